"""Read the weights of frozen networks from files of other people, without running code from the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import sha256_file
from data_sharding.corpora.safe_pickle import RefusedPickle, load_npy, load_torch

MAX_BYTES = 2**31
"""Largest size in bytes of a file of weights."""
COUNTERS = "num_batches_tracked"
"""Last part of the name of a counter that batch norms store, but do not use after the training."""


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read the named arrays of a file of weights.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file, a ``.pth`` or ``.pt`` file of `torch.save`, or a ``.ckpt`` file with a pickled
        dictionary of arrays. The restricted reader of `data_sharding.corpora.safe_pickle` reads pickles.

    Returns
    -------
    dict
        Maps the name of each array to its values. Names of nested dictionaries are joined by ``/``.

    Raises
    ------
    RequestError
        If the file is missing, too large, damaged, of another kind, or holds anything except named arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such file of weights; give the path of a file that exists")
    if path.stat().st_size > MAX_BYTES:
        raise RequestError(f"{path}: larger than {MAX_BYTES} bytes, which no known network needs; give another file")
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": _read_safetensors, ".pth": load_torch, ".pt": load_torch, ".ckpt": load_npy,
    }  # fmt: skip
    if path.suffix not in readers:
        raise RequestError(f"{path}: weights are read only from {', '.join(readers)} files; give another file")
    try:
        content = readers[path.suffix](path)
    except RefusedPickle as error:
        raise RequestError(f"{path}: {error}; give a file that holds only weights") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None
    arrays: dict[str, np.ndarray] = {}
    _collect(content, "", path, arrays)
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: not a safetensors file ({show(error)}); get the file again") from None


def _collect(content: Any, name: str, path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Add the arrays of nested dictionaries to `arrays`."""
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiu":
        arrays[name] = content
    elif isinstance(content, dict) and all(isinstance(key, str) for key in content):
        for key, value in content.items():
            _collect(value, f"{name}/{key}" if name else key, path, arrays)
    else:
        raise RequestError(
            f"{path}: '{show(name)}' is a {type(content).__name__}, not an array; give a file that holds only weights"
        )


def fill_network(network: nn.Module, arrays: Mapping[str, np.ndarray], path: str | Path) -> nn.Module:
    """Copy arrays into a network, after a check of every name, shape and value.

    Parameters
    ----------
    network : Module
        The network to fill.
    arrays : mapping of str to ndarray
        Maps the name of each tensor in the network's state dict to its values. The counters of batch norms may be
        missing.
    path : str or Path
        File of the arrays, for error messages.

    Returns
    -------
    Module
        The same network, in evaluation mode and without gradients.

    Raises
    ------
    RequestError
        If a name is missing or unknown, a shape differs, or a value is NaN or infinite.
    """
    state = network.state_dict()
    wanted = {name: value for name, value in state.items() if not name.endswith(COUNTERS)}
    given = {name: value for name, value in arrays.items() if not name.endswith(COUNTERS)}
    advice = f"give a file of weights of {type(network).__name__}"
    for names, what in ((wanted.keys() - given.keys(), "has no"), (given.keys() - wanted.keys(), "has an unknown")):
        if names:
            raise RequestError(f"{path}: {what} '{show(min(names))}' and {len(names) - 1} others; {advice}")
    for name, target in wanted.items():
        values = given[name]
        if tuple(values.shape) != tuple(target.shape):
            raise RequestError(
                f"{path}: '{name}' has the shape {values.shape} in place of {tuple(target.shape)}; {advice}"
            )
        if not np.isfinite(values).all():
            raise RequestError(f"{path}: '{name}' holds NaN or infinity; {advice}")
        target.copy_(torch.from_numpy(np.array(values, np.float32)))
    return network.requires_grad_(False).eval()


def check_digest(path: str | Path, sha256: str, package: str) -> None:
    """Check that a file of an installed package is the published file.

    Raises
    ------
    RequestError
        If the checksum of the file is not the checksum of the published file.
    """
    found = sha256_file(path)
    if found != sha256:
        raise RequestError(
            f"{path}: the sha256 is {found}, but the published file has {sha256}; install {package} again"
        )
