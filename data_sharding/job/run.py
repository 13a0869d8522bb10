"""The sharding job makes one dataset from corpora of recordings. Every recording gets a row in the ledger.

The job has two phases. In the first phase, the job reads and checks every recording, and writes its windows to a
*part*: a folder for one recording, inside the working folder. In the second phase, the job decides which recordings are
duplicates or held back, and copies the samples of all other recordings from the parts into shards. The job can be
stopped at any time, and the same command resumes it.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from data_sharding.audit.duplicates import RecordingFingerprint, find_duplicates, preference
from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_SET_ASIDE, RequestError
from data_sharding.common.files import digest_of
from data_sharding.common.progress import JobProgress, progress
from data_sharding.common.reason import Reason
from data_sharding.common.stop import check_stop, raise_on_stop_signals
from data_sharding.common.storage import (
    AnyPath,
    deliver,
    describe,
    fresh,
    is_remote,
    is_storage_error,
    remove_tree,
    scratch_folder,
)
from data_sharding.common.untrusted import private_folder
from data_sharding.dataset.ledger import NAME as LEDGER
from data_sharding.dataset.ledger import (
    STATUSES,
    LedgerRow,
    write_ledger,
)
from data_sharding.dataset.manifest import NAME as MANIFEST
from data_sharding.dataset.manifest import WORK, Manifest, Shard
from data_sharding.dataset.splits import SPLITS
from data_sharding.formats.kept.store import limit_size
from data_sharding.job.announce import describe_empty_splits
from data_sharding.job.cluster import (
    ClusterFailed,
    find_missing_on_nodes,
    ray_session,
    run_tasks,
    say,
)
from data_sharding.job.encoder_settings import use_encoder_settings
from data_sharding.job.isolation import GivenUp, call_isolated
from data_sharding.job.journal import Journal, lock_output
from data_sharding.job.pack_shards import ShardPlan, plan_shards, write_shard
from data_sharding.job.process_recording import PART_SCHEMA, get_library_versions
from data_sharding.job.publish import REPORT, publish, repair_copies
from data_sharding.job.request import Plan, ShardConfig, make_plan, reduce_config, resolve_decoded, resolve_output
from data_sharding.job.suggest_units import suggest_unit_factors
from data_sharding.job.task import PartResult, Task, describe_row, new_row
from data_sharding.job.versions import (
    FingerprintLoader,
    Former,
    check_growth,
    content_of,
    describe_changes,
    plan_version,
    store_results,
)

READER = "data_sharding.job.process_recording:process_recording"
"""Function that reads one recording; a child process of the worker runs it."""


def _find_former(output: AnyPath) -> Manifest | None:
    """Return the manifest of the finished dataset in the output folder; None if the folder has no finished dataset.

    Raises
    ------
    RequestError
        If the output is a file, or a folder whose files do not belong to a dataset.
    """
    if fresh(output).exists() and not output.is_dir():
        raise RequestError(f"output '{output}': is a file, not a folder; choose another path")
    if (output / MANIFEST).is_file():
        return Manifest.read(output)
    if output.is_dir() and any(output.iterdir()) and not (output / WORK).is_dir():
        raise RequestError(
            f"output '{output}': this folder is not empty, and its files are not from an interrupted 'dreamscale "
            "shard'; choose an empty or new folder"
        )
    return None


def _plan_growth(config: ShardConfig, plan: Plan, manifest: Manifest, output: AnyPath) -> Former | None:
    """Return the finished dataset that this job will change; None if the dataset is already up to date.

    Raises
    ------
    RequestError
        If the dataset cannot be extended with this config.
    """
    check_growth(config, reduce_config(config), manifest, output)
    former = Former.read(output, manifest)
    changed = former.find_changed_files(plan)
    if manifest.extra.get("request") == plan.request and not changed and not (config.compact and manifest.withdrawn):
        return None
    former.check_people(plan, config.split)
    former.forget(changed)
    # The stored samples contain the numbers of their labels. So that the old labels keep their numbers, new labels come
    # after the labels of the former version.
    plan.labels = [*manifest.labels, *(label for label in plan.labels if label not in manifest.labels)]
    return former


def read_isolated(task: Task, memory_gb: float) -> PartResult:
    """Read a recording in a child process of the worker. Each Ray task of the first phase calls this function.

    Parameters
    ----------
    task : Task
        The recording to process, and the settings for this recording.
    memory_gb : float
        Memory in GB that the child process may use.

    Returns
    -------
    PartResult
        Result of the recording. The recording is quarantined if its reader crashed, hung or used too much memory.
    """
    try:
        return call_isolated(READER, task, timeout_s=task.timeout_s, memory_gb=memory_gb)
    except GivenUp as error:
        return PartResult(row=new_row(task.item, "quarantined", error.reason))


def _read(argument: tuple[Task, float]) -> PartResult:
    return read_isolated(*argument)


def get_settings(config: ShardConfig, plan: Plan) -> tuple[str, str]:
    """Return two checksums of the settings that all recordings share: with and without the libraries' versions."""
    values = {"preprocess": config.preprocess.to_dict(), "split": reduce_config(config)["split"]}
    versions = {"schema": PART_SCHEMA, "labels": plan.labels, "versions": get_library_versions()}
    return digest_of({**values, **versions}), digest_of(values)


def read_recordings(
    config: ShardConfig, plan: Plan, work: AnyPath, in_flight: int, former: Former | None = None
) -> list[PartResult]:
    """Do the first phase of the job: write the windows of every recording to a part.

    Recordings are read in child processes, because readers of file formats may crash.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.
    plan : Plan
        The recordings, and all data about them that is available before they are opened.
    work : Path or UPath
        The job's working folder.
    in_flight : int
        Largest number of tasks that run or wait in Ray at the same time.
    former : Former, optional
        Former version of the dataset. A recording of the former version is read again only if it has changed.

    Returns
    -------
    list of PartResult
        One result for each recording, sorted by key. If the files and the settings of a recording have not changed
        since an earlier run, the result of the earlier run is used, and the files are not opened.
    """
    limits = config.ray.timeout_s, config.ray.memory_gb
    decoded = resolve_decoded(config)
    settings, source = get_settings(config, plan)
    results: dict[str, PartResult] = {}
    tasks: dict[str, tuple[Task, float]] = {}
    sizes = {key: plan.size(key) for key in plan.items}
    with Journal(work / "rows") as journal, JobProgress(sizes) as shown:

        def count(row: LedgerRow, *, from_earlier_run: bool = False) -> None:
            channels = row.n_kept or row.n_eeg
            shown.add(row.key, row.status, seconds=row.seconds, channels=channels, from_earlier_run=from_earlier_run)

        identities = {key: plan.identity(key, settings) for key in plan.items}
        # Read the largest recordings first: if the last task had a large recording, all other workers would wait for
        # this task.
        for key, item in sorted(plan.items.items(), key=lambda entry: (-sizes[entry[0]], entry[0])):
            if former and (result := former.find(key, identities[key], plan.identity(key, source))):
                results[key] = result
                count(result.row, from_earlier_run=True)
                continue
            result = journal.find(key, identities[key])
            # Do not use the stored result of a failed recording if the limits of time and memory have changed, or if
            # the cause of the failure may have disappeared.
            if result and result.limits in (None, limits) and not result.may_pass and _has_part(result, work):
                results[key] = result
                count(result.row, from_earlier_run=True)
                continue
            task = Task(
                item=item,
                spec=config.preprocess,
                split=config.split,
                labels=tuple(plan.labels),
                work=work,
                timeout_s=config.ray.timeout_s,
                decoded=decoded,
            )
            tasks[key] = (task, config.ray.memory_gb)

        def done(key: str, result: PartResult) -> None:
            if not result.part:
                result.limits = limits
                result.row.bytes = result.row.bytes or sizes[key]
            results[key] = result
            journal.add(key, identities[key], result)
            count(result.row)

        def give_up(key: str, error: Exception) -> Reason | None:
            files = {str(f) for f in plan.items[key].recording.files}
            if is_storage_error(error):
                name = str(getattr(error, "filename", None) or "")
                return Reason("unreadable", describe(error)) if name in files else None
            return Reason("failed", f"{type(error).__name__}: {describe(error)}")

        given_up = run_tasks(
            _read,
            tasks,
            in_flight=in_flight,
            memory_gb=config.ray.memory_gb,
            done=done,
            give_up=give_up,
            look=shown.look,
        )
        for key, reason in given_up.items():
            done(key, PartResult(row=new_row(plan.items[key], "quarantined", reason), may_pass=True))
    if former:
        results = {key: former.prefer(key, content_of(plan, result), result) for key, result in results.items()}
    return [results[key] for key in sorted(results)]


def _has_part(result: PartResult, work: AnyPath) -> bool:
    part = result.part
    # On an object store, checking a hundred thousand folders would take hours, so assume that the parts exist.
    return not part or is_remote(work) or (work / "parts" / part[:2] / part).is_dir()


def mark_duplicates(
    results: list[PartResult],
    plan: Plan,
    prints: dict[str, RecordingFingerprint],
    load_points: FingerprintLoader,
    former: Former | None = None,
) -> None:
    """If several recordings have the same signal, keep one of these recordings, and mark the others as duplicates.

    Parameters
    ----------
    results : list of PartResult
        Results of the first phase. This function changes the ledger rows of duplicates.
    plan : Plan
        The job's plan.
    prints : dict of str to RecordingFingerprint
        Maps the key of each recording to the data that is compared with other recordings.
    load_points : FingerprintLoader
        Function that loads the full fingerprint of a recording. The function is called only for pairs of recordings
        with similar signatures.
    former : Former, optional
        Former version of the dataset. Recordings in the former shards are kept, and new recordings with the same signal
        are duplicates.
    """
    rows = [result.row for result in results]
    candidates = [row for row in rows if row.status == "sharded"]
    served = former.reused & set(former.pieces) if former else set()
    candidates.sort(
        key=lambda row: (row.key not in served, preference(row, trials=plan.items[row.key].trials is not None))
    )
    duplicates = find_duplicates([prints[row.key] for row in candidates], load_points)
    for row in candidates:
        if copy := duplicates.get(row.key):
            reason = Reason("duplicate", text=f"duplicate of {copy}")
            row.set_aside("duplicate", reason, duplicate_of=copy.kept)
    # If a quarantined recording has the same signal as another recording, write a note into its ledger row. So the user
    # does not repair a recording whose signal is already in the dataset.
    unused = [result.row for result in results if result.row.status == "quarantined" and result.signature]
    kept_rows = [row for row in candidates if row.status == "sharded"]
    copies = find_duplicates([prints[row.key] for row in [*kept_rows, *unused]], load_points)
    for row in unused:
        if copy := copies.get(row.key):
            row.notes.append(f"the same signal as {copy}")


def collect_prints(results: list[PartResult]) -> dict[str, RecordingFingerprint]:
    """Return a dictionary from the key of each recording to the data that `find_duplicates` compares."""
    return {
        result.row.key: RecordingFingerprint(
            key=result.row.key,
            sha256=result.row.sha256,
            seconds=result.row.seconds,
            names=result.row.channels,
            signature=result.signature,
        )
        for result in results
    }


def pack(config: ShardConfig, plans: list[ShardPlan], output: AnyPath, in_flight: int) -> dict[str, list[Shard]]:
    """Do the second phase of the job: copy the samples from the parts into shards.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.
    plans : list of ShardPlan
        Plan of each shard, with the samples of the shard.
    output : Path or UPath
        Folder of the dataset.
    in_flight : int
        Largest number of tasks that run or wait in Ray at the same time.

    Returns
    -------
    dict
        List of the shards of each split, in the order of their numbers.
    """
    records: dict[str, Shard] = {}
    with progress("writing shards", len(plans)) as advance:

        def done(key: str, shard: Shard) -> None:
            records[key] = shard
            advance(1)

        tasks = {plan.path: (plan, output) for plan in plans}
        run_tasks(_write_shard, tasks, in_flight=in_flight, memory_gb=config.ray.memory_gb, done=done)
    return {split: [records[p.path] for p in plans if p.path.startswith(f"{split}/")] for split in SPLITS}


def _write_shard(task: tuple[ShardPlan, AnyPath]) -> Shard:
    plan, output = task
    return write_shard(plan, output, output / WORK)


def _finish(config: ShardConfig, manifest: Manifest, output: AnyPath) -> int:
    """Print the path of the report and the next commands; return the exit code of the job."""
    found, quarantined = manifest.counts["found"], manifest.counts["quarantined"]
    too_many = quarantined > config.allowed_set_aside * found
    if too_many:
        say(
            f"dreamscale: {quarantined} of {found} recordings are quarantined, more than allowed_set_aside "
            f"{config.allowed_set_aside:g}; 'dreamscale inspect {output}' lists the reasons"
        )
    say(
        f"report: {output / REPORT}; next: 'dreamscale inspect {output}' for tables, 'dreamscale verify {output}' to "
        f"check the files, 'dreamscale pretrain CONFIG --dataset {output}' to train an encoder"
    )
    return EXIT_SET_ASIDE if too_many else EXIT_DONE


def _say_result(manifest: Manifest, rows: list[LedgerRow], output: AnyPath) -> None:
    counts, hours = manifest.counts, manifest.hours
    say(
        f"{output}: {counts['sharded']} of {counts['found']} recordings sharded, {hours['written']:.3f} h in "
        + ", ".join(f"{manifest.samples(split)} {split}" for split in SPLITS)
        + " samples; "
        + ", ".join(f"{counts[status]} {status}" for status in STATUSES if status != "sharded")
    )
    for (status, reason), number in sorted(Counter((row.status, row.category) for row in rows).items()):
        if status in ("quarantined", "excluded", "held back"):
            say(f"  {status}: {number} x {reason}")


def run(config: ShardConfig) -> int:
    """Run the sharding job.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.

    Returns
    -------
    int
        Exit code: 0, or 3 if more recordings are quarantined than `allowed_set_aside` permits.

    Raises
    ------
    RequestError
        If the config is wrong. Almost all faults of a config are found before Ray starts. But an empty train split is
        found only after the recordings were read.
    """
    config, changes = use_encoder_settings(config)
    output, decoded = resolve_output(config.output), resolve_decoded(config)
    work = output / WORK
    with raise_on_stop_signals():
        if changes:
            say(changes)
        say(f"listing recordings in {', '.join(corpus.root for corpus in config.corpora)}")
        plan = make_plan(config)
        check_stop()
        current, former = _find_former(output), None
        if current is not None:
            former = _plan_growth(config, plan, current, output)
            if former is None:
                repair_copies(output, current)  # An earlier job may have been killed just after it wrote the manifest.
                remove_tree(work)
                say(f"{output}: this dataset is finished already; nothing to do")
                _limit_decoded(config, decoded)
                return _finish(config, current, output)
            say(f"{output}: holds version {current.version} of this dataset; looking for changes")
        if not is_remote(output):
            _make_folder(output)
        if decoded:
            _make_private(decoded)
            say(f"keeping decoded signals in {decoded}")
        say(f"found {len(plan.items)} recordings; starting Ray, which takes some seconds")
        for line in plan.subjects:
            say(line)
        with lock_output(work), ray_session(config.ray) as in_flight:
            _check_nodes(plan, work, decoded)
            remove_tree(work / "new")  # The folder `new` contains unfinished shards from an earlier run of the job.
            say(f"reading recordings, up to {in_flight} tasks at a time")
            state, rows, kept, points = _collect(config, plan, work, in_flight, former)
            suggestions = suggest_unit_factors(config.corpora, plan.corpus_of, rows)
            if not any("train" in result.samples for result in kept):
                for line in suggestions:
                    say(line)
                _refuse_empty(rows, work)
            version = plan_version(former, kept, plan, compact=config.compact)
            reused = former.reused if former else set()
            fresh_results = [result for result in kept if result.row.key not in reused]
            plans = plan_shards(fresh_results, config.samples_per_shard, version.moved, version.first)
            pieces = [(shard.path, piece.key) for shard in plans for piece in shard.pieces]
            if former:
                old = {shard.path for shards in version.splits.values() for shard in shards}
                served = [piece for row in rows if row.key in reused for piece in former.pieces.get(row.key, [])]
                pieces = [*((piece.shard, piece.key) for piece in served if piece.shard in old), *pieces]
            shards_of: dict[str, list[str]] = {}
            for path, key in pieces:
                shards_of.setdefault(key, []).append(path)
            for row in rows:
                row.shards = list(dict.fromkeys(shards_of.get(row.key, []))) if row.status == "sharded" else []
            splits = pack(config, plans, output, in_flight)
            splits = {split: [*version.splits[split], *splits[split]] for split in SPLITS}
            manifest = publish(config, plan, rows, splits, output, points, version, state)
            _limit_decoded(config, decoded)
    if current is not None and manifest.version > current.version:
        for line in describe_changes(current, manifest, version.changes):
            say(line)
    elif current is not None:
        say(f"{output}: nothing has changed; version {current.version} stays as it is")
    _say_result(manifest, rows, output)
    for line in [*suggestions, *describe_empty_splits(config.split, plan.items.values(), rows)]:
        say(line)
    return _finish(config, manifest, output)


def _collect(
    config: ShardConfig, plan: Plan, work: AnyPath, in_flight: int, former: Former | None
) -> tuple[bytes, list[LedgerRow], list[PartResult], FingerprintLoader]:
    """Read the recordings, and decide which of them belong to the dataset.

    Returns
    -------
    state : bytes
        Results of all recordings, as they were before duplicates were marked. The next job uses these results if it
        adds recordings.
    rows : list of LedgerRow
        Rows of the ledger.
    kept : list of PartResult
        Results of the recordings that belong to the dataset.
    points : FingerprintLoader
        Object that loads the fingerprint of a recording.
    """
    while True:
        results = read_recordings(config, plan, work, in_flight, former)
        state = store_results(results, plan, *get_settings(config, plan))
        rows = [result.row for result in results]
        for row in rows:
            describe_row(row, plan.items[row.key])
        points, prints = FingerprintLoader(results, work, former), collect_prints(results)
        plan.hold_back.mark(rows, prints, points)
        mark_duplicates(results, plan, prints, points, former)
        plan.hold_back.count_images(rows)
        _count_unlisted(rows, plan)
        kept = [result for result in results if result.row.status == "sharded"]
        # A recording may belong to the new version, although it was a duplicate or held back in the former version. The
        # former shards contain no samples of such a recording, so the recording must be read again.
        again = former.needs_samples(kept) if former else []
        if former is None or not again:
            return state, rows, kept, points
        former.forget(again)


def _count_unlisted(rows: list[LedgerRow], plan: Plan) -> None:
    """In the ledger column ``windows_left_out``, also count the trials that the corpora themselves left out."""
    for row in rows:
        if unlisted := plan.items[row.key].left_out:
            row.windows_left_out = dict(sorted((Counter(row.windows_left_out) + Counter(unlisted)).items()))


def _check_nodes(plan: Plan, work: AnyPath, decoded: Path | None = None) -> None:
    """Raise an error if a machine of the cluster cannot access the working folder or a corpus."""
    local = [] if is_remote(work) else [str(work / "lock")]
    firsts = {
        item.corpus: str(item.recording.path) for item in plan.items.values() if not is_remote(item.recording.path)
    }
    local += [str(decoded)] if decoded else []
    for address, missing in find_missing_on_nodes([*local, *firsts.values()]).items():
        raise RequestError(
            f"ray: machine {address} cannot access {missing[0]}; every machine needs the same folders under the same "
            "paths: mount the folder there, or use an object store"
        )


def _make_folder(output: AnyPath) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"output '{output}': the folder cannot be made ({error.strerror}); choose another folder"
        ) from None
    if not os.access(str(output), os.W_OK):
        raise RequestError(f"output '{output}': no permission to write there; choose another folder")


def _make_private(decoded: Path) -> None:
    try:
        private_folder(decoded)
    except RequestError as error:
        raise RequestError(f"decoded: {error}") from None
    except OSError as error:
        raise RequestError(
            f"decoded '{decoded}': the folder cannot be made ({error.strerror}); choose another folder"
        ) from None
    if not os.access(decoded, os.W_OK):
        raise RequestError(f"decoded '{decoded}': no permission to write there; choose another folder")


def _limit_decoded(config: ShardConfig, decoded: Path | None) -> None:
    """If the config limits the size of all decoded signals, delete signals that were not used for the longest time."""
    if decoded and config.decoded_gb:
        deleted, left = limit_size(decoded, 1e9 * config.decoded_gb)
        if deleted:
            say(f"{decoded}: deleted {deleted} kept signals that no job used recently; {left / 1e9:.3g} GB are left")


def _refuse_empty(rows: list[LedgerRow], work: AnyPath) -> None:
    with scratch_folder() as folder:
        write_ledger(folder / LEDGER, rows)
        deliver(folder / LEDGER, work / LEDGER)
    reasons = Counter(row.category for row in rows if row.reason).most_common(3)
    why = (
        ", ".join(f"{number} x {reason}" for reason, number in reasons) or "every subject with usable data is held out"
    )
    raise RequestError(f"no sample is left for train ({why}); see {work / LEDGER}, and change the corpora or the split")


def shard(config: ShardConfig) -> int:
    """Run the sharding job. Report a failure of the cluster or of the storage in one line.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.

    Returns
    -------
    int
        Exit code: the result of `run`, or 1 if the cluster, a disk or an object store failed.
    """
    try:
        return run(config)
    except ClusterFailed as error:
        say(f"dreamscale: {error} All finished work is kept; run the same command to resume")
    except Exception as error:
        if not is_storage_error(error):
            raise
        say(
            f"dreamscale: a disk or an object store failed: {describe(error)}; all finished work is kept in "
            f"{config.output}; repair the storage and run the same command to resume"
        )
    return EXIT_FAILED


main = command(ShardConfig, shard, prog="dreamscale shard", aliases={"-o": "output"})
