"""Tests of the whole sharding job with real Ray and real files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.ledger import read_ledger
from data_sharding.dataset.manifest import Manifest
from data_sharding.job.run import main

SPEC = {
    "sfreq": 100,
    "highpass": 1.0,
    "lowpass": 40.0,
    "window": 100,
    "stride": 100,
    "quality": {"leave_out_edges": False},
}


def write_config(path: Path, corpora: list[dict], **more) -> Path:
    values = {
        "corpora": corpora,
        "preprocess": SPEC,
        "samples_per_shard": 7,
        "allowed_set_aside": 0.5,
        "ray": {"num_cpus": 2, "memory_gb": 1},
        **more,
    }
    values.setdefault("output", str(path.with_suffix("")))
    path.write_text(yaml.safe_dump(values))
    return path


def tars(dataset: Path) -> dict[str, str]:
    return {s.path: s.sha256 for shards in Manifest.read(dataset).splits.values() for s in shards}


@pytest.fixture(scope="module")
def folder_config(folder_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    split = {"val_subjects": ["sub-03"], "test_subjects": ["04"]}
    return write_config(
        tmp_path_factory.mktemp("job") / "job.yaml", [{"root": str(folder_corpus), "name": "lab"}], split=split
    )


@pytest.fixture(scope="module")
def dataset(folder_config: Path) -> Path:
    output = folder_config.parent / "two_workers"
    assert main([str(folder_config), "--output", str(output)]) == 0
    return output


class TestFolder:
    def test_every_recording_has_its_row(self, dataset: Path) -> None:
        rows = {row.path: row for row in read_ledger(dataset)}
        statuses = {path: row.status for path, row in rows.items()}
        assert statuses == {
            "broken.bdf": "quarantined",
            "copies/again_raw.fif": "duplicate",
            "lost.vhdr": "quarantined",
            "sub-01/sub-01_task-rest_eeg.edf": "sharded",
            "sub-02/sub-02_task-rest_eeg.vhdr": "sharded",
            "sub-03/sub-03_task-rest_eeg.set": "sharded",
            "sub-04/sub-04_task-rest_raw.fif": "sharded",
        }
        assert rows["copies/again_raw.fif"].reason == f"duplicate of {rows['sub-01/sub-01_task-rest_eeg.edf'].key}"
        assert "sidecar missing" in rows["lost.vhdr"].reason and "unreadable" in rows["broken.bdf"].reason
        counts = Manifest.read(dataset).counts
        assert (counts["found"], counts["sharded"], counts["duplicate"], counts["quarantined"]) == (7, 4, 1, 2)

    def test_windows_hold_the_signal_of_the_recordings(self, dataset: Path, make_raw) -> None:
        from data_sharding.processing.preprocess import PreprocessSpec, preprocess

        split = EEGDataset(dataset, "test")
        assert len(split) == 4 and {split.meta(i)["subject"] for i in range(4)} == {"sub-04"}
        sample = split[2]
        assert sample.eeg.shape == (5, 100) and sample.meta["ch_names"] == ["Fp1", "Fp2", "F3", "F4", "C3"]
        assert sample.meta["start"] == 2.0 and sample.meta["corpus"] == "lab" and len(sample.meta["positions"][0]) == 3
        x_uv = 1e6 * make_raw(5, 500, 4, seed=4).get_data()
        wanted = preprocess(x_uv, 500, PreprocessSpec(**SPEC))[:, 200:300]
        np.testing.assert_allclose(sample.eeg, wanted, atol=0.05)

    def test_splits_share_no_subject_and_lose_no_window(self, dataset: Path) -> None:
        seen: dict[str, set[str]] = {}
        keys: list[str] = []
        for name in ("train", "val", "test"):
            split = EEGDataset(dataset, name)
            seen[name] = {split.meta(i)["subject"] for i in range(len(split))}
            keys += [split.key(i) for i in range(len(split))]
        assert len(keys) == len(set(keys)) == sum(row.windows for row in read_ledger(dataset)) == 6 + 5 + 6 + 4
        assert not (seen["train"] & seen["val"] or seen["train"] & seen["test"] or seen["val"] & seen["test"])

    def test_one_worker_writes_the_same_bytes(self, dataset: Path, folder_config: Path) -> None:
        output = folder_config.parent / "one_worker"
        assert main([str(folder_config), "--output", str(output), "--ray.num_cpus", "1"]) == 0
        assert tars(output) == tars(dataset)
        assert Manifest.read(output).dataset_id == Manifest.read(dataset).dataset_id
        assert (output / "ledger.parquet").read_bytes() == (dataset / "ledger.parquet").read_bytes()

    def test_webdataset_reads_it(self, dataset: Path) -> None:
        import webdataset as wds

        from data_sharding.dataset.samples import wds_decoder

        urls = [str(dataset / path) for path in sorted(tars(dataset)) if path.startswith("train/")]
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode(wds_decoder))
        assert len(samples) == Manifest.read(dataset).samples("train")
        for sample in samples:
            n = sample["json"]["n"]
            np.testing.assert_array_equal(sample["eeg.npy.zst"][n : 2 * n], sample["eeg.npy.zst"][:n][: 128 - n])

    def test_finished_dataset_is_not_changed(self, dataset: Path, folder_config: Path, capsys) -> None:
        before = (dataset / "manifest.json").stat().st_mtime_ns
        assert main([str(folder_config), "--output", str(dataset)]) == 0
        assert (
            dataset / "manifest.json"
        ).stat().st_mtime_ns == before and "finished already" in capsys.readouterr().err

    def test_another_finished_dataset_is_refused(self, dataset: Path, folder_config: Path, capsys) -> None:
        assert main([str(folder_config), "--output", str(dataset), "--preprocess.lowpass", "30"]) == 2
        assert "other settings (preprocess)" in capsys.readouterr().err

    def test_report_names_every_reason(self, dataset: Path) -> None:
        page = (dataset / "report.html").read_text()
        assert "data:image/png;base64," in page and "sidecar missing" in page and "http" not in page

    def test_nothing_unfinished_is_left(self, dataset: Path) -> None:
        names = {p.name for p in dataset.rglob("*")}
        assert not any(n.endswith(".tmp") or n == ".work" for n in names)


def test_too_many_quarantined_recordings_are_reported(folder_corpus: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "corpus"
    root.mkdir()
    for path in (folder_corpus / "sub-01").iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    (root / "noise.edf").write_bytes(b"x" * 300)
    config = write_config(
        tmp_path / "a.yaml", [{"root": str(root)}], allowed_set_aside=0.1, split={"val_fraction": 0, "test_fraction": 0}
    )
    assert main([str(config)]) == 3
    assert len(EEGDataset(tmp_path / "a")) == 6
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"listing recordings in {root}" and said[1].startswith("found 2 recordings; starting Ray")
    assert "1 of 2 recordings are quarantined" in said[-2] and "dreamscale inspect" in said[-2]
    assert said[-1].startswith(f"report: {tmp_path / 'a' / 'report.html'}; next: 'dreamscale inspect {tmp_path / 'a'}'")
    assert main([str(config)]) == 3
    said = capsys.readouterr().err.splitlines()
    assert "finished already" in said[-3] and said[-1].startswith("report: ")


def test_benchmarks_are_held_back(folder_corpus: Path, dataset: Path, tmp_path: Path) -> None:
    """Check that no window of a benchmark's recordings is written into the dataset.

    The config selects the benchmark's recordings by a list, by subject, or by another dataset. Copies of a listed
    recording are held back too.
    """
    (tmp_path / "benchmark.txt").write_text("recording lab/sub-01/*  # the copy of it is in another folder\n")
    config = write_config(
        tmp_path / "a.yaml",
        [{"root": str(folder_corpus), "name": "lab"}],
        split={"val_fraction": 0, "test_fraction": 0},
        hold_back={"subjects": ["04"], "lists": [str(tmp_path / "benchmark.txt")]},
    )
    assert main([str(config)]) == 0
    rows = {row.path: row for row in read_ledger(tmp_path / "a")}
    held = {path for path, row in rows.items() if row.status == "held back"}
    assert held == {
        "sub-01/sub-01_task-rest_eeg.edf",
        "copies/again_raw.fif",
        "sub-04/sub-04_task-rest_raw.fif",
    }
    assert "benchmark.txt, line 1" in rows["sub-01/sub-01_task-rest_eeg.edf"].held_back
    assert Manifest.read(tmp_path / "a").counts["held back"] == 3 and rows["lost.vhdr"].status == "quarantined"
    config = write_config(
        tmp_path / "b.yaml", [{"root": str(folder_corpus), "name": "lab"}], hold_back={"datasets": [str(dataset)]}
    )
    assert main([str(config)]) == 2


class TestTrouble:
    def test_sigterm_stops_cleanly(self, folder_corpus: Path, tmp_path: Path) -> None:
        root = tmp_path / "corpus"
        root.mkdir()
        # The corpus has 300 recordings, so that the job is still running when the signal arrives.
        for number in range(300):
            shutil.copy(folder_corpus / "sub-04" / "sub-04_task-rest_raw.fif", root / f"{number:03d}_raw.fif")
        config = write_config(tmp_path / "stopped.yaml", [{"root": str(root)}], ray={"num_cpus": 1})
        process = subprocess.Popen(
            [sys.executable, "-m", "data_sharding", str(config)], stderr=subprocess.PIPE, text=True
        )
        until = time.monotonic() + 120
        rows = tmp_path / "stopped" / ".work" / "rows"
        while not rows.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        assert "run the same command" in err and "Traceback" not in err

    def test_a_file_that_crashes_or_hangs_its_reader_affects_no_other(
        self, folder_corpus: Path, tmp_path: Path, monkeypatch
    ) -> None:
        """Install a plug-in for Ray's workers that makes the reader call os.abort or sleep forever."""
        plugin = tmp_path / "plugin"
        plugin.mkdir()
        (plugin / "sitecustomize.py").write_text(
            "import os, sys, time, importlib.abc\n"
            "class Hook(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'data_sharding.job.process_recording':\n"
            "            sys.meta_path.remove(self)\n"
            "            import data_sharding.formats.open_signal as readers\n"
            "            fif = readers.READERS['fif']\n"
            "            def read(path):\n"
            "                if 'deadly' in path.name: os.abort()\n"
            "                if 'endless' in path.name: time.sleep(600)\n"
            "                return fif(path)\n"
            "            readers.READERS['fif'] = read\n"
            "sys.meta_path.insert(0, Hook())\n"
        )
        root = tmp_path / "corpus"
        root.mkdir()
        good = (folder_corpus / "sub-04" / "sub-04_task-rest_raw.fif").read_bytes()
        for name in ("deadly", "endless", "good"):
            (root / f"{name}_raw.fif").write_bytes(good)
        monkeypatch.setenv("PYTHONPATH", f"{plugin}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        config = write_config(
            tmp_path / "a.yaml",
            [{"root": str(root)}],
            ray={"num_cpus": 2, "timeout_s": 25, "memory_gb": 1},
            allowed_set_aside=1.0,
            split={"val_fraction": 0, "test_fraction": 0},
        )
        assert main([str(config)]) == 0
        rows = {row.path: row for row in read_ledger(tmp_path / "a")}
        assert rows["good_raw.fif"].status == "sharded"
        assert (
            rows["deadly_raw.fif"].status == "quarantined"
            and "crashed its reader 2 times" in rows["deadly_raw.fif"].reason
        )
        assert rows["endless_raw.fif"].status == "quarantined" and "time-out" in rows["endless_raw.fif"].reason


class TestEvents:
    @pytest.fixture(scope="class")
    def paired(self, events_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        corpus = {
            "kind": "events",
            "root": str(events_corpus / "eeg"),
            "images": str(events_corpus / "images"),
            "tmin": 0.1,
        }
        split = {"val_subjects": ["sub-02"], "test_subjects": ["sub-03"]}
        path = tmp_path_factory.mktemp("events") / "paired.yaml"
        assert main([str(write_config(path, [corpus], split=split))]) == 0
        return path.with_suffix("")

    def test_cells(self, paired: Path) -> None:
        manifest = Manifest.read(paired)
        assert {s: manifest.samples(s) for s in ("train", "val", "test")} == {"train": 4, "val": 1, "test": 1}
        assert manifest.counts["left out: crossed cell of subject split and image split"] == 2 + 5 + 5 + 2
        assert manifest.counts["left out: trial beyond the recording"] == 1
        assert manifest.labels == ["cat", "dog"]
        (corpus,) = manifest.extra["corpora"]
        assert corpus["kind"] == "events" and corpus["design"] in ("random", "block", "unknown") and corpus["evidence"]

    def test_images_and_labels(self, paired: Path, events_corpus: Path) -> None:
        split = EEGDataset(paired, "train").require_images()
        for i in range(len(split)):
            sample = split[i]
            assert sample.image == (events_corpus / "images" / f"{sample.meta['image_id']}.png").read_bytes()
            assert split.labels[sample.meta["label"]] == sample.meta["label_name"] and sample.meta[
                "caption"
            ].startswith("a ")
        starts = sorted(split.meta(i)["start"] for i in range(len(split)))
        np.testing.assert_allclose(starts, [0.6, 1.8, 3.0, 4.2], atol=0.006)
        trials = Manifest.read(paired).extra["trials"]
        assert trials == {f"sub-0{i}": {"tmin": 0.1, "tmax": 1.1} for i in (1, 2, 3)}


class TestBadRequests:
    """An invalid config gives exit code 2 and one error line, before Ray starts."""

    @pytest.fixture(autouse=True)
    def no_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("Ray was started")

        monkeypatch.setattr("data_sharding.job.run.ray_session", refuse)

    def check(self, capsys, config: Path, *words: str, args: tuple[str, ...] = ()) -> None:
        assert main([str(config), *args]) == 2
        *said, error = capsys.readouterr().err.strip().splitlines()
        assert all(word in error for word in words), error
        assert all(line.startswith("listing recordings in ") for line in said), said

    def test_root(self, tmp_path: Path, capsys) -> None:
        self.check(
            capsys,
            write_config(tmp_path / "a.yaml", [{"root": str(tmp_path / "nowhere")}]),
            "nowhere",
            "no such folder",
        )

    def test_variable(self, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.delenv("SOME_CORPUS", raising=False)
        self.check(capsys, write_config(tmp_path / "a.yaml", [{"root": "${SOME_CORPUS}/x"}]), "SOME_CORPUS", "not set")

    def test_empty(self, tmp_path: Path, capsys) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "readme.txt").write_text("nothing here")
        self.check(capsys, write_config(tmp_path / "a.yaml", [{"root": str(tmp_path / "c")}]), "no recording found")

    def test_unknown_key(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus)}], sample_per_shard=3)
        self.check(capsys, config, "sample_per_shard")

    def test_unknown_key_of_a_corpus(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        self.check(
            capsys,
            write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus), "imagez": "x"}]),
            "corpora[0]",
            "imagez",
        )

    def test_missing_config(self, tmp_path: Path, capsys) -> None:
        self.check(capsys, tmp_path / "none.yaml", "none.yaml")

    def test_images_folder(self, events_corpus: Path, tmp_path: Path, capsys) -> None:
        corpus = {"kind": "events", "root": str(events_corpus / "eeg"), "images": str(tmp_path / "gone")}
        self.check(capsys, write_config(tmp_path / "a.yaml", [corpus]), "images", "gone")

    def test_an_image(self, events_corpus: Path, tmp_path: Path, capsys) -> None:
        corpus = {"kind": "events", "root": str(events_corpus / "eeg"), "images": str(events_corpus / "eeg")}
        self.check(capsys, write_config(tmp_path / "a.yaml", [corpus]), "6 of 6 images are missing", "img-0.png")

    def test_trial_keys(self, events_corpus: Path, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        corpus = {"kind": "events", "root": str(events_corpus / "eeg"), "images": str(events_corpus / "images")}
        for keys, *words in (
            ({"trial_offset": 0.1}, "corpora[0] (kind events)", "'trial_offset' was renamed; use 'tmin'"),
            ({"tmax": 0.5}, "corpora[0]", "tmax 0.5 is too early", "1 s from 0 s on", "set tmax to 1 or later"),
            ({"tmin": 0.2, "tmax": 1.1}, "tmax 1.1 is too early", "set tmax to 1.2"),
            ({"tmin": -1e5}, "'tmin' and 'tmax' make trials too long"),
            ({"tmin": 0.2, "tmax": 0.1}, "must be later than 'tmin'"),
        ):
            self.check(capsys, write_config(tmp_path / "a.yaml", [corpus | keys]), *words)
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus), "stimulus_delay_ms": 5}])
        self.check(capsys, config, "'stimulus_delay_ms' does not belong to kind folder", "events")

    def test_no_trials(self, folder_corpus: Path, events_corpus: Path, tmp_path: Path, capsys) -> None:
        corpus = {"kind": "events", "root": str(folder_corpus), "images": str(events_corpus / "images")}
        self.check(
            capsys,
            write_config(tmp_path / "a.yaml", [corpus]),
            "no recording has an events table; write RECORDING_events.tsv",
        )

    def test_unknown_subject(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus)}], split={"test_subjects": ["sub-77"]})
        self.check(capsys, config, "sub-77")

    def test_empty_train(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        corpus = {"root": str(folder_corpus), "exclude": ["copies/*", "sub-03/*", "sub-04/*"]}
        config = write_config(tmp_path / "a.yaml", [corpus], split={"test_subjects": ["01", "02"]})
        self.check(capsys, config, "no subject is left for train")

    def test_memory_that_workers_cannot_see(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus)}], output="memory://out")
        self.check(capsys, config, "memory://out", "object store")

    def test_output_that_is_not_a_folder(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus)}], output=str(tmp_path / "file" / "x"))
        (tmp_path / "file").write_text("x")
        self.check(capsys, config, "cannot be made", "Not a directory")

    def test_held_back_subject(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus)}], hold_back={"subjects": ["sub-77"]})
        self.check(capsys, config, "hold_back", "sub-77")

    def test_output_with_something_else(self, folder_corpus: Path, tmp_path: Path, capsys) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        config = write_config(tmp_path / "a.yaml", [{"root": str(folder_corpus)}], output=str(tmp_path / "out"))
        self.check(capsys, config, "not empty")


def test_ledger_columns_tell_the_channels(dataset: Path) -> None:
    row = next(r for r in read_ledger(dataset) if r.path.endswith("sub-02_task-rest_eeg.vhdr"))
    assert row.n_eeg == row.n_kept == len(row.channels) == 19 and row.montage == "standard_1005"
    assert row.channels_by_type == {"eeg": 19} and row.unit == "plausible"
    assert len(row.files) == 3 and len(row.sha256) == 64 and 5 < row.amplitude_uv < 20
    assert Counter(Path(s).parts[0] for s in row.shards)
