"""Stores decoded signals on disk, and reads them again. A file with a decoded signal is called a *kept signal*.

A kept signal has three parts: compressed blocks of samples, a footer in JSON, and a tail with the size and the checksum
of the footer. The footer has the metadata of the recording, and the offset and checksum of each block. The file is
written under a temporary name, and gets its final name when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.storage import deliver
from data_sharding.common.untrusted import MAX_JSON, check_count, check_list, check_sha256, open_regular, parse_json
from data_sharding.formats.kept.codec import MAX_VALUES, pack, unpack
from data_sharding.formats.kept.info import MOST, info_from_json, info_to_json
from data_sharding.formats.signal import Signal, SignalInfo

KEPT_SCHEMA = 2
"""Version of the file format. The name of a kept signal is a checksum that also depends on this version, so files of an
older version are not found."""
_TAIL = struct.Struct("<Q32s8s")
_MAGIC = b"DSkept1\n"
_TYPES = ("float32", "float64")


class NotKept(Exception):
    """A kept signal is missing or damaged, or does not contain a requested channel or sample.

    The caller must read the recording's own files.

    Parameters
    ----------
    note : str
        Note for the ledger if the kept signal is damaged; otherwise empty.
    """

    def __init__(self, note: str = "") -> None:
        super().__init__(note)
        self.note = note


class KeepingSignal:
    """A wrapper of a signal. When a caller reads samples, the wrapper also writes these samples to a file.

    Parameters
    ----------
    signal : Signal
        The open recording.
    path : Path
        File to write.
    """

    def __init__(self, signal: Signal, path: Path) -> None:
        self.signal, self.info, self.path = signal, signal.info, path
        self.fault = ""
        """Reason why the signal cannot be stored; empty if it can be stored."""
        self._stream = path.open("wb")
        self._picks: list[int] = []
        self._dtype = ""
        self._blocks: list[list[Any]] = []

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments."""
        x = self.signal.read(start, stop, picks)
        if not self.fault:
            self._add(start, stop, picks, x)
        return x

    def _add(self, start: int, stop: int, picks: list[int], x: np.ndarray) -> None:
        if not self._blocks:
            self._picks, self._dtype = list(picks), str(x.dtype)
        if picks != self._picks or str(x.dtype) != self._dtype or (self._blocks and start < self._blocks[-1][1]):
            self.fault = "its blocks were not read in order"
        elif x.shape != (len(picks), stop - start) or x.size > MAX_VALUES or self._dtype not in _TYPES:
            self.fault = f"a block has {x.size} values of the type {x.dtype}"
        else:
            data = pack(x)
            self._blocks.append([start, stop, self._stream.tell(), len(data), hashlib.sha256(data).hexdigest()])
            self._stream.write(data)

    def _is_complete(self) -> bool:
        covered: list[list[int]] = []
        for start, stop, *_ in self._blocks:
            if covered and covered[-1][1] == start:
                covered[-1][1] = stop
            else:
                covered.append([start, stop])
        spans = iter(covered)
        span = next(spans, None)
        for segment in self.info.segments:
            while span and span[1] < segment.stop:
                span = next(spans, None)
            if segment.stop > segment.start and (span is None or span[0] > segment.start):
                return False
        return bool(self._blocks)

    def finish(self, target: Path) -> str:
        """Move the file to `target` if all segments were read; if not, delete the unfinished file.

        Parameters
        ----------
        target : Path
            Final path. The file name, without its ending, is the key of the signal.

        Returns
        -------
        str
            Reason why the signal cannot be stored. Empty if the signal was stored, and also if not all segments were
            read.
        """
        try:
            with self._stream:
                if self.fault or not self._is_complete():
                    return self.fault
                footer = self._make_footer(target.stem)
                if self.fault:
                    return self.fault
                self._stream.write(footer)
                self._stream.write(_TAIL.pack(len(footer), hashlib.sha256(footer).digest(), _MAGIC))
            deliver(self.path, target)
        finally:
            self.path.unlink(missing_ok=True)
        return ""

    def _make_footer(self, key: str) -> bytes:
        info = info_to_json(self.info)
        values = {
            "schema": KEPT_SCHEMA,
            "key": key,
            "info": info,
            "picks": self._picks,
            "dtype": self._dtype,
            "blocks": self._blocks,
        }
        try:
            text = json.dumps(values, allow_nan=False, separators=(",", ":"))
            same = info_to_json(info_from_json(parse_json(text)["info"], "")) == info
        except (TypeError, ValueError, RequestError) as error:
            same, text = False, str(error)
        if not same:
            self.fault = f"its metadata cannot be written as JSON ({text[:100]})"
            return b""
        return text.encode()

    def close(self) -> None:
        """Close the files of the recording."""
        self.signal.close()


class KeptSignal:
    """An open kept signal. Its metadata and samples are those that the reader of the recording returned.

    Parameters
    ----------
    path : Path
        File of the signal.

    Raises
    ------
    NotKept
        If the file does not exist or is damaged. The method `read` raises `NotKept` too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: tuple[int, tuple[int, ...], np.ndarray] | None = None
        try:
            self._file = open_regular(path)
        except FileNotFoundError:
            raise NotKept from None
        except (OSError, RequestError) as error:
            raise self._damaged(error) from None
        try:
            with self._checked():
                self.info = self._read_footer()
        except BaseException:
            self.close()
            raise

    def _damaged(self, error: Exception | str) -> NotKept:
        return NotKept(f"the kept signal {self.path.name} is damaged, so the files were read again ({error})"[:300])

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RequestError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise self._damaged(error) from None

    def _pread(self, size: int, at: int) -> bytes:
        data = os.pread(self._file, size, at)
        if len(data) != size:
            raise ValueError("the file is too short")
        return data

    def _read_footer(self) -> SignalInfo:
        where, total = self.path.name, os.fstat(self._file).st_size
        if total < _TAIL.size:
            raise ValueError("the file is too short")
        length, checksum, magic = _TAIL.unpack(self._pread(_TAIL.size, total - _TAIL.size))
        end = total - _TAIL.size - length
        if magic != _MAGIC or length > MAX_JSON or end < 0:
            raise ValueError("the end is missing")
        footer = self._pread(length, end)
        if hashlib.sha256(footer).digest() != checksum:
            raise ValueError("the checksum of the footer is wrong")
        values = parse_json(footer)
        if values["schema"] != KEPT_SCHEMA or values["key"] != self.path.stem or values["dtype"] not in _TYPES:
            raise ValueError("the file belongs to another recording")
        info = info_from_json(values["info"], where)
        last = len(info.ch_names) - 1
        self._dtype = np.dtype(values["dtype"])
        picks = check_list(values["picks"], where, "picks")
        self._row = {check_count(pick, where, "picks", most=last): row for row, pick in enumerate(picks)}
        if len(self._row) != len(picks):
            raise ValueError("the file contains a channel twice")
        self._blocks: list[tuple[int, int, int, int, str]] = []
        begin = 0
        for entry in check_list(values["blocks"], where, "blocks"):
            start, stop, at, size, block_sum = check_list(entry, where, "blocks")
            check_count(start, where, "blocks", least=begin, most=MOST)
            begin = check_count(stop, where, "blocks", least=start + 1, most=start + MAX_VALUES // max(1, len(picks)))
            check_count(at, where, "blocks", most=end)
            check_count(size, where, "blocks", most=end - at)
            self._blocks.append((start, stop, at, size, check_sha256(block_sum, where)))
        self._starts = np.array([block[0] for block in self._blocks], np.int64)
        return info

    def read(self, start: int, stop: int, picks: list[int]) -> np.ndarray:
        """Read samples of some channels; `Signal.read` explains the arguments.

        Raises
        ------
        NotKept
            If a channel or a sample is not in the file, or if the file is damaged.
        """
        if any(pick not in self._row for pick in picks):
            raise NotKept
        rows = tuple(self._row[pick] for pick in picks)
        x, done = np.empty((len(picks), stop - start), self._dtype), start
        number = max(0, int(np.searchsorted(self._starts, start, "right")) - 1)
        while done < stop:
            if number >= len(self._blocks) or not self._blocks[number][0] <= done < self._blocks[number][1]:
                raise NotKept
            first, end = self._blocks[number][:2]
            until = min(stop, end)
            x[:, done - start : until - start] = self._block(number, rows)[:, done - first : until - first]
            done, number = until, number + 1
        return x

    def _block(self, number: int, rows: tuple[int, ...]) -> np.ndarray:
        if self._held and self._held[:2] == (number, rows):
            return self._held[2]
        start, stop, at, size, checksum = self._blocks[number]
        with self._checked():
            data = self._pread(size, at)
            if hashlib.sha256(data).hexdigest() != checksum:
                raise ValueError(f"the checksum of the samples {start} to {stop} is wrong")
            x = unpack(data, (len(self._row), stop - start), rows)
        self._held = number, rows, x
        return x

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
