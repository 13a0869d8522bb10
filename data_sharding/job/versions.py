"""Adds new recordings to a finished dataset, and withdraws recordings that were removed or have changed.

The job never changes existing shards, but writes additional shards with the new samples, and then a new manifest. The
new manifest lists the *withdrawn* samples: samples in old shards that do not belong to the dataset any more. Until the
new manifest is written, the former version of the dataset is complete and valid.

The folder ``versions/<number>`` contains the manifest and the ledger of each version. The folder of the current version
also contains the results of all recordings, so that the next job does not read unchanged recordings again.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.audit.fingerprints import NAME as FINGERPRINTS
from data_sharding.audit.fingerprints import Fingerprints, write_fingerprints
from data_sharding.common.errors import RequestError
from data_sharding.common.files import digest_of, read_json, sha256_file
from data_sharding.common.storage import AnyPath, file_state, fresh
from data_sharding.common.untrusted import parse_json, read_limited, unpack_zstd
from data_sharding.dataset.ledger import NAME as LEDGER
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.dataset.manifest import NAME as MANIFEST
from data_sharding.dataset.manifest import VERSIONS, Manifest, Shard, version_folder
from data_sharding.dataset.splits import SPLITS, SplitConfig
from data_sharding.job.pack_shards import Piece
from data_sharding.job.process_recording import recording_checksum
from data_sharding.job.request import Plan, ShardConfig
from data_sharding.job.task import PartResult

RESULTS = "results.jsonl.zst"
"""Name of the file with the results of all recordings, inside the folder of the current version."""
SET_ASIDE = "set_aside"
"""Name of the folder with the fingerprints of recordings that are not in the shards."""
NAMED = 5
"""Largest number of recordings that a message lists."""


@dataclass
class _Stored:
    identity: str
    source: str
    content: str
    result: dict[str, Any]


@dataclass
class Former:
    """The finished version of the dataset that is in the output folder when the job begins."""

    root: AnyPath
    manifest: Manifest
    stored: dict[str, _Stored]
    """Dictionary from the key of each recording to the result of the former job."""
    pieces: dict[str, list[Piece]]
    """Dictionary from the key of each recording to its samples in the former version."""
    reused: set[str] = field(default_factory=set)
    """Keys of the recordings whose results are taken from the former version."""

    @classmethod
    def read(cls, root: AnyPath, manifest: Manifest) -> Former:
        """Read the files that a job needs to extend a finished dataset.

        Raises
        ------
        RequestError
            If an older version of Dreamscale has made the dataset.
        """
        path = version_folder(root, manifest.version) / RESULTS
        if not path.is_file():
            raise RequestError(
                f"output '{root}': an older version of Dreamscale made this dataset, so no recordings can be added to "
                "it; make the dataset again in another folder"
            )
        stored = {}
        try:
            for line in unpack_zstd(read_limited(path, 2**30), str(path)).splitlines():
                values = parse_json(line)
                key = values.pop("key")
                stored[key] = _Stored(**values)
        except RequestError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{path}: damaged ({error}); make the dataset again in another folder") from None
        pieces: defaultdict[str, list[Piece]] = defaultdict(list)
        for split, shards in manifest.splits.items():
            for shard in shards:
                for key, start, stop in _find_runs(root, shard):
                    pieces[key].append(Piece(key=key, part="", split=split, start=start, stop=stop, shard=shard.path))
        return cls(root, manifest, stored, dict(pieces))

    def find(self, key: str, identity: str, source: str) -> PartResult | None:
        """Return the former result of a recording; None if the recording must be read again.

        Parameters
        ----------
        key : str
            Key of the recording.
        identity : str
            Checksum of everything that the result depends on.
        source : str
            Checksum of the same values as `identity`, but without the versions of libraries. With this checksum,
            recordings whose samples are in the shards are not read again after an upgrade of a library.
        """
        known = self.stored.get(key)
        if known is None:
            return None
        if known.identity != identity and not (known.source == source and known.result["row"]["status"] == "sharded"):
            return None
        self.reused.add(key)
        return PartResult.from_json(known.result)

    def prefer(self, key: str, content: str, result: PartResult) -> PartResult:
        """Return a recording's former result if reading it again found the same content; otherwise `result`."""
        known = self.stored.get(key)
        if known is None or key not in self.pieces or known.content != content or result.row.status != "sharded":
            return result
        self.reused.add(key)
        return PartResult.from_json(known.result)

    def forget(self, keys: Iterable[str]) -> None:
        """Remove the former results of the recordings with the given keys, so that these recordings are read again."""
        for key in keys:
            self.stored.pop(key, None)
            self.reused.discard(key)

    def needs_samples(self, kept: Iterable[PartResult]) -> list[str]:
        """Return the keys of recordings in `kept` whose result is reused, but whose samples are in no former shard."""
        return [r.row.key for r in kept if r.row.key in self.reused and r.row.key not in self.pieces]

    def find_changed_files(self, plan: Plan) -> set[str]:
        """Return the keys of recordings whose files are newer than the manifest and have changed."""
        written = file_state(self.root / MANIFEST)[1]
        found = set()
        for key, item in plan.items.items():
            known = self.stored.get(key)
            if known is None or not any(_changed_ns(file) > written for file in item.recording.files):
                continue
            hashes = [sha256_file(file) for file in item.recording.files]
            if known.result["row"]["sha256"] != recording_checksum(item, hashes):
                found.add(key)
        return found

    def check_people(self, plan: Plan, split: SplitConfig) -> None:
        """Refuse a job that would move a person from one split to another.

        Raises
        ------
        RequestError
            If a recording has another subject than in the former version, and the two subjects are in different splits.
        """
        for key, item in plan.items.items():
            known = self.stored.get(key)
            if known is None or not split.by_subject or known.result["row"]["status"] != "sharded":
                continue
            was = known.result["row"]["subject"]
            if was != item.subject and split.subject(was) != split.subject(item.subject):
                raise RequestError(
                    f"output '{self.root}': the subject of '{item.path}' is '{item.subject}' now (split "
                    f"{split.subject(item.subject)}) and was '{was}' (split {split.subject(was)}), so a person would "
                    "move to another split; name the subjects as before (key 'subject_pattern'), or choose another "
                    "folder"
                )

    def points(self) -> Callable[[str], np.ndarray]:
        """Return a function that loads the fingerprint of a recording by its key."""
        kept = Fingerprints(self.root)
        aside = Fingerprints(version_folder(self.root, self.manifest.version) / SET_ASIDE)
        known = {print_.key for print_ in kept.recordings}
        return lambda key: (kept if key in known else aside).load(key).astype(np.float16)


def _changed_ns(file: AnyPath) -> int:
    # Use the later of the two times: a copied file can have the modification time of the original, but the change time
    # of the new file is the time at which it was copied.
    return max(file.stat().st_ctime_ns, file.stat().st_mtime_ns) if isinstance(file, Path) else file_state(file)[1]


def _find_runs(root: AnyPath, shard: Shard) -> list[tuple[str, int, int]]:
    """List the recordings in a shard: key, first sample and last sample plus one; withdrawn samples are skipped."""
    keys = [entry["key"].rpartition("-")[0] for entry in read_json((root / shard.path).with_suffix(".idx"))]
    runs = []
    for (key, served), group in itertools.groupby(
        enumerate(zip(keys, shard.mask().tolist(), strict=True)), key=lambda entry: entry[1]
    ):
        places = [place for place, _ in group]
        if served:
            runs.append((key, places[0], places[-1] + 1))
    return runs


def store_results(results: Iterable[PartResult], plan: Plan, settings: str, source: str) -> bytes:
    """Return the content of the file `RESULTS`, from which the next job reads the results of unchanged recordings.

    Call this function before duplicates are marked in `results`.
    """
    import zstandard

    packer = zstandard.ZstdCompressor().compressobj()
    out = [b""]
    for result in results:
        key = result.row.key
        entry = {
            "key": key,
            "identity": "" if result.may_pass else plan.identity(key, settings),
            "source": plan.identity(key, source),
            "content": content_of(plan, result),
            "result": {**result.to_json(), "part": ""},
        }
        out.append(packer.compress((json.dumps(entry, separators=(",", ":")) + "\n").encode()))
    return b"".join([*out, packer.flush()])


def content_of(plan: Plan, result: PartResult) -> str:
    """Return a checksum of a recording's content and description that does not depend on the paths of its files."""
    item = plan.items[result.row.key]
    values = dataclasses.asdict(dataclasses.replace(item, recording=None, trials=None))  # type: ignore[arg-type]
    trials = [{**vars(trial), "image": plan.images.get(trial.image)} for trial in item.trials or ()]
    return digest_of(json.loads(json.dumps([result.row.sha256, values, trials], default=str)))


def check_growth(config: ShardConfig, values: Mapping[str, Any], manifest: Manifest, output: AnyPath) -> None:
    """Raise an error if a job with this config cannot add recordings to the finished dataset.

    Parameters
    ----------
    config : ShardConfig
        Config of the job.
    values : mapping
        Config of the job, reduced to the keys that determine the content of the dataset.
    manifest : Manifest
        Manifest of the finished dataset.
    output : Path or UPath
        Folder of the dataset.

    Raises
    ------
    RequestError
        If preprocessing or split differ, or if a corpus of the dataset is missing in the config.
    """
    other = [
        key
        for key in ("preprocess", "split")
        if json.dumps(values[key], sort_keys=True) != json.dumps(manifest.config.get(key), sort_keys=True)
    ]
    if other:
        raise RequestError(
            f"output '{output}': holds a finished dataset that was made with other settings ({', '.join(other)}); "
            "choose another folder, or delete this dataset first"
        )
    names = {corpus["name"] for corpus in values["corpora"]}
    for corpus in manifest.config.get("corpora", []):
        if corpus["name"] not in names:
            raise RequestError(
                f"output '{output}': holds a finished dataset with the corpus '{corpus['name'] or corpus['root']}', "
                "which is not in the config; add the corpus to the config, or choose another folder"
            )


@dataclass
class NewVersion:
    """Changes from the former version of a dataset to the next version."""

    number: int
    splits: dict[str, list[Shard]]
    """Shards of the former version that remain. Each entry lists all samples of the shard that are not in the new
    version."""
    moved: list[Piece]
    """Samples that are copied from old shards to new shards, because the old shards are deleted."""
    lost: list[str]
    """Paths of the shards that are rewritten."""
    first: dict[str, int]
    """Number of the first new shard of each split."""
    changes: dict[str, list[str]]
    """For each kind of change (such as added or removed), the keys of the recordings."""


def plan_version(former: Former | None, kept: list[PartResult], plan: Plan, *, compact: bool) -> NewVersion:
    """Decide which samples of the former version remain, and which shards are rewritten.

    Parameters
    ----------
    former : Former or None
        Former version; None for a new dataset.
    kept : list of PartResult
        Results of the recordings that belong to the new version.
    plan : Plan
        Plan of the job.
    compact : bool
        Whether to write shards with withdrawn samples again, without these samples.
    """
    if former is None:
        return NewVersion(1, {split: [] for split in SPLITS}, [], [], dict.fromkeys(SPLITS, 0), {})
    stay = {result.row.key for result in kept if result.row.key in former.reused}
    pieces = [piece for key in sorted(stay) for piece in former.pieces[key]]
    by_shard: defaultdict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_shard[piece.shard].append(piece)
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    moved: list[Piece] = []
    lost: list[str] = []
    first: dict[str, int] = {split: 0 for split in SPLITS}
    for split, shards in former.manifest.splits.items():
        for shard in shards:
            first[split] = max(first[split], int(Path(shard.path).stem) + 1)
            served = np.zeros(shard.samples + 2, bool)
            for piece in by_shard[shard.path]:
                served[piece.start + 1 : piece.stop + 1] = True
            served[[0, -1]] = True
            edges = np.flatnonzero(np.diff(served.astype(np.int8))).reshape(-1, 2).tolist()
            if compact and edges:
                lost.append(shard.path)
                moved += by_shard[shard.path]
            else:
                splits[split].append(dataclasses.replace(shard, withdrawn=edges))
    now = {result.row.key for result in kept}
    old = set(former.pieces)
    changes = {
        "added": sorted(now - old),
        "changed": sorted((now & old) - stay),
        "removed": sorted(key for key in old - now if key not in plan.items),
        "set aside": sorted(key for key in old - now if key in plan.items),
    }
    return NewVersion(former.manifest.version + 1, splits, moved, lost, first, changes)


def describe_changes(former: Manifest, manifest: Manifest, changes: Mapping[str, list[str]]) -> list[str]:
    """Return lines for the terminal about the changes since the former version."""
    old = {shard.path: shard for shards in former.splits.values() for shard in shards}
    new = {shard.path: shard for shards in manifest.splits.values() for shard in shards}
    added = sum(shard.samples for path, shard in new.items() if path not in old)
    lines = [
        f"version {manifest.version} (version {former.version} before): "
        + ", ".join(f"{len(keys)} recordings {what}" for what, keys in changes.items())
        + f"; {len(set(new) - set(old))} new shards with {added} samples, {len(set(new) & set(old))} old shards are "
        f"unchanged, {len(set(old) - set(new))} were rewritten; {manifest.withdrawn} samples in shards are withdrawn"
    ]
    for what, keys in changes.items():
        if keys:
            lines.append(f"  {what}: {', '.join(keys[:NAMED])}{' ...' if len(keys) > NAMED else ''}")
    if manifest.withdrawn:
        lines.append(
            "  withdrawn samples stay in the files; the same command with '--compact true' rewrites these shards"
        )
    return lines


class FingerprintLoader:
    """Loads the fingerprints of recordings from the job's parts (a part is the folder of one recording's output).

    Parameters
    ----------
    results : list of PartResult
        Results of the first phase.
    work : Path or UPath
        The job's working folder.
    former : Former, optional
        Former version of the dataset, which contains the fingerprints of recordings that were not read again.
    """

    def __init__(self, results: list[PartResult], work: AnyPath, former: Former | None = None) -> None:
        self.parts = {result.row.key: result.part for result in results}
        self.folder = work / "parts"
        self.signed = {result.row.key for result in results if result.signature}
        self.reused = former.reused if former else set()
        self.load_former = former.points() if former else None

    def __call__(self, key: str) -> np.ndarray:
        """Load the fingerprint of a recording.

        Parameters
        ----------
        key : str
            Key of the recording. The recording must have a part, or its result must come from the former version.

        Returns
        -------
        ndarray of float16, shape (n, P)
            The fingerprint: `n` channels with `P` points each.
        """
        if self.load_former and key in self.reused:
            return self.load_former(key)
        part = self.parts[key]
        return np.load(io.BytesIO((self.folder / part[:2] / part / "fingerprint.npy").read_bytes()))


def write_state(
    folder: Path, results: bytes, rows: list[LedgerRow], load_points: Callable[[str], np.ndarray]
) -> list[str]:
    """Write the files that the next job reads, and return their names relative to the folder of the version."""
    (folder / RESULTS).write_bytes(results)
    aside = [row for row in rows if row.status != "sharded"]
    (folder / SET_ASIDE).mkdir()
    write_fingerprints(folder / SET_ASIDE / FINGERPRINTS, aside, load_points)
    return [RESULTS, f"{SET_ASIDE}/{FINGERPRINTS}"]


def remove_stale(output: AnyPath, manifest: Manifest, files: Sequence[str]) -> None:
    """Delete shards that no version of the dataset needs, and files of former versions.

    The manifests of all versions are kept. The ledgers of former versions are deleted if shards were rewritten, because
    old ledgers may describe people whose recordings were withdrawn. Otherwise, the ledgers of former versions are kept,
    too.

    Parameters
    ----------
    output : Path or UPath
        Folder of the dataset.
    manifest : Manifest
        Manifest of the current version.
    files : sequence of str
        Names of files that are kept only in the folder of the current version, and deleted in the folders of former
        versions.
    """
    wanted = {Path(shard.path).with_suffix("").as_posix() for shards in manifest.splits.values() for shard in shards}
    for split in SPLITS:
        for file in fresh(output / split).iterdir() if (output / split).is_dir() else ():
            if f"{split}/{Path(file.name).stem}" not in wanted:
                file.unlink()
    for folder in fresh(output / VERSIONS).iterdir() if (output / VERSIONS).is_dir() else ():
        number = int(folder.name)
        if number == manifest.version:
            continue
        names = {*files, f"{SET_ASIDE}/{FINGERPRINTS}"}
        # A folder whose number is larger than that of the current version was left by an interrupted job.
        if number > manifest.version:
            names |= {LEDGER, MANIFEST}
        elif not manifest.extra.get("rewritten"):
            names.discard(LEDGER)
        for name in names:
            if (folder / name).is_file():
                (folder / name).unlink()
