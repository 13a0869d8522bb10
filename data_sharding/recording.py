"""One recording to a part of the dataset: what a worker of the Ray job does, in a process that may die.

Shapes: n channels, S samples at the recording's rate, T samples a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.channels import Channels, choose, pick_channels, restrict
from data_sharding.corpora import Item
from data_sharding.files import atomic_directory, digest_of, read_json, sha256_file, write_json
from data_sharding.preprocess import PreprocessSpec, preprocess, window_starts
from data_sharding.readers import UNIT_FACTORS, NotContinuous, ReadError, read
from data_sharding.samples import Sample, ShardWriter
from data_sharding.splits import SPLITS, SplitConfig
from data_sharding.units import Verdict, assess, line_frequency

PART_SCHEMA = 2
"""Part of a part's name: raise it when the code's results change, and no older part is taken up again."""
FLOAT16_MAX_UV = 65504.0
GAP = re.compile(r"boundary|edge boundary|bad_acq_skip|new segment/", re.IGNORECASE)
"""Annotations of EEGLAB, MNE and BrainVision for an interruption."""
MIN_SAMPLES = 16
"""Fewer samples cannot even be measured."""


class SetAside(Exception):
    """A recording is not used: status and reason for the ledger."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a worker needs for one recording."""

    item: Item
    spec: PreprocessSpec
    split: SplitConfig
    labels: tuple[str, ...]
    """Names of the labels by number, over all corpora."""
    work: Path
    """Folder of parts and of the log of attempts."""
    timeout_s: float
    """Seconds after which the worker ends itself."""


def versions() -> dict[str, str]:
    """Versions of the libraries that shape a part's bytes."""
    import mne
    import scipy
    import zstandard

    return {
        "mne": mne.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "zstandard": zstandard.__version__,
    }


def blank_row(item: Item, status: str, reason: str) -> dict[str, Any]:
    """Ledger row of a recording of which nothing is known but that it is there.

    Parameters
    ----------
    item : Item
        The recording.
    status : str
        sharded, duplicate, quarantined or excluded.
    reason : str
        Why; empty for sharded.

    Returns
    -------
    dict
        All columns of the ledger.
    """
    return {
        "key": item.key,
        "corpus": item.corpus,
        "path": item.path,
        "files": [f.name.encode("utf-8", "backslashreplace").decode() for f in item.recording.files],
        "bytes": 0,
        "sha256": "",
        "fingerprint": "",
        "format": item.recording.format,
        "subject": item.subject,
        "session": item.session,
        "split": "",
        "status": status,
        "reason": reason,
        "channels_by_type": "{}",
        "channels_left_out": "{}",
        "channels": [],
        "n_eeg": 0,
        "n_kept": 0,
        "channel_selection": "",
        "bads": [],
        "montage": "",
        "montage_confidence": 0.0,
        "sfreq": 0.0,
        "seconds": 0.0,
        "amplitude_uv": None,
        "unit": "",
        "unit_factor": None,
        "line_freq": None,
        "line_freq_from": "",
        "windows": 0,
        "seconds_written": 0.0,
        "windows_left_out": "{}",
        "shards": [],
        "notes": [],
    }


def _attempts(work: Path, key: str) -> Path:
    return work / "attempts" / f"{key}.log"


@contextlib.contextmanager
def watched(task: Task) -> Iterator[None]:
    """Leave a trace of the attempt, and end the process if it takes too long.

    Parameters
    ----------
    task : Task
        The recording at work.

    Yields
    ------
    None

    Notes
    -----
    `faulthandler`'s watchdog needs neither the interpreter nor its lock, so a reader that hangs in C is ended, too.
    """
    log = _attempts(task.work, task.item.key)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        stream.write("attempt\n")
        stream.flush()
        faulthandler.dump_traceback_later(task.timeout_s, exit=True, file=stream)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def why_died(work: Path, key: str) -> tuple[int, bool]:
    """What the trace of a recording says after its worker died.

    Parameters
    ----------
    work : Path
        The job's working folder.
    key : str
        The recording.

    Returns
    -------
    attempts : int
        How often it was begun.
    timed_out : bool
        Whether the last one ran into the time limit.
    """
    try:
        text = _attempts(work, key).read_text()
    except OSError:
        return 0, False
    return text.count("attempt\n"), "Timeout (" in text.rsplit("attempt\n", 1)[-1]


def process_recording(task: Task) -> dict[str, Any]:
    """Read a recording, judge it, and commit its windows as a part.

    Parameters
    ----------
    task : Task
        What to do.

    Returns
    -------
    dict
        The ledger row, with ``part`` (name of the part's folder) and ``split_samples`` beside its columns. A part
        that is committed already is taken as it is.
    """
    with watched(task):
        row = blank_row(task.item, "quarantined", "")
        try:
            hashes = {str(i): sha256_file(f) for i, f in enumerate(task.item.recording.files)}
            row["bytes"] = sum(f.stat().st_size for f in task.item.recording.files)
        except OSError as error:
            return row | {"reason": f"unreadable: {error.strerror}", "part": "", "split_samples": {}}
        row["sha256"] = digest_of(sorted(hashes.values())) if len(hashes) > 1 else hashes["0"]
        name = _part_name(task, hashes)
        part = task.work / "parts" / name[:2] / name
        if (part / "row.json").is_file():
            return read_json(part / "row.json")
        with atomic_directory(part) as folder:
            try:
                _fill(task, row, folder)
            except SetAside as verdict:
                row |= {"status": verdict.status, "reason": verdict.reason, "split_samples": {}}
            row["part"] = name
            write_json(folder / "row.json", row)
        return row


def _part_name(task: Task, hashes: dict[str, str]) -> str:
    item = dataclasses.asdict(task.item)
    item["recording"] = {"format": task.item.recording.format, "files": [f.name for f in task.item.recording.files]}
    trials = [{**t, "image": _image_identity(t["image"])} for t in item["trials"] or ()]
    return digest_of(
        {
            "schema": PART_SCHEMA,
            "item": {**item, "trials": trials if item["trials"] is not None else None},
            "hashes": hashes,
            "spec": task.spec.to_dict(),
            "split": dataclasses.asdict(task.split),
            "labels": list(task.labels),
            "versions": versions(),
        }
    )


def _image_identity(image: str) -> list[Any]:
    status = Path(image).stat()
    return [Path(image).name, status.st_size, status.st_mtime_ns]


def _fill(task: Task, row: dict[str, Any], folder: Path) -> None:
    """Do the work; rows of set-aside recordings keep what was learned up to there."""
    item, spec = task.item, task.spec
    if item.recording.problem:
        raise SetAside("quarantined" if item.recording.continuous else "excluded", item.recording.problem)
    try:
        raw = read(item.recording)
    except NotContinuous as error:
        raise SetAside("excluded", str(error)) from None
    except ReadError as error:
        raise SetAside("quarantined", str(error)) from None
    sfreq = float(raw.info["sfreq"])
    row |= {"sfreq": sfreq, "seconds": round(raw.n_times / sfreq, 4)}
    if raw.n_times < MIN_SAMPLES:
        raise SetAside("excluded", f"no signal: {raw.n_times} samples")
    channels = pick_channels(raw)
    row |= {
        "channels_by_type": json.dumps(channels.by_type),
        "channels_left_out": json.dumps(channels.left_out),
        "n_eeg": len(channels.names),
        "montage": channels.montage,
        "montage_confidence": channels.confidence,
    }
    if item.reason:
        raise SetAside("excluded", item.reason)
    if not channels.picks:
        others = [n for names in channels.left_out.values() for n in names] or sorted(channels.by_type)
        raise SetAside("excluded", f"no EEG channel: only {', '.join(others[:5])}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x_uv = 1e6 * np.asarray(raw.get_data(picks=np.array(channels.picks), verbose="ERROR"))
    except Exception as error:
        raise SetAside(
            "quarantined", f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    channels, x_uv = _drop_not_finite(channels, x_uv, row)
    known = UNIT_FACTORS.get(item.recording.format, 1.0)
    if known != 1.0:
        x_uv *= known
        row["notes"].append(f"the reader of {item.recording.format} returns values times {1 / known:g}; corrected")
    if item.unit_factor is not None:
        row["notes"].append(f"unit factor {item.unit_factor:g} from the config")
    verdict = assess(x_uv, sfreq, factor=item.unit_factor)
    x_uv *= verdict.factor
    channels, x_uv, bads = _select(channels, x_uv, verdict, row)
    row["unit_factor"] = known * verdict.factor
    prints = verdict.fingerprint
    if prints.shape[1]:
        row["fingerprint"] = hashlib.sha256(np.round(prints, 2).astype(np.float16).tobytes()).hexdigest()
    if len(bads) == len(channels.names):
        kinds = Counter(verdict.bads.values())
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise SetAside("quarantined", f"no usable channel: {text}")
    if verdict.unit == "unknown":
        dead = sum(kind in ("flat", "clipped") for kind in verdict.bads.values())
        if dead > 0.75 * len(verdict.channel_uv):
            raise SetAside(
                "quarantined",
                f"no usable channel: {dead} flat or clipped, the other {len(verdict.channel_uv) - dead} at "
                f"{verdict.amplitude_uv:.3g} microvolts",
            )
        raise SetAside(
            "quarantined",
            f"unit unknown: set aside; the amplitude reads as {verdict.amplitude_uv:.3g} microvolts "
            "(key 'unit_factors' says what it is)",
        )
    row["line_freq"], row["line_freq_from"] = _line(item, raw, x_uv, bads, sfreq)
    try:
        y = preprocess(x_uv, sfreq, spec, line_freq=row["line_freq"], bads=bads)
    except ValueError as error:
        raise SetAside("quarantined", f"cannot be preprocessed: {error}") from None
    if y.shape[-1] < spec.window:
        raise SetAside("excluded", f"too short: {row['seconds']:.2f} s, a window has {spec.window_s:.2f} s")
    _write_windows(task, row, folder, channels, y, bads, gaps(raw))
    np.save(folder / "fingerprint.npy", prints[row.pop("kept_rows")].astype(np.float16))
    if not row["windows"]:
        left = json.loads(row["windows_left_out"])
        raise SetAside("excluded", "no window left: " + ", ".join(f"{n} {why}" for why, n in sorted(left.items())))
    row["status"] = "sharded"


def _drop_not_finite(channels: Channels, x_uv: np.ndarray, row: dict[str, Any]) -> tuple[Channels, np.ndarray]:
    """Leave out channels with NaN or infinities: there is nothing true to put in their place."""
    finite = np.asarray(np.isfinite(x_uv).all(axis=1))
    if finite.all():
        return channels, x_uv
    names = [n for n, good in zip(channels.names, finite, strict=True) if not good]
    if not finite.any():
        raise SetAside("quarantined", "the signal holds NaN or infinite values in every channel")
    row["notes"].append(f"NaN or infinite values, left out: {', '.join(names)}")
    return restrict(channels, np.flatnonzero(finite).tolist(), channels.selection), x_uv[finite]


def _select(
    channels: Channels, x_uv: np.ndarray, verdict: Verdict, row: dict[str, Any]
) -> tuple[Channels, np.ndarray, list[int]]:
    """Limit to 128 channels and fill the row's columns about channels."""
    rows, rule = choose(channels, list(verdict.bads))
    kept = restrict(channels, rows, rule)
    bads = [new for new, old in enumerate(rows) if old in verdict.bads]
    row |= {
        "n_kept": len(rows),
        "channels": kept.names,
        "channel_selection": rule,
        "bads": [f"{kept.names[i]}: {verdict.bads[rows[i]]}" for i in bads],
        "amplitude_uv": round(verdict.amplitude_uv, 4),
        "unit": verdict.unit,
        "kept_rows": rows,
    }
    return kept, x_uv[rows] if len(rows) < len(x_uv) else x_uv, bads


def _line(item: Item, raw: Any, x_uv: np.ndarray, bads: list[int], sfreq: float) -> tuple[float | None, str]:
    if item.line_freq is not None:
        return item.line_freq, "config"
    if raw.info["line_freq"]:
        return float(raw.info["line_freq"]), "file"
    found = line_frequency(x_uv, sfreq, bads)
    return found, "spectrum" if found else "none found"


def _starts(task: Task, n_samples: int, left_out: Counter[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """First sample, split and extra metadata of every window that lies in the recording."""
    item, spec = task.item, task.spec
    if item.trials is None:
        split = task.split.subject(item.subject) if task.split.by_subject else "train"
        for start in window_starts(n_samples, spec):
            yield int(start), split, {}
        return
    number = {name: i for i, name in enumerate(task.labels)}
    for trial in item.trials:
        start = round((trial.onset + item.trial_offset) * spec.sfreq)
        split = task.split.trial(item.subject, trial.image_id, trial.split)
        if split is None:
            left_out["crossed cell of subject split and image split"] += 1
        elif start < 0 or start + spec.window > n_samples:
            left_out["trial beyond the recording"] += 1
        else:
            extra = {"image_id": trial.image_id, "label": number[trial.label_name], "label_name": trial.label_name}
            yield start, split, {**extra, "caption": trial.caption, "image_path": trial.image}


def image_type(data: bytes) -> str | None:
    """Extension of an image by its first bytes.

    Parameters
    ----------
    data : bytes
        The file.

    Returns
    -------
    str or None
        jpg, png or webp; None for anything else.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def gaps(raw: Any) -> np.ndarray:
    """Places where a recording was interrupted, as its own annotations say.

    Parameters
    ----------
    raw : mne.io.BaseRaw
        The recording.

    Returns
    -------
    ndarray, shape (n_gaps, 2)
        Begin and end in seconds from the recording's start; equal where the signal was cut out.
    """
    found = []
    first = raw.first_time if raw.annotations.orig_time is not None else 0.0
    for annotation in raw.annotations:
        onset = float(annotation["onset"]) - first
        if onset > 0.5 / raw.info["sfreq"] and GAP.match(annotation["description"]):
            found.append((onset, onset + float(annotation["duration"])))
    return np.array(found, float).reshape(-1, 2)


def _write_windows(
    task: Task, row: dict[str, Any], folder: Path, channels: Channels, y: np.ndarray, bads: list[int], cuts: np.ndarray
) -> None:
    item, spec = task.item, task.spec
    left_out: Counter[str] = Counter()
    written: Counter[str] = Counter()
    # Windows may overlap: what counts as written is the signal that they cover.
    covered = np.zeros(y.shape[-1], bool)
    good = np.setdiff1d(np.arange(len(y)), bads)
    base = {
        "n": len(channels.names),
        "ch_names": channels.names,
        "positions": channels.positions,
        "reference": "average" if spec.reference == "average" else "recorded",
        "sfreq": spec.sfreq,
        "recording": item.key,
        "subject": item.subject,
        "session": item.session,
        "corpus": item.corpus,
        "bads": [channels.names[i] for i in bads],
    }
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for count, (start, split, extra) in enumerate(_starts(task, y.shape[-1], left_out)):
            window = y[:, start : start + spec.window]
            if ((cuts[:, 0] < (start + spec.window) / spec.sfreq) & (cuts[:, 1] > start / spec.sfreq)).any():
                left_out["over a gap in the recording"] += 1
                continue
            if np.abs(window).max() > FLOAT16_MAX_UV:
                left_out["beyond float16 microvolts"] += 1
                continue
            if not np.ptp(window[good], axis=1).any():
                left_out["flat in every good channel"] += 1
                continue
            image, kind = None, "png"
            if path := extra.pop("image_path", None):
                image = Path(path).read_bytes()
                if (found := image_type(image)) is None:
                    left_out["image is neither jpg, png nor webp"] += 1
                    continue
                kind = found
            meta = {**base, "start": round(start / spec.sfreq, 6), "split": split, **extra}
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(folder / f"{split}.tar"))
            writers[split].write(
                Sample(key=f"{item.key}-{count:06d}", eeg=window, meta=meta, image=image, image_ext=kind)
            )
            written[split] += 1
            covered[start : start + spec.window] = True
    row["seconds_written"] = round(float(covered.sum()) / spec.sfreq, 4)
    row["windows"] = sum(written.values())
    row["windows_left_out"] = json.dumps(dict(sorted(left_out.items())))
    row["split_samples"] = {split: written[split] for split in SPLITS if written[split]}
    row["split"] = "+".join(row["split_samples"])


def run_in_worker(task: Task) -> dict[str, Any]:
    """Body of the Ray task: one thread, one recording, metadata back.

    Parameters
    ----------
    task : Task
        What to do.

    Returns
    -------
    dict
        See `process_recording`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    return process_recording(task)
