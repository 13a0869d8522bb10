"""``dreamscale verify``: check a dataset against its manifest, and check that its splits share no data."""

from __future__ import annotations

import contextlib
import itertools
import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.leakage import (
    KINDS,
    Contents,
    Findings,
    compare_datasets,
    compare_splits,
    holds_out_subjects,
)
from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_NOT_KNOWN, RequestError, one_line, printable
from data_sharding.common.files import sha256_file
from data_sharding.common.progress import progress
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.dataset.ledger import NAME as LEDGER
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import NAME as MANIFEST
from data_sharding.dataset.manifest import WORK, Manifest, Shard, current_file
from data_sharding.dataset.shard_reader import HEADER, padded_size, read_entries
from data_sharding.dataset.splits import SPLITS

ANEW = "make the dataset again with 'dreamscale shard' and a new folder in the key 'output'"
"""Advice for a dataset that needs another split or other names of subjects. The dataset must be made again, because the
splits of an existing dataset are never changed."""


@dataclass(kw_only=True)
class VerifyConfig:
    """Check the bytes and counts of a dataset, and check that its splits (or two datasets) share no data."""

    dataset: str
    """Folder of the dataset."""
    against: str = ""
    """Folder of a second dataset. If a second dataset is given, the command checks only that no subject, recording,
    window or image is in both datasets."""
    content: bool = True
    """True: also decode every window and compare the splits. False: check only bytes and counts."""
    lines: int = 20
    """Print at most this many findings of each kind; 0: print all findings."""

    def __post_init__(self) -> None:
        if self.lines < 0:
            raise ValueError(f"the key 'lines' must not be negative, got {self.lines}")
        if self.against and not self.content:
            raise ValueError(
                "the key 'against' compares the windows of both datasets, so 'content' must not be false; remove "
                "'content: false'"
            )


def shard_faults(root: AnyPath, shard: Shard) -> list[str]:
    """Check the bytes, the counts and the index of a shard.

    Parameters
    ----------
    root : Path or UPath
        Directory of the dataset.
    shard : Shard
        Manifest entry of the shard.

    Returns
    -------
    list of str
        One description for each fault; it begins with the name of the damaged file. Empty if the shard is intact.
    """
    name = f"{shard.path.removesuffix('.tar')}.idx"
    tar, index = root / shard.path, root / name
    for path, called in ((tar, shard.path), (index, name)):
        if not path.is_file():
            return [f"{called}: missing"]
    faults = []
    if tar.stat().st_size != shard.bytes:
        faults.append(f"{shard.path}: the file has {tar.stat().st_size} bytes, but the manifest says {shard.bytes}")
    elif sha256_file(tar) != shard.sha256:
        faults.append(f"{shard.path}: its sha256 differs from the manifest's")
    if sha256_file(index) != shard.index_sha256:
        return [*faults, f"{name}: its sha256 differs from the manifest's"]
    try:
        entries = read_entries(index, shard.bytes)
    except RequestError as error:
        return [*faults, one_line(error)]
    if len(entries) != shard.samples:
        faults.append(f"{name}: the index has {len(entries)} samples, but the manifest says {shard.samples}")
    if not faults:
        indexed = {f"{e['key']}.{name}": at for e in entries for name, at in e["members"].items()}
        if _list_members(tar, shard.bytes) != indexed:
            faults.append(f"{name}: its offsets are not those of the members of {shard.path}")
    return faults


def _list_members(tar: AnyPath, size: int) -> dict[str, list[int]] | None:
    """Return offset and size of each member of a shard; None if the tar has a member of an unexpected kind.

    `tarfile.open` is not used, because it reads special members (such as long names) of any size into memory.
    """
    members: dict[str, list[int]] = {}
    with tar.open("rb") as stream:
        at = 0
        while at < size:
            stream.seek(at)
            block = stream.read(HEADER)
            if not block.strip(b"\0"):  # A tar file ends with two blocks of zeros.
                return members
            try:
                info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            except (tarfile.HeaderError, UnicodeError):
                return None
            if info.type != tarfile.REGTYPE or info.name in members or not 0 <= info.size <= size:
                return None
            members[info.name] = [at + HEADER, info.size]
            at += HEADER + padded_size(info.size)
    return members


def find_faults(dataset: str | AnyPath) -> list[str]:
    """Check the bytes and counts of a dataset.

    Parameters
    ----------
    dataset : str, Path or UPath
        Directory of the dataset.

    Returns
    -------
    list of str
        Description of each fault; empty if the dataset is intact.

    Raises
    ------
    RequestError
        If the folder is not a complete dataset.
    """
    root = as_path(dataset)
    manifest = Manifest.read(root)
    shards = [shard for split in manifest.splits.values() for shard in split]
    faults: list[str] = []
    if not any(manifest.samples(split) for split in manifest.splits):
        faults.append(f"{MANIFEST}: no split has samples, so the dataset is empty")
    with progress("verifying shards", len(shards)) as advance:
        for shard in shards:
            faults += shard_faults(root, shard)
            advance(1)
    known = {shard.path for shard in shards}
    # If the work folder exists, a job is adding recordings or was interrupted. In both cases, shards that are not in
    # the manifest are not a fault.
    growing = (root / WORK).is_dir()
    for split in manifest.splits if not growing else ():
        for tar in sorted((root / split).glob("*.tar")):
            if f"{split}/{tar.name}" not in known:
                faults.append(f"{split}/{tar.name}: the manifest does not list this shard")
    keys: set[str] = set()
    for shard in shards:
        index = (root / shard.path).with_suffix(".idx")
        for entry in itertools.compress(_intact_entries(index, shard), shard.mask()):
            if entry["key"] in keys:
                faults.append(f"{shard.path}: sample {entry['key']} is in the dataset twice")
            keys.add(entry["key"])
    if "ledger_sha256" in manifest.extra:
        faults += _ledger_faults(root, manifest)
    return faults


def _intact_entries(index: AnyPath, shard: Shard) -> list[dict[str, Any]]:
    """Return the entries of a shard's index, one for each sample; an empty list if the index is missing or damaged.

    The function `shard_faults` reports a missing or damaged index.
    """
    with contextlib.suppress(RequestError):
        return read_entries(index, shard.bytes) if index.is_file() else []
    return []


def _ledger_faults(root: AnyPath, manifest: Manifest) -> list[str]:
    ledger, fingerprints = current_file(root, LEDGER), current_file(root, FINGERPRINTS)
    if not ledger.is_file():
        return [f"{LEDGER}: missing"]
    if sha256_file(ledger) != manifest.extra["ledger_sha256"]:
        return [f"{LEDGER}: its sha256 differs from the manifest's"]
    rows = read_ledger(root)
    windows = sum(row.windows for row in rows)
    samples = sum(manifest.samples(split) for split in manifest.splits)
    faults = []
    if windows != samples:
        faults.append(f"{LEDGER}: the rows count {windows} windows, but the manifest has {samples} samples")
    if len(rows) != manifest.counts.get("found"):
        faults.append(f"{LEDGER}: {len(rows)} recordings, but the manifest counts {manifest.counts.get('found')}")
    if (digest := manifest.extra.get("fingerprints_sha256")) and (
        not fingerprints.is_file() or sha256_file(fingerprints) != digest
    ):
        faults.append(f"{FINGERPRINTS}: missing, or its sha256 differs from the manifest's")
    return faults


def _print_findings(findings: Findings, lines: int) -> None:
    """Print proofs of leakage, then questions, and then the texts of `compared`, `to_confirm` and `not_compared`."""
    for proof in (True, False):
        for kind in KINDS:
            these = [f for f in findings.found if f.kind == kind and f.proof == proof]
            for finding in these[: lines or None]:
                print(f"{'shared' if proof else 'to look at'}: {printable(finding.text)}")
            if lines and len(these) > lines:
                print(f"  ... and {len(these) - lines} more of kind {kind} (--lines 0 prints all)")
    for text in findings.compared:
        print(f"compared: {printable(text)}")
    for text in findings.to_confirm:
        print(f"not confirmed: {printable(text)}")
    for text in findings.not_compared:
        print(f"not compared: {printable(text)}")


def _count_proofs(findings: Findings) -> str:
    count = Counter(finding.kind for finding in findings.proofs)
    return ", ".join(f"{count[kind]} about {kind}s" for kind in KINDS if count[kind])


def _verify_against(config: VerifyConfig) -> int:
    if as_path(config.dataset).resolve() == as_path(config.against).resolve():
        raise RequestError(
            f"the key 'against' is '{config.against}', which is the dataset itself; name another dataset, or leave "
            "'against' out to compare the splits"
        )
    for path in (config.dataset, config.against):
        Manifest.read(path)
    ours, theirs = (Contents.read(path) for path in (config.dataset, config.against))
    findings = compare_datasets(ours, theirs)
    _print_findings(findings, config.lines)
    if findings.proofs:
        print(f"{config.dataset} and {config.against} share data: {_count_proofs(findings)}")
        return EXIT_FAILED
    questions = len(findings.found)
    asked = f"; answer the {questions} questions above (lines 'to look at')" if questions else ""
    unknown = ours.count_unnamed() + theirs.count_unnamed()
    if unknown:
        print(
            f"{config.dataset} and {config.against}: it is not known whether they share subjects, because the subjects "
            f"of {unknown} recordings are unknown; otherwise no shared data was found in what could be compared{asked}"
        )
        return EXIT_NOT_KNOWN
    recognised = ours.count_recognised() + theirs.count_recognised()
    print(
        f"{config.dataset} and {config.against}: no shared data was found in what could be compared"
        + (f", if the recognised subjects of {recognised} recordings are right" if recognised else "")
        + asked
    )
    return EXIT_DONE


def verify(config: VerifyConfig) -> int:
    """Check a dataset according to the options, and print the result.

    Parameters
    ----------
    config : VerifyConfig
        Options of the command.

    Returns
    -------
    int
        Exit code. 0: no fault and no shared data were found. 1: a fault or shared data were found. 3: nothing was
        found, but some subjects are unknown, so one person may be in two splits or datasets.

    Raises
    ------
    RequestError
        If the folder is not a complete dataset.
    """
    if not config.dataset:
        raise RequestError("dreamscale verify: no dataset is given; write the folder of the dataset after the command")
    if config.against:
        return _verify_against(config)
    faults = find_faults(config.dataset)
    for fault in faults:
        print(printable(fault))
    if faults:
        print(f"{config.dataset}: {len(faults)} faults; copy the dataset again, or run 'dreamscale shard' again")
        return EXIT_FAILED
    manifest = Manifest.read(config.dataset)
    total = sum(manifest.samples(split) for split in manifest.splits)
    shards = sum(len(shards) for shards in manifest.splits.values())
    aside = f" (version {manifest.version}, {manifest.withdrawn} withdrawn samples)" if manifest.version > 1 else ""
    print(f"{config.dataset}: {total} samples in {shards} shards{aside}; all bytes and counts agree with the manifest")
    if not config.content:
        return EXIT_DONE
    contents = Contents.read(config.dataset)
    findings = compare_splits(contents)
    _print_findings(findings, config.lines)
    if findings.proofs:
        print(
            f"{config.dataset}: the splits share data: {_count_proofs(findings)}; "
            f"change 'split' in the config, and {ANEW}"
        )
        return EXIT_FAILED
    return _conclude(config, contents, findings)


def _conclude(config: VerifyConfig, contents: Contents, findings: Findings) -> int:
    """Print the last line for the case that no shared data were found, and return the exit code."""
    manifest = contents.manifest
    stage = "align" if manifest.labels else "pretrain"
    following = f"next: dreamscale {stage} CONFIG --dataset {config.dataset}"
    filled = [split for split in SPLITS if manifest.samples(split)]
    unknown, recognised = contents.count_unnamed(), contents.count_recognised()
    if len(filled) < 2:
        print(f"{config.dataset}: all samples are in {''.join(filled)}, so there are no splits to compare; {following}")
        return EXIT_DONE
    if not holds_out_subjects(manifest):
        print(
            f"{config.dataset}: the config holds out no subjects, so a subject may be in several splits; the splits "
            f"share no window; {following}"
        )
        return EXIT_DONE
    if unknown:
        print(
            f"{config.dataset}: it is not known whether a person is in several splits, because the subjects of "
            f"{unknown} of {len(contents.recordings)} recordings are unknown; no other shared data was found; set "
            f"subject_pattern, or a table in the key 'subjects', and {ANEW}"
        )
        return EXIT_NOT_KNOWN
    if questions := sum(finding.kind == "subject" for finding in findings.found):
        print(
            f"{config.dataset}: no shared data was found, but the questions about {questions} subjects above (lines "
            f"'to look at') are open; {following}"
        )
        return EXIT_DONE
    if recognised:
        print(
            f"{config.dataset}: the splits share nothing, if the subjects of {recognised} of "
            f"{len(contents.recordings)} recordings are right: their names were recognised from the paths, and are "
            f"not confirmed; {following}"
        )
        return EXIT_DONE
    print(f"{config.dataset}: the splits share nothing; {following}")
    return EXIT_DONE


main = command(VerifyConfig, verify, prog="dreamscale verify", positionals=("dataset",))
