"""The sharding job: corpora of recordings to one dataset, with an account of every recording."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.cluster import RayConfig, ray_session, run_tasks, say, stop_signals
from data_sharding.config import parse_config, to_dict
from data_sharding.corpora import CorpusConfig, Item, list_items
from data_sharding.duplicates import Print, find_duplicates
from data_sharding.errors import EXIT_DONE, EXIT_SET_ASIDE, RequestError, run_main
from data_sharding.files import digest_of, sha256_file
from data_sharding.ledger import NAME as LEDGER
from data_sharding.ledger import short_reason, totals, write_ledger
from data_sharding.manifest import NAME as MANIFEST
from data_sharding.manifest import Manifest, Shard
from data_sharding.packing import ShardPlan, plan_shards, write_shard
from data_sharding.preprocess import PreprocessSpec
from data_sharding.progress import progress
from data_sharding.recording import Task, blank_row, run_in_worker, versions, why_died
from data_sharding.splits import SPLITS, SplitConfig

WORK = ".work"
"""Folder inside the output for what is not finished; gone when the dataset is."""
CRASHES = 2
"""Deaths of its worker after which a recording is quarantined."""


@dataclass(kw_only=True)
class ShardConfig:
    """Recordings of any maker to a dataset of WebDataset shards."""

    corpora: list[CorpusConfig]
    """Where the recordings are."""
    output: str
    """Folder of the dataset; a finished different dataset there is never replaced."""
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    """Rate, band, reference and window; stored with the dataset and with every encoder trained on it."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Who and what is held out."""
    samples_per_shard: int = 4096
    """Most samples a tar."""
    allowed_set_aside: float = 0.05
    """Share of the recordings found that may be quarantined before the job ends with exit code 3."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Where the job runs."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ValueError("corpora: the list is empty; name at least one corpus")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {self.samples_per_shard}")
        if not 0 <= self.allowed_set_aside <= 1:
            raise ValueError(f"allowed_set_aside is a share between 0 and 1, got {self.allowed_set_aside}")


@dataclass(kw_only=True)
class Plan:
    """What is to be done, known before any recording is opened."""

    items: dict[str, Item]
    """Recordings by key."""
    labels: list[str]
    """Names of the labels by number."""
    request: str
    """Checksum of config and file listing: the same for the same request."""


def make_plan(config: ShardConfig) -> Plan:
    """Find the recordings and check everything that can be checked without opening them.

    Parameters
    ----------
    config : ShardConfig
        The request.

    Returns
    -------
    Plan
        What is to be done.

    Raises
    ------
    RequestError
        If a corpus is missing, empty or unpaired, keys clash, or nobody is left to train on.
    """
    items: dict[str, Item] = {}
    for corpus in config.corpora:
        for item in list_items(corpus):
            if item.key in items:
                raise RequestError(
                    f"corpora: '{item.path}' of corpus '{item.corpus}' is listed twice; give the corpora "
                    "different names, or take one of them out"
                )
            items[item.key] = item
    usable = [item for item in items.values() if item.recording.problem is None and item.reason is None]
    config.split.check_subjects({item.subject for item in usable})
    shown = [(item, trial) for item in usable for trial in item.trials or ()]
    continuous = any(item.trials is None for item in usable)
    if (
        shown
        and not continuous
        and not any(config.split.trial(i.subject, t.image_id, t.split) == "train" for i, t in shown)
    ):
        raise RequestError(
            "split: no trial is left for train: no training subject saw a training image; change the split"
        )
    listing = [[key, [[f.name, f.stat().st_size] for f in item.recording.files]] for key, item in sorted(items.items())]
    trials = [
        [key, [[t.onset, t.image_id, t.label_name, t.caption, t.split] for t in i.trials or ()]]
        for key, i in sorted(items.items())
    ]
    return Plan(
        items=items,
        labels=sorted({trial.label_name for _, trial in shown}),
        request=digest_of({"config": _essence(config), "files": listing, "trials": trials}),
    )


def _essence(config: ShardConfig) -> dict[str, Any]:
    """The config without what does not change the dataset."""
    values = to_dict(config)
    for key in ("output", "ray", "allowed_set_aside"):
        values.pop(key)
    return values


def _finished(config: ShardConfig, plan: Plan, output: Path) -> Manifest | None:
    """The dataset that is there already, if it is the one asked for.

    Raises
    ------
    RequestError
        If the folder holds something else.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(f"output '{output}': is a file, not a folder")
    if not (output / MANIFEST).is_file():
        if output.is_dir() and any(output.iterdir()) and not (output / WORK).is_dir():
            raise RequestError(f"output '{output}': not empty, and no unfinished dataset; choose another folder")
        return None
    manifest = Manifest.read(output)
    if manifest.extra.get("request") != plan.request:
        ours = _essence(config)
        other = [
            key
            for key in ours
            if json.dumps(ours[key], sort_keys=True) != json.dumps(manifest.config.get(key), sort_keys=True)
        ]
        what = f"made with other settings ({', '.join(other)})" if other else "made of other recordings"
        raise RequestError(
            f"output '{output}': holds a finished dataset {what}; choose another folder, or remove it first"
        )
    written = (output / MANIFEST).stat().st_mtime
    newer = [item for item in plan.items.values() if any(f.stat().st_ctime > written for f in item.recording.files)]
    if newer:
        from data_sharding.ledger import read_ledger

        known = {row["key"]: row["sha256"] for row in read_ledger(output)}
        for item in newer:
            hashes = sorted(sha256_file(f) for f in item.recording.files)
            if known.get(item.key) != (digest_of(hashes) if len(hashes) > 1 else hashes[0]):
                raise RequestError(
                    f"output '{output}': '{item.path}' has changed since this dataset was made; choose another folder"
                )
    return manifest


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep a second job out of the same output."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                f"output '{work.parent}': another job is writing there; wait for it, or choose another folder"
            ) from None
        yield


def read_recordings(config: ShardConfig, plan: Plan, work: Path, in_flight: int) -> list[dict[str, Any]]:
    """First phase: every recording to a part, each in a worker that may die.

    Parameters
    ----------
    config : ShardConfig
        The request.
    plan : Plan
        What is to be done.
    work : Path
        The job's working folder.
    in_flight : int
        Tasks at a time.

    Returns
    -------
    list of dict
        One ledger row for each recording, sorted by key.
    """
    shutil.rmtree(work / "attempts", ignore_errors=True)
    tasks = {
        key: Task(
            item=item,
            spec=config.preprocess,
            split=config.split,
            labels=tuple(plan.labels),
            work=work.resolve(),
            timeout_s=config.ray.timeout_s,
        )
        for key, item in plan.items.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    crashes: Counter[str] = Counter()
    tally: Counter[str] = Counter()

    with progress("reading recordings", len(tasks)) as advance:

        def done(key: str, row: dict[str, Any]) -> None:
            rows[key] = row
            tally[row["status"]] += 1
            advance(1, ", ".join(f"{tally[name]} {name}" for name in sorted(tally)))

        def died(key: str, how: str) -> str | None:
            attempts, timed_out = why_died(work, key)
            if timed_out:
                return f"time-out: not finished after {config.ray.timeout_s:g} s (key 'ray.timeout_s')"
            # A worker that died before it began says nothing about the recording.
            crashes[key] += attempts > crashes[key]
            if crashes[key] < CRASHES:
                return None
            return f"crashed its reader {crashes[key]} times ({how})"

        for key, reason in run_tasks(run_in_worker, tasks, in_flight=in_flight, done=done, died=died).items():
            done(key, blank_row(plan.items[key], "quarantined", reason) | {"part": "", "split_samples": {}})
    return [rows[key] for key in sorted(rows)]


def mark_duplicates(rows: list[dict[str, Any]], plan: Plan, work: Path) -> None:
    """Write every signal once.

    Preferred is the recording with trials, then one whose subject is known, then the one with more channels.

    Parameters
    ----------
    rows : list of dict
        The ledger; duplicates are marked in place.
    plan : Plan
        What is done.
    work : Path
        The job's working folder.
    """
    candidates = [row for row in rows if row["status"] == "sharded"]
    candidates.sort(
        key=lambda r: (plan.items[r["key"]].trials is None, r["subject"] == r["key"], -r["n_kept"], r["key"])
    )
    prints = [
        Print(
            key=row["key"],
            sha256=row["sha256"],
            seconds=row["seconds"],
            names=row["channels"],
            points=np.load(work / "parts" / row["part"][:2] / row["part"] / "fingerprint.npy").astype(np.float32),
        )
        for row in candidates
    ]
    duplicates = find_duplicates(prints)
    for row in candidates:
        if kept := duplicates.get(row["key"]):
            row |= {
                "status": "duplicate",
                "reason": f"duplicate of {kept}",
                "split_samples": {},
                "windows": 0,
                "seconds_written": 0.0,
                "split": "",
            }


def pack(config: ShardConfig, plans: list[ShardPlan], work: Path, in_flight: int) -> dict[str, list[Shard]]:
    """Second phase: parts to shards.

    Parameters
    ----------
    config : ShardConfig
        The request.
    plans : list of ShardPlan
        What goes where.
    work : Path
        The job's working folder.
    in_flight : int
        Tasks at a time.

    Returns
    -------
    dict
        Shards of each split, in order.
    """
    work = work.resolve()
    records: dict[str, Shard] = {}
    with progress("writing shards", len(plans)) as advance:

        def done(key: str, shard: Shard) -> None:
            records[key] = shard
            advance(1)

        tasks = {plan.path: (plan, work / "parts", work / "dataset") for plan in plans}
        run_tasks(_write_shard, tasks, in_flight=in_flight, done=done, died=lambda key, how: None)
    return {split: [records[p.path] for p in plans if p.path.startswith(f"{split}/")] for split in SPLITS}


def _write_shard(task: tuple[ShardPlan, Path, Path]) -> Shard:
    return write_shard(*task)


def _publish(
    config: ShardConfig, plan: Plan, rows: list[dict[str, Any]], splits: dict[str, list[Shard]], output: Path
) -> Manifest:
    """Move the shards into place, account for everything, and write the manifest last."""
    from data_sharding.report import write_report

    work = output / WORK
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
        if splits[split]:
            for done in (work / "dataset" / split).glob("*.done.json"):
                done.unlink()
            wanted = {Path(shard.path).stem for shard in splits[split]}
            for stale in (work / "dataset" / split).iterdir():
                if stale.stem not in wanted:
                    stale.unlink()
            (work / "dataset" / split).rename(output / split)
    counts, hours = totals(rows)
    hours["written"] = round(sum(row["seconds_written"] for row in rows) / 3600, 6)
    counts["windows"] = sum(row["windows"] for row in rows)
    for row in rows:
        for why, number in json.loads(row["windows_left_out"]).items():
            counts[f"left out: {why}"] = counts.get(f"left out: {why}", 0) + number
    write_ledger(output / LEDGER, rows)
    essence = {
        "preprocess": config.preprocess.to_dict(),
        "labels": plan.labels,
        "shards": {split: [shard.sha256 for shard in shards] for split, shards in splits.items()},
    }
    manifest = Manifest(
        dataset_id=digest_of(essence),
        preprocess=config.preprocess,
        splits=splits,
        labels=plan.labels,
        counts=counts,
        hours=hours,
        config=_essence(config),
        versions=versions(),
        extra={"request": plan.request, "ledger_sha256": sha256_file(output / LEDGER)},
    )
    write_report(output / "report.html", rows, manifest)
    manifest.write(output)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _exit_code(config: ShardConfig, manifest: Manifest) -> int:
    found, quarantined = manifest.counts["found"], manifest.counts["quarantined"]
    if quarantined > config.allowed_set_aside * found:
        say(
            f"dreamscale: {quarantined} of {found} recordings were set aside, more than allowed_set_aside "
            f"{config.allowed_set_aside:g}; 'dreamscale inspect {config.output}' says why"
        )
        return EXIT_SET_ASIDE
    return EXIT_DONE


def _say_result(manifest: Manifest, rows: list[dict[str, Any]], output: Path) -> None:
    counts, hours = manifest.counts, manifest.hours
    say(
        f"{output}: {counts['sharded']} of {counts['found']} recordings sharded, {hours['written']:.3f} h in "
        + ", ".join(f"{manifest.samples(split)} {split}" for split in SPLITS)
        + f" samples; {counts['duplicate']} duplicate, {counts['quarantined']} quarantined, "
        + f"{counts['excluded']} excluded"
    )
    for (status, reason), number in sorted(Counter((r["status"], short_reason(r["reason"])) for r in rows).items()):
        if status in ("quarantined", "excluded"):
            say(f"  {status}: {number} x {reason}")


def run(config: ShardConfig) -> int:
    """Run the job.

    Parameters
    ----------
    config : ShardConfig
        The request.

    Returns
    -------
    int
        0, or 3 where more was quarantined than `allowed_set_aside`.

    Raises
    ------
    RequestError
        If the request is wrong: before Ray starts, but for a train split that turns out empty.
    """
    output = Path(config.output).expanduser()
    work = output / WORK
    with stop_signals():
        plan = make_plan(config)
        if manifest := _finished(config, plan, output):
            say(f"{output}: this dataset is finished already; nothing to do")
            return _exit_code(config, manifest)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"output '{output}': cannot be made ({error.strerror})") from None
        if not os.access(output, os.W_OK):
            raise RequestError(f"output '{output}': no permission to write there")
        with _alone(work), ray_session(config.ray) as in_flight:
            rows = read_recordings(config, plan, work, in_flight)
            mark_duplicates(rows, plan, work)
            kept = [row for row in rows if row["status"] == "sharded"]
            if not any("train" in row["split_samples"] for row in kept):
                write_ledger(work / LEDGER, rows)
                reasons = Counter(short_reason(row["reason"]) for row in rows if row["reason"]).most_common(3)
                why = (
                    ", ".join(f"{number} x {reason}" for reason, number in reasons)
                    or "every subject with usable data is held out"
                )
                raise RequestError(
                    f"no sample is left for train ({why}); see {work / LEDGER}, and change the corpora or the split"
                )
            plans = plan_shards(kept, config.samples_per_shard)
            shards_of: dict[str, list[str]] = {}
            for shard in plans:
                for piece in shard.pieces:
                    shards_of.setdefault(piece.key, []).append(shard.path)
            for row in rows:
                row["shards"] = list(dict.fromkeys(shards_of.get(row["key"], [])))
            splits = pack(config, plans, work, in_flight)
            manifest = _publish(config, plan, rows, splits, output)
    _say_result(manifest, rows, output)
    return _exit_code(config, manifest)


def _main(argv: list[str]) -> int:
    return run(
        parse_config(ShardConfig, argv, prog="dreamscale shard", positionals=("config",), aliases={"-o": "output"})
    )


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale shard CONFIG.yaml --output DIR``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; `sys.argv[1:]` by default.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(_main, argv)
