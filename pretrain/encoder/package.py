"""Write and read the files of an encoder package.

A package is a directory:

=====================  ==============================================================================
``config.json``        kind and schema of the package, architecture of the encoder, its origin
``preprocess.json``    the preprocessing of the pretraining, `PreprocessSpec`
``model.safetensors``  the weights, float32
``example.npz``        an input, the encoder's output for it, and the tolerance of the self-check
``model_card.md``      a description of the encoder for its users
``encoder.pt2``        optional: the encoder as a program that needs PyTorch only
=====================  ==============================================================================

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.files import atomic_directory, atomic_write_text, read_json, write_json
from data_sharding.common.typed_values import check_fields
from data_sharding.common.untrusted import MAX_WINDOW, check_count, check_group, check_positions, open_npz
from data_sharding.dataset.samples import N_PADDED
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.model.build import count_parameters
from pretrain.model.config import EncoderConfig
from pretrain.model.weights import MAX_TABLE, WEIGHTS, save_weights

KIND = "dreamscale_eeg_encoder"
SCHEMA = 1
CONFIG, SPEC, EXAMPLE, CARD = "config.json", "preprocess.json", "example.npz", "model_card.md"
PROGRAM = "encoder.pt2"
# Largest allowed difference between the stored output and a new output for the same input. The last layer norm gives
# output values of about 1 in size. Outputs computed on two kinds of CPU differ by about 1e-5, so a difference above
# 2e-3 shows that the weights are wrong.
TOLERANCE = 2e-3
MAX_TOLERANCE = 0.1
"""Largest tolerance that an encoder package may state."""
MAX_TOKENS = 2**16
"""Largest number of tokens in a window. The work of attention grows with the square of the number of tokens."""
_EXAMPLE_INPUTS = ("x", "positions", "count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageContents:
    """The content of an encoder package except the weights; the weights are read separately."""

    folder: Path
    """Directory of the package."""
    config: EncoderConfig
    """Architecture of the encoder."""
    spec: PreprocessSpec
    """Preprocessing that was used in the pretraining."""
    n_chans: int | None
    """Number of channels of the windows that `EEGEncoder.forward` gets."""
    n_outputs: int | None
    """Number of classes of the head; None or 0 if there is no head."""
    positions_C3: Tensor | None
    """Electrode positions in metres that are stored with the encoder; NaN for an unknown position."""
    extra: dict[str, Any]
    """Information on the origin of the encoder, e.g. ``aligned`` if it was fine-tuned to match image embeddings."""


def check_output(path: str | Path) -> Path:
    """Raise an error if writing a package to a path would replace files that are not an encoder package.

    Parameters
    ----------
    path : str or Path
        Directory to which a package is to be written.

    Returns
    -------
    Path
        The directory `path`.

    Raises
    ------
    RequestError
        If the path is a file, or a directory that is neither empty nor an encoder package.
    """
    output = Path(path)
    if output.exists() and not (output / CONFIG).is_file() and (output.is_file() or any(output.iterdir())):
        raise RequestError(f"{output}: exists already and is not an encoder package; choose another place")
    return output


def write_package(
    path: str | Path, model: Any, positions_C3: Tensor | None, *, card: str | None, program: bool, extra: dict[str, Any]
) -> None:
    """Write an encoder package, either completely or not at all.

    Parameters
    ----------
    path : str or Path
        Directory to write; an existing package is replaced.
    model : EEGEncoder
        The encoder, on the CPU, in float32 and in evaluation mode.
    positions_C3 : Tensor, [C, 3], or None
        Electrode positions to store with the encoder.
    card : str or None
        Text of the model card; a short text if None.
    program : bool
        Whether to write `encoder.pt2` too, a program that needs only PyTorch to run.
    extra : dict
        Information about the encoder's origin, to store in `config.json`.

    Raises
    ------
    RequestError
        If the encoder's output holds NaN or infinite values, or if the directory cannot be written. Then no package is
        written.
    """
    example = _make_example(model)
    with torch.no_grad():
        output = model(*example)
    if not output.isfinite().all():
        raise RequestError(f"{path}: not written, because the encoder's output holds NaN or infinite values")
    with _named_fault(path), atomic_directory(path) as folder:
        save_weights(model.state_dict(), folder / WEIGHTS)
        write_json(folder / SPEC, model.spec.to_dict())
        write_json(
            folder / CONFIG,
            {
                "kind": KIND,
                "schema": SCHEMA,
                "encoder": dataclasses.asdict(model.config),
                "n_chans": model.n_chans,
                "n_outputs": model.n_outputs,
                "positions": None if positions_C3 is None else _to_lists(positions_C3),
                "parameters": count_parameters(model),
                "versions": {"torch": torch.__version__, "dreamscale": _own_version()},
                "extra": extra,
            },
        )
        arrays = dict(zip(_EXAMPLE_INPUTS, (value.numpy() for value in example), strict=False))
        np.savez(folder / EXAMPLE, **arrays, y=output.numpy(), tolerance=np.float64(TOLERANCE))
        atomic_write_text(folder / CARD, card or f"# EEG encoder\n\n{model.config}\n\n{model.spec}\n")
        if program:
            export_program(model, folder / PROGRAM)


@contextlib.contextmanager
def _named_fault(path: str | Path) -> Iterator[None]:
    """Turn an OSError in the ``with`` block into an error with a message of one line that names the package."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from None


def read_package(path_or_hub_id: str | Path) -> PackageContents:
    """Read the description of an encoder from its package, without the weights.

    Parameters
    ----------
    path_or_hub_id : str or Path
        Directory of the package, or its name on the Hugging Face hub (``user/name``).

    Returns
    -------
    PackageContents
        Architecture, preprocessing and settings of the encoder.

    Raises
    ------
    RequestError
        If there is no such package, or if one of the package's JSON files is missing or damaged.
    """
    folder = _find_folder(path_or_hub_id)
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise RequestError(f"{folder / CONFIG}: not the config of a Dreamscale encoder package")
    if values.get("schema") != SCHEMA:
        raise RequestError(
            f"{folder / CONFIG}: the package has schema {show(values.get('schema'))}, but this version of Dreamscale "
            f"reads schema {SCHEMA}; export the encoder again with this version"
        )
    where = str(folder / CONFIG)
    try:
        config = EncoderConfig(**check_fields(EncoderConfig, values.get("encoder"), f"{where}, encoder", least=0))
        check_count(config.channels * config.samples, where, "channels x samples", most=N_PADDED * MAX_WINDOW)
        check_count(config.tokens * config.token_rows(), where, "tokens of a window", most=MAX_TOKENS)
        check_count(config.tokens * config.dim, where, "tokens x dim", most=MAX_TABLE)
        for name in ("n_chans", "n_outputs"):
            if values.get(name) is not None:
                check_count(values[name], where, name, most=2**31)
        return PackageContents(
            folder=folder,
            config=config,
            spec=PreprocessSpec.from_dict(read_json(folder / SPEC), str(folder / SPEC)),
            n_chans=values.get("n_chans"),
            n_outputs=values.get("n_outputs"),
            positions_C3=_from_lists(values["positions"], where) if values.get("positions") else None,
            extra=check_group(values.get("extra") or {}, where, "extra"),
        )
    except RequestError:
        raise
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damage_error(folder, error) from None


def damage_error(folder: Path, error: Exception) -> RequestError:
    """Return an error that says that the JSON files of a package do not describe an encoder; the caller raises it."""
    return RequestError(f"{folder}: {CONFIG} or {SPEC} is damaged ({error}); export the encoder again")


def check_example(model: Any, folder: Path) -> None:
    """Check that an encoder computes the output that was stored when its package was written.

    Parameters
    ----------
    model : EEGEncoder
        The encoder with the weights of the package, on the CPU.
    folder : Path
        Directory of the package.

    Raises
    ------
    RequestError
        If the example is missing or damaged, or if the output differs from the stored output by more than the
        tolerance.
    """
    path = folder / EXAMPLE
    if not path.is_file():
        raise RequestError(f"{path}: no such file, so the package is not complete; export the encoder again")
    try:
        with open_npz(path) as example:
            inputs = [torch.from_numpy(example[name]) for name in _EXAMPLE_INPUTS if name in example]
            y, tolerance = example["y"], float(example["tolerance"])
        rows, times = inputs[0].shape[-2:]
        if inputs[0].shape[0] != 1 or rows > model.config.channels or times != model.config.samples:
            raise ValueError(f"its input has the shape {tuple(inputs[0].shape)}")
        if not 0 < tolerance <= MAX_TOLERANCE:
            raise ValueError(f"its tolerance is {tolerance}")
        with torch.no_grad():
            error = float(np.abs(model(*inputs).numpy() - y).max())
    except Exception as problem:
        # Catch all errors: for a damaged archive, zipfile, zlib, NumPy and PyTorch each raise errors of their own
        # types.
        why = f"{type(problem).__name__}: {one_line(problem)[:200]}"
        raise RequestError(f"{path}: damaged ({why}); export the encoder again") from None
    if not error <= tolerance:
        raise RequestError(
            f"{path}: the encoder's output differs from the stored output by {error:.3g} (allowed {tolerance:g}), so "
            "weights and config do not belong together; export the encoder again"
        )


def export_program(model: Any, path: Path) -> None:
    """Write an encoder as a program that PyTorch runs without this project.

    Parameters
    ----------
    model : EEGEncoder
        The encoder, on the CPU, in evaluation mode.
    path : Path
        File to write, `.pt2`.

    Notes
    -----
    ``torch.export.load(path).module()(x_BCT)`` runs the program on any number of windows with 128 channels, in model
    units. With the montage tokenizer, the arguments are ``(x_BCT, positions_BC3, count_B)``: windows with 1 to 128
    rows, electrode positions in metres (NaN for an unknown position), and the number of recorded channels of each
    window.
    """
    example = tuple(value.repeat(2, *[1] * (value.ndim - 1)) for value in _make_example(model))
    batch = torch.export.Dim("batch", min=1)
    rows = {1: torch.export.Dim("channels", min=1, max=model.config.channels)} if len(example) > 1 else {}
    dynamic = ({0: batch, **rows}, {0: batch, **rows}, {0: batch})[: len(example)]
    program = torch.export.export(model, example, dynamic_shapes=dynamic)
    torch.export.save(program, path)


def _make_example(model: Any) -> tuple[Tensor, ...]:
    """Compute an artificial input for the self-check, so that an encoder package never contains a real recording."""
    config: EncoderConfig = model.config
    time_T = torch.arange(config.samples, dtype=torch.float64) / config.samples
    channel_C1 = torch.arange(config.channels, dtype=torch.float64)[:, None]
    waves_CT = torch.sin(2 * math.pi * (3 + channel_C1 % 17) * time_T + channel_C1) + 0.5 * torch.cos(
        2 * math.pi * (1 + channel_C1 % 5) * time_T
    )
    # The artificial electrodes lie on a spiral on a sphere as large as a head. In this artificial input, every fifth
    # electrode has an unknown position.
    turns = torch.arange(config.channels, dtype=torch.float64)
    height = 1 - turns / config.channels
    around = (1 - height**2).sqrt()
    sphere_C3 = 0.095 * torch.stack([around * (2.4 * turns).cos(), around * (2.4 * turns).sin(), height], dim=1)
    places = [None if i % 5 == 4 else place for i, place in enumerate(sphere_C3.tolist())]
    electrodes = model.backbone.electrode_inputs([{"n": config.channels, "positions": places}])
    if "count_B" in electrodes:
        # The last quarter of the rows is padding, so that the self-check covers padding too.
        electrodes["count_B"] = torch.tensor([max(1, config.channels * 3 // 4)])
    return waves_CT.float()[None], *electrodes.values()


def _to_lists(positions_C3: Tensor) -> list[list[float] | None]:
    return [place if all(map(math.isfinite, place)) else None for place in positions_C3.tolist()]


def _from_lists(lists: Any, where: str) -> Tensor:
    """Convert lists of electrode positions, made by `_to_lists`, back to a tensor."""
    if len(check_positions(lists, where)) > N_PADDED:
        raise RequestError(
            f"{where}: has {len(lists)} electrode positions; an encoder takes at most {N_PADDED} channels"
        )
    return torch.tensor([place or [math.nan] * 3 for place in lists])


def _find_folder(path_or_hub_id: str | Path) -> Path:
    """Return the directory of a package; download the package if it is on the Hugging Face hub."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise RequestError(
                f"{path}: the folder has no {CONFIG}, so it is not an encoder package; write a package with "
                "'dreamscale export'"
            )
        return path
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path_or_hub_id)) or path.exists():
        raise RequestError(f"{path}: no such encoder package; write a package with 'dreamscale export'")
    import huggingface_hub

    try:
        # Download only the files that this list names. Other files, such as the program `encoder.pt2`, are not needed
        # here.
        wanted = [CONFIG, SPEC, EXAMPLE, CARD, "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(str(path_or_hub_id), allow_patterns=wanted))
    except Exception as error:
        raise RequestError(
            f"{path_or_hub_id}: no such directory, and the Hugging Face hub has no such package or cannot be reached "
            f"({type(error).__name__}); give the folder of an encoder package, or the id of a package on the hub"
        ) from None


def _own_version() -> str:
    try:
        return importlib.metadata.version("dreamscale")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
