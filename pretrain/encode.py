"""Compute the features of a recording: ``dreamscale encode ENCODER RECORDING -o OUT.npz``."""

from __future__ import annotations

import dataclasses
import json
import sys
import uuid
from pathlib import Path
from typing import Literal

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode the windows of a recording and write their tokens to a file."""

    encoder: str
    """Directory of the encoder package, or the package's name on the Hugging Face hub."""
    recording: str
    """Path of a recording, in any format that 'dreamscale shard' reads."""
    output: str
    """File to which the features are written; its name must end in .npz. The file contains the arrays tokens [windows,
    tokens, width], pooled [windows, width] and times [windows], and a report."""
    line_freq: float | None = None
    """Mains frequency in Hz, from 40 to 70. By default the mains frequency is detected in the recording."""
    unit_factor: float | None = None
    """Factor that converts the recording's values to volts, if the recording states a wrong unit."""
    batch_size: int = 64
    """Number of windows to encode in one forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the computation. auto: a GPU if there is a GPU, otherwise the CPU."""

    def __post_init__(self) -> None:
        from pretrain.encoder.recording import check_numbers

        check_numbers(unit_factor=self.unit_factor, line_freq=self.line_freq)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not self.output.endswith(".npz"):
            raise ValueError(f"output is '{self.output}'; its name must end in .npz")


def encode(config: EncodeConfig) -> int:
    """Encode a recording and write its features.

    Parameters
    ----------
    config : EncodeConfig
        Config of the command.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    RequestError
        If the encoder package or the recording cannot be used, or if the output cannot be written.
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
    # Write to a file with a temporary name and then rename it, so that a file with the name `output` is always
    # complete.
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
        raise RequestError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    finally:
        partial.unlink(missing_ok=True)
    windows, tokens, width = found.tokens.shape
    print(
        f"{found.report}\ndreamscale encode: {windows} windows x {tokens} tokens x {width} values in {output}; next: "
        f"numpy.load('{output}')['pooled'] in Python"
    )
    return EXIT_DONE


main = command(
    EncodeConfig, encode, prog="dreamscale encode", positionals=("encoder", "recording"), aliases={"-o": "output"}
)

if __name__ == "__main__":
    sys.exit(main())
