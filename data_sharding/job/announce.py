"""Lines for the terminal about subjects: how they were found, which are unknown, and which splits have no sample."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from data_sharding.corpora import CorpusConfig, Item
from data_sharding.corpora.folder import NAME_IN_PATH
from data_sharding.corpora.naming import confirming_pattern, find_look_alikes, recognise
from data_sharding.dataset.ledger import LedgerRow
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
        by_source[_find_source(item)].append(item)
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


def describe_empty_splits(
    split: SplitConfig, items: Iterable[Item], rows: Iterable[LedgerRow] | None = None
) -> list[str]:
    """Return a line for each of the splits val and test that has no sample, with the reason.

    Parameters
    ----------
    split : SplitConfig
        Settings of the job's splits.
    items : iterable of Item
        Recordings of the job.
    rows : iterable of LedgerRow, optional
        Rows of the ledger at the end of the job. If `rows` is not given, a split is empty only if the config gives it
        no recording and no trial.

    Returns
    -------
    list of str
        One line for each empty split. The line also says what to change.
    """
    usable = [item for item in items if item.recording.problem is None and item.reason is None]
    planned, images = _plan_samples(split, usable)
    given = any(trial.split for item in usable for trial in item.trials or ())
    filled = (
        None if rows is None else {part for row in rows if row.status == "sharded" for part in row.split.split("+")}
    )
    lines = []
    for name in ("val", "test"):
        if name in planned and (filled is None or name in filled):
            continue
        of_split = [item for item in usable if split.by_subject and split.subject(item.subject) == name]
        if name in planned:
            what = f"none of its {_number(planned[name], 'recording')}"
            lines.append(f"{name} has no samples: {what} could be used; the ledger has the reason for each recording")
        elif split.by_subject and not of_split:
            lines.append(f"{name} has no subjects: {_explain_no_subject(split, name, usable)}")
        elif split.by_subject:
            lines.append(f"{name} has no samples: {_explain_crossed_cells(name, of_split, images, given)}")
        elif not images:
            lines.append(f"{name} has no subjects: the config holds out no subjects")
        else:
            lines.append(f"{name} has no samples: {_explain_no_image(split, name, len(images), given)}")
    return lines


def _plan_samples(split: SplitConfig, items: Sequence[Item]) -> tuple[Counter[str], dict[str, str | None]]:
    """Return the number of recordings with samples for each split, and the split of each image."""
    planned: Counter[str] = Counter()
    images: dict[str, str | None] = {}
    for item in items:
        if item.trials is None:
            planned[split.subject(item.subject) if split.by_subject else "train"] += 1
            continue
        found = set()
        for trial in item.trials:
            if trial.image_id:
                images[trial.image_id] = split.image(trial.image_id, trial.split, trial.concept)
            found.add(split.trial(item.subject, trial.image_id, trial.split, trial.concept))
        planned.update(name for name in found if name is not None)
    return planned, images


def _explain_no_subject(split: SplitConfig, name: str, items: Sequence[Item]) -> str:
    """Say why the config puts no subject into the split `name`."""
    if split.val_subjects or split.test_subjects:
        return f"{name}_subjects is empty"
    fraction = getattr(split, f"{name}_fraction")
    if not fraction:
        return f"{name}_fraction is 0"
    known = {item.subject for item in items if _find_source(item) != "unknown"}
    unknown = sum(_find_source(item) == "unknown" for item in items)
    whose = "whose subjects are not known, so that each counts as a separate subject"
    counts = [_number(len(known), "subject")] * bool(known)
    counts += [f"{_number(unknown, 'recording')} ({whose})"] * bool(unknown)
    return (
        f"the hash put none of {' and '.join(counts)} there ({name}_fraction {fraction:g}, seed {split.seed}); choose "
        f"another seed, a larger {name}_fraction, or {name}_subjects"
    )


def _explain_crossed_cells(name: str, items: Sequence[Item], images: dict[str, str | None], given: bool) -> str:
    """Say why no trial of the subjects in the split `name` belongs to the split."""
    people, trials = sorted({item.subject for item in items}), sum(len(item.trials or ()) for item in items)
    some = f"{', '.join(people[:3])}{' ...' * (len(people) > 3)}"
    own = sum(where == name for where in images.values())
    saw = f"none of the {_number(own, f'{name} image')}" if own else f"no {name} image, because there is none"
    fractions = "set image_val_fraction and image_test_fraction to 0"
    return (
        f"the config holds out subjects and images, and its {_number(len(people), 'subject')} ({some}) saw {saw}, so "
        f"all their {_number(trials, 'trial')} are left out; to hold out only subjects, {fractions}"
        f"{', and remove the splits that the corpus gives to its images' * given}; to hold out only images, set "
        "val_fraction and test_fraction to 0, and leave val_subjects and test_subjects empty"
    )


def _explain_no_image(split: SplitConfig, name: str, count: int, given: bool) -> str:
    """Say why the config, which holds out no subjects, puts none of `count` images into the split `name`."""
    if given:
        return f"the corpus puts none of its {_number(count, 'image')} there; correct the splits that the corpus gives"
    fraction = getattr(split, f"image_{name}_fraction")
    if not fraction:
        return f"image_{name}_fraction is 0"
    return (
        f"the hash put none of {_number(count, 'image')} there (image_{name}_fraction {fraction:g}, by {split.by}, "
        f"seed {split.seed}); choose another seed, or a larger image_{name}_fraction"
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _find_source(item: Item) -> str:
    """Return where the name of the subject comes from; ``unknown`` if the subject is not known."""
    return item.subject_from or ("unknown" if item.subject == item.key else "corpus")
