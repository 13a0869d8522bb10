"""Write weights as safetensors files, and read them with a strict check of names and shapes.

A config from a file is checked before a network is built from it: the network may not be larger than its weights file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from data_sharding.common.errors import RequestError, show

WEIGHTS = "model.safetensors"
"""Name of the file with the weights in a checkpoint, an encoder package or another saved model."""


MAX_TABLE = 2**26
"""Largest number of values in all tables, such as fixed position embeddings, that a network computes when it is
built."""
# A network may have 64 tensors and 2**22 values more than its weights file. If only a few weights are missing from the
# file, the network is then still built, and the later check of names can say which weights are missing.
_MORE_TENSORS, _MORE_VALUES = 64, 2**22


@dataclass(frozen=True)
class WeightsSize:
    """Size of the weights in a file."""

    tensors: int
    """Number of tensors."""
    values: int
    """Number of values of all tensors."""


def measure_weights(paths: Iterable[Path], prefix: str = "") -> WeightsSize:
    """Return the size of the weights in safetensors files; only the headers of the files are read.

    Parameters
    ----------
    paths : iterable of Path
        The safetensors files.
    prefix : str
        Only weights whose name begins with this text are counted.

    Raises
    ------
    RequestError
        If a file is missing or damaged. The size in a header can be trusted, because the library safetensors refuses a
        header that claims more bytes than the file has.
    """
    from safetensors import SafetensorError, safe_open

    shapes: list[list[int]] = []
    for path in paths:
        if not path.is_file():
            raise RequestError(f"{path}: no such file, so {path.parent} is not complete; make or copy it again")
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118, not a dictionary
                shapes += [file.get_slice(name).get_shape() for name in names]
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{path}: damaged ({show(error)}); make or copy {path.parent} again") from None
    return WeightsSize(len(shapes), sum(map(math.prod, shapes)))


class _TooLargeError(Exception):
    """Raised while a network is built, as soon as it is larger than its weights file."""


def check_network(build: Callable[[], Any], size: WeightsSize, where: str | Path) -> None:
    """Check that a network that a config describes is not larger than its weights file.

    The network is built without memory (on PyTorch's meta device), and the building stops as soon as the network has
    clearly more parameters than the weights file. A damaged or changed config therefore cannot make the code build a
    network that is much larger than its weights file.

    Parameters
    ----------
    build : callable
        Function that builds the network, or several networks, whose sizes are then added.
    size : WeightsSize
        Size of the weights file.
    where : str or Path
        Path of the config that describes the network, for the error message.

    Raises
    ------
    RequestError
        If the network is larger than the weights, or if it cannot be built.
    """
    # While the network is built, the hooks below add each tensor under its `id()`, so that a tensor is counted once.
    # The dicts keep a reference to each tensor, because Python may give the id of a deleted tensor to a new tensor.
    parameters: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    totals = {"parameters": 0, "buffers": 0}

    def count(kind: str, seen: dict[int, Tensor], most_tensors: float, most_values: int, value: Tensor | None) -> None:
        if value is None or id(value) in seen:
            return
        seen[id(value)] = value
        totals[kind] += value.numel()
        if len(seen) > most_tensors or totals[kind] > most_values:
            raise _TooLargeError

    hooks = (
        register_module_parameter_registration_hook(
            lambda _module, _name, value: count(
                "parameters", parameters, size.tensors + _MORE_TENSORS, size.values + _MORE_VALUES, value
            )
        ),
        register_module_buffer_registration_hook(
            lambda _module, _name, value: count("buffers", buffers, math.inf, size.values + MAX_TABLE, value)
        ),
    )
    try:
        with torch.device("meta"):
            build()
    except _TooLargeError:
        raise RequestError(
            f"{where}: describes a network that is larger than its weights file ({size.tensors} tensors with "
            f"{size.values} values), so it is damaged or changed; get both files again from their source"
        ) from None
    except RequestError:
        raise
    # A config may have a wrong value of any kind, and libraries raise many types of errors for wrong values.
    except Exception as error:
        raise RequestError(
            f"{where}: describes no network that can be built ({type(error).__name__}: {show(error)}); get it again "
            "from its source"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()


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
    # The library safetensors lets only the owner read the file, so give the file the permissions of its folder.
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
        Name of the config that describes the model's architecture, for error messages.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or its names or shapes differ from the model's.
    """
    set_weights(model, read_tensors(path), path, config)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict of str to Tensor
        The tensors by name.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or if the path is not a regular file. (For a named pipe, the library would
        wait without end.)
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RequestError(f"{path}: no such file, so {path.parent} is not complete; make or copy it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: damaged ({show(error)}); make or copy {path.parent} again") from None


def _kind_of(value: Tensor) -> str:
    return "float" if value.is_floating_point() else "complex" if value.is_complex() else "integer"


def set_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, config: str) -> None:
    """Set the weights of a model; their names and shapes must be exactly those of the model.

    Parameters
    ----------
    model : nn.Module
        The model.
    weights : dict of str to Tensor
        The weights by name.
    path, config : Path and str
        File of the weights, and name of the config that describes the model's architecture; both for error messages.

    Raises
    ------
    RequestError
        If names or shapes differ from the model's, or if a weight has another kind of number (float, complex or
        integer).
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    both = sorted(expected.keys() & weights.keys())
    wrong = [name for name in both if expected[name].shape != weights[name].shape]
    numbers = [name for name in both if _kind_of(expected[name]) != _kind_of(weights[name])]
    if missing or unknown or wrong or numbers:
        parts = [
            f"{what} {', '.join(map(show, names[:3]))}{' ...' if len(names) > 3 else ''}"
            for what, names in (
                ("missing", missing),
                ("unknown", unknown),
                ("of another shape", wrong),
                ("of another type", numbers),
            )
            if names
        ]
        raise RequestError(f"{path}: the weights do not fit {config}: {'; '.join(parts)}")
    model.load_state_dict(weights)
