"""Benchmarks kept out of a dataset: by name before anything is read, by content after.

What is held back is named by subject, by recording, by lists, or as whole datasets. Names are resolved against the
corpora before the work begins, and one that matches nothing is refused: a typing error must not leak a benchmark.
Recordings that are held back are read and fingerprinted like all others, so that a copy of them under another name or
in another format is held back, too.
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

from data_sharding.audit.duplicates import HOW, Print, matches
from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import as_path
from data_sharding.dataset.ledger import LedgerRow

if TYPE_CHECKING:
    from data_sharding.audit.leakage import Contents
    from data_sharding.corpora import Item

IMAGE_REASON = "image is held back"
"""Reason in ``windows_left_out`` of a trial whose image is held back."""


@dataclass(frozen=True, kw_only=True)
class HoldBackConfig:
    """What must not enter the dataset: recordings, people and images of the benchmarks."""

    subjects: list[str] = field(default_factory=list)
    """Subjects as in paths (sub-11 or 11), or CORPUS/SUBJECT for one corpus only."""
    recordings: list[str] = field(default_factory=list)
    """Glob patterns over CORPUS/PATH, the path relative to the corpus's root."""
    lists: list[str] = field(default_factory=list)
    """Text files with one line each: ``subject NAME``, ``recording GLOB`` or ``sha256 HEX``; # begins a comment."""
    datasets: list[str] = field(default_factory=list)
    """Datasets written by ``dreamscale shard``, all of whose recordings, subjects and images are held back."""

    def __bool__(self) -> bool:
        return bool(self.subjects or self.recordings or self.lists or self.datasets)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that is held back."""

    kind: Literal["subject", "recording", "sha256"]
    """What `value` names."""
    value: str
    """Name, pattern or checksum."""
    source: str
    """The config's key, or file and line."""


def read_list(path: str) -> list[Entry]:
    """Read a list of what is held back.

    Parameters
    ----------
    path : str
        Text file.

    Returns
    -------
    list of Entry
        In the file's order.

    Raises
    ------
    RequestError
        If it is missing or a line is none of the three kinds.
    """
    file = as_path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"hold_back.lists '{path}': cannot be read ({error})") from None
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
                f"hold_back.lists '{path}', line {number}: '{text}' is none of 'subject NAME', 'recording GLOB' and "
                "'sha256 HEX'"
            )
        if kind == "sha256" and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise RequestError(f"hold_back.lists '{path}', line {number}: '{value}' is no SHA-256 of 64 digits")
        entries.append(Entry(kind=kind, value=value.lower() if kind == "sha256" else value, source=where))  # type: ignore[arg-type]
    return entries


def _bare(subject: str) -> str:
    return subject.removeprefix("sub-")


class _Names:
    """Recordings by the names under which they can be held back: a hundred thousand of them, and long lists."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.subjects: defaultdict[str, list[str]] = defaultdict(list)
        self.paths: defaultdict[str, list[str]] = defaultdict(list)
        for item in items:
            if item.subject != item.key:  # Of others nobody says whose they are.
                for name in {_bare(item.subject), f"{item.corpus}/{_bare(item.subject)}"}:
                    self.subjects[name].append(item.key)
            # Where the corpus is named after the first folder, the path begins with its name already.
            inside = item.path.startswith(f"{item.corpus}/")
            for name in {f"{item.corpus}/{item.path}", *([item.path] if inside else [])}:
                self.paths[name].append(item.key)

    def find(self, entry: Entry) -> list[str]:
        """Keys of the recordings that an entry names."""
        if entry.kind == "subject":
            corpus, slash, subject = entry.value.rpartition("/")
            return self.subjects.get(f"{corpus}{slash}{_bare(subject)}", [])
        if not re.search(r"[*?\[]", entry.value):
            return self.paths.get(entry.value, [])
        fits = re.compile(fnmatch.translate(entry.value)).match
        return [key for path, keys in self.paths.items() if fits(path) for key in keys]

    def some(self, kind: str) -> str:
        """A few names, for a message."""
        names = sorted(n for n in (self.subjects if kind == "subject" else self.paths) if kind != "subject" or "/" in n)
        if not names:
            return "no subjects with a name (subject_pattern gives them one)"
        return ", ".join(names[:5]) + " ..." * (len(names) > 5)


@dataclass(kw_only=True)
class HoldBack:
    """What is held back, resolved against the corpora."""

    named: dict[str, str]
    """Key of a recording to the name that holds it back, and where that stands."""
    sha256: dict[str, str]
    """Checksum to where it stands."""
    datasets: list[Contents]
    """Held-back datasets, as `data_sharding.audit.leakage.Contents`."""
    identity: dict[str, Any]
    """What of it shapes the dataset, to be part of the plan's checksum."""
    images_left_out: dict[str, int] = field(default_factory=dict)
    """Key of a recording to the number of its trials whose image is held back; filled by `without_images`."""

    @classmethod
    def plan(cls, config: HoldBackConfig, items: Iterable[Item]) -> HoldBack:
        """Resolve names, before anything is read.

        Parameters
        ----------
        config : HoldBackConfig
            The request.
        items : iterable of Item
            Recordings of all corpora.

        Returns
        -------
        HoldBack
            Ready for `without_images` and `mark`.

        Raises
        ------
        RequestError
            If a name matches nothing, a list cannot be read, or a dataset is not complete. A dataset that has nothing
            in common with the corpora is no mistake.
        """
        from data_sharding.audit.leakage import Contents

        names = _Names(list(items))
        entries = [Entry(kind="subject", value=v, source="hold_back.subjects") for v in config.subjects]
        entries += [Entry(kind="recording", value=v, source="hold_back.recordings") for v in config.recordings]
        for path in config.lists:
            found = read_list(path)
            if not found:
                raise RequestError(f"hold_back.lists '{path}': names nothing; take it out of the config, or fill it")
            entries += found
        named: dict[str, str] = {}
        for entry in entries:
            if entry.kind == "sha256":
                continue
            keys = names.find(entry)
            if not keys:
                raise RequestError(
                    f"{entry.source}: {entry.kind} '{entry.value}' is in none of the corpora; there are "
                    f"{names.some(entry.kind)}"
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

    def without_images(self, items: Sequence[Item]) -> list[Item]:
        """Take trials out whose image is one of a held-back dataset: by bytes, by looks, or by name in one corpus.

        Parameters
        ----------
        items : sequence of Item
            Recordings.

        Returns
        -------
        list of Item
            The same, with fewer trials where images are held back; `images_left_out` counts them.

        Raises
        ------
        RequestError
            If an image cannot be read.
        """
        pictured = [contents for contents in self.datasets if contents.images]
        shown = sorted({trial.image for item in items for trial in item.trials or () if trial.image})
        if not pictured or not shown:
            return list(items)
        held = _held_images(shown, pictured)
        names = {(use.corpus, use.image_id) for contents in pictured for use in contents.images}
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
        prints: Mapping[str, Print],
        load_points: Callable[[str], np.ndarray],
    ) -> dict[str, int]:
        """Hold recordings back, after they were read and before duplicates are sought.

        Parameters
        ----------
        rows : sequence of LedgerRow
            The ledger; rows of recordings that are held back are changed.
        prints : mapping of str to Print
            What is compared of each recording, by key.
        load_points : callable
            Key of a recording to its fingerprint [n, P].

        Returns
        -------
        dict
            For each name, list and dataset the number of recordings that it held back.
        """
        usable = [row for row in rows if row.status == "sharded"]
        why: dict[str, tuple[str, str]] = {}
        for row in usable:
            if name := self.named.get(row.key):
                why[row.key] = (name, f"{name}")
            elif source := self.sha256.get(row.sha256):
                why[row.key] = (f"sha256 ({source})", f"its checksum stands in {source}")
        for contents in self.datasets:
            self._by_dataset(contents, usable, why, prints, load_points)
        self._copies(usable, why, prints, load_points)
        counts: Counter[str] = Counter()
        for row in usable:
            if row.key in why:
                name, reason = why[row.key]
                row.set_aside("held back", Reason("held back", reason), held_back=name)
                counts[name] += 1
        for contents in self.datasets:
            counts.setdefault(f"dataset {contents.name}", 0)
        return dict(counts)

    def _by_dataset(
        self,
        contents: Contents,
        rows: Sequence[LedgerRow],
        why: dict[str, tuple[str, str]],
        prints: Mapping[str, Print],
        load_points: Callable[[str], np.ndarray],
    ) -> None:
        name = f"dataset {contents.name}"
        checksums = contents.checksums()
        subjects = contents.known_subjects()
        theirs = contents.fingerprints.prints if contents.fingerprints else []
        rest = []
        for row in rows:
            if row.sha256 and row.sha256 in checksums:
                why.setdefault(row.key, (name, f"recording of {name} (equal bytes)"))
            elif (row.corpus, row.subject) in subjects:
                why.setdefault(row.key, (name, f"subject {row.subject} of {name}"))
            else:
                rest.append(row)
        if theirs and contents.fingerprints:
            ours = [prints[row.key] for row in rest]
            for i, j, relation in matches(ours, theirs, load_points, contents.fingerprints.load):
                reason = f"recording of {name} ({HOW[relation]} as {theirs[j].key})"
                why.setdefault(rest[i].key, (name, reason))
        # Who has one recording in a benchmark is a subject of that benchmark.
        people = {
            (row.corpus, row.subject) for row in rows if why.get(row.key, ("",))[0] == name and row.subject != row.key
        }
        for row in rows:
            if (row.corpus, row.subject) in people:
                why.setdefault(row.key, (name, f"subject {row.subject} has a recording in {name}"))

    def _copies(
        self,
        rows: Sequence[LedgerRow],
        why: dict[str, tuple[str, str]],
        prints: Mapping[str, Print],
        load_points: Callable[[str], np.ndarray],
    ) -> None:
        """Hold back what is the same recording as one that is held back."""
        held = [row for row in rows if row.key in why]
        rest = [row for row in rows if row.key not in why]
        by_bytes = {row.sha256: row for row in held if row.sha256}
        pairs = [(i, by_bytes[row.sha256]) for i, row in enumerate(rest) if row.sha256 in by_bytes]
        ours, theirs = ([prints[row.key] for row in group] for group in (rest, held))
        pairs += [(i, held[j]) for i, j, _ in matches(ours, theirs, load_points, load_points)]
        for i, original in pairs:
            name = why[original.key][0]
            why.setdefault(rest[i].key, (name, f"copy of {original.key}, {name}"))

    def count_images(self, rows: Iterable[LedgerRow]) -> None:
        """Enter the trials that `without_images` took out into the rows' ``windows_left_out``.

        Parameters
        ----------
        rows : iterable of LedgerRow
            The ledger, changed in place.
        """
        for row in rows:
            if number := self.images_left_out.get(row.key):
                row.windows_left_out = dict(sorted({**row.windows_left_out, IMAGE_REASON: number}.items()))


def _held_images(paths: Sequence[str], datasets: Sequence[Contents]) -> set[str]:
    """Files that are pictures of held-back datasets, by bytes or by looks."""
    from concurrent.futures import ThreadPoolExecutor

    from data_sharding.audit.fingerprints import ImagePrint, image_print, similar_images

    def look(path: str) -> ImagePrint:
        try:
            return image_print(as_path(path).read_bytes())
        except OSError as error:
            raise RequestError(f"{path}: cannot be read ({error.strerror})") from None

    with ThreadPoolExecutor() as pool:
        ours = list(pool.map(look, paths))
    of_sha: defaultdict[str, list[str]] = defaultdict(list)
    for path, picture in zip(paths, ours, strict=True):
        of_sha[picture.sha256].append(path)
    held: set[str] = set()
    for contents in datasets:
        theirs = [use.picture for use in contents.images]
        for picture in theirs:
            held.update(of_sha.get(picture.sha256, ()))
        held.update(paths[i] for i, _ in similar_images(ours, theirs))
    return held
