"""Copies the samples of all recordings into shards of limited size.

The first phase of the job has written the samples of each recording to a folder, the *part* of the recording. The plan
of the shards depends only on the order of the recordings' keys. So the bytes of the shards do not depend on the number
of workers.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from data_sharding.common.files import digest_of, read_json, write_json
from data_sharding.common.storage import AnyPath, deliver, scratch_folder
from data_sharding.dataset.dataset import shard_record
from data_sharding.dataset.manifest import Shard
from data_sharding.dataset.samples import ShardWriter
from data_sharding.dataset.splits import SPLITS
from data_sharding.job.task import PartResult


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive samples of one recording that are copied into the same shard."""

    key: str
    """Key of the recording."""
    part: str
    """Name of the recording's part, which is a folder."""
    split: str
    """Name of the split. The file ``<split>.tar`` in the part holds its samples."""
    start: int
    """Number of the first sample in this file."""
    stop: int
    """Number of the last sample plus one."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Which samples a shard contains."""

    path: str
    """Path of the shard, relative to the folder of the dataset."""
    pieces: tuple[Piece, ...]
    """The samples, in the order in which they are written."""


def plan_shards(results: Iterable[PartResult], samples_per_shard: int) -> list[ShardPlan]:
    """Plan which samples go into which shard.

    Parameters
    ----------
    results : iterable of PartResult
        Results of the recordings to write, in any order.
    samples_per_shard : int
        Largest number of samples in a shard.

    Returns
    -------
    list of ShardPlan
        Plans of the shards, sorted by split and number. Recordings are in the order of their keys.
    """
    plans: list[ShardPlan] = []
    ordered = sorted(results, key=lambda result: result.row.key)
    for split in SPLITS:
        pieces: list[Piece] = []
        room, number = samples_per_shard, 0

        def close(split: str = split) -> None:
            nonlocal pieces, room, number
            if pieces:
                plans.append(ShardPlan(path=f"{split}/{number:06d}.tar", pieces=tuple(pieces)))
            pieces, room, number = [], samples_per_shard, number + 1

        for result in ordered:
            at, left = 0, result.samples.get(split, 0)
            while left:
                take = min(left, room)
                pieces.append(Piece(key=result.row.key, part=result.part, split=split, start=at, stop=at + take))
                at, left, room = at + take, left - take, room - take
                if not room:
                    close()
        close()
    return plans


def write_shard(plan: ShardPlan, parts: AnyPath, root: AnyPath, work: AnyPath) -> Shard:
    """Copy samples from the parts of recordings into a shard, without decoding the samples.

    Parameters
    ----------
    plan : ShardPlan
        The samples that the shard contains.
    parts : Path or UPath
        Folder with the parts of all recordings.
    root : Path or UPath
        Folder of the dataset.
    work : Path or UPath
        The job's working folder; its folder ``shards`` holds a record of each finished shard.

    Returns
    -------
    Shard
        Entry of the shard for the manifest. If a finished shard with the same plan exists, it is not written again.
    """
    tar = root / plan.path
    done = work / "shards" / f"{plan.path}.json"
    digest = digest_of([[p.part, p.split, p.start, p.stop] for p in plan.pieces])
    if done.is_file():
        record = read_json(done)
        if record.pop("plan") == digest and tar.is_file() and tar.stat().st_size == record["bytes"]:
            return Shard(**record)
    with scratch_folder() if isinstance(root, UPath) else _folder(work / "new") as folder:
        local = folder / plan.path
        with ShardWriter(local) as writer:
            for piece in plan.pieces:
                source = parts / piece.part[:2] / piece.part / f"{piece.split}.tar"
                entries = read_json(source.with_suffix(".idx"))[piece.start : piece.stop]
                with source.open("rb") as stream:
                    for entry in entries:
                        members = []
                        for name, (offset, size) in entry["members"].items():
                            stream.seek(offset)
                            members.append((f"{entry['key']}.{name}", stream.read(size)))
                        writer.write_members(entry["key"], members, entry)
        record = shard_record(folder, local, len(writer))
        deliver(local.with_suffix(".idx"), tar.with_suffix(".idx"))
        deliver(local, tar)
    write_json(done, {"plan": digest, **vars(record)})
    return record


@contextlib.contextmanager
def _folder(base: AnyPath) -> Iterator[Path]:
    """Make a temporary folder on the disk of the dataset, so that its files can be renamed into the dataset."""
    folder = Path(str(base)) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
