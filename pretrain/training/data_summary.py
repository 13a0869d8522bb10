"""A description of the training data, kept in each checkpoint for the model card of the exported encoder."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from data_sharding.common.errors import RequestError, show
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.ledger import NAME, read_ledger_file
from data_sharding.dataset.manifest import version_folder
from data_sharding.dataset.mixture import Mixture

_MOST_SAMPLES = 20_000
_PER_RECORDING = ("device", "device_filters", "task", "license", "recording_year")
_PER_SUBJECT = ("sex", "group", "age")


def describe_people(dataset: EEGDataset | Mixture) -> dict[str, Any]:
    """Describe the subjects, devices and licences of a split.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        The split. For a mixture, the numbers of its datasets are added up, so a subject in two of the datasets counts
        twice.

    Returns
    -------
    dict
        ``subjects``: number of identified subjects; None if this number is unknown. ``recordings``: number of
        recordings. ``unknown``: number of recordings with an unknown subject. ``not_confirmed``: number of recordings
        whose subject is only a guess from the file's path. ``sex``, ``group`` and ``age`` (in decades): a dictionary
        with the number of subjects for each value. ``device``, ``device_filters``, ``task``, ``license`` and
        ``recording_year``: a dictionary with the number of recordings for each value. In these dictionaries, an empty
        text stands for an unknown value. If the dataset has no ledger, only ``subjects`` is returned; if such a dataset
        has more than 20,000 samples, ``subjects`` is None.
    """
    if isinstance(dataset, Mixture):
        return _merge([describe_people(part) for part in dataset.parts])
    ledger = version_folder(dataset.path, dataset.manifest.version) / NAME
    if not ledger.is_file():
        ledger = dataset.path / NAME
    if not ledger.is_file():
        return _describe_without_ledger(dataset)
    used = [row for row in read_ledger_file(ledger) if row.status == "sharded" and dataset.split in row.splits]
    people: defaultdict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for row in used:
        if row.has_subject:
            values = {name: getattr(row, name) for name in _PER_SUBJECT}
            people[row.corpus, row.subject].update({k: v for k, v in values.items() if v not in (None, "")})
    return {
        "subjects": len(people),
        "recordings": len(used),
        "unknown": sum(not row.has_subject for row in used),
        "not_confirmed": sum(row.subject_from == "recognised" for row in used),
        "sex": _count(person.get("sex") for person in people.values()),
        "group": _count(person.get("group") for person in people.values()),
        "age": _count(_decade(person.get("age")) for person in people.values()),
        **{name: _count(getattr(row, name) for row in used) for name in _PER_RECORDING},
    }


def _count(values: Any) -> dict[str, int]:
    return dict(Counter("" if value is None else str(value) for value in values).most_common())


def _decade(age: float | None) -> str:
    if age is None:
        return ""
    decade = int(age // 10) * 10
    return "90 or older" if decade >= 90 else f"{decade} to {decade + 9}"


def _describe_without_ledger(dataset: EEGDataset) -> dict[str, Any]:
    if len(dataset) > _MOST_SAMPLES:
        return {"subjects": None}
    metas = [dataset.meta(number) for number in range(len(dataset))]
    return {"subjects": len({(meta.get("corpus"), meta.get("subject")) for meta in metas})}


def _merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up each number in the descriptions of several datasets. If one dataset lacks the number, the sum is None."""
    out: dict[str, Any] = {}
    for name in parts[0]:
        values = [part.get(name) for part in parts]
        if any(value is None for value in values):
            out[name] = None
        elif isinstance(values[0], dict):
            out[name] = dict(sum((Counter(value) for value in values), Counter()).most_common())
        else:
            out[name] = sum(values)  # type: ignore[arg-type]
    return out


def check_licenses(allowed: Sequence[str], found: Mapping[str, int] | None, place: str) -> None:
    """Raise an error if the training data have a licence that is not allowed.

    Parameters
    ----------
    allowed : sequence of str
        Allowed licences, as glob patterns in which upper and lower case make no difference. If the list is empty, all
        licences are allowed.
    found : mapping of str to int, or None
        Number of recordings for each licence that the training data have. The key for recordings without a known
        licence is an empty text. None if nothing is known about the licences of any recording.
    place : str
        The dataset or the run, for the error message.

    Raises
    ------
    RequestError
        If a recording has a licence that is not allowed or not known, or if nothing is known about licences.
    """
    if not allowed:
        return
    if found is None:
        raise RequestError(
            f"{place}: the licences of the training data are not known, and allowed_licenses is "
            f"{', '.join(allowed)}; make the dataset again with this version of 'dreamscale shard', or remove the key"
        )
    patterns = [pattern.casefold() for pattern in allowed]
    wrong = {
        name: number
        for name, number in found.items()
        if not name or not any(fnmatch.fnmatchcase(name.casefold(), pattern) for pattern in patterns)
    }
    if wrong:
        listed = ", ".join(f"{number} x {name or 'unknown'}" for name, number in wrong.items())
        hint = "; set the key 'license' of the corpus whose licence is unknown" if "" in wrong else ""
        raise RequestError(
            f"{place}: the training data have recordings with a licence that allowed_licenses ({', '.join(allowed)}) "
            f"does not contain: {listed}; remove these recordings from the dataset, or allow the licence{hint}"
        )


def describe_data(dataset: EEGDataset | Mixture, people: dict[str, Any], windows_seen: int) -> dict[str, Any]:
    """Describe the training data.

    Parameters
    ----------
    dataset : EEGDataset or Mixture
        The training split.
    people : dict
        Result of `describe_people` for the training split.
    windows_seen : int
        Number of windows on which the model was trained. A window on which it was trained twice is counted twice.

    Returns
    -------
    dict
        The description of the training data that an encoder package contains.
    """
    manifest = dataset.manifest
    return {
        "dataset_id": manifest.dataset_id,
        "versions": {part.manifest.dataset_id: part.manifest.version for part in dataset.parts},
        "preprocess": manifest.preprocess.to_dict(),
        "windows": {split: manifest.samples(split) for split in sorted(manifest.splits)},
        "counts": manifest.counts,
        "hours": manifest.hours,
        "subjects": people.get("subjects"),
        "people": people,
        "hours_seen": windows_seen * manifest.preprocess.window_s / 3600,
    }


def describe_versions_in_words(data: Mapping[str, Any]) -> list[str]:
    """Return lines in Markdown with id and version number of the training data.

    Parameters
    ----------
    data : mapping
        Result of `describe_data`. If an older version of Dreamscale wrote it, it has no version numbers of datasets.

    Returns
    -------
    list of str
        One line for a single dataset. For a mixture, one line for the mixture and one for each of its datasets.
    """
    own, versions = data["dataset_id"], data.get("versions") or {}
    if own in versions:
        return [f"- Dataset id `{own}`, version {versions[own]}"]
    return [
        f"- Dataset id `{own}`",
        *(f"- Dataset id `{part}`, version {n}, in the mixture" for part, n in versions.items()),
    ]


def describe_people_in_words(people: Mapping[str, Any]) -> list[str]:
    """Return lines in Markdown about the subjects, devices and licences of the training data.

    Parameters
    ----------
    people : mapping
        Result of `describe_people`, or an empty mapping if the run is from an older version of Dreamscale. If the
        mapping has no entry ``recordings``, or if this number is 0, the returned list is empty.
    """
    if not people.get("recordings"):
        return []
    lines = []
    if people["unknown"]:
        lines.append(f"- The subject of {people['unknown']:,} of {people['recordings']:,} recordings is not known")
    if people["not_confirmed"]:
        lines.append(
            f"- The subjects of {people['not_confirmed']:,} of {people['recordings']:,} recordings were recognised "
            "from file names, not confirmed"
        )
    titles = {"sex": "Sex", "age": "Age in years", "group": "Group", "device": "Device", "task": "Task"}
    titles |= {"device_filters": "Filters of the device", "recording_year": "Year of the recording"}
    for name, title in titles.items():
        values = people.get(name) or {}
        if set(values) - {""}:
            unit = "subjects" if name in _PER_SUBJECT else "recordings"
            lines.append(f"- {title} ({unit}): {_list_values(values)}")
    lines.append(f"- Licence (recordings): {_list_values(people.get('license') or {'': people['recordings']})}")
    return lines


def _list_values(values: Mapping[str, int], most: int = 8) -> str:
    known = [(name, number) for name, number in values.items() if name]
    known.sort(key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{show(name)} {number:,}" for name, number in known[:most]]
    if rest := known[most:]:
        parts.append(f"{len(rest)} other values {sum(number for _, number in rest):,}")
    if unknown := values.get(""):
        parts.append(f"unknown {unknown:,}")
    return ", ".join(parts)
