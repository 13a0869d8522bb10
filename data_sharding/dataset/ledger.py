"""The ledger: a table with one row for every recording that was found, with its status and the reason for it."""

from __future__ import annotations

import dataclasses
import io
import json
import types
import typing
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, Literal, get_args

from data_sharding.common.errors import RequestError, show
from data_sharding.common.files import atomic_write_bytes
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath
from data_sharding.common.typed_values import MAX_INTEGER, check_typed
from data_sharding.common.untrusted import MAX_TEXT, check_text, parse_json, read_limited
from data_sharding.dataset.manifest import current_file
from data_sharding.dataset.rows import Rows

NAME = "ledger.parquet"
Status = Literal["sharded", "duplicate", "quarantined", "excluded", "held back"]
MAX_LEDGER = 2**30
"""Largest size of a ledger in bytes."""
STATUSES: tuple[Status, ...] = get_args(Status)
ADDED_LATER = frozenset(
    {
        *("reader", "reference", "segments", "duplicate_of", "held_back", "reason_category", "bad_kinds"),
        *("subject_from", "age", "sex", "group", "recording_year", "device", "device_filters", "task", "license"),
        *("trial_tmin", "trial_tmax", "seconds_left_out", "bad_in_windows"),
    }
)
"""Columns that may be missing in ledgers from older versions of Dreamscale. A missing column gets the default value of
its field in `LedgerRow`."""


@dataclasses.dataclass(kw_only=True)
class LedgerRow:
    """One row of the ledger: the data of one recording. Each field is a column of ``ledger.parquet``.

    Dictionaries are stored as JSON text. If a recording could not be opened, the fields that describe its signal have
    their default values.
    """

    key: str
    """Unique name of the recording in the dataset. The key of each sample of the recording begins with this name."""
    corpus: str
    """Name of the recording's corpus."""
    path: str
    """Path of the recording, relative to the root folder of the corpus."""
    files: list[str]
    """Names of all files of the recording."""
    bytes: int = 0
    """Total size of the recording's files, in bytes."""
    sha256: str = ""
    """Checksum over all files of the recording; empty if a file could not be read."""
    fingerprint: str = ""
    """Checksum of the signal's fingerprint; empty if the recording has too little signal for a fingerprint."""
    format: str = ""
    """File format of the recording, such as edf or brainvision."""
    reader: str = ""
    """Name of the reader that opened the files; at present, always equal to `format`."""
    subject: str
    """Name of the subject; equal to the recording's `key` if the subject is unknown."""
    session: str = ""
    """Name of the session; empty if the session is unknown."""
    subject_from: str | None = None
    """Source of the subject's name: config (the key `subject_pattern`), table (the key `subjects`, or the sidecar of an
    array), bids (sub-X in the path), corpus (the published files name the subject), header (a hash of the patient in
    the header), recognised (from the path, not confirmed), or unknown; None in ledgers from older versions of
    Dreamscale."""
    age: float | None = None
    """Age of the subject in years at the recording; 90 for all higher ages; None if unknown."""
    sex: str = ""
    """M, F or O; empty if unknown."""
    group: str = ""
    """Group of the subject, such as patient or control; empty if unknown."""
    recording_year: int | None = None
    """Year of the recording, from the header of the file; None if unknown."""
    device: str = ""
    """Name of the recording device; empty if unknown."""
    device_filters: str = ""
    """Filters that the device applied; empty if unknown."""
    task: str = ""
    """Task of the subject during the recording; empty if unknown."""
    license: str = ""
    """Licence of the recording; empty if unknown."""
    split: str = ""
    """Splits in which the recording has windows, joined by ``+``."""
    status: Status
    """sharded (windows of the recording are in the dataset), duplicate (another recording has the same signal),
    quarantined (the recording has a fault), excluded (the recording is intact, but not usable here), or held back (the
    recording belongs to a benchmark)."""
    reason: str = ""
    """One sentence that says why the recording is not in the dataset; empty if the recording is sharded."""
    reason_category: str | None = None
    """Category of `reason`, used to count recordings; None in ledgers from older versions of Dreamscale."""
    duplicate_of: str = ""
    """Key of the recording that is kept in place of this duplicate."""
    held_back: str = ""
    """Entry in `hold_back` of the config that matches this held-back recording: a name, a list or a dataset."""
    channels_by_type: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of the recording's channels of each type."""
    channels_left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Names of the channels that are not used, for each reason."""
    channels: list[str] = dataclasses.field(default_factory=list)
    """Canonical names of the channels in the windows, in order."""
    n_eeg: int = 0
    """Number of EEG channels in the recording."""
    n_kept: int = 0
    """Number of channels in the windows, at most 128."""
    channel_selection: str = ""
    """Rule by which the channels in the windows were selected, such as ``all`` or ``128 of 129 by scalp coverage``."""
    bads: list[str] = dataclasses.field(default_factory=list)
    """Bad channels among the channels in the windows, each as ``name: kind``."""
    bad_kinds: list[str] | None = None
    """Fault of each channel in `bads`, such as flat or clipped; None in ledgers from older versions of Dreamscale."""
    montage: str = ""
    """Source of the electrode positions: file, the name of a standard montage, or none."""
    montage_confidence: float = 0.0
    """Fraction of the EEG channels that have a position."""
    reference: str = ""
    """Reference of the recording; empty if the file does not name the reference."""
    sfreq: float = 0.0
    """Sampling rate of the recording in Hz."""
    seconds: float = 0.0
    """Length of the recording in seconds."""
    segments: int = 1
    """Number of continuous segments of the recording, between interruptions."""
    amplitude_uv: float | None = None
    """Median amplitude of the channels in microvolts; None if the amplitude was not measured."""
    unit: str = ""
    """Source of the unit: declared (in the file), plausible (from the amplitude), configured (in the config), or
    unknown."""
    unit_factor: float | None = None
    """Factor that converts the values of the file to volts."""
    line_freq: float | None = None
    """Mains frequency in Hz that was filtered out; None if no mains frequency was filtered out."""
    line_freq_from: str = ""
    """Source of the mains frequency: config, file, spectrum, or none found."""
    windows: int = 0
    """Number of windows of the recording in the dataset."""
    seconds_written: float = 0.0
    """Length of the signal in the windows of the recording, in seconds."""
    windows_left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of windows or trials of the recording that are not in the dataset, for each reason."""
    seconds_left_out: dict[str, float] = dataclasses.field(default_factory=dict)
    """Length of the signal outside the windows in seconds, for each reason; empty for a recording with trials. The
    lengths in `seconds_left_out` and `seconds_written` add up to the length of the recording."""
    bad_in_windows: dict[str, int] = dataclasses.field(default_factory=dict)
    """For each kind of fault, such as muscle, number of windows in which a channel has this fault; channels that are
    bad in the whole recording are not counted."""
    trial_tmin: float | None = None
    """Start of the stored trials, in seconds from the onset of the image; None for a recording without trials."""
    trial_tmax: float | None = None
    """End of the stored trials, in seconds from the onset of the image; None for a recording without trials."""
    shards: list[str] = dataclasses.field(default_factory=list)
    """Paths of the shards with windows of the recording, relative to the dataset."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Further notes about the recording."""

    @property
    def splits(self) -> list[str]:
        """Splits in which the recording has windows."""
        return self.split.split("+") if self.split else []

    @property
    def has_subject(self) -> bool:
        """Whether the subject of the recording is known.

        For an unknown subject, `subject` is the key of the recording.
        """
        return bool(self.subject) and self.subject != self.key

    @property
    def category(self) -> str:
        """Category of `reason`, used to count recordings.

        Rows from older versions of Dreamscale have no `reason_category`. For such a row, the category is the status if
        the recording is a duplicate or held back, and otherwise the whole text of `reason`.
        """
        if self.reason_category is not None:
            return self.reason_category
        return self.status if self.status in ("duplicate", "held back") else self.reason

    def set_reason(self, status: Status, reason: Reason) -> None:
        """Set the status and the reason of the row, and leave all other columns unchanged.

        Raises
        ------
        ValueError
            If `status` is not one of `STATUSES`.
        """
        if status not in STATUSES:
            raise ValueError(f"status '{status}': must be one of {', '.join(STATUSES)}")
        self.status, self.reason, self.reason_category = status, str(reason), reason.category

    def set_aside(self, status: Status, reason: Reason, *, duplicate_of: str = "", held_back: str = "") -> None:
        """Mark a recording as not in the dataset. The measured values of the recording remain in the row.

        Parameters
        ----------
        status : str
            duplicate or held back.
        reason : Reason
            Why the recording is not in the dataset.
        duplicate_of, held_back : str
            Values for the columns `duplicate_of` and `held_back`.

        Raises
        ------
        ValueError
            If `status` is not one of `STATUSES`.
        """
        self.set_reason(status, reason)
        self.split, self.windows, self.seconds_written = "", 0, 0.0
        self.duplicate_of, self.held_back = duplicate_of, held_back

    def reset_impossible(self) -> None:
        """Replace impossible numbers, such as an age below 0, by the default values of their columns, and add notes.

        Readers refuse a ledger with an impossible number. Without this method, one such number from a damaged recording
        would make the whole dataset unreadable.
        """
        for name in _NUMBERS:
            value = getattr(self, name)
            try:
                _check_value(name, value, "")
            except RequestError:
                setattr(self, name, _DEFAULTS[name])
                self.notes.append(f"{name} was {show(value)}, which is not possible, so this value was left out")

    def to_columns(self) -> dict[str, Any]:
        """Return the values of the row as they are stored, with dictionaries as JSON text."""
        values = {name: getattr(self, name) for name in COLUMNS}
        return {
            name: json.dumps(value) if isinstance(value, dict) else _shorten(value) for name, value in values.items()
        }

    @classmethod
    def from_columns(cls, values: dict[str, Any], where: str) -> LedgerRow:
        """Build a row from stored values; columns that this version of the program does not know are ignored.

        Parameters
        ----------
        values : dict
            The stored values, by column.
        where : str
            Path of the ledger and number of the row, for messages.

        Raises
        ------
        KeyError
            If a column that every version of Dreamscale writes is missing. The error contains the name of the column.
        RequestError
            If a value has another type than its column, or is not possible, such as a negative length.
        """
        known = {}
        for name in COLUMNS:
            if name in values:
                known[name] = _check_value(name, values[name], where)
            elif name not in ADDED_LATER:
                raise KeyError(name)
        return cls(**known)


def _shorten(value: Any) -> Any:
    """Cut a text that is too long for the ledger. Readers refuse a ledger with a text of more than `MAX_TEXT`."""
    if isinstance(value, list):
        return [_shorten(entry) for entry in value]
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[: MAX_TEXT - 100]} ... (shortened; the whole text has {len(value)} characters)"
    return value


def _check_value(column: str, value: Any, where: str) -> Any:
    """Check a stored value, and parse the JSON of a dictionary."""
    if column in JSON_COLUMNS and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise RequestError(f"{where}: {column} is not valid JSON ({show(error)})") from None
    if column in _NAMES:
        check_text(value, where, column)
    return check_typed(_TYPES[column], value, where, column, least=-MAX_INTEGER if column in _SIGNED else 0)


_TYPES = typing.get_type_hints(LedgerRow)
COLUMNS = tuple(field.name for field in dataclasses.fields(LedgerRow))
"""Columns of the ledger, in order."""
JSON_COLUMNS = frozenset(name for name in COLUMNS if typing.get_origin(_TYPES[name]) is dict)
"""Columns that hold dictionaries as JSON text."""


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LedgerRow)}
_NUMBERS = tuple(name for name in COLUMNS if _TYPES[name] in (int, float, int | None, float | None))
_NAMES = frozenset({"key", "corpus", "path", "subject", "session"})
"""Columns whose texts are names, which have at most `untrusted.MAX_NAME` characters."""
_SIGNED = frozenset({"unit_factor", "trial_tmin", "trial_tmax"})
"""Columns whose numbers may be negative."""


def schema() -> Any:
    """Return the pyarrow schema of the ledger, made from the fields of `LedgerRow`."""
    import pyarrow as pa

    def arrow_type(python_type: Any) -> Any:
        if isinstance(python_type, types.UnionType):  # A column of any Arrow type may contain nulls, so drop None.
            (python_type,) = (part for part in get_args(python_type) if part is not types.NoneType)
        if typing.get_origin(python_type) is list:
            return pa.list_(pa.string())
        return {int: pa.int64(), float: pa.float64()}.get(python_type, pa.string())

    return pa.schema([(name, arrow_type(_TYPES[name])) for name in COLUMNS])


def write_ledger(path: str | AnyPath, rows: Iterable[LedgerRow]) -> None:
    """Write the ledger. An interrupted write leaves no partial file.

    Parameters
    ----------
    path : str, Path or UPath
        File to write.
    rows : iterable of LedgerRow
        One row for each recording.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(rows)
    for row in rows:
        row.reset_impossible()
    table = pa.Table.from_pylist([row.to_columns() for row in rows], schema=schema())
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write_bytes(path, buffer.getvalue())


def read_ledger(dataset: str | AnyPath) -> list[LedgerRow]:
    """Read the ledger of a dataset; ledgers from older versions of Dreamscale can be read, too.

    Parameters
    ----------
    dataset : str, Path or UPath
        The dataset's directory.

    Returns
    -------
    list of LedgerRow
        One row for each recording.

    Raises
    ------
    RequestError
        If the dataset has no ledger, or the ledger is damaged.
    """
    return read_ledger_file(current_file(dataset, NAME))


def read_ledger_file(path: AnyPath) -> list[LedgerRow]:
    """Read a ledger file, for example the ledger of an older version of a dataset; see `read_ledger`."""
    import pyarrow as pa

    if not path.is_file():
        raise RequestError(f"{path}: no such file; only 'dreamscale shard' writes a ledger")
    try:
        data = read_limited(path, MAX_LEDGER)
        rows = Rows(io.BytesIO(data), len(data), str(path), schema())
        return [
            LedgerRow.from_columns(row, f"{path}, row {number}")
            for number, row in enumerate(rows.iterate(rows.names), start=1)
        ]
    except KeyError as error:
        raise RequestError(f"{path}: has no column {error}; run 'dreamscale shard' again into a new folder") from None
    except RequestError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"{path}: damaged ({show(error)}); run 'dreamscale shard' again into a new folder") from None


def count_by_status(rows: Iterable[LedgerRow]) -> tuple[dict[str, int], dict[str, float]]:
    """Count recordings and hours by status.

    Parameters
    ----------
    rows : iterable of LedgerRow
        Rows of the ledger.

    Returns
    -------
    counts : dict of str to int
        Number of recordings found, and number of recordings of each status.
    hours : dict of str to float
        Hours of the recordings found, and of the recordings of each status; a recording that could not be opened has
        zero hours.
    """
    counts: dict[str, int] = {"found": 0, **dict.fromkeys(STATUSES, 0)}
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for name in ("found", row.status):
            counts[name] += 1
            seconds[name] += row.seconds
    return counts, {name: round(seconds[name] / 3600, 6) for name in counts}


def count_windows_left_out(rows: Iterable[LedgerRow]) -> Counter[str]:
    """For each reason, count the windows and trials that were left out of the dataset."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.windows_left_out)
    return total
