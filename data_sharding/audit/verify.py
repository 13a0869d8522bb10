"""Every byte and every count of a dataset against its manifest, and what splits or datasets have in common."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass

from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.leakage import KINDS, Contents, Findings, compare_datasets, compare_splits
from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError, run_main
from data_sharding.common.files import read_json, sha256_file
from data_sharding.common.progress import progress
from data_sharding.common.storage import AnyPath, as_path
from data_sharding.dataset.ledger import NAME as LEDGER
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import Manifest, Shard


@dataclass(kw_only=True)
class VerifyConfig:
    """Check a dataset's bytes and counts and that its splits share nothing, or that it shares nothing with another."""

    dataset: str
    """Folder of the dataset."""
    against: str = ""
    """Folder of another dataset: prove that the two share no subject, recording, window or image."""
    content: bool = True
    """Decode every window and compare the splits, too; false: bytes and counts only."""
    lines: int = 20
    """Most findings of a kind that are printed; 0: all."""

    def __post_init__(self) -> None:
        if self.lines < 0:
            raise ValueError(f"lines must not be negative, got {self.lines}")
        if self.against and not self.content:
            raise ValueError("content: datasets cannot be compared without it; leave it out")


def shard_faults(root: AnyPath, shard: Shard) -> list[str]:
    """What is wrong with a shard.

    Parameters
    ----------
    root : Path or UPath
        The dataset.
    shard : Shard
        Its manifest entry.

    Returns
    -------
    list of str
        One line a fault, naming the file; empty where there is none.
    """
    name = f"{shard.path.removesuffix('.tar')}.idx"
    tar, index = root / shard.path, root / name
    for path, called in ((tar, shard.path), (index, name)):
        if not path.is_file():
            return [f"{called}: missing"]
    faults = []
    if tar.stat().st_size != shard.bytes:
        faults.append(f"{shard.path}: {tar.stat().st_size} bytes, the manifest says {shard.bytes}")
    elif sha256_file(tar) != shard.sha256:
        faults.append(f"{shard.path}: its sha256 is not the manifest's")
    if sha256_file(index) != shard.index_sha256:
        return [*faults, f"{name}: its sha256 is not the manifest's"]
    entries = read_json(index)
    if len(entries) != shard.samples:
        faults.append(f"{name}: {len(entries)} samples, the manifest says {shard.samples}")
    if not faults:
        with tar.open("rb") as file, tarfile.open(fileobj=file) as stream:
            members = {m.name: [m.offset_data, m.size] for m in stream}
        indexed = {f"{e['key']}.{name}": at for e in entries for name, at in e["members"].items()}
        if members != indexed:
            faults.append(f"{name}: does not point at the members of {shard.path}")
    return faults


def find_faults(dataset: str | AnyPath) -> list[str]:
    """What is wrong with a dataset.

    Parameters
    ----------
    dataset : str, Path or UPath
        Its directory.

    Returns
    -------
    list of str
        One line a fault; empty where there is none.

    Raises
    ------
    RequestError
        If there is no complete dataset.
    """
    root = as_path(dataset)
    manifest = Manifest.read(root)
    shards = [shard for split in manifest.splits.values() for shard in split]
    faults: list[str] = []
    with progress("verifying shards", len(shards)) as advance:
        for shard in shards:
            faults += shard_faults(root, shard)
            advance(1)
    known = {shard.path for shard in shards}
    for split in manifest.splits:
        for tar in sorted((root / split).glob("*.tar")):
            if f"{split}/{tar.name}" not in known:
                faults.append(f"{split}/{tar.name}: not in the manifest")
    keys: set[str] = set()
    for shard in shards:
        index = (root / shard.path).with_suffix(".idx")
        for entry in read_json(index) if index.is_file() else ():
            if entry["key"] in keys:
                faults.append(f"{shard.path}: sample {entry['key']} is in the dataset twice")
            keys.add(entry["key"])
    if "ledger_sha256" in manifest.extra:
        faults += _ledger_faults(root, manifest)
    return faults


def _ledger_faults(root: AnyPath, manifest: Manifest) -> list[str]:
    if not (root / LEDGER).is_file():
        return [f"{LEDGER}: missing"]
    if sha256_file(root / LEDGER) != manifest.extra["ledger_sha256"]:
        return [f"{LEDGER}: its sha256 is not the manifest's"]
    rows = read_ledger(root)
    windows = sum(row.windows for row in rows)
    samples = sum(manifest.samples(split) for split in manifest.splits)
    faults = []
    if windows != samples:
        faults.append(f"{LEDGER}: {windows} windows, the manifest has {samples} samples")
    if len(rows) != manifest.counts.get("found"):
        faults.append(f"{LEDGER}: {len(rows)} recordings, the manifest counts {manifest.counts.get('found')}")
    if (digest := manifest.extra.get("fingerprints_sha256")) and (
        not (root / FINGERPRINTS).is_file() or sha256_file(root / FINGERPRINTS) != digest
    ):
        faults.append(f"{FINGERPRINTS}: missing, or its sha256 is not the manifest's")
    return faults


def _say(findings: Findings, lines: int) -> None:
    """Print what was found, kind by kind, and how far the comparison reached."""
    for proof in (True, False):
        for kind in KINDS:
            these = [f for f in findings.found if f.kind == kind and f.proof == proof]
            for finding in these[: lines or None]:
                print(f"{'shared' if proof else 'to look at'}: {finding.text}")
            if lines and len(these) > lines:
                print(f"  ... and {len(these) - lines} more of kind {kind} (--lines 0 prints all)")
    for text in findings.compared:
        print(f"compared: {text}")
    for text in findings.not_compared:
        print(f"not compared: {text}")


def _counts(findings: Findings) -> str:
    count = Counter(finding.kind for finding in findings.proofs)
    return ", ".join(f"{count[kind]} about {kind}s" for kind in KINDS if count[kind])


def _against(config: VerifyConfig) -> int:
    if as_path(config.dataset).resolve() == as_path(config.against).resolve():
        raise RequestError(f"against '{config.against}': is the dataset itself; leave it out to compare its splits")
    for path in (config.dataset, config.against):
        Manifest.read(path)
    ours, theirs = (Contents.read(path) for path in (config.dataset, config.against))
    findings = compare_datasets(ours, theirs)
    _say(findings, config.lines)
    if findings.proofs:
        print(f"{config.dataset} and {config.against} share something: {_counts(findings)}")
        return EXIT_FAILED
    questions = len(findings.found)
    print(
        f"{config.dataset} and {config.against}: nothing shared was found in what could be compared"
        + (f"; {questions} things to look at" if questions else "")
    )
    return EXIT_DONE


def _main(argv: list[str]) -> int:
    config = parse_config(VerifyConfig, argv, prog="dreamscale verify", positionals=("dataset",))
    if not config.dataset:
        raise RequestError("dreamscale verify: name the dataset's folder")
    if config.against:
        return _against(config)
    faults = find_faults(config.dataset)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{config.dataset}: {len(faults)} faults; shard the corpus again, or copy the dataset again")
        return EXIT_FAILED
    manifest = Manifest.read(config.dataset)
    total = sum(manifest.samples(split) for split in manifest.splits)
    shards = sum(len(shards) for shards in manifest.splits.values())
    print(f"{config.dataset}: {total} samples in {shards} shards, every byte and count as the manifest says")
    if not config.content:
        return EXIT_DONE
    findings = compare_splits(Contents.read(config.dataset))
    _say(findings, config.lines)
    if findings.proofs:
        print(f"{config.dataset}: the splits share something: {_counts(findings)}; change the split and shard again")
        return EXIT_FAILED
    print(f"{config.dataset}: nothing crosses the splits")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale verify DATASET [--against OTHER]``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; `sys.argv[1:]` by default.

    Returns
    -------
    int
        0 without a fault and with nothing shared, 1 otherwise, 2 where there is no complete dataset.
    """
    return run_main(_main, argv)
