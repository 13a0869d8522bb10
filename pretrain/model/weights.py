"""Write weights as safetensors files, and read them with a strict check of names and shapes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from data_sharding.common.errors import RequestError

WEIGHTS = "model.safetensors"
"""Name of the file with the weights in a checkpoint, an encoder package or another saved model."""


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as a safetensors file. The file gets the permissions of its folder.

    Parameters
    ----------
    weights : dict of str to Tensor
        Weights to write; all tensors must be on the CPU.
    path : Path
        File to write.
    """
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    # The library safetensors lets only the owner read the file. Give the file the permissions of its folder instead.
    path.chmod(path.parent.stat().st_mode & 0o666)


def load_strictly(model: nn.Module, path: Path, config: str = "config.json") -> None:
    """Load weights into a model; names and shapes of the weights must be exactly those of the model.

    Parameters
    ----------
    model : nn.Module
        The model.
    path : Path
        The safetensors file.
    config : str
        Name of the config that gave the model its shape, for error messages.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or its names or shapes differ from the model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RequestError(f"{path}: no such file, so {path.parent} is not complete; write {path.parent} again")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: damaged ({error}); write {path.parent} again") from None
    set_weights(model, weights, path, config)


def set_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, config: str) -> None:
    """Set the weights of a model; their names and shapes must be exactly those of the model.

    Parameters
    ----------
    model : nn.Module
        The model.
    weights : dict of str to Tensor
        Tensor for each name of a weight.
    path, config : Path and str
        File of the weights, and name of the config that gave the model its shape; both for error messages.

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
