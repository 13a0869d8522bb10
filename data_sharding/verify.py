"""Every byte and every count of a dataset against its manifest."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from data_sharding.config import parse_config
from data_sharding.errors import EXIT_DONE, EXIT_FAILED, RequestError, run_main
from data_sharding.files import read_json, sha256_file
from data_sharding.ledger import NAME as LEDGER
from data_sharding.ledger import read_ledger
from data_sharding.manifest import Manifest, Shard
from data_sharding.progress import progress


@dataclass(kw_only=True)
class VerifyConfig:
    """Check every byte and count of a dataset against its manifest."""

    dataset: str
    """Folder of the dataset."""


def shard_faults(root: Path, shard: Shard) -> list[str]:
    """What is wrong with a shard.

    Parameters
    ----------
    root : Path
        The dataset.
    shard : Shard
        Its manifest entry.

    Returns
    -------
    list of str
        One line a fault, naming the file; empty where there is none.
    """
    tar = root / shard.path
    index = tar.with_suffix(".idx")
    for path in (tar, index):
        if not path.is_file():
            return [f"{path.relative_to(root)}: missing"]
    faults = []
    if tar.stat().st_size != shard.bytes:
        faults.append(f"{shard.path}: {tar.stat().st_size} bytes, the manifest says {shard.bytes}")
    elif sha256_file(tar) != shard.sha256:
        faults.append(f"{shard.path}: its sha256 is not the manifest's")
    if sha256_file(index) != shard.index_sha256:
        return [*faults, f"{index.relative_to(root)}: its sha256 is not the manifest's"]
    entries = read_json(index)
    if len(entries) != shard.samples:
        faults.append(f"{index.relative_to(root)}: {len(entries)} samples, the manifest says {shard.samples}")
    if not faults:
        with tarfile.open(tar) as stream:
            members = {m.name: [m.offset_data, m.size] for m in stream}
        indexed = {f"{e['key']}.{name}": at for e in entries for name, at in e["members"].items()}
        if members != indexed:
            faults.append(f"{index.relative_to(root)}: does not point at the members of {shard.path}")
    return faults


def find_faults(dataset: str | Path) -> list[str]:
    """What is wrong with a dataset.

    Parameters
    ----------
    dataset : str or Path
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
    root = Path(dataset)
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
            if tar.relative_to(root).as_posix() not in known:
                faults.append(f"{tar.relative_to(root)}: not in the manifest")
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


def _ledger_faults(root: Path, manifest: Manifest) -> list[str]:
    if not (root / LEDGER).is_file():
        return [f"{LEDGER}: missing"]
    if sha256_file(root / LEDGER) != manifest.extra["ledger_sha256"]:
        return [f"{LEDGER}: its sha256 is not the manifest's"]
    rows = read_ledger(root)
    windows = sum(row["windows"] for row in rows)
    samples = sum(manifest.samples(split) for split in manifest.splits)
    faults = []
    if windows != samples:
        faults.append(f"{LEDGER}: {windows} windows, the manifest has {samples} samples")
    if len(rows) != manifest.counts.get("found"):
        faults.append(f"{LEDGER}: {len(rows)} recordings, the manifest counts {manifest.counts.get('found')}")
    return faults


def _main(argv: list[str]) -> int:
    config = parse_config(VerifyConfig, argv, prog="dreamscale verify", positionals=("dataset",))
    if not config.dataset:
        raise RequestError("dreamscale verify: name the dataset's folder")
    faults = find_faults(config.dataset)
    for fault in faults:
        print(fault)
    manifest = Manifest.read(config.dataset)
    if faults:
        print(f"{config.dataset}: {len(faults)} faults; shard the corpus again, or copy the dataset again")
        return EXIT_FAILED
    total = sum(manifest.samples(split) for split in manifest.splits)
    shards = sum(len(shards) for shards in manifest.splits.values())
    print(f"{config.dataset}: {total} samples in {shards} shards, every byte and count as the manifest says")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale verify DATASET``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; `sys.argv[1:]` by default.

    Returns
    -------
    int
        0 without a fault, 1 with one, 2 where there is no complete dataset.
    """
    return run_main(_main, argv)
