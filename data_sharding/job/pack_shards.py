"""Copies the samples (windows and trials) of all recordings into shards; the number of samples in a shard is limited.

The first phase of the job wrote the samples of each recording to a folder, the *part* of the recording. Recordings are
packed in the order of their keys, so the bytes of the shards do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from data_sharding.common.files import digest_of, read_json, write_json
from data_sharding.common.storage import AnyPath, deliver, scratch_folder
from data_sharding.dataset.dataset import shard_record
from data_sharding.dataset.manifest import WORK, Shard
from data_sharding.dataset.samples import ShardWriter
from data_sharding.dataset.splits import SPLITS
from data_sharding.job.task import PartResult


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive samples (windows or trials) of one recording that are copied into one shard."""

    key: str
    """Key of the recording."""
    part: str
    """Name of the recording's part, which is a folder."""
    split: str
    """Name of the split. The file ``<split>.tar`` in the part contains the samples of the split."""
    start: int
    """Index of the first copied sample in the tar file that `source` returns."""
    stop: int
    """Index of the last copied sample in the tar file that `source` returns, plus one."""
    shard: str = ""
    """Path of the shard from which the samples are copied; empty if the samples are copied from the recording's
    part."""

    def source(self, root: AnyPath) -> AnyPath:
        """Return the path of the tar file with the samples; `root` is the folder of the dataset."""
        if self.shard:
            return root / self.shard
        return root / WORK / "parts" / self.part[:2] / self.part / f"{self.split}.tar"


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Plan of one shard: which samples (windows or trials) it will contain."""

    path: str
    """Path of the shard, relative to the folder of the dataset."""
    pieces: tuple[Piece, ...]
    """Samples of the shard, in the order in which they are written."""


def plan_shards(
    results: Iterable[PartResult],
    samples_per_shard: int,
    moved: Sequence[Piece] = (),
    first: Mapping[str, int] | None = None,
) -> list[ShardPlan]:
    """Plan which samples go into which shard.

    Parameters
    ----------
    results : iterable of PartResult
        Results of the recordings to write, in any order.
    samples_per_shard : int
        Largest number of samples in a shard.
    moved : sequence of Piece
        Samples that are copied from old shards.
    first : mapping of str to int, optional
        For each split, the number that its first new shard gets; 0 by default.

    Returns
    -------
    list of ShardPlan
        Plans of the shards, sorted by split and number. The samples are packed in the order of the keys of their
        recordings.
    """
    plans: list[ShardPlan] = []
    wanted = [
        Piece(key=result.row.key, part=result.part, split=split, start=0, stop=number)
        for result in results
        for split, number in result.samples.items()
        if number
    ]
    ordered = sorted([*wanted, *moved], key=lambda piece: (piece.key, piece.shard, piece.start))
    for split in SPLITS:
        pieces: list[Piece] = []
        room, number = samples_per_shard, (first or {}).get(split, 0)

        def close(split: str = split) -> None:
            nonlocal pieces, room, number
            if pieces:
                plans.append(ShardPlan(path=f"{split}/{number:06d}.tar", pieces=tuple(pieces)))
            pieces, room, number = [], samples_per_shard, number + 1

        for piece in ordered:
            at, left = piece.start, piece.stop - piece.start if piece.split == split else 0
            while left:
                take = min(left, room)
                pieces.append(dataclasses.replace(piece, start=at, stop=at + take))
                at, left, room = at + take, left - take, room - take
                if not room:
                    close()
        close()
    return plans


def write_shard(plan: ShardPlan, root: AnyPath, work: AnyPath) -> Shard:
    """Copy samples from the parts of recordings, or from old shards, into a shard, without decoding the samples.

    Parameters
    ----------
    plan : ShardPlan
        The samples that the shard contains.
    root : Path or UPath
        Folder of the dataset.
    work : Path or UPath
        The job's working folder; its folder ``shards`` contains a file about each finished shard.

    Returns
    -------
    Shard
        Entry of the shard for the manifest. A finished shard with the same plan is not written again.
    """
    tar = root / plan.path
    done = work / "shards" / f"{plan.path}.json"
    digest = digest_of([[p.part or p.shard, p.split, p.start, p.stop] for p in plan.pieces])
    if done.is_file():
        record = read_json(done)
        if record.pop("plan") == digest and tar.is_file() and tar.stat().st_size == record["bytes"]:
            return Shard(**record)
    with scratch_folder() if isinstance(root, UPath) else _folder(work / "new") as folder:
        local = folder / plan.path
        with ShardWriter(local) as writer:
            for piece in plan.pieces:
                source = piece.source(root)
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
    """Make a temporary folder on the same disk as the dataset, so that its files can be moved by renaming."""
    folder = Path(str(base)) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
