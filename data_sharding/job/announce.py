"""Lines for the terminal about subjects: how they were found, which are unknown, and which splits have no subject."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from data_sharding.corpora import CorpusConfig, Item
from data_sharding.corpora.folder import NAME_IN_PATH
from data_sharding.corpora.naming import confirming_pattern, find_look_alikes, recognise
from data_sharding.dataset.splits import SplitConfig

BEGIN = r"[^/_ -]+(?=[_ -][^/]*$)"
"""Regular expression for the beginning of a file name, before the first underscore, blank or hyphen."""
MOST_GROUPS = 3
"""Largest number of groups of similar names that are printed."""


def describe_subjects(config: CorpusConfig, items: Sequence[Item]) -> list[str]:
    """Describe how the subjects of a corpus were found, and which recordings have no known subject.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.
    items : sequence of Item
        Recordings of the corpus.

    Returns
    -------
    list of str
        Lines for the terminal. The list is empty if the config, a table or BIDS names every subject.
    """
    usable = [item for item in items if item.recording.problem is None and item.reason is None]
    by_source: defaultdict[str, list[Item]] = defaultdict(list)
    for item in usable:
        source = item.subject_from or ("unknown" if item.subject == item.key else "corpus")
        by_source[source].append(item)
    label = config.name or config.root
    lines = []
    if recognised := by_source["recognised"]:
        lines += _describe_recognised(label, recognised)
    if headers := by_source["header"]:
        lines.append(
            f"{label}: the names of {_count(headers)} are hashes of the patient in the header (docs/privacy.md)"
        )
        lines += _find_contradictions(label, headers)
    if unknown := by_source["unknown"]:
        lines += _describe_unknown(label, unknown, len(usable))
    groups = find_look_alikes({item.subject for item in usable if item.subject != item.key})
    for group in groups[:MOST_GROUPS]:
        lines.append(
            f"{label}: the names {', '.join(group)} look like one person, but count as different subjects; if they are "
            "one person, give them one name in a table (key 'subjects')"
        )
    if len(groups) > MOST_GROUPS:
        lines.append(f"  ... and {len(groups) - MOST_GROUPS} more groups of similar names")
    if named := sum(NAME_IN_PATH in item.info_patch.get("notes", []) for item in items):
        lines.append(
            f"{label}: the paths of {named} recordings contain the patient's name or number in their header; the "
            "dataset keeps paths, so rename the files before you give the dataset to others"
        )
    return lines


def _count(items: Sequence[Item]) -> str:
    people = len({item.subject for item in items})
    return f"{people} subject{'s' * (people != 1)} of {len(items)} recording{'s' * (len(items) != 1)}"


def _describe_recognised(label: str, items: Sequence[Item]) -> list[str]:
    examples: dict[str, str] = {}
    for item in items:
        examples.setdefault(item.subject, item.path)
    schemes = list(dict.fromkeys(scheme for item in items if (scheme := recognise(item.path).scheme)))
    shown = ", ".join(f"{subject} ({path})" for subject, path in list(examples.items())[:2])
    lines = [
        f"{label}: the names of {_count(items)} were recognised in the paths, and are not confirmed "
        f"({'; '.join(scheme.name for scheme in schemes)}), for example {shown}"
    ]
    pattern = confirming_pattern(schemes, {item.path: item.subject for item in items})
    wrong = "if they are wrong, set another subject_pattern, or a table in the key 'subjects'"
    if pattern is not None:
        # Put the regular expression in single quotes, which have the same meaning in YAML and in the shell. The regular
        # expression itself contains no single quote.
        lines.append(f"  if these names are right, confirm them in the config: subject_pattern: '{pattern}'; {wrong}")
    else:
        lines.append(f"  if these names are right, confirm them with a table in the key 'subjects'; {wrong}")
    lines += [f"  {scheme.note}" for scheme in schemes if scheme.note]
    # A name that occurs in several folders is ambiguous: in anna/s1.edf and bert/s1.edf, s1 may be a session, but in
    # open/S01.edf and closed/S01.edf, S01 may be a person.
    places: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        folder = item.path.rpartition("/")[0]
        if folder and recognise(folder).subject != item.subject:
            places[item.subject].add(folder)
    for subject, folders in sorted(places.items()):
        if len(folders) > 1:
            some = ", ".join(sorted(folders)[:2])
            lines.append(
                f"  {subject} is in {len(folders)} folders ({some} ...): if each folder is one person, the names above "
                "are wrong"
            )
            break
    return lines


def _describe_unknown(label: str, items: Sequence[Item], total: int) -> list[str]:
    lines = [
        f"{label}: the subject of {len(items)} of {total} recordings is not known, for example of {items[0].path}; "
        "each of them counts as a separate subject, so one person may be in several splits, and 'dreamscale verify' "
        "cannot call the splits clean; set subject_pattern, or a table in the key 'subjects'"
    ]
    for item in items:
        if names := recognise(item.path).candidates:
            lines.append(f"  {item.path} contains several names ({', '.join(names)}), so no name was used")
            break
    folders = {item.path.split("/")[0] for item in items if "/" in item.path}
    if len(folders) > 1:
        some = ", ".join(sorted(folders)[:2])
        lines.append(f"  if each first folder ({some} ...) is one person: subject_pattern: '^(?P<subject>[^/]+)/'")
    begins = Counter(match.group() for item in items if (match := re.search(BEGIN, item.path)))
    if len(begins) > 1 and max(begins.values()) > 1 and sum(begins.values()) == len(items):
        some = ", ".join(sorted(begins)[:2])
        lines.append(
            f"  if the beginning of each file name ({some} ...) is one person: subject_pattern: '(?P<subject>{BEGIN})'"
        )
    return lines


def _find_contradictions(label: str, items: Sequence[Item]) -> list[str]:
    """Compare the subjects from headers with the names in the paths, and return a line about each contradiction."""
    of_patient: defaultdict[str, set[str]] = defaultdict(set)
    of_name: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        if name := recognise(item.path).subject:
            of_patient[item.subject].add(name)
            of_name[name].add(item.subject)
    lines = []
    if several := [names for names in of_patient.values() if len(names) > 1]:
        lines.append(
            f"  but the paths of {len(several)} of these subjects name several people, for example "
            f"{', '.join(sorted(several[0])[:3])}; if the paths are right, set subject_pattern"
        )
    if several := sorted(name for name, patients in of_name.items() if len(patients) > 1):
        lines.append(
            f"  but the headers of {several[0]} name several patients; if the paths are right, set subject_pattern"
        )
    return lines


def describe_empty_splits(split: SplitConfig, subjects: Iterable[str], *, images: bool = False) -> list[str]:
    """Return a line for each of the splits val and test that has no subject, with the reason.

    Parameters
    ----------
    split : SplitConfig
        Settings of the job's splits.
    subjects : iterable of str
        Names of the subjects.
    images : bool
        Whether the corpora have trials with images, so that val and test may consist of held-out images.

    Returns
    -------
    list of str
        One line for each split without a subject.
    """
    everyone = set(subjects)
    places = {split.subject(name) for name in everyone} if split.by_subject else set()
    lines = []
    for name in ("val", "test"):
        if name in places:
            continue
        fraction, listed = getattr(split, f"{name}_fraction"), split.val_subjects or split.test_subjects
        if not split.by_subject:
            if not images:
                lines.append(f"{name} has no subjects: the config holds out no subjects")
        elif listed:
            lines.append(f"{name} has no subjects: {name}_subjects is empty")
        elif not fraction:
            lines.append(f"{name} has no subjects: {name}_fraction is 0")
        else:
            lines.append(
                f"{name} has no subjects: the hash put none of {len(everyone)} subjects there ({name}_fraction "
                f"{fraction:g}, seed {split.seed}); choose another seed, a larger {name}_fraction, or {name}_subjects"
            )
    return lines
