"""Weights on disk: safetensors, read back strictly."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from data_sharding.common.errors import RequestError

WEIGHTS = "model.safetensors"
"""File of a checkpoint, an encoder package or a model that holds the weights."""


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as safetensors, readable for whom the folder is.

    Parameters
    ----------
    weights : dict of str to Tensor
        On the processor.
    path : Path
        File to write.
    """
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    # safetensors writes for the owner alone; a package is for others too, as far as the folder lets them in.
    path.chmod(path.parent.stat().st_mode & 0o666)


def load_strictly(model: nn.Module, path: Path, config: str = "config.json") -> None:
    """Load a file of weights, every one of them and no other.

    Parameters
    ----------
    model : nn.Module
        The model.
    path : Path
        safetensors file.
    config : str
        Name of the file that describes the model's shape, for messages.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or its names or shapes differ from the model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RequestError(f"{path}: no such file, so what it belongs to is not complete; write it again")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: damaged ({error}); write it again") from None
    set_weights(model, weights, path, config)


def set_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, config: str) -> None:
    """Give a model its weights, every one of them and no other.

    Parameters
    ----------
    model : nn.Module
        The model.
    weights : dict of str to Tensor
        Weights by name.
    path, config : Path and str
        Where the weights come from, and the file that describes the model's shape, for messages.

    Raises
    ------
    RequestError
        If names or shapes differ from the model's.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape)
    if missing or unknown or wrong:
        parts = [
            f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise RequestError(f"{path}: the weights do not fit {config}: {'; '.join(parts)}")
    model.load_state_dict(weights)
