"""Tests that pickles of plain data are read, and that all other pickles are refused."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sharding.corpora.safe_pickle import RefusedPickle, load_npy, load_torch

RNG = np.random.default_rng(0)


class Calls:
    """An object whose pickle calls a function when the pickle is loaded without protection."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        if a.dtype.hasobject:
            return a.shape == b.shape and same(a.ravel().tolist(), b.ravel().tolist())
        return a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b) and type(a) is type(b)


DATA = {
    "big": RNG.normal(size=(40, 3, 1000)),
    "fortran": np.asfortranarray(RNG.normal(size=(300, 200)).astype(np.float32)),
    "small": np.arange(5, dtype=np.int16),
    "big-endian": np.arange(5, dtype=">i4"),
    "names": ["Fz", "Cz"],
    "text": np.array(["a", "bcd"]),
    "objects": np.array([{"x": 1}, [np.arange(3)], None], dtype=object),
    "numbers": (np.float64(2.5), np.int64(3), 1, 2.0, True, None, "word", b"bytes"),
    "order": OrderedDict(a=1),
    "set": {1, 2},
    ("a", 1): frozenset({b"x", None}),
    "empty": np.zeros((0, 3)),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_of_arrays_come_back(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(DATA, protocol=protocol))
    back = load_npy(tmp_path / "bare.npy")
    assert same(DATA, back)


def test_npy_with_a_dictionary_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DATA)  # type: ignore[arg-type]
    back = load_npy(tmp_path / "a.npy")
    assert same(DATA, back)
    # The array 'big' must be a view of the file's content, not a copy in memory.
    assert not back["big"].flags.owndata and not back["big"].flags.writeable
    np.save(tmp_path / "b.npy", DATA["big"])
    assert np.array_equal(load_npy(tmp_path / "b.npy"), DATA["big"])


def test_an_array_stored_twice_is_loaded_once(tmp_path: Path) -> None:
    x = np.arange(10.0)
    np.save(tmp_path / "a.npy", {"a": x, "b": [x]})  # type: ignore[arg-type]
    back = load_npy(tmp_path / "a.npy")
    assert back["a"] is back["b"][0]


HOSTILE = {
    "os.system": (Calls(os.system, "touch {}"), "posix.system"),
    "eval": (Calls(builtins.eval, "open({!r}, 'w')"), "(builtins|__builtin__).eval"),
    "getattr": (Calls(getattr, "x", "upper"), "(builtins|__builtin__).getattr"),
    "bytearray": (Calls(bytearray, 10), "(builtins|__builtin__).bytearray"),
    "in a dictionary": ({"eeg": [Calls(os.system, "touch {}")]}, "posix.system"),
    "in an array of objects": (np.array([Calls(os.system, "touch {}"), 1], dtype=object), "posix.system"),
    "a class": (Path, "pathlib"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    thing, word = HOSTILE[name]
    trace = tmp_path / "trace"
    for call in [thing, *(thing["eeg"] if isinstance(thing, dict) else []), *np.atleast_1d(np.array(thing, object))]:
        if isinstance(call, Calls):
            function, arguments = call.call
            call.call = (function, tuple(a.format(str(trace)) if isinstance(a, str) else a for a in arguments))
    np.save(tmp_path / "a.npy", thing, allow_pickle=True)  # type: ignore[arg-type]
    torch.save({"dataset": thing}, tmp_path / "a.pth")
    torch.save({"dataset": thing}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    for load, file in ((load_npy, "a.npy"), (load_torch, "a.pth"), (load_torch, "b.pth")):
        with pytest.raises(RefusedPickle, match=f"refused: it asks for {word}"):
            load(tmp_path / file)
    assert not trace.exists()


def op(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


BROKEN = {
    "promises bytes": op(b"\x8e" + struct.pack("<Q", 1 << 50)),
    "promises text": op(b"\x8d" + struct.pack("<Q", 1 << 50)),
    "promises a frame": op(b"\x95" + struct.pack("<Q", 1 << 60)),
    "promises a buffer": op(b"\x96" + struct.pack("<Q", 1 << 40)),
    "a long number": op(b"\x8b" + struct.pack("<i", 1 << 30)),
    "new object": op(glob("collections", "OrderedDict"), b")\x81"),
    "old instance": op(b"(icollections\nOrderedDict\n"),
    "extension": op(b"\x82\x01"),
    "sets attributes of a class": op(glob("numpy", "ndarray"), b"}\x8c\x01xK\x01sb"),
    "sets an attribute of a dictionary": op(glob("collections", "OrderedDict"), b")R}\x8c\x01xK\x01sb"),
    "persistent": op(b"\x8c\x01xQ"),
    "a function as a value": op(glob("_codecs", "encode")),
    "a function as a key": op(b"}" + glob("_codecs", "encode") + b"K\x01s"),
    "a class in a set": op(b"\x8f(" + glob("numpy", "ndarray") + b"\x90"),
    "calls text": op(b"\x8c\x01x)R"),
    "pops nothing": op(b"0"),
    "no end": b"\x80\x04}",
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
    "deep": op(b"]" * 50_000 + b"a" * 49_999),
    "shape is a lie": op(
        glob("numpy.core.numeric", "_frombuffer"),
        b"(C\x04abcd" + glob("numpy", "dtype") + b"\x8c\x02f4\x85RJ\xff\xff\xff\x7f\x85\x8c\x01CtR",
    ),
    # The pickle 'amplifies' copies a text of 60 kB 60,000 times, so its result would need 3.6 GB of memory.
    "amplifies": op(
        b"X" + struct.pack("<I", 60_000) + b"a" * 60_000 + b"q\x00(",
        (glob("_codecs", "encode") + b"h\x00\x85R") * 60_000,
        b"t",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(BROKEN[name])
    with pytest.raises((RefusedPickle, OSError, ValueError)) as caught:
        load_npy(path)
    assert isinstance(caught.value, RefusedPickle) and "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_a_network_are_read_without_the_versions_of_its_layers(tmp_path: Path, zipped: bool) -> None:
    network = torch.nn.Linear(2, 3)
    torch.save(network.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = load_torch(tmp_path / "a.pth")
    assert list(found) == ["weight", "bias"]
    np.testing.assert_array_equal(found["weight"], network.weight.detach().numpy())


@given(st.binary(min_size=1, max_size=8), st.integers(0, 10_000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_and_do_no_harm(tmp_path_factory, patch: bytes, at: int, cut: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": [1, "x"]}, buffer, _use_new_zipfile_serialization=False)
    whole = bytearray(buffer.getvalue())
    at %= len(whole)
    whole[at : at + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(bytes(whole[: at + 1] if cut else whole))
    try:
        load_torch(path)
    except RefusedPickle as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("numpy_label", [True, False])
def test_torch_files_old_and_new(tmp_path: Path, new: bool, numpy_label: bool) -> None:
    base = torch.arange(24, dtype=torch.float32)
    data = {
        "dataset": [{"eeg": base.reshape(4, 6).T, "label": np.int64(3) if numpy_label else 3}],
        "half": base[2:5].half(),
        "shared": base,
        "labels": ["n01", "n02"],
    }
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    back = load_torch(tmp_path / "a.pth")
    assert np.array_equal(np.asarray(back["dataset"][0]["eeg"]), base.reshape(4, 6).T.numpy())
    assert np.array_equal(np.asarray(back["half"]), [2, 3, 4]) and np.asarray(back["half"]).dtype == np.float16
    assert int(back["dataset"][0]["label"]) == 3 and back["labels"] == ["n01", "n02"]


def test_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4).expand(10_000, 4)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(RefusedPickle, match="beyond its storage"):
        load_torch(tmp_path / "a.pth")
