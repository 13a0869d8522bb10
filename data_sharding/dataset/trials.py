"""A table with the metadata of a split's samples, so that the JSON of each sample is parsed only once.

The first process that needs the table reads the JSON of every sample and writes the table to a file in the cache folder
(`data_sharding.dataset.cache.cache_folder`). Other processes of the machine wait until the file is complete. All
processes memory-map the file, so the table is in memory only once, and later commands need not build the table again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of
from data_sharding.common.progress import progress
from data_sharding.common.storage import AnyPath, describe, is_remote
from data_sharding.common.untrusted import private_folder
from data_sharding.dataset.cache import cache_folder, locked
from data_sharding.dataset.manifest import Shard
from data_sharding.dataset.shard_reader import SampleLocation, ShardReader, damage_error, parse_meta

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = ("corpus", "subject", "session", "recording", "image_id", "label_name", "caption", "concept")
"""Names of the metadata fields whose values are texts. A text that many trials share is stored only once."""
LISTS = ("ch_names", "positions")
"""Names of the metadata fields whose values are lists. Lists are stored as JSON texts. A list that many trials share is
stored only once."""
NUMBERS = {"n": ("int64", 0), "label": ("int64", -1), "onset": ("int64", 0), "start": ("float64", 0.0)}
"""Names of the metadata fields whose values are numbers, each with its data type and the value that stands for a
missing number."""
FORMAT = 1
"""Version of the file format. The checksum in the name of a file depends on this version, so a new version uses new
files."""
UNUSED_DAYS = 90
"""Number of days after which an unused file of a table is deleted. Unused files are deleted when a new file is
written."""
_SHOWN = 20_000
"""The progress is shown only for a split with at least this many samples."""


class TrialSource(Protocol):
    """Protocol with the attributes and methods of `EEGDataset` that are needed to build a table."""

    @property
    def reader(self) -> ShardReader:
        """Reader of the current thread, with its open shards."""
        ...

    def __len__(self) -> int: ...

    def locations(self, numbers: range) -> list[SampleLocation]:
        """Compute the locations of samples in the shards."""
        ...

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard, for error messages."""
        ...


class TrialTable:
    """Metadata of a split's samples, in columns.

    Parameters
    ----------
    table : pyarrow.Table
        Content of the table's file, from `open_table`.
    kept : ndarray of bool, shape (stored samples,), optional
        True for each stored sample that the dataset reads (does not leave out); by default True for all samples.

    Notes
    -----
    ``start`` and ``onset`` describe the complete stored sample, even if a dataset reads only a part of the sample.
    """

    def __init__(self, table: pa.Table, kept: NDArray[np.bool_] | None = None) -> None:
        self._table = table
        self._kept = None if kept is None or kept.all() else kept
        self._values: dict[str, list[str | None]] = {}
        self._chosen: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return self._table.num_rows if self._kept is None else int(self._kept.sum())

    def _choose(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        if self._kept is None:
            return values
        if name not in self._chosen:
            self._chosen[name] = values[self._kept]
        return self._chosen[name]

    def numbers(self, name: str) -> NDArray[Any]:
        """Return a column of numbers.

        Parameters
        ----------
        name : str
            One of the names in `NUMBERS`: n, label, onset or start.

        Returns
        -------
        ndarray, shape (samples,)
            One number for each sample. A missing number has the value that `NUMBERS` lists, such as -1 for a label.
        """
        return self._choose(name, self._table.column(name).chunk(0).to_numpy(zero_copy_only=True))

    def codes(self, name: str) -> NDArray[np.int32]:
        """Return a column of texts as integer codes.

        Parameters
        ----------
        name : str
            One of the names in `TEXTS` or `LISTS`.

        Returns
        -------
        ndarray of int32, shape (samples,)
            For each sample, the index of its text in `values`. Samples with the same text have the same code.
        """
        return self._choose(name, self._table.column(name).chunk(0).indices.to_numpy(zero_copy_only=True))

    def values(self, name: str) -> list[str | None]:
        """Return the different texts of a column.

        The numbers that `codes` returns are indices into this list. In the list, None stands for a missing text.
        """
        if name not in self._values:
            self._values[name] = self._table.column(name).chunk(0).dictionary.to_pylist()
        return self._values[name]

    def text(self, name: str, number: int) -> str | None:
        """Return the text of one sample; None if the sample has no such text."""
        return self.values(name)[self.codes(name)[number]]

    def group(self, *names: str) -> NDArray[np.int64]:
        """Number the combinations of texts in several columns, and return the number of each sample's combination.

        Parameters
        ----------
        *names : str
            Columns to combine: names in `TEXTS` or `LISTS`.

        Returns
        -------
        ndarray of int64, shape (samples,)
            Two samples have the same number if they have the same text in all columns `names`, and different numbers
            otherwise. The combinations are numbered 0, 1, 2 and so on, without gaps.
        """
        group = np.zeros(len(self), np.int64)
        for name in names:
            combined = group * len(self.values(name)) + self.codes(name)
            group = np.unique(combined, return_inverse=True)[1].reshape(-1).astype(np.int64)
        return group


class _Builder:
    """Collects the columns of a table sample by sample.

    Each different text or list is stored only once, with a number. For each sample, only the number of its text or list
    is stored. For 661,600 trials, the stored numbers take about 60 MB, whatever the size of the JSON.
    """

    def __init__(self) -> None:
        self.known: dict[str, dict[Any, int]] = {name: {} for name in (*TEXTS, *LISTS)}
        self.codes = {name: array("i") for name in self.known}
        self.numbers = {name: array("d" if kind == "float64" else "q") for name, (kind, _) in NUMBERS.items()}

    def add(self, meta: dict[str, Any]) -> None:
        """Append a sample with the metadata `meta`."""
        for name, known in self.known.items():
            value = meta.get(name)
            if name in LISTS and value is not None:
                value = tuple(tuple(one) if isinstance(one, list) else one for one in value)
            self.codes[name].append(known.setdefault(value, len(known)))
        for name, (_, missing) in NUMBERS.items():
            self.numbers[name].append(meta.get(name, missing))

    def finish(self, digest: str) -> pa.Table:
        """Return the table."""
        import pyarrow as pa

        columns: dict[str, Any] = {}
        for name, known in self.known.items():
            texts = [json.dumps(value) if isinstance(value, tuple) else value for value in known]
            codes = pa.array(np.frombuffer(self.codes[name], np.int32))
            columns[name] = pa.DictionaryArray.from_arrays(codes, pa.array(texts, pa.string()))
        for name, (kind, _) in NUMBERS.items():
            columns[name] = pa.array(np.frombuffer(self.numbers[name], kind))
        return pa.table(columns, schema=_schema(digest))


def _schema(digest: str) -> pa.Schema:
    import pyarrow as pa

    texts = [pa.field(name, pa.dictionary(pa.int32(), pa.string())) for name in (*TEXTS, *LISTS)]
    numbers = [pa.field(name, pa.type_for_alias(kind)) for name, (kind, _) in NUMBERS.items()]
    return pa.schema([*texts, *numbers], metadata={"dreamscale_trials": digest})


def digest_of_split(path: AnyPath, split: str, shards: list[Shard]) -> str:
    """Compute the checksum that the file name of a split's table contains.

    Parameters
    ----------
    path : Path or UPath
        Directory of the dataset.
    split : str
        Name of the split.
    shards : list of Shard
        All shards of the split.

    Returns
    -------
    str
        Checksum over the checksums of all shards. The shards of a local dataset are read without verification, so they
        may have changed since the manifest was written. For a local dataset, the checksum therefore includes the path
        of the dataset, and the size and modification time of each file.
    """
    files: list[Any] = []
    for shard in shards:
        files.append([shard.sha256, shard.index_sha256, shard.withdrawn])
        if not is_remote(path):
            for file in (path / shard.path, (path / shard.path).with_suffix(".idx")):
                status = file.stat()
                files[-1] += [status.st_size, status.st_mtime_ns]
    place = "" if is_remote(path) else str(path.absolute())
    return digest_of({"format": FORMAT, "place": place, "split": split, "files": files})


def build_table(source: TrialSource, digest: str) -> pa.Table:
    """Read the metadata of every sample of a split into a table.

    Parameters
    ----------
    source : EEGDataset
        The split, opened without `tmin` and `tmax`.
    digest : str
        Checksum of the split, from `digest_of_split`.

    Returns
    -------
    pyarrow.Table
        The table, with one row for each sample.

    Raises
    ------
    RequestError
        If a sample is damaged; the message names the file and the sample.
    """
    builder, reader, block = _Builder(), source.reader, 1024
    with progress("table of the trials", len(source), enabled=len(source) >= _SHOWN) as advance:
        for start in range(0, len(source), block):
            numbers = range(start, min(start + block, len(source)))
            for location in source.locations(numbers):
                text = bytes(reader.read(location, location.meta_at, location.meta))
                shard, sample = source.shard_name(location.shard), reader.name(location, "")
                try:
                    builder.add(parse_meta(text, shard, sample))
                except OverflowError as error:
                    raise damage_error(shard, sample, f"its JSON has a number that is too large ({error})") from None
            reader.close_evicted()
            advance(len(numbers))
    return builder.finish(digest)


def _read_file(path: Path, digest: str, samples: int) -> pa.Table | None:
    """Map the file of a table into memory and check the table.

    The result is None if the file does not exist, or does not contain the expected table.
    """
    import pyarrow as pa

    if not path.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if not table.schema.equals(_schema(digest), check_metadata=True) or table.num_rows != samples:
            raise pa.ArrowInvalid("another table")
        table.validate(full=True)
        if any(column.num_chunks != 1 or column.null_count for column in table.columns):
            raise pa.ArrowInvalid("parts are missing")
    except (pa.ArrowException, OSError) as error:
        print(f"{path}: this table of trials is damaged ({error}); it is made again")
        return None
    os.utime(path)
    return table


def _write_file(path: Path, table: pa.Table) -> None:
    import pyarrow as pa

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    oldest = time.time() - UNUSED_DAYS * 86_400
    for other in path.parent.glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):
            if other.stat().st_mtime < oldest:
                other.unlink()


def open_table(digest: str, samples: int, source: Callable[[], TrialSource], *, folder: Path | None = None) -> pa.Table:
    """Open the table of a split. If the table's file does not exist, build the table and write the file.

    Parameters
    ----------
    digest : str
        Checksum of the split, from `digest_of_split`.
    samples : int
        Number of samples of the split.
    source : callable
        Function that opens the split without `tmin` and `tmax`; it is called only if the table must be built.
    folder : Path, optional
        Folder of the table's file; by default the folder ``trials`` in the cache folder.

    Returns
    -------
    pyarrow.Table
        The table. Its columns are in the memory-mapped file if `folder` can be written, and otherwise in the memory of
        this process.

    Raises
    ------
    RequestError
        If a sample is damaged, or another user could change the files in `folder`.

    Notes
    -----
    One process at a time builds the table of a split; the other processes wait for the file. If `folder` cannot be
    written, a message is printed, and every process builds its own table.
    """
    folder = folder or cache_folder() / "trials"
    path = folder / f"{digest[:32]}.arrow"
    try:
        private_folder(folder)
        if (table := _read_file(path, digest, samples)) is not None:
            return table
        with locked(folder / "locks" / digest[:32]):
            if (table := _read_file(path, digest, samples)) is None:
                _write_file(path, build_table(source(), digest))
                table = _read_file(path, digest, samples)
        if table is not None:
            return table
        fault = "the file was changed while it was read"
    except RequestError:
        raise
    except OSError as error:
        fault = describe(error)
    print(
        f"{folder}: the table of the trials cannot be kept ({fault}), so every process makes its own; set "
        "DREAMSCALE_CACHE to a folder that can be written"
    )
    return build_table(source(), digest)
