"""Tests of versions of a dataset: recordings are added, removed and changed, and jobs are killed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_sharding.audit.inspect_dataset import main as inspect
from data_sharding.audit.verify import main as verify
from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.dataset.splits import SPLITS, SplitConfig
from data_sharding.job.run import main

pytestmark = pytest.mark.timeout(600)
SECONDS = 8


class Lab:
    """A corpus that changes, and the config that shards it."""

    def __init__(self, folder: Path, write) -> None:
        self.root, self.write = folder / "recordings", write
        self.config = folder / "job.yaml"
        values = {
            "corpora": [{"root": str(self.root), "name": "lab"}],
            "preprocess": {
                "sfreq": 100,
                "highpass": 1.0,
                "lowpass": 40.0,
                "window": 100,
                "stride": 100,
                "quality": {"leave_out_edges": False},
            },
            "samples_per_shard": 12,
            "split": {"val_fraction": 0.2, "test_fraction": 0.2},
            "ray": {"num_cpus": 2, "memory_gb": 0.5},
        }
        self.config.write_text(yaml.safe_dump(values))

    def path(self, number: int) -> Path:
        return self.root / f"sub-{number:02d}" / f"sub-{number:02d}_task-rest_raw.fif"

    def record(self, number: int, seed: int | None = None) -> None:
        self.write(self.path(number), number if seed is None else seed)

    def shard(self, output: Path, *args: str) -> int:
        return main([str(self.config), "--output", str(output), *args])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, make_raw, write_raw) -> Lab:
    lab = Lab(
        tmp_path_factory.mktemp("lab"), lambda path, seed: write_raw(make_raw(6, 200, SECONDS, seed=500 + seed), path)
    )
    for number in range(7):
        lab.record(number)
    return lab


@pytest.fixture(scope="module")
def first(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("first") / "dataset"
    assert lab.shard(output) == 0
    return output


@pytest.fixture(scope="module")
def changed(lab: Lab, first: Path) -> Lab:
    """Change the corpus: add two recordings, remove one recording, and replace the signal of another recording."""
    lab.record(7)
    lab.record(8)
    shutil.rmtree(lab.path(1).parent)
    lab.record(2, seed=99)
    return lab


@pytest.fixture(scope="module")
def anew(changed: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a dataset of the changed corpus in a new folder."""
    output = tmp_path_factory.mktemp("anew") / "dataset"
    assert changed.shard(output) == 0
    return output


@pytest.fixture(scope="module")
def grown(changed: Lab, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("grown") / "dataset"
    shutil.copytree(first, output)
    assert changed.shard(output) == 0
    return output


def samples_of(dataset: Path, version: str = "") -> dict[str, set[tuple[str, str]]]:
    """For each split, return the key of each sample and the checksum of its EEG values."""
    found = {}
    for split in SPLITS:
        try:
            data = EEGDataset(dataset, split, version=version)
        except RequestError:
            continue
        samples = [data[number] for number in range(len(data))]
        found[split] = {(s.key, hashlib.sha256(s.eeg.tobytes()).hexdigest()) for s in samples}
        assert len(found[split]) == len(samples)
    return found


def files_of(dataset: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dataset)): p.read_bytes() for split in SPLITS for p in (dataset / split).glob("*")}


def test_only_the_changes_are_written(first: Path, grown: Path, anew: Path, capsys) -> None:
    before, after, fresh = Manifest.read(first), Manifest.read(grown), Manifest.read(anew)
    old = files_of(first)
    assert old.items() <= files_of(grown).items()
    assert after.version == 2 and after.dataset_id not in (before.dataset_id, fresh.dataset_id)
    assert after.extra["changes"] == {"added": 2, "changed": 1, "removed": 1, "set aside": 0}
    assert samples_of(grown) == samples_of(anew) != samples_of(first)
    assert after.counts == fresh.counts and after.hours == fresh.hours
    assert after.withdrawn == 2 * SECONDS
    columns = [
        {key: value for key, value in row.to_columns().items() if key != "shards"}
        for dataset in (grown, anew)
        for row in read_ledger(dataset)
    ]
    assert columns[: len(columns) // 2] == columns[len(columns) // 2 :]
    assert verify([str(grown)]) == verify([str(anew)])
    assert "(version 2, 16 withdrawn samples)" in capsys.readouterr().out
    assert inspect([str(grown)]) == 0


def test_nobody_changes_the_split(first: Path, grown: Path) -> None:
    was = {row.subject: row.split for row in read_ledger(first)}
    now = {row.subject: row.split for row in read_ledger(grown)}
    assert all(now[subject] == was[subject] for subject in set(was) & set(now))
    split = SplitConfig(val_fraction=0.2, test_fraction=0.2)
    assert all(split.subject(subject) == name for subject, name in now.items())


def test_a_former_version_can_be_read(first: Path, grown: Path) -> None:
    assert samples_of(grown, Manifest.read(first).dataset_id) == samples_of(first)
    with pytest.raises(RequestError, match="never had a version with the id 123"):
        EEGDataset(grown, version="123")


def test_the_same_command_does_nothing(changed: Lab, grown: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in grown.rglob("*")}
    assert changed.shard(grown) == 0
    assert "finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in grown.rglob("*")} == before


def test_withdrawn_samples_are_removed(changed: Lab, grown: Path, tmp_path: Path, first: Path, capsys) -> None:
    output = tmp_path / "compact"
    shutil.copytree(grown, output)
    assert changed.shard(output, "--compact", "true") == 0
    manifest = Manifest.read(output)
    assert manifest.version == 3 and not manifest.withdrawn
    assert samples_of(output) == samples_of(grown)
    assert verify([str(output)]) == verify([str(grown)])
    names = {
        f"{s.path.removesuffix('.tar')}.{kind}" for v in manifest.splits.values() for s in v for kind in ("tar", "idx")
    }
    assert set(files_of(output)) == names
    gone = Manifest.read(first).dataset_id
    with pytest.raises(RequestError, match=r"version 1 .* was compacted"):
        EEGDataset(output, version=gone)
    capsys.readouterr()
    assert changed.shard(output, "--compact", "true") == 0
    assert "finished already" in capsys.readouterr().err


def test_a_copy_of_a_withdrawn_recording_takes_its_place(
    lab: Lab, changed: Lab, grown: Path, tmp_path: Path, make_raw, write_raw
) -> None:
    """Add a copy of a recording; the job calls this copy a duplicate. Then remove the recording, so that its copy is
    needed."""
    root = tmp_path / "recordings"
    shutil.copytree(changed.root, root)
    output = tmp_path / "dataset"
    args = ["--corpora", f"[{{root: {root}, name: lab}}]"]
    shutil.copytree(grown, output)
    copy = root / "sub-03" / "copy_raw.fif"
    copy.write_bytes((root / "sub-03" / "sub-03_task-rest_raw.fif").read_bytes())
    assert changed.shard(output, *args) == 0
    manifest = Manifest.read(output)
    assert manifest.counts["duplicate"] == 1 and manifest.dataset_id == Manifest.read(grown).dataset_id
    (root / "sub-03" / "sub-03_task-rest_raw.fif").unlink()
    assert changed.shard(output, *args) == 0
    after = Manifest.read(output)
    assert after.counts["duplicate"] == 0 and after.extra["changes"]["added"] == after.extra["changes"]["removed"] == 1
    assert sum(map(len, samples_of(output).values())) == sum(map(len, samples_of(grown).values()))


def test_a_killed_job_leaves_the_former_version(changed: Lab, first: Path, grown: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "killed"
    shutil.copytree(first, output)
    before = (output / "manifest.json").read_bytes()
    command = [sys.executable, "-m", "data_sharding", str(changed.config), "--output", str(output)]
    for wanted in ("rows/*.jsonl", "shards/*/*.json"):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while not any((output / ".work").glob(wanted)) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -9
        assert (output / "manifest.json").read_bytes() == before
        assert samples_of(output) == samples_of(first)
        capsys.readouterr()
        verify([str(output), "--content", "false"])
        assert "all bytes and counts agree" in capsys.readouterr().out
    assert changed.shard(output) == 0
    assert Manifest.read(output).dataset_id == Manifest.read(grown).dataset_id
    assert files_of(output) == files_of(grown)


def test_what_a_dataset_cannot_take_over(changed: Lab, grown: Path, capsys) -> None:
    assert changed.shard(grown, "--split.val_fraction", "0.3") == 2
    assert "other settings (split)" in capsys.readouterr().err
    assert changed.shard(grown, "--corpora", f"[{{root: {changed.root}, name: other}}]") == 2
    assert "the corpus 'lab'" in capsys.readouterr().err
    args = ["--corpora", f"[{{root: {changed.root}, name: lab, subject_pattern: '(?P<subject>rest)'}}]"]
    assert changed.shard(grown, *args) == 2
    assert "would move to another split" in capsys.readouterr().err
