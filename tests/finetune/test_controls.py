"""Tests of the controls of ``dreamscale generate``: exchanged EEG, noise, and predictors without a brain response."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.signal import butter, sosfiltfilt

from data_sharding.common.errors import RequestError, run_main
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample
from finetune.eeg import read_means
from finetune.evaluation.generated import check_control, read_generated, read_not_applicable
from finetune.generate import main
from finetune.generation.exchange import randomise_phases, read_noise
from finetune.generation.predictors import find_face_channels
from finetune.generation.trials import list_trials
from finetune.images import ImageTable
from finetune.linear.train import main as train_linear
from pretrain.evidence.baseline import remove_line
from pretrain.evidence.predictors import noise_features, predict_from_features
from pretrain.evidence.trials import find_neighbourhoods, tabulate_trials

ONSET = 32
"""Time point of the image in the stored trials, 0.25 s after their beginning."""
BLOCK = 6
"""Number of consecutive trials with the same label."""


def write_blocks(path: Path, source: Path, *, onset: int = ONSET, timed: bool = True) -> Path:
    """Write the images of `source` with EEG that reveals the label everywhere: in time, baseline, eyes and response.

    Each of two people sees blocks of consecutive trials with the same label. Every third trial is a test trial. Channel
    HEOG is an eye channel.
    """
    rng, splits = np.random.default_rng(0), {"train": [], "test": []}
    old = EEGDataset(source, "train")
    images: dict[int, list[Sample]] = {0: [], 1: []}
    for number in range(len(old)):
        sample = old[number]
        images[sample.meta["label"]].append(sample)
    for person in ("a", "b"):
        for place in range(36):
            label = place // BLOCK % 2
            sample = images[label][place % 18 + (18 if person == "b" else 0) - (4 if person == "b" else 0)]
            split = "test" if place % 3 == 1 else "train"
            eeg = rng.normal(0, 5, (8, onset + 128)) + (20.0 if label else -20.0)
            eeg[:, onset + 40 : onset + 60] += 40.0 if label else -40.0
            # Before the image, the alpha rhythm is stronger in the blocks of one label.
            eeg[:, :onset] += (40.0 if label else 5.0) * np.sin(2 * np.pi * 10 / 128 * np.arange(onset))
            meta = sample.meta | {"n": 8, "onset": onset, "start": 2.0 * place if timed else 0.0, "split": split}
            meta |= {"ch_names": [*(f"C{i}" for i in range(1, 8)), "HEOG"], "positions": [None] * 8}
            meta |= {"recording": f"rec-{person}", "subject": person, "image_id": f"{split}-{sample.meta['image_id']}"}
            new = Sample(key=f"{person}-{place:03d}", eeg=eeg.astype(np.float32), meta=meta, image=sample.image)
            splits[split].append(new)
    splits["val"] = [Sample(key=f"val-{s.key}", eeg=s.eeg, meta=s.meta, image=s.image) for s in splits["train"][:8]]
    write_dataset(path, splits, old.spec, labels=old.labels, samples_per_shard=20)
    return path


def train(dataset: Path, output: Path) -> Path:
    config = output.parent / f"{output.name}.yaml"
    config.write_text(
        f"dataset: {dataset}\noutput: {output}\nchannels: 16\nbins: 16\ncomponents: 4\ntracker: {{kind: none}}\n"
    )
    assert train_linear([str(config)]) == 0
    return output


@pytest.fixture(scope="module")
def blocks(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "data", paired_dataset)


@pytest.fixture(scope="module")
def run(blocks: Path) -> Path:
    return train(blocks, blocks.parent / "run")


@pytest.fixture
def make(run: Path, blocks: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that generates the images of a control, and returns their folder."""

    def generate(control: str, *words: object, dataset: Path = blocks, model: Path = run) -> Path:
        out = tmp_path / control
        args = [model, dataset, "-o", out, "--control", control, *words]
        assert main([str(word) for word in args]) == 0
        return out

    return generate


def test_shuffle_within_exchanges_the_eeg_of_neighbours_that_show_another_image(
    make: Callable[..., Path], blocks: Path
) -> None:
    own, control = make("none"), make("shuffle_within")
    check_control(read_generated(own), read_generated(control))
    data = EEGDataset(blocks, "test")
    neighbourhood = dict(zip(map(data.key, range(len(data))), find_neighbourhoods(tabulate_trials(data)), strict=True))
    metas = {data.key(number): data.meta(number) for number in range(len(data))}
    trials = json.loads((control / "generated.json").read_text())["trials"]
    assert len(trials) == 24 and sorted(t["key"] for t in trials) == sorted(t["eeg_key"] for t in trials)
    for trial in trials:
        mine, other = metas[trial["key"]], metas[trial["eeg_key"]]
        assert neighbourhood[trial["key"]] == neighbourhood[trial["eeg_key"]]
        assert mine["recording"] == other["recording"] and mine["image_id"] != other["image_id"]
        assert abs(mine["start"] - other["start"]) < 60
    # The control image is generated from the neighbour's EEG, so it equals the image generated for the neighbour's own
    # trial.
    for trial in trials:
        shown = Image.open(own / "images" / f"{trial['eeg_key']}.png")
        np.testing.assert_array_equal(Image.open(control / trial["file"]), shown)


def test_shuffle_within_leaves_presentations_of_the_own_image_out_of_an_average(
    make: Callable[..., Path], blocks: Path, tmp_path: Path
) -> None:
    data, path = EEGDataset(blocks, "test"), tmp_path / "repeated"
    samples = []
    for number in range(len(data)):
        sample = data.read_stored(number)
        # Consecutive pairs of trials show the same image.
        sample.meta["image_id"] = f"{sample.meta['subject']}-{number // 2}"
        samples.append(sample)
    old = EEGDataset(blocks, "train")
    stored = [old.read_stored(number) for number in range(len(old))]
    write_dataset(path, {"train": stored, "test": samples}, data.spec, labels=data.labels)
    trials = json.loads((make("shuffle_within", dataset=path) / "generated.json").read_text())["trials"]
    own = json.loads((make("none", dataset=path) / "generated.json").read_text())["trials"]
    assert len(trials) == 12
    for trial, mine in zip(trials, own, strict=True):
        assert mine["eeg_keys"][0] == mine["eeg_key"] and len(mine["eeg_keys"]) == mine["repeats"] == 2
        assert trial["repeats"] == 2 and not set(trial["eeg_keys"]) & set(mine["eeg_keys"])


def test_noise_keeps_spectra_and_covariance_and_destroys_the_time_course() -> None:
    rng = np.random.default_rng(0)
    for samples in (128, 129):
        bump = np.exp(-((np.arange(samples) - 50) ** 2) / 50)
        eeg = rng.normal(0, 1, (6, samples)) + 5 * bump + 3
        noise = randomise_phases(eeg, 7)
        before, after = (np.fft.rfft(x.astype(np.float64), axis=-1) for x in (eeg, noise))
        np.testing.assert_allclose(np.abs(after), np.abs(before), atol=1e-3)
        np.testing.assert_allclose(after[0] * after[1].conj(), before[0] * before[1].conj(), atol=2e-2)
        np.testing.assert_allclose(np.cov(noise), np.cov(eeg), atol=1e-4)
        np.testing.assert_allclose(noise.mean(axis=1), eeg.mean(axis=1), atol=1e-5)
        np.testing.assert_array_equal(noise, randomise_phases(eeg, 7))
        # Averaged over 400 seeds, the noise is constant in time: each channel keeps its mean, and no evoked response
        # remains.
        many = np.array([randomise_phases(eeg, seed) for seed in range(400)])
        assert np.abs(many.mean(axis=0) - eeg.mean(axis=1, keepdims=True)).max() < 0.2 * np.ptp(eeg)
        alike = [np.corrcoef(one[0], eeg[0])[0, 1] for one in many]
        assert abs(np.mean(alike)) < 0.1 and np.median(np.abs(alike)) < 0.4


def test_noise_of_a_trial_depends_on_its_key_only_and_is_given_to_the_model(
    make: Callable[..., Path], blocks: Path
) -> None:
    data = EEGDataset(blocks, "test")
    groups = [[number] for number in range(6)]
    trials = list_trials(data, groups, groups)
    noise, eeg = read_noise(data, trials, 3), read_means(data, groups)
    assert noise.shape == eeg.shape and not np.allclose(noise, eeg)
    np.testing.assert_array_equal(noise[4], read_noise(data, trials[4:5], 3)[0])
    np.testing.assert_array_equal(noise[:, :8], noise[:, 8:16])  # As in the EEG, padded rows repeat the 8 channels.
    assert (noise != read_noise(data, trials, 4)).any()
    own, control = make("none"), make("noise")
    check_control(read_generated(own), read_generated(control))
    trials = json.loads((control / "generated.json").read_text())["trials"]
    assert all(trial["noise"] is True and trial["eeg_key"] == trial["key"] for trial in trials)
    differ = [(own / trial["file"]).read_bytes() != (control / trial["file"]).read_bytes() for trial in trials]
    assert any(differ)


def test_a_filter_that_carries_the_response_to_before_the_image_is_no_leak() -> None:
    rng = np.random.default_rng(0)
    labels_n = np.repeat([0, 1], 100)
    times = (np.arange(512) - 256) / 128
    response = np.exp(-(((times - 0.35) / 0.08) ** 2)) * np.array([1.0, -0.6, 0.3])[:, None]
    raw_nCT = np.where(labels_n == 0, -1, 1)[:, None, None] * 12 * response + rng.normal(0, 1.0, (200, 3, 512))
    high_pass = butter(2, 0.5, "highpass", fs=128, output="sos")
    before_nCT = sosfiltfilt(high_pass, raw_nCT, axis=-1)[..., 224:256]
    order = rng.permutation(200)
    fit, new = order[:100], order[100:]

    def score(x_nCT: np.ndarray) -> float:
        x_nF = noise_features(x_nCT, 128.0)
        found = predict_from_features(x_nF[fit], labels_n[fit], x_nF[new])
        return float((found == labels_n[new]).mean())

    assert score(before_nCT) > 0.9, "the slow wave of the filter reveals the label"
    assert 0.35 < score(np.stack([remove_line(x_CT) for x_CT in before_nCT])) < 0.65
    assert 0.35 < score(raw_nCT[..., 224:256]) < 0.65, "without a filter, there is nothing before the image"


@pytest.mark.parametrize("control", ["time", "baseline", "eyes", "nearest"])
def test_a_predictor_shows_a_training_image_of_the_category_that_it_finds_without_a_generator(
    control: str, make: Callable[..., Path], blocks: Path
) -> None:
    out = make(control)
    check_control(read_generated(make("none")), read_generated(out))
    table = ImageTable(EEGDataset(blocks, "train"))
    trials = json.loads((out / "generated.json").read_text())["trials"]
    # The label is constant in long blocks, and the baseline, the eye channel and the response reveal it.
    assert np.mean([trial["predicted_label"] == trial["label"] for trial in trials]) > 0.8
    pictures = table.pixels()
    for trial in trials:
        row = table.ids.index(trial["shown_image_id"])
        assert table.labels[row] == trial["predicted_label"]
        np.testing.assert_array_equal(Image.open(out / trial["file"]), pictures[row])
        assert trial["eeg_key"] == (None if control == "time" else trial["key"])
    assert len({trial["shown_image_id"] for trial in trials}) > 4


def test_predictors_learn_from_the_train_split_only(
    run: Path, blocks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), str(blocks), "-o", str(tmp_path / "o"), "--split", "train", "--control", "time"]
    assert run_main(main, words) == 2
    assert "learns from the train split; give another split" in capsys.readouterr().err


def test_a_control_that_the_data_cannot_give_says_why(
    make: Callable[..., Path], blocks: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_blocks(tmp_path / "bare", paired_dataset, onset=0, timed=False)
    model = train(paired_dataset, tmp_path / "other")
    cases = [
        ("baseline", bare, None, "72 of 72 trials are stored with less than 0.05 s before the picture"),
        ("shuffle_within", bare, None, "24 of 24 trials, such as a-001, have no neighbour in their recording"),
        ("eyes", paired_dataset, model, "no eye or face channel is in all trials"),
        ("class", blocks, None, "the linear baseline needs EEG"),
    ]
    for control, dataset, given, reason in cases:
        capsys.readouterr()
        out = make(control, dataset=dataset, **({"model": given} if given else {}))
        said = capsys.readouterr().out
        assert said.startswith("not applicable: ") and reason in said
        assert [path.name for path in out.iterdir()] == ["generated.json"]
        assert reason in read_not_applicable(out)
        with pytest.raises(RequestError, match="holds no images, because this control cannot be made from the data"):
            read_generated(out)
    assert read_not_applicable(make("none")) == ""


def test_a_forged_control_is_refused(make: Callable[..., Path]) -> None:
    own = read_generated(make("none"))
    folders = {control: read_generated(make(control)) for control in ("shuffle", "noise", "time")}
    for control in folders.values():
        check_control(own, control)

    def first(name: str, **changes: Any) -> dict[str, Any]:
        trials = folders[name].about["trials"]
        return {"trials": [trials[0] | changes, *trials[1:]]}

    mine = own.trials[0]["key"]
    forged = [
        ("shuffle", {"model_digest": "0" * 64}, "model_digest is '0000"),
        ("shuffle", {"model_digest": None}, "has no model_digest"),
        ("shuffle", {"seed": 1}, "seed is 1, but 0"),
        ("shuffle", {"steps": 9}, "steps is 9, but 1"),
        ("shuffle", {"dataset_id": "x"}, "dataset_id is 'x'"),
        ("shuffle", {"dataset_version": 2}, "dataset_version is 2"),
        ("shuffle", {"split": "val"}, "split is 'val'"),
        ("shuffle", {"trials": folders["shuffle"].trials[1:]}, "the images belong to other trials than"),
        ("shuffle", {"control": "none"}, "does not hold control images"),
        ("shuffle", first("shuffle", eeg_key=mine), "was made from its own EEG, so the folder is not the control"),
        ("shuffle", first("shuffle", eeg_keys=["x", mine]), "was made from its own EEG"),
        ("shuffle", first("shuffle", eeg_key=None), "was made from no EEG"),
        ("noise", first("noise", noise=False), "was made from EEG that is not noise"),
        ("time", first("time", eeg_key="x"), "was made from EEG, so the folder is not the control 'time'"),
    ]
    for name, changes, message in forged:
        control = folders[name]
        about, control.about = control.about, control.about | changes
        with pytest.raises(RequestError, match=message):
            check_control(own, control)
        control.about = about
    with pytest.raises(RequestError, match="this folder holds control images"):
        check_control(folders["noise"], folders["shuffle"])


def test_face_channels_are_found_by_name_or_by_position() -> None:
    positions = [(0.04, 0.068, -0.042), (-0.066, 0.047, -0.017), (0.03, 0.09, 0.04), (0.05, -0.06, -0.04), None]
    assert find_face_channels(["E126", "E128", "E9", "E94", "E50"], positions) == ["E126", "E128"]
    assert find_face_channels(["VEOG", "Fp1", "F9"], [None, None, (-0.0717, 0.0701, -0.0126)]) == ["VEOG"]
