"""Tests that repeated presentations of an image are averaged, and that every result says how many were averaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_sharding.common.errors import RequestError, run_main
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.samples import Sample, pad_channels
from finetune.align import main as align
from finetune.align import measure_retrieval
from finetune.dm_re2i.train import main as ddpm
from finetune.eeg import EEGConfig, group_repeats, load_encoder, read_means, read_trials
from finetune.electrodes import EncoderInput
from finetune.evaluation.evaluate import main as evaluate
from finetune.generate import main as generate
from finetune.images import ImageTable, open_paired
from finetune.stable_diffusion.train import main as finetune
from pretrain.encoder.encoder import EEGEncoder

ONSET = 32
"""Time point of the onset in the stored trials, 0.25 s after their beginning."""


@pytest.fixture(scope="module")
def repeated(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the first trial of `paired_dataset` once and every other trial three times, with different noise and a
    baseline.

    The 32 baseline values of a trial are the last 32 values of the trial's window, multiplied by -1.
    """
    rng, splits = np.random.default_rng(0), {}
    for split in ("train", "val", "test"):
        data, splits[split] = EEGDataset(paired_dataset, split), []
        for number in range(len(data)):
            sample = data[number]
            for repeat in range(1 if number == 0 else 3):
                window = sample.eeg + rng.normal(0, 3, sample.eeg.shape)
                meta = sample.meta | {"repeat": repeat, "onset": ONSET, "start": 10.0 * number + repeat}
                eeg = np.concatenate([-window[:, -ONSET:], window], axis=1)
                key = f"{sample.key}-{repeat}"
                splits[split].append(Sample(key=key, eeg=eeg, meta=meta, image=sample.image, image_ext="png"))
    path = tmp_path_factory.mktemp("repeated") / "data"
    write_dataset(path, splits, data.spec, labels=data.labels, samples_per_shard=40)
    return path


def test_repeats_of_one_subject_are_grouped(repeated: Path) -> None:
    data = EEGDataset(repeated, "test")
    assert [len(group) for group in group_repeats(data, 0)] == [1] + [3] * 15
    assert [len(group) for group in group_repeats(data, 2)] == [1] + [2, 1] * 15
    assert group_repeats(data, 1) == [[number] for number in range(46)]
    for average in (0, 1, 2, 5):
        groups = group_repeats(data, average)
        assert sorted(number for group in groups for number in group) == list(range(46))
        names = [{(data.meta(n)["image_id"], data.meta(n)["subject"]) for n in group} for group in groups]
        assert all(len(name) == 1 for name in names)
    group = group_repeats(data, 0)[4]
    mean = np.mean([data[n].eeg.astype(np.float32) for n in group], axis=0)
    assert np.allclose(read_means(data, [group, [0]])[0].numpy(), pad_channels(mean), atol=1e-4)
    with pytest.raises(ValueError, match=r"eeg\.average_repeats must be 0"):
        EEGConfig(average_repeats=-1)
    with pytest.raises(ValueError, match=r"eeg\.tmax 0 must be later than eeg\.tmin 0\.5"):
        EEGConfig(tmin=0.5, tmax=0.0)


def test_other_subjects_and_other_channels_are_not_averaged(repeated: Path, tmp_path: Path) -> None:
    data = EEGDataset(repeated, "test")
    samples = [data[number] for number in range(4)]
    for sample, (subject, names) in zip(samples, (("a", "E"), ("a", "E"), ("b", "E"), ("a", "X")), strict=True):
        sample.meta |= {"image_id": "same", "subject": subject, "ch_names": [f"{names}{i}" for i in range(16)]}
    write_dataset(tmp_path / "d", {"test": samples}, data.spec, labels=data.labels)
    assert group_repeats(EEGDataset(tmp_path / "d", "test"), 0) == [[0, 1], [2], [3]]


def test_retrieval_counts_an_image_once(repeated: Path, encoder_package: Path) -> None:
    """Check that each image is searched once even if several trials show it, and that `repeats` is the mean number of
    presentations that are averaged to a trial."""
    data = EEGDataset(repeated, "val")
    table = ImageTable(data)
    target = F.normalize(torch.eye(len(table)), dim=-1)
    encoder = EEGEncoder.from_pretrained(encoder_package)
    means = read_trials(data, group_repeats(data, 0), encoder)
    rows = table.row_of[[group[0] for group in group_repeats(data, 0)]]

    def embed(trials: EncoderInput, groups: Sequence[Sequence[int]]) -> torch.Tensor:
        del groups
        nearest = torch.cdist(trials.x.flatten(1), means.flatten(1)).argmin(1)
        return target[torch.as_tensor(rows)[nearest]]

    assert len(table) == 16
    for average, trials, repeats in ((0, 16, 46 / 16), (1, 46, 1.0), (3, 16, 46 / 16)):
        found = measure_retrieval(embed, encoder, data, table, target, "cpu", average_repeats=average)
        assert (found["images"], found["trials"], found["repeats"]) == (16, trials, repeats)
        assert found["top1"] == 1.0 and found["label"] == 1.0


def words(**keys: object) -> list[str]:
    keys = {"device": "cpu", "tracker.kind": "none", **keys}
    return [str(word) for key, value in keys.items() for word in (f"--{key.replace('__', '.')}", value)]


@pytest.fixture(scope="module")
def model(repeated: Path, encoder_package: Path, miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Align and fine-tune for one step each, on the part of each trial from -0.25 s (baseline included) to 0.75 s."""
    root = tmp_path_factory.mktemp("runs")
    part = {"eeg__tmin": -0.25, "eeg__tmax": 0.75, "training__steps": 1, "training__batch_size": 8}
    found = {"dataset": repeated, "encoder": encoder_package, "target__model": miniature / "clip"}
    assert align(words(**found, output=root / "align", **part)) == 0
    found = {"dataset": repeated, "encoder": root / "align" / "encoder", "base": miniature / "stable-diffusion"}
    assert finetune(words(**found, output=root / "sd", **part)) == 0
    return root / "sd" / "model"


def test_the_alignment_says_what_it_averaged(model: Path) -> None:
    found = json.loads((model.parents[1] / "align" / "align" / "result.json").read_text())
    assert found["val"]["trials"] == 16 and found["val"]["repeats"] == 46 / 16
    assert found["eeg"] == {"tmin": -0.25, "tmax": 0.75}


def test_another_part_of_the_trial_is_refused(model: Path, repeated: Path, encoder_package: Path) -> None:
    aligned = model.parents[1] / "align" / "encoder"
    with pytest.raises(RequestError, match=r"aligned with eeg\.tmin -0\.25 and eeg\.tmax 0\.75.* sets None and None;"):
        load_encoder(str(aligned), open_paired(repeated, "train"))
    with pytest.raises(RequestError, match=r"tokens of 4 time points, and .* has 62 .* set eeg\.tmax to 0\.46875 s"):
        load_encoder(str(encoder_package), open_paired(repeated, "train", tmin=0.0, tmax=62 / 128))


def test_generation_reads_the_same_part_and_evaluation_says_what_was_averaged(
    model: Path, repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--training.steps", "40", "--training.width", "8", "--permutations", "199"]
    for average, trials, sentence in (
        (0, 16, "The EEG of each trial is the mean over 1 to 3 presentations of its image to one subject."),
        (1, 46, "The EEG of each trial is one presentation of its image. 46 trials show 16 pairs of subject and image"),
    ):
        out = tmp_path / f"{average}"
        args = [model, repeated, "-o", out, "--steps", 1, "--average_repeats", average, "--device", "cpu"]
        assert generate([str(arg) for arg in args]) == 0
        about = json.loads((out / "generated.json").read_text())
        assert about["eeg"] == {"tmin": -0.25, "tmax": 0.75} and about["average_repeats"] == average
        assert len(about["trials"]) == trials and sum(trial["repeats"] for trial in about["trials"]) == 46
        capsys.readouterr()
        assert evaluate([str(out), *quick]) == 0
        said = capsys.readouterr().out
        assert ("each trial is the mean of up to 3 presentations" in said) == (not average)
        found = json.loads((out / "metrics.json").read_text())
        assert found["repeats"] == {
            "average_repeats": average,
            "least": 1,
            "most": 1 if average else 3,
            "presentations": 46,
        }
        assert found["trials"] == trials and found["images"] == 16
        assert sentence in (out / "report.html").read_text()
    control = tmp_path / "control"
    assert (
        generate(
            [
                str(a)
                for a in (model, repeated, "-o", control, "--steps", 1, "--control", "shuffle", "--average_repeats", 1)
            ]
        )
        == 0
    )
    assert run_main(evaluate, [str(tmp_path / "0"), "--controls", f"[{control}]", *quick]) == 2
    assert "average_repeats is 1, but 0" in capsys.readouterr().err


def test_a_network_without_an_encoder_reads_any_part(repeated: Path, tmp_path: Path) -> None:
    small = {"evrnet__training__steps": 1, "ddpm__training__steps": 1, "ddpm__image_size": 16, "ddpm__base_channels": 8}
    small |= {"evrnet__training__batch_size": 8, "ddpm__training__batch_size": 8, "evrnet__widths": "[4,4,4,4,8]"}
    small |= {"ddpm__multipliers": "[1,2]", "ddpm__head_dim": 4, "evrnet__calibration_trials": 8}
    args = words(dataset=repeated, output=tmp_path / "run", eeg__tmin=-0.25, eeg__tmax=1.0, **small)
    assert ddpm(args) == 0
    out = tmp_path / "out"
    args = [tmp_path / "run" / "model", repeated, "-o", out, "--steps", 1, "--guidance_scale", 1, "--limit", 3]
    assert generate([str(arg) for arg in args]) == 0
    about = json.loads((out / "generated.json").read_text())
    assert about["eeg"] == {"tmin": -0.25, "tmax": 1.0} and [trial["repeats"] for trial in about["trials"]] == [1, 3, 3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_groups_and_images_are_those_of_a_plain_loop_over_the_samples(repeated: Path, split: str) -> None:
    data = EEGDataset(repeated, split)
    metas = [data.meta(number) for number in range(len(data))]
    table = ImageTable(data)
    assert table.ids == sorted({meta["image_id"] for meta in metas})
    assert [table.ids[row] for row in table.row_of] == [meta["image_id"] for meta in metas]
    assert [table.labels[row] for row in table.row_of] == [meta["label"] for meta in metas]
    assert [table.captions[row] for row in table.row_of] == [meta["caption"] for meta in metas]
    for number, meta in enumerate(metas):
        same = [n for n, other in enumerate(metas) if other["image_id"] == meta["image_id"] and n != number]
        assert table.companions(number) == same
        own = [n for n in same if metas[n]["subject"] == meta["subject"]]
        assert table.companions(number, within_person=True) == own
    for average in (0, 2):
        plain: dict[tuple[str, str], list[list[int]]] = {}
        for number, meta in enumerate(metas):
            groups = plain.setdefault((meta["subject"], meta["image_id"]), [[]])
            if average and len(groups[-1]) == average:
                groups.append([])
            groups[-1].append(number)
        assert group_repeats(data, average) == sorted(group for groups in plain.values() for group in groups)
