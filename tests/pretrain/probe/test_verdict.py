"""Tests of the probe's verdict: on predictions with known truth, through the command, and on real recordings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_sharding.common.errors import RequestError
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.job.run import main as shard_main
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.encoder.encoder import EEGEncoder
from pretrain.evidence.rules import Evidence, NotApplicable, judge
from pretrain.evidence.trials import TrialTable, label_is_constant_in_recordings, tabulate_trials
from pretrain.probe.config import ProbeConfig
from pretrain.probe.features import Trials
from pretrain.probe.folds import make_outer_folds
from pretrain.probe.run import main
from pretrain.probe.verdict import Setting, collect_evidence

REAL = Path(os.environ.get("DREAMSCALE_REAL_EEG") or "/nonexistent")
SPEC = PreprocessSpec(sfreq=64.0, highpass=0.5, lowpass=25.0, window=64, stride=64)
ONSET = 16
DECLARED = "drawn at random"
NO_BASELINE = NotApplicable(reason="the trials are stored without a baseline")
QUICK = ["--methods", "[]", "--shuffles", "0", "--resamples", "500"]


def make_trials(people: int = 8, images: int = 40, *, order: str = "random", seed: int = 0) -> Trials:
    """Make trials of two labels without EEG. Half of the people are in the test split, and see other images than the
    rest."""
    rng = np.random.default_rng(seed)
    person, image = (part.ravel() for part in np.meshgrid(np.arange(people), np.arange(images), indexing="ij"))
    labels_n, test_n = image % 2, person >= people // 2
    times = [rng.permutation(images) for _ in range(people)]
    if order == "blocks":
        times = [np.argsort(np.argsort(np.arange(images) % 2, kind="stable"))] * people
    n = len(person)
    return Trials(
        splits_n=np.where(test_n, "test", "train"),
        table=TrialTable(
            labels_n=labels_n,
            images_n=np.array([f"{i} {t}" for i, t in zip(image, test_n, strict=True)]),
            subjects_n=np.array([f"s{p}" for p in person]),
            sessions_n=np.full(n, ""),
            recordings_n=np.array([f"r{number}" for number in (labels_n if order == "recordings" else person)]),
            times_n=np.concatenate(times).astype(float),
        ),
        channels=["a", "b"],
        eeg_nCT=np.zeros((n, 2, 16), np.float16),
        digests_n=np.arange(n),
        window_s=0.5,
        metas=[{}] * n,
        electrodes=[{"n": 2, "positions": None}] * n,
        tokens={},
    )


def make_setting(trials: Trials, *, folds: Any = "split", design: Any = "random", **changes: Any) -> Setting:
    values: dict[str, Any] = {
        "trials": trials,
        "folds": make_outer_folds(trials, ProbeConfig(encoder="e", dataset="d", folds=folds))[0],
        "classes": 2,
        "design": design,
        "design_evidence": DECLARED,
        "baseline_nF": NO_BASELINE,
    }
    return Setting(**(values | changes))


def predict(setting: Setting, right: float) -> np.ndarray:
    """Return the right label with the given probability, and otherwise a wrong label."""
    truth = setting.trials.labels_n[setting.scored]
    return np.where(np.random.default_rng(1).random(len(truth)) < right, truth, 1 - truth)


def collect(setting: Setting, right: float = 0.8) -> Evidence:
    return collect_evidence(setting, predict(setting, right))


class TestWords:
    @pytest.mark.parametrize("folds", ["split", "subjects"])
    def test_right_predictions_in_random_order_are_a_signal(self, folds: str) -> None:
        verdict = judge(collect(make_setting(make_trials(16), folds=folds)), resamples=500)
        assert verdict.word == "signal"
        assert verdict.scope is not None and verdict.scope.startswith("people who are not in the training trials")
        assert "finer content was not tested" in verdict.scope

    def test_few_people_are_named_in_the_scope(self) -> None:
        verdict = judge(collect(make_setting(make_trials(6))), resamples=500)
        assert verdict.word == "signal" and "no claim about people" in (verdict.scope or "")

    @pytest.mark.parametrize("seed", range(3))
    def test_predictions_by_chance_are_no_signal(self, seed: int) -> None:
        assert judge(collect(make_setting(make_trials(seed=seed)), 0.5), resamples=500).word == "no signal"

    @pytest.mark.parametrize("design", ["block", "unknown"])
    def test_another_design_is_confounded(self, design: str) -> None:
        assert judge(collect(make_setting(make_trials(), design=design))).word == "confounded"

    def test_labels_that_are_constant_within_recordings_are_confounded(self) -> None:
        assert judge(collect(make_setting(make_trials(order="recordings"))), resamples=500).word == "confounded"

    @pytest.mark.parametrize("folds", ["split", "subjects"])
    def test_blocks_are_found_where_the_order_is_declared_random(self, folds: str) -> None:
        verdict = judge(collect(make_setting(make_trials(order="blocks"), folds=folds)), resamples=500)
        assert verdict.word == "confounded" and "time of the trial" in verdict.why[0]

    def test_a_label_in_the_baseline_is_found(self) -> None:
        trials = make_trials()
        baseline_nF = np.random.default_rng(3).normal(size=(len(trials), 4))
        setting = make_setting(trials, baseline_nF=baseline_nF)
        assert judge(collect(setting), resamples=500).word == "signal"
        baseline_nF[:, 0] += 2 * trials.labels_n
        verdict = judge(collect(make_setting(trials, baseline_nF=baseline_nF)), resamples=500)
        assert verdict.word == "confounded" and "EEG before the picture" in verdict.why[0]


class TestEvidence:
    def test_chance_is_the_share_of_the_commonest_label(self) -> None:
        trials = make_trials(images=40)
        trials.table.labels_n[:] = np.arange(len(trials)) % 4 == 0
        assert collect(make_setting(trials)).chance == 0.75
        assert collect(make_setting(trials, classes=4)).chance == 0.75
        assert collect(make_setting(make_trials(), classes=2)).chance == 0.5

    def test_one_label_in_the_test_trials_is_no_signal(self) -> None:
        trials = make_trials()
        trials.table.labels_n[trials.splits_n == "test"] = 1
        evidence = collect(make_setting(trials), 1.0)
        assert evidence.chance == 0.5
        assert judge(evidence, resamples=500).word != "signal"

    def test_eeg_is_exchanged_within_a_fold_with_trials_of_other_images(self) -> None:
        setting = make_setting(make_trials(), folds="subjects")
        fold_s = np.repeat(np.arange(len(setting.folds)), [len(fold.test) for fold in setting.folds])
        # Each fold predicts one label only, so an exchange within the fold changes no prediction.
        found = collect_evidence(setting, fold_s % 2)
        for name in ("shuffle", "shuffle_within"):
            control = found.controls[name]
            assert not isinstance(control, NotApplicable) and control.left_out_n is not None
            np.testing.assert_array_equal(control.hits_n, found.hits_n)
            assert not control.left_out_n.any()

    def test_unknown_times_have_no_neighbours(self) -> None:
        trials = make_trials()
        trials.table.times_n[:] = np.nan
        found = collect(make_setting(trials))
        assert found.controls["shuffle_within"] == NotApplicable(reason="no trial has a neighbour whose time is known")
        assert not isinstance(found.controls["shuffle"], NotApplicable)

    def test_new_labels_cannot_be_predicted_from_time(self) -> None:
        trials = make_trials()
        trials.table.labels_n[trials.splits_n == "test"] += 2
        found = collect_evidence(make_setting(trials, classes=4), np.zeros(160, np.int64))
        assert found.new_concepts and found.new_people
        assert isinstance(found.controls["time"], NotApplicable)
        assert judge(found, resamples=500).word == "no signal"

    def test_people_of_the_training_trials_are_not_new(self) -> None:
        trials = make_trials()
        trials.table.subjects_n[:] = "s1"
        found = collect(make_setting(trials))
        assert not found.new_people and not found.new_concepts


def write_trials(path: Path, *, split_recordings: bool = False, images_known: bool = True) -> Path:
    """Write trials of two labels in random order: the label is the sign of a bump. EEG before the picture is stored
    too.

    With `split_recordings`, all trials of a recording have the same label.
    """
    rng = np.random.default_rng(7)
    splits: dict[str, list[Sample]] = {}
    for number in range(7):
        split = "train" if number < 4 else "test"
        times = rng.permutation(24)
        for image in range(24):
            label = image % 2
            eeg = rng.normal(0, 10, (4, ONSET + SPEC.window))
            eeg[:, ONSET + 20 : ONSET + 40] += 12 if label else -12
            meta: dict[str, Any] = {
                **{"n": 4, "ch_names": ["Fz", "Cz", "Pz", "Oz"], "positions": [None] * 4, "reference": "average"},
                **{"sfreq": SPEC.sfreq, "start": 2.0 * times[image], "onset": ONSET, "subject": f"s{number}"},
                **{"recording": f"{number}-{label}" if split_recordings else f"{number}", "session": "", "bads": []},
                **{"corpus": "tiny", "split": split, "label": label, "label_name": ("minus", "plus")[label]},
            }
            if images_known:
                meta["image_id"] = f"{split}-{image}"
            sample = Sample(key=f"{number}-{image:02d}", eeg=eeg.astype(np.float32), meta=meta)
            splits.setdefault(split, []).append(sample)
    write_dataset(path, splits, SPEC, labels=["minus", "plus"], samples_per_shard=64)
    return path


def save_encoder(path: Path, spec: PreprocessSpec, patch: int) -> Path:
    torch.manual_seed(11)
    shape = {"patch": patch, "dim": 32, "depth": 1, "heads": 2, "mlp_ratio": 1.0}
    EEGEncoder(spec=spec, n_times=spec.window, sfreq=spec.sfreq, **shape).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("verdict") / "encoder", SPEC, 4)


def run_probe(package: Path, data: Path, out: Path, *options: str, code: int = 0) -> dict[str, Any]:
    assert main([str(package), str(data), *QUICK, "--output", str(out), *options]) == code
    return json.loads(out.read_text())["verdict"]


class TestCommand:
    def test_the_verdict_is_printed_stored_and_required(self, package: Path, tmp_path: Path, capsys: Any) -> None:
        data, out = write_trials(tmp_path / "data"), tmp_path / "probe.json"
        verdict = run_probe(package, data, out, "--design_evidence", DECLARED, "--require", "signal")
        assert verdict["word"] == "signal" and verdict["chance"] == 0.5
        assert {row["name"] for row in verdict["comparisons"]} >= {
            *("own - shuffle", "own - shuffle_within", "time - chance", "baseline - chance")
        }
        assert verdict["not_applicable"].keys() == {*("noise", "no_eeg", "eyes", "nearest", "identification", "judge")}
        assert f"verdict: signal ({verdict['scope']}). {verdict['why'][0]}" in capsys.readouterr().out
        # The manifest of this dataset does not name the design, so without a declaration the design is unknown.
        verdict = run_probe(package, data, out, "--require", "signal", code=1)
        assert verdict["word"] == "confounded"
        assert "verdict: confounded. The design is unknown" in capsys.readouterr().out
        assert run_probe(package, data, out)["word"] == "confounded"

    @pytest.mark.parametrize("images_known", [True, False])
    def test_one_label_in_each_recording(self, images_known: bool, package: Path, tmp_path: Path) -> None:
        data = write_trials(tmp_path / "data", split_recordings=True, images_known=images_known)
        verdict = run_probe(package, data, tmp_path / "probe.json", "--design_evidence", DECLARED)
        assert verdict["word"] == "confounded"
        assert verdict["why"][0].startswith("Each recording has only one label")

    def test_a_manifest_of_another_form_is_refused(self, package: Path, tmp_path: Path, capsys: Any) -> None:
        data = write_trials(tmp_path / "data")
        manifest = json.loads((data / "manifest.json").read_text())
        manifest["extra"]["corpora"] = [{"name": "tiny", "design": "shuffled"}]
        (data / "manifest.json").write_text(json.dumps(manifest))
        assert main([str(package), str(data), *QUICK]) == 2
        assert "'shuffled', not one of random, block, unknown" in capsys.readouterr().err


class TestMissingImages:
    def test_trials_of_a_recording_with_one_label_are_one_image(self, tmp_path: Path) -> None:
        data = EEGDataset(write_trials(tmp_path / "data", split_recordings=True, images_known=False), "test")
        table = tabulate_trials(data, images_needed=False)
        assert np.unique(table.images_n).tolist() == [
            f"recording tiny/s{number}//{number}-{label}" for number in (4, 5, 6) for label in (0, 1)
        ]
        assert label_is_constant_in_recordings(table)
        with pytest.raises(RequestError, match="72 samples have no image_id"):
            tabulate_trials(data)

    def test_trials_of_a_recording_with_several_labels_are_single(self, tmp_path: Path) -> None:
        path = write_trials(tmp_path / "data", images_known=False)
        tables = [tabulate_trials(EEGDataset(path, split), images_needed=False) for split in ("train", "test")]
        names = np.concatenate([table.images_n for table in tables])
        assert len(np.unique(names)) == len(names) == 7 * 24


def write_eegmat(root: Path, people: int) -> None:
    """Write recordings of the set eegmat as arrays, with a label for every 5 s. Part 1 of each person was recorded at
    rest, and part 2 during arithmetic."""
    import mne

    for number in range(people):
        for part, label in ((1, "rest"), (2, "arithmetic")):
            edf = REAL / "eegmat" / f"Subject{number:02d}_{part}.edf"
            raw = mne.io.read_raw_edf(edf, verbose="ERROR")
            picks = [name for name in raw.ch_names if name.startswith("EEG ") and name != "EEG A2-A1"]
            folder = root / f"sub-{number:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            volts_CT = np.asarray(raw.pick(picks).get_data())
            np.save(folder / f"{label}.npy", (volts_CT * 1e6).astype(np.float32))
            sidecar = {
                **{"sfreq": raw.info["sfreq"], "unit": "uV", "ch_names": [name.removeprefix("EEG ") for name in picks]},
                **{"events": [{"onset": 5.0 * window, "label_name": label} for window in range(1, 11)]},
            }
            (folder / f"{label}.json").write_text(json.dumps(sidecar))


@pytest.mark.skipif(
    not (REAL / "eegmat").is_dir(), reason="DREAMSCALE_REAL_EEG does not name a folder with the real set eegmat"
)
def test_rest_against_arithmetic_is_confounded(tmp_path: Path) -> None:
    write_eegmat(tmp_path / "eeg", people=4)
    config = {
        "corpora": [{"kind": "arrays", "root": str(tmp_path / "eeg"), "name": "eegmat"}],
        "preprocess": {"sfreq": 64, "highpass": 1.0, "lowpass": 25.0, "window": 320, "stride": 320},
        "split": {"val_fraction": 0, "test_fraction": 0},
        "ray": {"num_cpus": 1, "memory_gb": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    assert shard_main([str(tmp_path / "job.yaml"), "--output", str(tmp_path / "data")]) == 0
    spec = EEGDataset(tmp_path / "data").spec
    package = save_encoder(tmp_path / "encoder", spec, 16)
    # A declared random order changes nothing, because the order was measured.
    options = ["--folds", "subjects", "--methods", '["band power"]', "--design_evidence", DECLARED]
    verdict = run_probe(package, tmp_path / "data", tmp_path / "probe.json", *options, "--require", "signal", code=1)
    assert verdict["word"] == "confounded"
    assert verdict["why"][0].startswith("Each recording has only one label")
    assert any("The design is block" in sentence for sentence in verdict["why"])
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["trials"]["scored"] > 60 and found["images"] == 8
