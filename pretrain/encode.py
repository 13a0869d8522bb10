"""Features of any readable recording: ``dreamscale encode ENCODER RECORDING -o OUT.npz``."""

from __future__ import annotations

import dataclasses
import json
import sys
import uuid
from pathlib import Path
from typing import Literal

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Write the tokens of a recording's windows."""

    encoder: str
    """Encoder package: a directory, or a name on the Hugging Face hub."""
    recording: str
    """Any file that sharding reads."""
    output: str
    """File to write, .npz: tokens [windows, tokens, width], pooled [windows, width], times [windows], report."""
    line_freq: float | None = None
    """Mains frequency in Hz, 40 to 70; found in the recording by default."""
    unit_factor: float | None = None
    """Factor to true volts, where the recording's unit is wrong."""
    batch_size: int = 64
    """Windows encoded at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""

    def __post_init__(self) -> None:
        from pretrain.encoder.recording import check_numbers

        check_numbers(unit_factor=self.unit_factor, line_freq=self.line_freq)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not self.output.endswith(".npz"):
            raise ValueError(f"output is '{self.output}'; its name must end in .npz")


def encode(config: EncodeConfig) -> int:
    """Encode a recording.

    Parameters
    ----------
    config : EncodeConfig
        The request.

    Returns
    -------
    int
        0.

    Raises
    ------
    RequestError
        If the package or the recording cannot be used.
    """
    import numpy as np

    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.encoder.recording import open_recording
    from pretrain.runs.distributed import choose_device

    device = choose_device(config.device)
    recording = open_recording(config.recording)
    encoder = EEGEncoder.from_pretrained(config.encoder).to(device)
    try:
        found = encoder.encode(
            recording,
            line_freq=config.line_freq,
            unit_factor=config.unit_factor,
            batch_size=config.batch_size,
        )
    except RequestError as error:
        raise RequestError(f"{config.recording}: {error}") from None
    output = Path(config.output)
    # Written beside and renamed: a file that is there is whole.
    partial = output.with_name(f".{output.stem}.{uuid.uuid4().hex[:8]}.npz")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            partial,
            tokens=found.tokens,
            pooled=found.pooled,
            times=found.times,
            report=np.array(json.dumps(dataclasses.asdict(found.report))),
        )
        partial.replace(output)
    except OSError as error:
        raise RequestError(f"{output}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)
    print(f"{found.report}\ndreamscale encode: {found.tokens.shape} tokens in {output}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Encode from the command line.

    Parameters
    ----------
    argv : list of str, optional
        ``ENCODER RECORDING -o OUT.npz [--key value ...]``.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(
        lambda words: encode(
            parse_config(
                EncodeConfig,
                words,
                prog="dreamscale encode",
                positionals=("encoder", "recording"),
                aliases={"-o": "output"},
            )
        ),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
