"""Reads pickled arrays, tensors and plain containers from untrusted files, without running any code in them.

Corpora of EEG and images are distributed as ``.pth`` files, or as ``.npy`` files that contain a pickled dictionary. A
pickle is a program, and Python's own unpickler runs this program. The reader in this module executes only the pickle
instructions that create data. A pickle can also ask for Python functions by name. For a few allowed names, the reader
calls its own functions; all other names raise an error. Large arrays are memory-mapped instead of read.

No existing library can read these files safely without copying large arrays. ``numpy.load`` loads a pickled dictionary
only if it may run the pickle, and ``torch.load(weights_only=True)`` has limits that are listed in `load_torch`.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_sharding.common.errors import show

MAP_BYTES = 1 << 16
"""Arrays of at least this many bytes are memory-mapped instead of read."""
MAX_INSTRUCTIONS = 20_000_000
"""Limit on the number of instructions in a pickle, because an instruction of one byte can create a large object."""
MAX_PARTS = 50_000_000
"""Limit on the number of values in the object that a pickle creates. Nested lists that each contain the next list twice
need little memory, but the length of their text and of their copies doubles with each level."""
MAX_KEY_PARTS = 64
"""Limit on the number of values in a dictionary key, because computing the hash of deeply nested tuples takes long."""
MAX_INT_KEY = 2**61 - 2
"""Largest integer that may be a key of a dictionary. Larger integers can be chosen so that all have the same hash, and
this would make the dictionary slow."""
PLAIN_KEYS = (str, bytes, int, float, complex, np.generic, type(None))
PLAIN_DTYPE = re.compile(r"[biufc]\d{1,2}|[US]\d{1,6}|O8?")
TORCH_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""Number at the beginning of each file that `torch.save` wrote before PyTorch 1.6."""
OPCODES = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE
BINUNICODE8 SHORT_BINUNICODE TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT
SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL
STACK_GLOBAL REDUCE BUILD BINPERSID
"""
"""Names of the allowed pickle instructions, as in the module `pickle`. A pickle of data needs no other instructions."""


class RefusedPickle(ValueError):
    """Error: a pickle contains something other than data, or is damaged."""


class _Blob:
    """Position and size, in the file, of bytes that will be memory-mapped instead of read."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size


class _DType:
    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not PLAIN_DTYPE.fullmatch(code):
            raise RefusedPickle(
                f"refused: it holds an array of the type {show(code)}; only plain numbers and text are allowed"
            )
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 8 or any(part is not None for part in state[2:5]):
            raise RefusedPickle("refused: it holds an array of records; only plain arrays are allowed")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Placeholder for an array. The pickle sets the shape and the content of the array in a later instruction."""

    state: tuple[Any, ...] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _DType):
            raise RefusedPickle("damaged: the content of an array is missing")
        self.state = state


class _Storage:
    def __init__(self, key: str, dtype: str, count: int) -> None:
        self.key, self.dtype, self.count = key, np.dtype(dtype), count
        self.start = -1


class _Tensor:
    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
        whole = (isinstance(v, int) and v >= 0 for v in (offset, *size, *stride))
        if not isinstance(storage, _Storage) or len(size) != len(stride) or not all(whole):
            raise RefusedPickle("damaged: a tensor has no valid shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # A tensor with stride 0 repeats one number, so without this check a small file could create a huge array.
        if math.prod(size) and (last >= storage.count or math.prod(size) > storage.count):
            raise RefusedPickle("damaged: a tensor reaches beyond its storage")
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)


class _File:
    """A binary file whose methods raise an error if fewer bytes remain in the file than are requested."""

    def __init__(self, stream: Any, size: int) -> None:
        self.stream, self.size = stream, size

    def read(self, n: int) -> bytes:
        if n < 0 or n > self.size - self.stream.tell():
            raise RefusedPickle("damaged: it ends too early, or states more bytes than it has")
        return self.stream.read(n)

    def readline(self) -> bytes:
        return self.stream.readline()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[:] = data
        return len(data)

    def skip(self, n: int) -> int:
        start = self.stream.tell()
        if n > self.size - start:
            raise RefusedPickle("damaged: it ends too early, or states more bytes than it has")
        self.stream.seek(n, io.SEEK_CUR)
        return start


def _instructions() -> dict[int, Callable[[Any], None]]:
    known: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
    numbers = [getattr(pickle, name)[0] for name in OPCODES.split()]
    return {number: known[number] for number in numbers}


class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Reads one pickle from the current position of a file."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _instructions()

    def __init__(self, file: _File) -> None:
        super().__init__(file, encoding="latin1")  # type: ignore[call-arg]
        self.file = file
        self.budget = 8 * file.size + (1 << 20)
        self.storages: dict[str, _Storage] = {}
        # For each tuple or frozenset that contains other tuples or frozensets: the object and its number of values, by
        # the `id` of the object. A reference to the object keeps it alive, so that no new object gets the same `id`.
        self.parts: dict[int, tuple[Any, int]] = {}
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): self._ordered,
            ("builtins", "set"): lambda values=(): set(self._check_keys(values)),
            ("builtins", "frozenset"): lambda values=(): self._count_parts(frozenset(self._check_keys(values))),
            ("_codecs", "encode"): self._encode,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _DType,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
        }
        for core in ("numpy.core", "numpy._core"):
            self.known[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
            self.known[f"{core}.multiarray", "scalar"] = self._scalar
            self.known[f"{core}.numeric", "_frombuffer"] = self._from_buffer
        # Pickles of old protocols have the module names of Python 2, and contain the call bytes() for an empty byte
        # string.
        for name in ("set", "frozenset"):
            self.known["__builtin__", name] = self.known["builtins", name]
        self.known["__builtin__", "bytes"] = lambda: b""

    def run(self) -> Any:
        """Return the object in the pickle, with placeholders in place of arrays and tensors."""
        try:
            return self.load()
        except RefusedPickle:
            raise
        except EOFError:
            raise RefusedPickle("damaged: it ends too early") from None
        except MemoryError:
            raise
        except Exception as error:
            raise RefusedPickle(f"damaged: {type(error).__name__}: {show(error)}") from None

    def load(self) -> Any:
        """Execute at most `MAX_INSTRUCTIONS` instructions. Raise an error for an instruction that is not allowed."""
        self._unframer = pickle._Unframer(self.file.read, self.file.readline)  # type: ignore[attr-defined]
        self.read, self.readinto, self.readline = self._unframer.read, self._unframer.readinto, self._unframer.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append, self.proto = self.stack.append, 0
        dispatch, read = self.dispatch, self.read
        for _ in range(MAX_INSTRUCTIONS):
            code = read(1)
            if not code:
                raise EOFError
            step = dispatch.get(code[0])
            if step is None:
                raise RefusedPickle(
                    f"refused: the instruction {code!r} creates objects of classes, which data do not need"
                )
            try:
                step(self)
            except pickle._Stop as stop:  # type: ignore[attr-defined]
                return stop.value
        raise RefusedPickle(f"refused: more than {MAX_INSTRUCTIONS} instructions")

    def find_class(self, module: str, name: str) -> Any:
        """Return this module's own function for a name in the pickle; raise an error for a name that is not allowed."""
        try:
            return self.known[module, name]
        except KeyError:
            raise RefusedPickle(
                f"refused: it asks for {show(module)}.{show(name)}; a file of data needs only arrays and plain "
                "containers"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage (values) of a tensor; `pid` contains the name that `torch.save` gave to this storage."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[4], int):
            raise RefusedPickle("refused: a reference to something outside the file")
        if pid[1] not in TORCH_DTYPES.values():
            raise RefusedPickle(f"refused: a tensor storage of the type {show(pid[1])}")
        if len(pid) > 5 and pid[5] is not None:
            raise RefusedPickle("refused: a view of a tensor storage, which only very old files have")
        if not isinstance(pid[2], str | int):
            raise RefusedPickle("damaged: a tensor storage has no name")
        return self.storages.setdefault(str(pid[2]), _Storage(str(pid[2]), pid[1], pid[4]))

    def spend(self, *values: Any) -> None:
        """Limit the total memory of new objects, because a pickle could copy a long text a million times."""
        self.budget -= 64 + sum(len(v) for v in values if hasattr(v, "__len__"))
        if self.budget < 0:
            raise RefusedPickle("refused: its content needs far more memory than the file has bytes")

    def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        entries: list[Any] = list(pairs)
        self._check_keys([key for key, _ in entries])
        return OrderedDict(entries)

    def _count_parts(self, value: Any) -> Any:
        """Count the values in a new tuple or frozenset, store the count if `value` is nested, and return `value`."""
        count = 1 + sum(self._parts_of(part) for part in value)
        if count > len(value) + 1:
            self.parts[id(value)] = value, min(count, 2 * MAX_PARTS)
        return value

    def _parts_of(self, value: Any) -> int:
        if type(value) not in (tuple, frozenset):
            return 1
        return self.parts[id(value)][1] if id(value) in self.parts else len(value) + 1

    def _check_keys(self, keys: Iterable[Any]) -> Iterable[Any]:
        """Refuse dictionary keys and set members whose hash would take long to compute."""
        keys = list(keys)
        for key in keys:
            if self._parts_of(key) > MAX_KEY_PARTS:
                raise RefusedPickle(f"refused: a key of more than {MAX_KEY_PARTS} parts")
            if isinstance(key, tuple | frozenset):
                self._check_keys(key)
            elif isinstance(key, int) and abs(key) > MAX_INT_KEY:
                raise RefusedPickle("refused: a key that is a very large number")
        return keys

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise RefusedPickle("refused: a text in another encoding than latin1")
        return text.encode("latin1")

    def _scalar(self, dtype: Any, data: Any = b"") -> Any:
        if not isinstance(dtype, _DType) or not isinstance(data, bytes) or dtype.dtype.hasobject:
            raise RefusedPickle("damaged: a number has no valid type")
        return np.frombuffer(data, dtype.dtype, count=1)[0]

    def _from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
        array = _Array()
        array.build((1, shape, dtype, order == "F", bytes(data) if isinstance(data, bytearray) else data))
        return array

    def load_reduce(self) -> None:
        """Execute the pickle instruction that calls a function. All functions on the stack belong to this module."""
        arguments, function = self.stack.pop(), self.stack[-1]
        if not callable(function) or not isinstance(arguments, tuple):
            raise RefusedPickle("damaged: it calls something that is not a function")
        self.spend(*arguments)
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        """Execute the pickle instruction that sets the content of an object. The object must be an array or a dtype."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, OrderedDict) and isinstance(state, dict) and state.keys() == {"_metadata"}:
            return  # `torch.save` stores version numbers of layers together with the weights; ignore these numbers.
        if not isinstance(target, _Array | _DType):
            raise RefusedPickle(f"refused: it sets the state of a {type(target).__name__}")
        if isinstance(target, _Array) and isinstance(state, tuple):
            self.spend(*state)
        target.build(state)

    def _bytes(self, size: int) -> None:
        # Inside a frame (a buffered part of the pickle), the position in the file is unknown, so the bytes are read,
        # not mapped into memory.
        if size < MAP_BYTES or self._unframer.current_frame:
            self.append(self.read(size))
        else:
            self.append(_Blob(self.file.skip(size), size))

    def load_binbytes(self) -> None:
        """Read a byte string with a length field of 32 bits."""
        self._bytes(struct.unpack("<I", self.read(4))[0])

    def load_binbytes8(self) -> None:
        """Read a byte string with a length field of 64 bits."""
        self._bytes(struct.unpack("<Q", self.read(8))[0])

    def load_tuple(self) -> None:
        """Make a tuple of all values on the stack above the last mark."""
        items = self.pop_mark()  # `pop_mark` also sets `self.append` back to the list that was in use before the mark.
        self.append(self._count_parts(tuple(items)))

    def _load_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise RefusedPickle("damaged: a tuple has too few values")
        self.stack[-size:] = [self._count_parts(tuple(self.stack[-size:]))]

    def load_setitem(self) -> None:
        """Set one value of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        """Set several values of a dictionary."""
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        """Make a dictionary of all keys and values on the stack above the last mark."""
        items = self.pop_mark()
        self.append({})
        self._set_items(self.stack[-1], items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedPickle(f"refused: it sets a value of a {type(target).__name__.lstrip('_')}")
        target.update(zip(self._check_keys(items[::2]), items[1::2], strict=True))

    def load_empty_set(self) -> None:
        """Make an empty set, and count its memory: one byte of a pickle makes a set of some hundred bytes."""
        self.spend(bytes(200))
        self.append(set())

    def load_additems(self) -> None:
        """Add values to a set."""
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise RefusedPickle("refused: it adds values to something that is not a set")
        self.stack[-1].update(self._check_keys(items))

    def load_frozenset(self) -> None:
        """Make a frozenset of all values on the stack above the last mark."""
        items = self.pop_mark()
        self.append(self._count_parts(frozenset(self._check_keys(items))))

    def load_put(self) -> None:
        """Store a value for later instructions, under a number that the pickle contains as text."""
        number = int(self.readline()[:-1])
        if not 0 <= number < 2**31:
            raise RefusedPickle("damaged: a value is stored under an impossible number")
        self.memo[number] = self.stack[-1]

    def load_long4(self) -> None:
        """Raise an error for integers of more than 255 bytes, because data do not contain such integers."""
        raise RefusedPickle("refused: an integer of more than 255 bytes")

    dispatch[pickle.TUPLE[0]] = load_tuple
    dispatch[pickle.TUPLE1[0]] = lambda self: self._load_tuple(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._load_tuple(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._load_tuple(3)
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.EMPTY_SET[0]] = load_empty_set
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.PUT[0]] = load_put
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8
    dispatch[pickle.LONG4[0]] = load_long4


class _Resolver:
    """Replaces the placeholders for arrays and tensors by NumPy arrays."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, dict):
            self._keep(value, value)
            self._check_plain(value)
            for key in value:
                value[key] = self(value[key])
            return value
        if isinstance(value, set | frozenset):
            self._check_plain(value)
            return self._keep(value, value)
        if isinstance(value, list):
            self._keep(value, value)
            for i, entry in enumerate(value):
                value[i] = self(entry)
            return value
        if isinstance(value, tuple):
            return self._keep(value, tuple(self(entry) for entry in value))
        if isinstance(value, _Array):
            return self._keep(value, self._array(value))
        if isinstance(value, _Tensor):
            return self._keep(value, self._tensor(value))
        if isinstance(value, _Blob):
            return self._keep(value, bytes(self.data[value.start : value.start + value.size]))
        if isinstance(value, _DType):
            return value.dtype
        if callable(value) or isinstance(value, _Storage):
            raise RefusedPickle("refused: one of its values is a class or a function")
        return value

    def _check_plain(self, keys: Iterable[Any]) -> None:
        """Check that keys of dictionaries and members of sets are numbers, text, or tuples of numbers and text."""
        for key in keys:
            if isinstance(key, tuple | frozenset):
                self._check_plain(key)
            elif not isinstance(key, PLAIN_KEYS):
                raise RefusedPickle(f"refused: a key of the type {type(key).__name__.lstrip('_')}")

    def _keep(self, value: Any, made: Any) -> Any:
        self.done[id(value)] = made
        self.kept.append(value)  # Keep a reference to the original object, so that no new object gets the same `id`.
        return made

    def _array(self, array: _Array) -> np.ndarray:
        if array.state is None:
            raise RefusedPickle("damaged: an array has no content")
        _, shape, wanted, fortran, data = array.state
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise RefusedPickle("damaged: an array has no valid shape")
        dtype, count, order = wanted.dtype, math.prod(shape), "F" if fortran else "C"
        if dtype.hasobject:
            if not isinstance(data, list) or len(data) != count:
                raise RefusedPickle("damaged: the length of an array of objects does not match its shape")
            out = np.empty(count, object)
            for i, entry in enumerate(data):
                out[i] = self(entry)
            return out.reshape(shape, order=order)
        if isinstance(data, str):
            data = data.encode("latin1")
        have = data.size if isinstance(data, _Blob) else len(data) if isinstance(data, bytes | bytearray) else -1
        if have != count * dtype.itemsize:
            raise RefusedPickle("damaged: the length of an array does not match its shape")
        if isinstance(data, _Blob):
            flat = np.frombuffer(self.data, dtype, count=count, offset=data.start)
        else:
            flat = np.frombuffer(data, dtype, count=count)
        return flat.reshape(shape, order=order)

    def _tensor(self, tensor: _Tensor) -> np.ndarray:
        storage = tensor.storage
        if storage.start < 0:
            raise RefusedPickle(f"damaged: the values of tensor storage '{storage.key}' are not in the file")
        if storage.start + storage.count * storage.dtype.itemsize > len(self.data):
            raise RefusedPickle("damaged: it ends too early")
        flat = np.frombuffer(self.data, storage.dtype, count=storage.count, offset=storage.start)
        steps = tuple(step * storage.dtype.itemsize for step in tensor.stride)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.size, steps, writeable=False)


def _finish(path: Path, value: Any) -> Any:
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        result = _Resolver(data)(value)
        _count_all(result, {})
        return result
    except RecursionError:
        raise RefusedPickle("refused: its containers are nested too deeply") from None


def _count_all(value: Any, counts: dict[int, int]) -> int:
    """Count the values in a result. Refuse a result with too many values, or a container that contains itself."""
    if isinstance(value, dict):
        inside: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        inside = value.flat
    else:
        return 1
    if id(value) not in counts:
        counts[id(value)] = -1
        counts[id(value)] = 1 + sum(_count_all(entry, counts) for entry in inside)
    if not 0 < counts[id(value)] <= MAX_PARTS:
        raise RefusedPickle(f"refused: a container contains itself, or there are more than {MAX_PARTS} values")
    return counts[id(value)]


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise RefusedPickle("not a file, but a folder, a device or a named pipe")


def load_npy(path: Path) -> Any:
    """Read a ``.npy`` file that contains an array, or a pickle of arrays and plain containers.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Any
        A read-only, memory-mapped array. If the file is a pickle: the pickled object, usually a dictionary of arrays.

    Raises
    ------
    RefusedPickle
        If the pickle contains anything except arrays and plain containers, or is damaged.
    """
    _check_file(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(6) != b"\x93NUMPY":
            stream.seek(0)
            return _finish(path, _Reader(_File(stream, size)).run())
        stream.seek(0)
        try:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, dtype = header(stream)
            if not dtype.hasobject:
                return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, SyntaxError, TypeError, MemoryError, OverflowError, RecursionError) as error:
            raise RefusedPickle(f"damaged: {show(error, 200)}") from None
        value = _finish(path, _Reader(_File(stream, size)).run())
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def load_torch(path: Path) -> Any:
    """Read a ``.pth`` file of tensors and plain containers. The tensors are memory-mapped and not copied.

    Parameters
    ----------
    path : Path
        File written by `torch.save`, in the current format or in the format before PyTorch 1.6.

    Returns
    -------
    Any
        The stored object. Tensors in the stored object become read-only, memory-mapped arrays.

    Raises
    ------
    RefusedPickle
        If the file contains anything except tensors, arrays and plain containers, or is damaged.

    Notes
    -----
    The safe mode of PyTorch, ``torch.load(weights_only=True)``, has four limits:

    - `torch.load` cannot memory-map files in the older format, so every worker would copy gigabytes into memory.
    - `torch.load` refuses labels that are NumPy numbers.
    - If a damaged file states a far too large length of a tensor, `torch.load` allocates memory for this length.
    - `torch.load` needs PyTorch, which the workers of the sharding job do not need for anything else.
    """
    _check_file(path)
    return _load_torch_zip(path) if zipfile.is_zipfile(path) else _load_torch_legacy(path)


def _load_torch_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        entries = {entry.filename: entry for entry in archive.infolist()}
        name = next((n for n in entries if re.fullmatch(r"[^/]+/data\.pkl", n)), None)
        if name is None or entries[name].compress_type != zipfile.ZIP_STORED:
            raise RefusedPickle("damaged: not a file of torch.save")
        pickled = archive.read(name)
        reader = _Reader(_File(io.BytesIO(pickled), len(pickled)))
        # The values of tensors are in separate files of the archive, so the pickle is small. Read the byte
        # strings in the pickle instead of memory-mapping them.
        reader._bytes = lambda size: reader.append(reader.read(size))  # type: ignore[method-assign]
        value = reader.run()
        for key, storage in reader.storages.items():
            entry = entries.get(f"{name[: -len('data.pkl')]}data/{key}")
            if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                raise RefusedPickle(f"damaged: the values of tensor storage '{show(key)}' are not in the file")
            if storage.count * storage.dtype.itemsize > entry.file_size:
                raise RefusedPickle(f"damaged: tensor storage '{show(key)}' is shorter than its size states")
            stream.seek(entry.header_offset + 26)
            lengths = struct.unpack("<HH", stream.read(4))
            storage.start = entry.header_offset + 30 + sum(lengths)
    return _finish(path, value)


def _load_torch_legacy(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as stream:
        file = _File(stream, size)
        if _Reader(file).run() != TORCH_MAGIC:
            raise RefusedPickle("not a file of torch.save")
        _Reader(file).run()  # Skip the version of the format.
        about = _Reader(file).run()
        if not isinstance(about, dict) or not about.get("little_endian", True):
            raise RefusedPickle("refused: its numbers are big-endian")
        reader = _Reader(file)
        value = reader.run()
        keys = _Reader(file).run()
        for key in keys if isinstance(keys, list) else []:
            storage = reader.storages.get(str(key)) if isinstance(key, str | int) else None
            count = struct.unpack("<q", file.read(8))[0]
            if storage is None or count != storage.count or count < 0:
                raise RefusedPickle(f"damaged: the length of tensor storage '{show(key)}' does not match its size")
            storage.start = file.skip(count * storage.dtype.itemsize)
    return _finish(path, value)
