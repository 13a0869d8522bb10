"""Hold benchmarks back: leave their data out of a dataset, so that a pretrained model can be tested on the benchmarks.

The key `hold_back` of the config lists subjects, recordings and whole datasets, or text files that list subjects,
recordings and checksums. All names and patterns are looked up in the corpora before any recording is read. If a name or
pattern matches nothing, the job stops with an error, because a typing error must not let a benchmark into the training
data. Recordings that are held back are read and fingerprinted like all other recordings. Thus a copy of a benchmark
recording, under another name or in another format, is found and held back too.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_sharding.audit.duplicates import HOW, RecordingFingerprint, find_matches
from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import as_path
from data_sharding.common.untrusted import MAX_IMAGE, read_limited
from data_sharding.dataset.ledger import LedgerRow

if TYPE_CHECKING:
    from data_sharding.audit.leakage import Contents
    from data_sharding.corpora import Item

IMAGE_REASON = "image is held back"
"""Reason in the ledger column ``windows_left_out`` for trials with an image that is held back."""


@dataclass(frozen=True, kw_only=True)
class HoldBackConfig:
    """Recordings, subjects and images of benchmarks, which must not be in the dataset."""

    subjects: list[str] = field(default_factory=list)
    """Names of subjects, as they are in the paths of the files (sub-11 or 11). SUBJECT means the subjects with this
    name in every corpus; CORPUS/SUBJECT means the subject of one corpus only."""
    recordings: list[str] = field(default_factory=list)
    """Glob patterns that are matched against CORPUS/PATH of each recording, where PATH is relative to the root folder
    of the corpus."""
    lists: list[str] = field(default_factory=list)
    """Paths of text files. Each line of a file is ``subject NAME``, ``recording GLOB`` or ``sha256 HEX``; # begins a
    comment."""
    datasets: list[str] = field(default_factory=list)
    """Folders of datasets from ``dreamscale shard``. All recordings, subjects and images of these datasets are held
    back."""

    def __bool__(self) -> bool:
        return bool(self.subjects or self.recordings or self.lists or self.datasets)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a hold-back list: a subject, a pattern of recordings or a checksum."""

    kind: Literal["subject", "recording", "sha256"]
    """Kind of `value`: the name of a subject, a glob pattern or a checksum."""
    value: str
    """Name of a subject, glob pattern of recordings, or checksum over all files of a recording."""
    source: str
    """Where the entry is written, for messages: a key of the config, or the name of a list file and a line number."""


def read_list(path: str) -> list[Entry]:
    """Read a text file that lists subjects, recordings and checksums to hold back.

    Parameters
    ----------
    path : str
        Path of the text file.

    Returns
    -------
    list of Entry
        One entry for each line in the order of the file. Empty lines and comments have no entry.

    Raises
    ------
    RequestError
        If the file cannot be read, or if a line is not ``subject NAME``, ``recording GLOB`` or ``sha256 HEX``.
    """
    file = as_path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"hold_back.lists '{path}': cannot be read ({error}); correct the key, or repair the file"
        ) from None
    entries = []
    for number, line in enumerate(lines, start=1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        kind, _, value = text.partition(" ")
        value = value.strip()
        where = f"{file.name}, line {number}"
        if kind not in ("subject", "recording", "sha256") or not value:
            raise RequestError(
                f"hold_back.lists '{path}', line {number}: '{text}' is not understood; write 'subject NAME', "
                "'recording GLOB' or 'sha256 HEX'"
            )
        if kind == "sha256" and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise RequestError(
                f"hold_back.lists '{path}', line {number}: '{value}' is not a SHA-256 checksum; "
                "write 64 hexadecimal digits"
            )
        entries.append(Entry(kind=kind, value=value.lower() if kind == "sha256" else value, source=where))  # type: ignore[arg-type]
    return entries


def _bare(subject: str) -> str:
    return subject.removeprefix("sub-")


class _Names:
    """Keys of the recordings, indexed by subject and by path, so that many names can be looked up quickly."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.subjects: defaultdict[str, list[str]] = defaultdict(list)
        self.paths: defaultdict[str, list[str]] = defaultdict(list)
        for item in items:
            if item.subject != item.key:  # A recording with an unknown subject has its own key as its subject.
                for name in {_bare(item.subject), f"{item.corpus}/{_bare(item.subject)}"}:
                    self.subjects[name].append(item.key)
            # Every recording can be named by CORPUS/PATH. If PATH itself begins with the name of the corpus, the
            # recording can be named by PATH too.
            inside = item.path.startswith(f"{item.corpus}/")
            for name in {f"{item.corpus}/{item.path}", *([item.path] if inside else [])}:
                self.paths[name].append(item.key)

    def find(self, entry: Entry) -> list[str]:
        """Return the keys of the recordings that match an entry of the hold-back list."""
        if entry.kind == "subject":
            corpus, slash, subject = entry.value.rpartition("/")
            return self.subjects.get(f"{corpus}{slash}{_bare(subject)}", [])
        if not re.search(r"[*?\[]", entry.value):
            return self.paths.get(entry.value, [])
        fits = re.compile(fnmatch.translate(entry.value)).match
        return [key for path, keys in self.paths.items() if fits(path) for key in keys]

    def examples(self, kind: str) -> str:
        """Return a few names of subjects or recordings as text, for a message."""
        names = sorted(n for n in (self.subjects if kind == "subject" else self.paths) if kind != "subject" or "/" in n)
        if not names:
            return "no named subjects (set subject_pattern in the corpus to name them)"
        return ", ".join(names[:5]) + " ..." * (len(names) > 5)


@dataclass(kw_only=True)
class HoldBack:
    """The recordings, checksums and datasets to hold back (to leave out of the dataset).

    All names were already looked up in the corpora.
    """

    named: dict[str, str]
    """Recordings that an entry holds back by name or pattern. The key is the key of the recording; the value is a text
    with the entry, and with the place where the entry is written."""
    sha256: dict[str, str]
    """Checksums that are held back. The key is the checksum; the value says where the entry is written."""
    datasets: list[Contents]
    """Contents of the datasets that are held back."""
    identity: dict[str, Any]
    """Those settings of `hold_back` that change the dataset. They are part of the checksum of the job's plan."""
    images_left_out: dict[str, int] = field(default_factory=dict)
    """The key is the key of a recording; the value is the number of its trials with a held-back image.
    `drop_held_back_images` fills this dictionary."""

    @classmethod
    def plan(cls, config: HoldBackConfig, items: Iterable[Item]) -> HoldBack:
        """Search the corpora for the names in the config, before any recording is read.

        Parameters
        ----------
        config : HoldBackConfig
            Section `hold_back` of the job's config.
        items : iterable of Item
            Recordings of all corpora.

        Returns
        -------
        HoldBack
            Object whose methods `drop_held_back_images` and `mark` are called in later steps of the job.

        Raises
        ------
        RequestError
            If a name matches nothing, if a list cannot be read, or if a dataset is not complete. It is not an error if
            a held-back dataset and the corpora have no data in common.
        """
        from data_sharding.audit.leakage import Contents

        names = _Names(list(items))
        entries = [Entry(kind="subject", value=v, source="hold_back.subjects") for v in config.subjects]
        entries += [Entry(kind="recording", value=v, source="hold_back.recordings") for v in config.recordings]
        for path in config.lists:
            found = read_list(path)
            if not found:
                raise RequestError(
                    f"hold_back.lists '{path}': the list is empty; remove it from the config, or add entries"
                )
            entries += found
        named: dict[str, str] = {}
        for entry in entries:
            if entry.kind == "sha256":
                continue
            keys = names.find(entry)
            if not keys:
                raise RequestError(
                    f"{entry.source}: {entry.kind} '{entry.value}' is not in the corpora; correct or remove the entry; "
                    f"the corpora have {names.examples(entry.kind)}"
                )
            for key in keys:
                named.setdefault(key, f"{entry.kind} {entry.value} ({entry.source})")
        datasets = [Contents.read(path, windows=False) for path in config.datasets]
        return cls(
            named=named,
            sha256={e.value: e.source for e in entries if e.kind == "sha256"},
            datasets=datasets,
            identity={
                "entries": sorted([e.kind, e.value] for e in entries),
                "datasets": sorted(contents.manifest.dataset_id for contents in datasets),
            },
        )

    def drop_held_back_images(self, items: Sequence[Item]) -> list[Item]:
        """Remove the trials with an image of a held-back dataset.

        An image counts as an image of a dataset if the dataset has an image of equal bytes, an image of similar pixels,
        or an image of the same name and the same corpus.

        Parameters
        ----------
        items : sequence of Item
            Recordings.

        Returns
        -------
        list of Item
            The recordings without the removed trials. The numbers of removed trials are in `images_left_out`.

        Raises
        ------
        RequestError
            If an image cannot be read.
        """
        with_images = [contents for contents in self.datasets if contents.images]
        shown = sorted({trial.image for item in items for trial in item.trials or () if trial.image})
        if not with_images or not shown:
            return list(items)
        held = _find_held_back_images(shown, with_images)
        names = {(use.corpus, use.image_id) for contents in with_images for use in contents.images}
        out = []
        for item in items:
            trials = item.trials or ()
            kept = tuple(t for t in trials if t.image not in held and (item.corpus, t.image_id) not in names)
            if len(kept) < len(trials):
                self.images_left_out[item.key] = len(trials) - len(kept)
                item = dataclasses.replace(item, trials=kept)
            out.append(item)
        return out

    def mark(
        self,
        rows: Sequence[LedgerRow],
        fingerprints: Mapping[str, RecordingFingerprint],
        load_points: Callable[[str], np.ndarray],
    ) -> dict[str, int]:
        """Mark the ledger rows of recordings that are held back (left out of the dataset).

        Call this method before duplicates are searched.

        A recording is held back if one of the following conditions is true; the first true condition gives the reason:

        1. the recording, its subject, or its checksum is listed in the config or in a list file;
        2. a held-back dataset contains a recording of equal bytes, the same subject of the same corpus, or the same
           signal;
        3. the same subject has another recording that is held back by condition 2;
        4. the recording has the same bytes or the same signal as a recording that is held back by conditions 1 to 3.

        Parameters
        ----------
        rows : sequence of LedgerRow
            Rows of the ledger; the rows of held-back recordings are changed.
        fingerprints : mapping of str to RecordingFingerprint
            Fingerprint of each recording, by key.
        load_points : callable
            Function that takes the key of a recording, and returns its fingerprint, shape (n, P).

        Returns
        -------
        dict
            For each entry of `hold_back`: number of recordings that the entry holds back.
        """
        usable = [row for row in rows if row.status == "sharded"]
        why: dict[str, tuple[str, str]] = {}
        for row in usable:
            if name := self.named.get(row.key):
                why[row.key] = (name, f"{name}")
            elif source := self.sha256.get(row.sha256):
                why[row.key] = (f"sha256 ({source})", f"the checksum of the recording is listed in {source}")
        for contents in self.datasets:
            self._hold_back_dataset(contents, usable, why, fingerprints, load_points)
        self._hold_back_copies(usable, why, fingerprints, load_points)
        counts: Counter[str] = Counter()
        for row in usable:
            if row.key in why:
                name, reason = why[row.key]
                row.set_aside("held back", Reason("held back", reason), held_back=name)
                counts[name] += 1
        for contents in self.datasets:
            counts.setdefault(f"dataset {contents.name}", 0)
        return dict(counts)

    def _hold_back_dataset(
        self,
        contents: Contents,
        rows: Sequence[LedgerRow],
        why: dict[str, tuple[str, str]],
        fingerprints: Mapping[str, RecordingFingerprint],
        load_points: Callable[[str], np.ndarray],
    ) -> None:
        name = f"dataset {contents.name}"
        checksums = contents.checksums()
        subjects = contents.known_subjects()
        theirs = contents.fingerprints.recordings if contents.fingerprints else []
        rest = []
        for row in rows:
            if row.sha256 and row.sha256 in checksums:
                why.setdefault(row.key, (name, f"recording of {name} (equal bytes)"))
            elif (row.corpus, row.subject) in subjects:
                why.setdefault(row.key, (name, f"subject {row.subject} of {name}"))
            else:
                rest.append(row)
        if theirs and contents.fingerprints:
            ours = [fingerprints[row.key] for row in rest]
            for i, j, relation in find_matches(ours, theirs, load_points, contents.fingerprints.load):
                reason = f"recording of {name} ({HOW[relation]} as {theirs[j].key})"
                why.setdefault(rest[i].key, (name, reason))
        # If a recording of a subject is in the held-back dataset, hold back all recordings of this subject.
        people = {
            (row.corpus, row.subject) for row in rows if why.get(row.key, ("",))[0] == name and row.subject != row.key
        }
        for row in rows:
            if (row.corpus, row.subject) in people:
                why.setdefault(row.key, (name, f"subject {row.subject} has a recording in {name}"))

    def _hold_back_copies(
        self,
        rows: Sequence[LedgerRow],
        why: dict[str, tuple[str, str]],
        fingerprints: Mapping[str, RecordingFingerprint],
        load_points: Callable[[str], np.ndarray],
    ) -> None:
        """Hold back recordings with the same bytes or the same signal as a recording that is already held back."""
        held = [row for row in rows if row.key in why]
        rest = [row for row in rows if row.key not in why]
        by_bytes = {row.sha256: row for row in held if row.sha256}
        pairs = [(i, by_bytes[row.sha256]) for i, row in enumerate(rest) if row.sha256 in by_bytes]
        ours, theirs = ([fingerprints[row.key] for row in group] for group in (rest, held))
        pairs += [(i, held[j]) for i, j, _ in find_matches(ours, theirs, load_points, load_points)]
        for i, original in pairs:
            name = why[original.key][0]
            why.setdefault(rest[i].key, (name, f"copy of {original.key}, {name}"))

    def count_images(self, rows: Iterable[LedgerRow]) -> None:
        """Write the numbers of removed trials (`images_left_out`) to the ledger column ``windows_left_out``.

        Parameters
        ----------
        rows : iterable of LedgerRow
            Rows of the ledger, which are changed in place.
        """
        for row in rows:
            if number := self.images_left_out.get(row.key):
                row.windows_left_out = dict(sorted({**row.windows_left_out, IMAGE_REASON: number}.items()))


def _find_held_back_images(paths: Sequence[str], datasets: Sequence[Contents]) -> set[str]:
    """Return the image files whose bytes are equal, or whose pixels are similar, to an image of a held-back dataset."""
    from concurrent.futures import ThreadPoolExecutor

    from data_sharding.audit.fingerprints import ImageFingerprint, find_similar_images, fingerprint_image

    def read(path: str) -> ImageFingerprint:
        try:
            return fingerprint_image(read_limited(as_path(path), MAX_IMAGE))
        except OSError as error:
            raise RequestError(
                f"{path}: the image cannot be read ({error.strerror}); check the file and its permissions"
            ) from None

    with ThreadPoolExecutor() as pool:
        ours = list(pool.map(read, paths))
    of_sha: defaultdict[str, list[str]] = defaultdict(list)
    for path, image in zip(paths, ours, strict=True):
        of_sha[image.sha256].append(path)
    held: set[str] = set()
    for contents in datasets:
        theirs = [use.fingerprint for use in contents.images]
        for image in theirs:
            held.update(of_sha.get(image.sha256, ()))
        held.update(paths[i] for i, _ in find_similar_images(ours, theirs))
    return held
