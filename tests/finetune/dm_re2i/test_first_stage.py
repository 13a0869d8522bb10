"""Tests of DM-RE2I's first stage alone: every network, two processes, and data that no classifier can learn."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_sharding.common.errors import run_main
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from finetune.dm_re2i.train import main
from finetune.generators import load_generator

Launch = Callable[..., subprocess.CompletedProcess[str]]
TINY = {
    "tracker.kind": "none",
    "evrnet.training.steps": 30,
    "evrnet.training.batch_size": 16,
    "evrnet.training.lr": 0.01,
    "evrnet.training.warmup": 2,
    "evrnet.training.log_every": 1,
    "evrnet.training.evaluation.every": 10,
}
EVRNET = {"evrnet.channels": 16, "evrnet.widths": "[4,8,8,16,16]"}
DDPM = {
    "ddpm.image_size": 16,
    "ddpm.base_channels": 8,
    "ddpm.multipliers": "[1,2]",
    "ddpm.heads": 2,
    "ddpm.head_dim": 4,
    "ddpm.training.steps": 2,
    "ddpm.training.batch_size": 8,
}


def _args(dataset: Path, output: Path, *parts: dict, **more: object) -> list[str]:
    keys = {"dataset": dataset, "output": output, **TINY}
    for part in (*parts, {key.replace("__", "."): value for key, value in more.items()}):
        keys |= part
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def _curve(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "evrnet" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_two_processes_train_the_same_network_as_one(paired_dataset: Path, tmp_path: Path, launch: Launch) -> None:
    # The learning rate is small, because AdamW turns rounding errors of gradients near zero into steps of full size.
    more = {"stages": "evrnet", "evrnet.training.steps": 4, "evrnet.training.lr": 1e-4, "evrnet.image_weight": 0.5}
    for processes in (1, 2):
        args = _args(paired_dataset, tmp_path / str(processes), EVRNET, more)
        done = launch("finetune.dm_re2i", *args, processes=processes)
        assert done.returncode == 0, done.stderr
    for name, count in (("train/loss", 4), ("train/image_error", 4), ("grad_norm", 4), ("val/loss", 1)):
        one, two = (_curve(tmp_path / str(processes), name) for processes in (1, 2))
        assert len(one) == count
        # The gradient passes through batch norms, which enlarge rounding errors of fp32, so its tolerance is the
        # largest.
        tolerance = {"train/loss": 5e-4, "train/image_error": 5e-4, "grad_norm": 2e-2, "val/loss": 1e-3}[name]
        np.testing.assert_allclose(one[0], two[0], rtol=1e-5 if name == "train/loss" else tolerance)
        np.testing.assert_allclose(one, two, rtol=tolerance)


@pytest.mark.parametrize("network", ["evrnet", "eegnet", "tsconv", "encoder"])
def test_every_network_learns_writes_its_results_and_guides_the_generator(
    network: str, paired_dataset: Path, encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"evrnet.network": network, **(EVRNET if network == "evrnet" else {"evrnet.channels": 16})}
    if network == "encoder":
        own = {"evrnet.network": "encoder", "evrnet.encoder": encoder_package, "evrnet.train_encoder": True}
    args = _args(paired_dataset, tmp_path / "run", own, DDPM)
    assert run_main(main, [*args, "--stages", "evrnet"]) == 0
    assert not (tmp_path / "run" / "model").exists()
    result = json.loads((tmp_path / "run" / "evrnet" / "classification.json").read_text())
    assert result["split"] == "val" and result["chose_weights"] and result["trials"] == 16
    # The category is visible in the sign of the evoked response.
    assert result["accuracy"] >= 0.8 and result["kappa"] > 0.5 and set(result["subjects"]) == {"val-0", "val-1"}
    assert np.sum(result["confusion"]) == 16
    for name in ("confusion.png", "subjects.png", "loss.png"):
        assert (tmp_path / "run" / "evrnet" / "plots" / name).is_file()
    status = json.loads((tmp_path / "run" / "evrnet" / "status.json").read_text())
    assert {"accuracy", "kappa", "loss"} <= status["val"].keys() and "val/kappa" in _line_with(tmp_path / "run")
    capsys.readouterr()
    assert run_main(main, [*args, "--stages", "evrnet"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    # With both stages, the command does not train the finished first stage again, but continues with EG-DDPM.
    assert run_main(main, args) == 0
    assert "val accuracy" not in capsys.readouterr().out
    eeg = collate(EEGDataset(paired_dataset, "test"), [0, 1]).eeg.float()
    images = load_generator(tmp_path / "run").generate(eeg, steps=2, seeds=[1, 2])
    assert images.shape == (2, 16, 16, 3)


def _line_with(run: Path) -> set[str]:
    lines = (run / "evrnet" / "metrics.jsonl").read_text().splitlines()
    return {key for line in lines for key in json.loads(line)}


def _relabelled(source: Path, target: Path, split: str, label: int) -> Path:
    """Copy a paired dataset, and give the first trial of a split the label of a third category that does not occur in
    train."""
    splits = {}
    for name in ("train", "val", "test"):
        data = EEGDataset(source, name)
        splits[name] = [data[number] for number in range(len(data))]
        if name == split:
            splits[name][0].meta.update(label=label, label_name="star")
    write_dataset(target, splits, EEGDataset(source).spec, labels=["circle", "square", "star"])
    return target


@pytest.mark.parametrize("split", ["val", "test"])
def test_categories_that_train_lacks_are_refused(
    split: str, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _relabelled(paired_dataset, tmp_path / "data", split, 2)
    assert run_main(main, _args(data, tmp_path / "run", EVRNET)) == 2
    err = capsys.readouterr().err
    assert f"the categories star of {split} do not occur in train" in err and "split.by: image" in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_contradicting_keys_are_refused(
    paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        ({"stages": "evrnet", "evrnet_from": "x"}, "remove one of the two keys"),
        ({"evrnet.network": "encoder"}, "give evrnet.encoder"),
        ({"evrnet.network": "eegnett"}, "eegnet"),
    ):
        assert run_main(main, _args(paired_dataset, tmp_path / "run", more)) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_the_feature_learns_the_image_and_the_package_stays_the_same(
    paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = {"evrnet.image_weight": 1, "evrnet.image_components": 4}
    for name, more in (("plain", {}), ("image", image)):
        assert run_main(main, [*_args(paired_dataset, tmp_path / name, EVRNET, more), "--stages", "evrnet"]) == 0
    errors = _curve(tmp_path / "image", "train/image_error")
    assert np.mean(errors[-5:]) < 0.9 * np.mean(errors[:5])
    assert len(_curve(tmp_path / "image", "val/image_error")) == 3 and not _curve(tmp_path / "plain", "val/image_error")
    plain, with_image = (
        {key: value.shape for key, value in load_file(tmp_path / name / "evrnet/package/model.safetensors").items()}
        for name in ("plain", "image")
    )
    assert plain == with_image
    args = _args(paired_dataset, tmp_path / "refused", EVRNET, image, {"evrnet.average": 2})
    capsys.readouterr()
    assert run_main(main, args) == 2
    assert "evrnet.image_weight 1.0 and evrnet.average 2 cannot be used together" in capsys.readouterr().err
    for value in ("-1", ".nan", ".inf"):
        assert run_main(main, _args(paired_dataset, tmp_path / "refused", EVRNET, {"evrnet.image_weight": value})) == 2
        assert "image_weight" in capsys.readouterr().err
    frozen = {"evrnet.network": "encoder", "evrnet.encoder": "nowhere", "evrnet.image_weight": 1}
    assert run_main(main, _args(paired_dataset, tmp_path / "refused", frozen)) == 2
    assert "a frozen encoder does not change" in capsys.readouterr().err
