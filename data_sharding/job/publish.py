"""Writes the files that describe a version of a dataset. A version becomes valid when its manifest is written."""

from __future__ import annotations

import dataclasses

from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.fingerprints import write_fingerprints
from data_sharding.audit.report import write_report
from data_sharding.common.files import atomic_write_bytes, digest_of, sha256_file
from data_sharding.common.stop import check_stop
from data_sharding.common.storage import AnyPath, fresh, put, remove_tree, scratch_folder
from data_sharding.dataset.ledger import NAME as LEDGER
from data_sharding.dataset.ledger import LedgerRow, count_by_status, count_windows_left_out, read_ledger, write_ledger
from data_sharding.dataset.manifest import NAME as MANIFEST
from data_sharding.dataset.manifest import WORK, Manifest, Shard, version_folder
from data_sharding.job.process_recording import get_library_versions
from data_sharding.job.request import Plan, ShardConfig, reduce_config
from data_sharding.job.versions import RESULTS, FingerprintLoader, NewVersion, remove_stale, write_state

REPORT = "report.html"
COPIES = (LEDGER, FINGERPRINTS, REPORT)
"""Files of the current version that are copied to the folder of the dataset, for users."""


def publish(
    config: ShardConfig,
    plan: Plan,
    rows: list[LedgerRow],
    splits: dict[str, list[Shard]],
    output: AnyPath,
    points: FingerprintLoader,
    version: NewVersion,
    state: bytes,
) -> Manifest:
    """Write the files of a version of the dataset, and delete files that no version needs.

    Parameters
    ----------
    config, plan : ShardConfig, Plan
        Config and plan of the job.
    rows : list of LedgerRow
        Rows of the ledger.
    splits : dict
        Shards of each split.
    output : Path or UPath
        Folder of the dataset.
    points : callable
        Object that loads the fingerprint of a recording.
    version : NewVersion
        Changes from the former version of the dataset to the new version.
    state : bytes
        Results of all recordings, for the next job.

    Returns
    -------
    Manifest
        Manifest of the new version, or of the former version if nothing has changed.
    """
    counts, hours = count_by_status(rows)
    hours["written"] = round(sum(row.seconds_written for row in rows) / 3600, 6)
    counts["windows"] = sum(row.windows for row in rows)
    counts |= {f"left out: {why}": number for why, number in count_windows_left_out(rows).items()}
    content = {
        "preprocess": config.preprocess.to_dict(),
        "labels": plan.labels,
        "shards": {split: [shard.sha256 for shard in shards] for split, shards in splits.items()},
    }
    withdrawn = {shard.path: shard.withdrawn for shards in splits.values() for shard in shards if shard.withdrawn}
    if withdrawn:
        content["withdrawn"] = withdrawn
    with scratch_folder() as folder:
        write_ledger(folder / LEDGER, rows)
        write_fingerprints(folder / FINGERPRINTS, [row for row in rows if row.status == "sharded"], points)
        extra = {
            "request": plan.request,
            "corpora": plan.corpora,
            "trials": describe_trials(rows),
            "ledger_sha256": sha256_file(folder / LEDGER),
            "fingerprints_sha256": sha256_file(folder / FINGERPRINTS),
        }
        if version.number > 1:
            changes = {what: len(keys) for what, keys in version.changes.items()}
            extra |= {"version": version.number, "changes": changes, "rewritten": len(version.lost)}
        manifest = Manifest(
            dataset_id=digest_of(content),
            preprocess=config.preprocess,
            splits=splits,
            labels=plan.labels,
            counts=counts,
            hours=hours,
            config=reduce_config(config),
            versions=get_library_versions(),
            extra=extra,
        )
        if version.number > 1 and (former := _find_equal(output, manifest, rows)):
            # Only the config or the times of files have changed. Store the new config and the new results in the former
            # version, so that the next job has nothing to do.
            former = dataclasses.replace(
                former, config=manifest.config, extra={**former.extra, "request": plan.request}
            )
            atomic_write_bytes(version_folder(output, former.version) / RESULTS, state)
            former.write(output)
            remove_tree(output / WORK)
            return former
        write_report(folder / REPORT, rows, manifest, root=output)
        names = write_state(folder, state, [row for row in rows if row.key in points.signed], points)
        manifest.write(folder)
        check_stop()
        own = version_folder(output, version.number)
        first = version.number == 1
        for name in ((LEDGER,) if first else COPIES) + (*names, MANIFEST):
            put(folder / name, own / name)
        # In the first version, the manifest is written last. In a later version, the manifest is written first, because
        # the other files are only copies for users.
        for name in (*COPIES, MANIFEST) if first else (MANIFEST, *COPIES):
            put(folder / name, output / name)
    remove_stale(output, manifest, (RESULTS, *COPIES))
    remove_tree(output / WORK)
    return manifest


def _find_equal(output: AnyPath, manifest: Manifest, rows: list[LedgerRow]) -> Manifest | None:
    """Return the manifest in the output folder if samples and ledger are the same as in the new version; else None."""
    former = Manifest.read(output)
    same = former.dataset_id == manifest.dataset_id
    return former if same and [r.to_columns() for r in read_ledger(output)] == [r.to_columns() for r in rows] else None


def repair_copies(output: AnyPath, manifest: Manifest) -> None:
    """Write the missing files of a version whose job was killed just after it wrote the manifest."""
    if not (fresh(output) / WORK).is_dir():
        return
    if manifest.version > 1:
        for name in COPIES:
            atomic_write_bytes(output / name, (version_folder(output, manifest.version) / name).read_bytes())
    remove_stale(output, manifest, (RESULTS, *COPIES))


def describe_trials(rows: list[LedgerRow]) -> dict[str, dict[str, float]]:
    """For each corpus, return the time range that its stored trials cover together, in seconds from the onset."""
    spans: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.status == "sharded" and row.trial_tmin is not None and row.trial_tmax is not None:
            span = spans.setdefault(row.corpus, {"tmin": row.trial_tmin, "tmax": row.trial_tmax})
            span["tmin"], span["tmax"] = min(span["tmin"], row.trial_tmin), max(span["tmax"], row.trial_tmax)
    return spans
