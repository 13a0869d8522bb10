"""Find leakage: subjects, recordings, windows and images that are in two datasets, or in two splits of a dataset.

The following rules decide when two subjects, recordings, windows or images are the same:

- **Subject**: same corpus and same name. A recording with an unknown subject counts as a separate subject. Equal names
  in two corpora are not a proof of leakage, but a question for the user, because "sub-01" is usually a different person
  in each corpus.
- **Recording**: equal bytes (checksum over all files), the same signal (`data_sharding.audit.duplicates`), or the same
  key. Two recordings with the same key but different checksums are not a proof of leakage, but a question for the user.
- **Window**: equal values, or overlapping times in a shared recording. Times are compared because different
  preprocessing gives different values for the same second of a recording.
- **Image**: equal bytes, similar pixels (`find_similar_images` in `data_sharding.audit.fingerprints`), or the same name
  in the same corpus.

Each finding is either a proof of leakage or a question that a person must answer. For example, a finding is a question
if only the names are equal, or if the config of the dataset allows a subject or image in several splits.

In array shapes, `W` is the number of windows of a dataset, and `R` the number of recordings.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from data_sharding.audit.duplicates import HOW, find_duplicates, find_matches
from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.fingerprints import (
    Fingerprints,
    ImageFingerprint,
    find_similar_images,
    fingerprint_image,
    window_digest,
)
from data_sharding.common.cores import count_cores
from data_sharding.common.errors import RequestError
from data_sharding.common.progress import progress
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.common.untrusted import check_meta, parse_json
from data_sharding.corpora.naming import find_look_alikes
from data_sharding.dataset.ledger import NAME as LEDGER
from data_sharding.dataset.ledger import LedgerRow, read_ledger
from data_sharding.dataset.manifest import Manifest, Shard, current_file
from data_sharding.dataset.samples import IMAGE_EXTENSIONS, decode_eeg
from data_sharding.dataset.shard_reader import read_entries
from data_sharding.dataset.splits import SPLITS
from data_sharding.processing.preprocess import PreprocessSpec

Kind = Literal["subject", "recording", "window", "image"]
KINDS: tuple[Kind, ...] = ("subject", "recording", "window", "image")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One subject, recording, image or group of windows that is in two datasets or in two splits."""

    kind: Kind
    """Kind of the shared data: subject, recording, window or image."""
    text: str
    """Text of one line that says which subject, recording, windows or image are shared."""
    proof: bool = True
    """True if the finding is a proof of leakage. False if the finding is a question for a person, for example because
    only the names are equal, or because the config of the dataset allows the subject or image in several splits."""


@dataclass(kw_only=True)
class Findings:
    """Result of a comparison of two datasets, or of the splits of one dataset."""

    found: list[Finding] = field(default_factory=list)
    """Findings of all kinds: proofs and questions."""
    compared: list[str] = field(default_factory=list)
    """Description of each comparison that was made."""
    not_compared: list[str] = field(default_factory=list)
    """Description of each comparison that could not be made, with the reason."""
    to_confirm: list[str] = field(default_factory=list)
    """A text for each dataset in which subjects were recognised from the paths, but not confirmed in the config."""

    @property
    def proofs(self) -> list[Finding]:
        """The findings that prove leakage."""
        return [finding for finding in self.found if finding.proof]


@dataclass(frozen=True, kw_only=True)
class ImageUse:
    """An image of a dataset, and the splits that contain trials with this image."""

    corpus: str
    """Corpus of the image."""
    image_id: str
    """Name of the image in the corpus."""
    fingerprint: ImageFingerprint
    """Fingerprint of the image."""
    splits: tuple[str, ...]
    """Splits that contain trials with this image."""


@dataclass(kw_only=True)
class Contents:
    """Contents of a dataset that are needed to compare the dataset with others."""

    name: str
    """Path of the dataset as the user wrote it."""
    manifest: Manifest
    """Manifest of the dataset."""
    rows: dict[str, LedgerRow]
    """Ledger rows by key; empty if the dataset has no ledger."""
    fingerprints: Fingerprints | None
    """Fingerprints of the recordings; None if the dataset has no fingerprints file."""
    recordings: list[str]
    """Keys of the `R` recordings that have windows in the dataset."""
    people: list[tuple[str, str]]
    """Corpus and subject of each of the `R` recordings."""
    recording: np.ndarray = field(repr=False)
    """Recording of each of the `W` windows, as an index into `recordings`."""
    split: np.ndarray = field(repr=False)
    """Split of each of the `W` windows, as an index into `SPLITS`."""
    start: np.ndarray = field(repr=False)
    """Start of each of the `W` windows, in seconds from the beginning of the recording. For a trial, the window is the
    part that models read by default."""
    stored: np.ndarray = field(repr=False)
    """Start and length in seconds of the whole stored signal of each window, shape (W, 2). The stored signal of a trial
    can include a baseline."""
    digest: np.ndarray = field(repr=False)
    """Checksum of each of the `W` windows (`data_sharding.audit.fingerprints.window_digest`); empty if the windows were
    not decoded."""
    images: list[ImageUse] = field(repr=False)
    """Images of the dataset; an image with two names has two entries."""
    concepts: dict[str, set[str]] = field(default_factory=dict, repr=False)
    """For each concept, the splits that contain trials with an image of the concept."""
    _order: np.ndarray | None = field(default=None, init=False, repr=False)
    _bounds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), init=False, repr=False)

    @classmethod
    def read(cls, dataset: str | AnyPath, *, windows: bool = True) -> Contents:
        """Read the contents of a whole dataset.

        Parameters
        ----------
        dataset : str, Path or UPath
            Directory of the dataset.
        windows : bool
            Whether to decode the windows and to compute their checksums.

        Returns
        -------
        Contents
            Contents of the dataset.

        Raises
        ------
        RequestError
            If the directory is not a complete dataset, or if a shard or an index is missing or damaged.
        """
        root = as_path(dataset)
        manifest = Manifest.read(root)
        rows = {row.key: row for row in read_ledger(root)} if current_file(root, LEDGER).is_file() else {}
        keys: dict[str, int] = {}
        people: list[tuple[str, str]] = []
        columns: list[list[tuple[int, int, float, int, float, float]]] = []
        fingerprints: dict[str, ImageFingerprint] = {}
        uses: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
        concepts: defaultdict[str, set[str]] = defaultdict(set)
        jobs = [(split, shard) for split, shards in manifest.splits.items() for shard in shards if shard.served]

        def read_shard(job: tuple[str, Shard]) -> list[tuple[_Sample, str]]:
            out = []
            for sample, image in _read_samples(root, job[1], manifest.preprocess, windows):
                sha = ""
                if image is not None:
                    sha = hashlib.sha256(image).hexdigest()
                    if sha not in fingerprints:
                        fingerprints[sha] = fingerprint_image(image, sha)
                out.append((sample, sha))
            return out

        with (
            progress(f"reading {root}", len(jobs)) as advance,
            ThreadPoolExecutor(min(8, count_cores())) as pool,
        ):
            for (split, _), samples in zip(jobs, pool.map(read_shard, jobs), strict=True):
                place = SPLITS.index(split)
                column = []
                for sample, sha in samples:
                    if sample.recording not in keys:
                        keys[sample.recording] = len(people)
                        people.append((sample.corpus, sample.subject))
                    where = sample.stored_start, sample.stored_length
                    column.append((keys[sample.recording], place, sample.start, sample.digest, *where))
                    if sha:
                        uses[sample.corpus, sample.image_id, sha].add(split)
                    if sample.concept:
                        concepts[sample.concept].add(split)
                columns.append(column)
                advance(1)
        flat = [window for column in columns for window in column]
        return cls(
            name=str(dataset),
            manifest=manifest,
            rows=rows,
            fingerprints=Fingerprints(root) if current_file(root, FINGERPRINTS).is_file() else None,
            recordings=list(keys),
            people=people,
            recording=np.array([w[0] for w in flat], np.int64),
            split=np.array([w[1] for w in flat], np.int8),
            start=np.array([w[2] for w in flat], float),
            stored=np.array([w[4:] for w in flat], float).reshape(-1, 2),
            digest=np.array([w[3] for w in flat] if windows else [], np.uint64),
            images=[
                ImageUse(
                    corpus=c, image_id=i, fingerprint=fingerprints[sha], splits=tuple(s for s in SPLITS if s in where)
                )
                for (c, i, sha), where in sorted(uses.items())
            ],
            concepts=dict(concepts),
        )

    def checksums(self) -> dict[str, str]:
        """Return a dictionary from checksums to the keys of the recordings in the dataset.

        For the checksum of a duplicate, the value is the key of the recording that was kept.
        """
        present = set(self.recordings)
        kept = {row.sha256: key if key in present else row.duplicate_of for key, row in self.rows.items()}
        return {sha: key for sha, key in kept.items() if sha and key in present}

    def windows_of(self, number: int) -> np.ndarray:
        """Find the windows of a recording.

        Parameters
        ----------
        number : int
            Index of the recording in `recordings`.

        Returns
        -------
        ndarray of int
            Indices of the windows in `start`, and in all other arrays with one entry for each window.
        """
        if self._order is None:
            self._order = np.argsort(self.recording, kind="stable")
            self._bounds = np.searchsorted(self.recording[self._order], np.arange(len(self.recordings) + 1))
        return self._order[self._bounds[number] : self._bounds[number + 1]]

    def known_subjects(self) -> set[tuple[str, str]]:
        """Return corpus and name of each subject with a known name (not empty, and not the key of the recording)."""
        return {(c, s) for (c, s), key in zip(self.people, self.recordings, strict=True) if s and s != key}

    def count_unnamed(self) -> int:
        """Count the recordings whose subject is unknown."""
        return sum(s in ("", key) for (_, s), key in zip(self.people, self.recordings, strict=True))

    def count_recognised(self) -> int:
        """Count the recordings whose subject was recognised from the path, but not confirmed in the config."""
        return sum(key in self.rows and self.rows[key].subject_from == "recognised" for key in self.recordings)


class _Sample(NamedTuple):
    """Data of a window that the comparison needs. To save memory, the other metadata of the window are not stored."""

    recording: str
    corpus: str
    subject: str
    start: float
    stored_start: float
    stored_length: float
    image_id: str
    concept: str
    digest: int


def _read_samples(
    root: AnyPath, shard: Shard, spec: PreprocessSpec, windows: bool
) -> Iterator[tuple[_Sample, bytes | None]]:
    """Yield each sample of a shard and the bytes of its image (None without an image); skip withdrawn samples."""
    tar = root / shard.path

    def window(data: bytes, meta: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
        begin = max(meta.get("onset", 0), 0)
        return decode_eeg(data, meta["n"], entry.get("samples", spec.window))[:, begin : begin + spec.window]

    try:
        with tar.open("rb") as stream:
            entries = read_entries(tar.with_suffix(".idx"), tar.stat().st_size)
            for entry in itertools.compress(entries, shard.mask()):
                members: dict[str, list[int]] = entry["members"]

                def member(name: str, members: dict[str, list[int]] = members) -> bytes:
                    offset, size = members[name]
                    stream.seek(offset)
                    return stream.read(size)

                meta = check_meta(parse_json(member("json")))
                # Use only the part of a trial that models read by default, because the baselines of consecutive trials
                # can overlap.
                begin = max(int(meta.get("onset", 0)), 0)
                first = float(meta.get("start", 0.0))
                sample = _Sample(
                    recording=str(meta.get("recording", "")),
                    corpus=str(meta.get("corpus", "")),
                    subject=str(meta.get("subject", "")),
                    start=first + begin / spec.sfreq,
                    stored_start=first,
                    stored_length=int(entry.get("samples", spec.window)) / spec.sfreq,
                    image_id=str(meta.get("image_id", "")),
                    concept=str(meta.get("concept", "")),
                    digest=window_digest(window(member("eeg.npy.zst"), meta, entry)) if windows else 0,
                )
                image = next((f"image.{ext}" for ext in IMAGE_EXTENSIONS if f"image.{ext}" in members), None)
                yield sample, member(image) if image else None
    except Exception as error:
        # Reading a damaged shard can raise errors of many types, so catch all of them.
        why = f"cannot be read ({error}); run 'dreamscale verify {root}' to see what is damaged"
        raise RequestError(f"{tar}: {why}") from None


def _match_values(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices in `a` of those values that are also in `b`, and for each such value an index in `b`."""
    if not len(a) or not len(b):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order_a, order_b = np.argsort(a), np.argsort(b, kind="stable")
    place = np.searchsorted(b[order_b], a[order_a]).clip(max=len(b) - 1)
    hit = b[order_b[place]] == a[order_a]
    found = np.argsort(order_a[hit])
    return order_a[hit][found], order_b[place[hit]][found]


def _overlaps(a: np.ndarray, length_a: Any, b: np.ndarray, length_b: Any) -> np.ndarray:
    """Return a mask of a first group of windows: True if a window overlaps in time with a window of a second group.

    `a` and `b` are the start times of the windows of the two groups, and `length_a` and `length_b` the lengths of these
    windows, in seconds. Each length is one number for the whole group, or an array with one number for each window.
    """
    if not len(a) or not len(b):
        return np.zeros(len(a), bool)
    order = np.argsort(b)
    ends = np.maximum.accumulate((b + length_b)[order])
    # For each window of the first group, find the last window of the second group that starts before the window of the
    # first group ends. Start times of windows are rounded, so use a tolerance.
    last = np.searchsorted(b[order], a + length_a - 1e-4) - 1
    return (last >= 0) & (ends[np.maximum(last, 0)] > a + 1e-4)


def _windows(number: int) -> str:
    return f"{number} window{'s' * (number != 1)}"


def _say_overlap(hit: np.ndarray) -> str:
    return "overlaps" if hit.sum() == 1 else "overlap"


def _times(starts: np.ndarray) -> str:
    shown = ", ".join(f"{t:.2f}" for t in np.sort(starts)[:3])
    return f"at {shown}{' ...' if len(starts) > 3 else ''} s"


def compare_datasets(a: Contents, b: Contents) -> Findings:
    """Find subjects, recordings, windows and images that are in two datasets.

    Parameters
    ----------
    a, b : Contents
        Contents of the two datasets. The datasets may have different preprocessing.

    Returns
    -------
    Findings
        Proofs of leakage, questions for a person, and lists of the comparisons that were made or not possible.
    """
    out = Findings()
    _compare_subjects(a, b, out)
    pairs = _compare_recordings(a, b, out)
    _compare_windows(a, b, pairs, out)
    _compare_images(a, b, out)
    return out


def _compare_subjects(a: Contents, b: Contents, out: Findings) -> None:
    ours, theirs = a.known_subjects(), b.known_subjects()
    out.compared.append(f"subjects by corpus and name: {len(ours)} with {len(theirs)}")
    for corpus, subject in sorted(ours & theirs):
        out.found.append(Finding(kind="subject", text=f"subject {subject} of corpus {corpus} is in both"))
    where: defaultdict[str, list[str]] = defaultdict(list)
    for corpus, subject in theirs:
        where[subject].append(corpus)
    for corpus, subject in sorted(ours - theirs):
        if others := sorted(set(where[subject]) - {corpus}):
            text = f"same name: subject {subject} of corpus {corpus}, and of {', '.join(others)} in the other dataset"
            out.found.append(Finding(kind="subject", text=text, proof=False))
    for contents in (a, b):
        _report_unnamed(contents, out)


def _report_unnamed(contents: Contents, out: Findings) -> None:
    if unnamed := contents.count_unnamed():
        text = f"subjects of {unnamed} recordings of {contents.name}: the subjects are unknown"
        out.not_compared.append(f"{text}; set the key 'subject_pattern' or 'subjects'")
    if recognised := contents.count_recognised():
        text = f"subjects of {recognised} recordings of {contents.name}: their names were recognised from the paths"
        out.to_confirm.append(f"{text}; confirm the names with the key 'subject_pattern' or 'subjects'")
    names = {subject for _, subject in contents.known_subjects()}
    for group in find_look_alikes(names):
        text = f"the names {', '.join(group)} in {contents.name}: are they one person?"
        out.found.append(Finding(kind="subject", text=text, proof=False))


def _compare_recordings(a: Contents, b: Contents, out: Findings) -> list[tuple[str, str]]:
    """Add findings about recordings to `out`. Return, for each shared recording, its key in `a` and its key in `b`."""
    pairs: dict[tuple[str, str], str] = {}
    sums_a, sums_b = a.checksums(), b.checksums()
    for sha in sums_a.keys() & sums_b.keys():
        pairs[sums_a[sha], sums_b[sha]] = "equal bytes"
    for contents in (a, b):
        if not contents.rows:
            out.not_compared.append(f"recordings by checksum: {contents.name} has no {LEDGER}")
        if contents.fingerprints is None:
            out.not_compared.append(f"recordings by signal: {contents.name} has no {FINGERPRINTS}")
    if sums_a and sums_b:
        out.compared.append(f"recordings by checksum of their files: {len(sums_a)} with {len(sums_b)}")
    if a.fingerprints and b.fingerprints:
        ours, theirs = a.fingerprints.recordings, b.fingerprints.recordings
        out.compared.append(f"recordings by signal: {len(ours)} with {len(theirs)}")
        for i, j, relation in find_matches(ours, theirs, a.fingerprints.load, b.fingerprints.load):
            pairs.setdefault((ours[i].key, theirs[j].key), HOW[relation])
    for key in sorted(set(a.recordings) & set(b.recordings)):
        ours, theirs = a.rows.get(key), b.rows.get(key)
        if (key, key) in pairs:
            continue
        if ours and theirs and ours.sha256 != theirs.sha256:
            text = f"same name: recording {key}; the files differ"
            out.found.append(Finding(kind="recording", text=text, proof=False))
        else:
            pairs[key, key] = "same corpus and path"
    for (one, other), how in sorted(pairs.items()):
        who = one if one == other else f"{one} here is {other} there"
        out.found.append(Finding(kind="recording", text=f"recording {who}: {how}"))
    return list(pairs)


def _compare_windows(a: Contents, b: Contents, pairs: Sequence[tuple[str, str]], out: Findings) -> None:
    spec_a, spec_b = a.manifest.preprocess, b.manifest.preprocess
    equal_a, equal_b = _match_values(a.digest, b.digest)
    out.compared.append(f"windows by content: {len(a.digest)} with {len(b.digest)}")
    if spec_a.digest() != spec_b.digest():
        x, y = spec_a.to_dict(), spec_b.to_dict()
        other = ", ".join(sorted(k for k in x.keys() | y.keys() if x.get(k) != y.get(k)))
        out.not_compared.append(
            f"windows by content cannot be compared completely, because the preprocessing differs ({other}); "
            "windows of shared recordings are compared by time"
        )
    if len(equal_a):
        groups: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for i, j in zip(equal_a, equal_b, strict=True):
            groups[a.recordings[a.recording[i]], b.recordings[b.recording[j]]].append(float(a.start[i]))
        for (one, other), starts in sorted(groups.items()):
            text = f"{_windows(len(starts))} of {one} equal to windows of {other}, {_times(np.array(starts))}"
            out.found.append(Finding(kind="window", text=text))
    number_a, number_b = ({key: i for i, key in enumerate(c.recordings)} for c in (a, b))
    for one, other in sorted(pairs):
        if one in number_a and other in number_b:
            x, y = a.start[a.windows_of(number_a[one])], b.start[b.windows_of(number_b[other])]
            hit = _overlaps(x, spec_a.window_s, y, spec_b.window_s)
            if hit.any():
                count = f"{int(hit.sum())} of {_windows(len(x))} of {one}"
                text = f"{count} {_say_overlap(hit)} in time with {other}, {_times(x[hit])}"
                out.found.append(Finding(kind="window", text=text))
    if pairs:
        out.compared.append(f"windows by time, of {len(pairs)} shared recordings")


def find_shared_windows(a: Contents, b: Contents, *, same_recording: bool = True) -> np.ndarray:
    """Return a mask of the windows of `b`, True where a window equals, or overlaps in time with, a window of `a`."""
    found = np.zeros(len(b.recording), bool)
    found[_match_values(b.digest, a.digest)[0]] = True
    number_a, number_b = ({key: i for i, key in enumerate(c.recordings)} for c in (a, b))
    lengths = b.manifest.preprocess.window_s, a.manifest.preprocess.window_s
    for one, other in _compare_recordings(a, b, Findings()):
        # If `same_recording` is False, compare times only if the recording's keys in `a` and `b` differ.
        if one in number_a and other in number_b and (same_recording or one != other):
            mine = b.windows_of(number_b[other])
            start = a.start[a.windows_of(number_a[one])]
            found[mine] |= _overlaps(b.start[mine], lengths[0], start, lengths[1])
    return found


def _compare_images(a: Contents, b: Contents, out: Findings) -> None:
    if not a.images or not b.images:
        return
    out.compared.append(f"images by name, bytes and pixels: {len(a.images)} with {len(b.images)}")
    _report_unreadable_images(out, a, b)
    reported: set[tuple[int, int]] = set()
    for i, j in find_similar_images([u.fingerprint for u in a.images], [u.fingerprint for u in b.images]):
        x, y = a.images[i], b.images[j]
        reported.add((i, j))
        how = "equal bytes" if x.fingerprint.sha256 == y.fingerprint.sha256 else "the same image, encoded again"
        out.found.append(Finding(kind="image", text=f"image {_image(x)} here is {_image(y)} there: {how}"))
    named: defaultdict[str, list[int]] = defaultdict(list)
    of_sha: defaultdict[str, list[int]] = defaultdict(list)
    for j, use in enumerate(b.images):
        named[use.image_id].append(j)
        of_sha[use.fingerprint.sha256].append(j)
    for i, use in enumerate(a.images):
        for j in of_sha[use.fingerprint.sha256]:
            if (i, j) not in reported:
                reported.add((i, j))
                text = f"image {_image(use)} here is {_image(b.images[j])} there: equal bytes"
                out.found.append(Finding(kind="image", text=text))
        for j in named[use.image_id]:
            other = b.images[j]
            if (i, j) not in reported and use.image_id:
                same = use.corpus == other.corpus
                text = f"image {_image(use)} here, {_image(other)} there; the contents differ"
                text = text if same else f"same name: {text}"
                out.found.append(Finding(kind="image", text=text, proof=same))


def _image(use: ImageUse) -> str:
    return f"{use.corpus}/{use.image_id or use.fingerprint.sha256[:12]}"


def _report_unreadable_images(out: Findings, *contents: Contents) -> None:
    for each in contents:
        if unreadable := sum(use.fingerprint.phash is None for use in each.images):
            out.not_compared.append(f"{unreadable} images of {each.name} by pixels: Pillow cannot open these images")


def holds_out_subjects(manifest: Manifest) -> bool:
    """Return whether the config of a dataset holds out subjects; True if the config has no section `split`."""
    return not _allowed_crossings(manifest)[0]


def _allowed_crossings(manifest: Manifest) -> tuple[bool, bool]:
    """Return whether the config allows subjects in several splits, and whether it allows images in several splits."""
    split = manifest.config.get("split")
    if not split:
        return False, False
    subjects = any(split.get(k) for k in ("val_subjects", "test_subjects", "val_fraction", "test_fraction"))
    images = any(split.get(k) for k in ("image_val_fraction", "image_test_fraction"))
    return not subjects, not images


def compare_splits(contents: Contents) -> Findings:
    """Find subjects, recordings, windows and images that are in two splits of a dataset.

    Parameters
    ----------
    contents : Contents
        Contents of the dataset.

    Returns
    -------
    Findings
        Proofs of leakage, and questions for a person to answer. Two windows in different splits always prove leakage if
        they are equal, or if the parts that models read by default overlap in time. A subject in several splits is a
        question, and not a proof, if the config does not hold out subjects. An image in several splits is a question if
        the config does not hold out images.
    """
    out = Findings()
    free_subjects, free_images = _allowed_crossings(contents.manifest)
    there = [split for split in SPLITS if contents.manifest.samples(split)]
    known, unnamed = len(contents.known_subjects()), contents.count_unnamed()
    out.compared.append(
        f"{', '.join(there)}: {len(contents.recordings)} recordings of {known} subjects"
        + (f" and of unknown subjects ({unnamed} recordings), " if unnamed else ", ")
        + f"{len(contents.split)} windows, {len(contents.images)} images"
    )
    of_subject: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    of_recording: defaultdict[int, set[int]] = defaultdict(set)
    codes = np.sort(contents.recording * len(SPLITS) + contents.split)
    for code in codes[np.diff(codes, prepend=-1) > 0]:
        recording, split = divmod(int(code), len(SPLITS))
        of_recording[recording].add(split)
        of_subject[contents.people[recording]].add(split)
    allowed = " (the config does not hold subjects out)" if free_subjects else ""
    for (corpus, subject), places in sorted(of_subject.items()):
        if len(places) > 1 and (corpus, subject) in contents.known_subjects():
            text = f"subject {subject} of corpus {corpus} is in {_names(places)}{allowed}"
            out.found.append(Finding(kind="subject", text=text, proof=not free_subjects))
    for number, places in sorted(of_recording.items()):
        if len(places) > 1:
            text = f"recording {contents.recordings[number]} is in {_names(places)}{allowed}"
            out.found.append(Finding(kind="recording", text=text, proof=not free_subjects))
    _report_unnamed(contents, out)
    _question_two_names(contents, of_subject, out)
    _compare_recordings_of_splits(contents, of_recording, out)
    _compare_windows_of_splits(contents, of_recording, out)
    _compare_images_of_splits(contents, free_images, out)
    return out


def _question_two_names(contents: Contents, of_subject: dict[tuple[str, str], set[int]], out: Findings) -> None:
    """Ask whether two subjects are one person, if they have copies of one recording and are in different splits."""
    asked: set[frozenset[tuple[str, str]]] = set()
    for row in contents.rows.values():
        kept = contents.rows.get(row.duplicate_of)
        if kept is None or not row.has_subject or not kept.has_subject:
            continue
        pair = frozenset({(row.corpus, row.subject), (kept.corpus, kept.subject)})
        places = [of_subject.get(person, set()) for person in sorted(pair)]
        if pair in asked or len(pair) < 2 or not all(places) or len(set().union(*places)) < 2:
            continue
        asked.add(pair)
        names = " and ".join(f"{subject} of corpus {corpus}" for corpus, subject in sorted(pair))
        text = f"{names} have copies of one recording, and are in {_names(set().union(*places))}: are they one person?"
        out.found.append(Finding(kind="subject", text=text, proof=False))


def _names(places: set[int]) -> str:
    return " and ".join(SPLITS[p] for p in sorted(places))


def _compare_recordings_of_splits(contents: Contents, of_recording: dict[int, set[int]], out: Findings) -> None:
    if contents.fingerprints is None:
        out.not_compared.append(f"recordings by signal: there is no {FINGERPRINTS}")
        return
    number = {key: i for i, key in enumerate(contents.recordings)}
    twice = find_duplicates(contents.fingerprints.recordings, contents.fingerprints.load)
    for key, copy in sorted(twice.items(), key=lambda pair: pair[0]):
        if key in number and copy.kept in number:
            places = of_recording[number[key]] | of_recording[number[copy.kept]]
            words = f"recording {key} is a copy of {copy}; they are in {_names(places)}"
            out.found.append(Finding(kind="recording", text=words, proof=len(places) > 1))
    out.compared.append(f"recordings by signal: {len(contents.fingerprints.recordings)} with one another")


def _compare_windows_of_splits(contents: Contents, of_recording: dict[int, set[int]], out: Findings) -> None:
    length = contents.manifest.preprocess.window_s
    order = np.argsort(contents.digest, kind="stable")
    equal = np.flatnonzero(contents.digest[order][1:] == contents.digest[order][:-1]) if len(order) else order
    groups: Counter[tuple[int, int, int, int]] = Counter()
    for i, j in zip(order[equal], order[equal + 1], strict=True):
        ends = sorted((int(contents.split[k]), int(contents.recording[k])) for k in (i, j))
        groups[(*ends[0], *ends[1])] += 1
    for (split, one, where, other), count in sorted(groups.items()):
        text = (
            f"{_windows(count)} of {contents.recordings[one]} ({SPLITS[split]}) equal to windows of "
            f"{contents.recordings[other]} ({SPLITS[where]})"
        )
        out.found.append(Finding(kind="window", text=text, proof=split != where))
    for number, places in sorted(of_recording.items()):
        if len(places) < 2:
            continue
        mine = contents.windows_of(number)
        for p, q in combinations(sorted(places), 2):
            x, y = (contents.start[mine[contents.split[mine] == s]] for s in (p, q))
            hit = _overlaps(x, length, y, length)
            if hit.any():
                text = (
                    f"{_windows(int(hit.sum()))} of {contents.recordings[number]} in {SPLITS[p]} "
                    f"{_say_overlap(hit)} in time with windows in {SPLITS[q]}, {_times(x[hit])}"
                )
                out.found.append(Finding(kind="window", text=text))
            (x, long_x), (y, long_y) = (contents.stored[mine[contents.split[mine] == s]].T for s in (p, q))
            only_outside = _overlaps(x, long_x, y, long_y) & ~hit
            if only_outside.any():
                text = (
                    f"{_windows(int(only_outside.sum()))} of {contents.recordings[number]} in {SPLITS[p]} "
                    f"{_say_overlap(only_outside)} in time with windows in {SPLITS[q]} only before or after the part "
                    f"that models read by default, {_times(x[only_outside])}"
                )
                out.found.append(Finding(kind="window", text=text, proof=False))
    out.compared.append(f"windows by content and by time: {len(contents.split)}")


def _compare_images_of_splits(contents: Contents, allowed: bool, out: Findings) -> None:
    if not contents.images:
        return
    _report_unreadable_images(out, contents)
    why = " (the config does not hold images out)" if allowed else ""
    uses = contents.images
    for use in uses:
        if len(use.splits) > 1:
            text = f"image {_image(use)} is in {' and '.join(use.splits)}{why}"
            out.found.append(Finding(kind="image", text=text, proof=not allowed))
    fingerprints = [use.fingerprint for use in uses]
    for i, j in find_similar_images(fingerprints, fingerprints):
        if i < j and set(uses[i].splits) != set(uses[j].splits):
            how = "equal bytes" if fingerprints[i].sha256 == fingerprints[j].sha256 else "the same image, encoded again"
            text = (
                f"image {_image(uses[i])} ({' and '.join(uses[i].splits)}) is {_image(uses[j])} "
                f"({' and '.join(uses[j].splits)}): {how}{why}"
            )
            out.found.append(Finding(kind="image", text=text, proof=not allowed))
    out.compared.append(f"images by name, bytes and pixels: {len(uses)}")
    if (contents.manifest.config.get("split") or {}).get("by") == "concept":
        for concept, splits in sorted(contents.concepts.items()):
            if len(splits) > 1:
                where = " and ".join(s for s in SPLITS if s in splits)
                out.found.append(Finding(kind="image", text=f"concept {concept} is in {where}"))
        out.compared.append(f"concepts of images: {len(contents.concepts)}")
