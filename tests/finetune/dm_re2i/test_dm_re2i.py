from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import run_main
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from data_sharding.dataset.samples import pad_channels
from finetune.diffusion import Sampling
from finetune.dm_re2i.eg_ddpm import EGDDPM
from finetune.dm_re2i.model import ClassMeans, DMRE2IGenerator, compute_features
from finetune.dm_re2i.train import main
from finetune.eeg import group_repeats, read_trials
from finetune.generators import Source, load_generator
from pretrain.encoder.encoder import EEGEncoder

Launch = Callable[..., subprocess.CompletedProcess[str]]
TINY = {
    "tracker.kind": "none",
    "evrnet.channels": 16,
    "evrnet.widths": "[4,8,8,16,16]",
    "evrnet.average": 3,
    "evrnet.whiten": 0.05,
    "evrnet.mixup": 0.1,
    "evrnet.augment.drop_channels": 0.1,
    "evrnet.training.steps": 30,
    "evrnet.training.batch_size": 16,
    "evrnet.training.lr": 0.01,
    "evrnet.training.warmup": 2,
    "evrnet.training.evaluation.every": 10,
    "ddpm.image_size": 16,
    "ddpm.base_channels": 8,
    "ddpm.multipliers": "[1,2]",
    "ddpm.heads": 2,
    "ddpm.head_dim": 4,
    "ddpm.training.steps": 6,
    "ddpm.training.batch_size": 8,
    "ddpm.training.log_every": 1,
    "ddpm.training.ema": 0.9,
}


def _args(dataset: Path, output: Path, **more: object) -> list[str]:
    keys = {"dataset": dataset, "output": output, **TINY, **{k.replace("__", "."): v for k, v in more.items()}}
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def trained(paired_dataset: Path, tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Path:
    """Train both stages of DM-RE2I with the real launcher."""
    output = tmp_path_factory.mktemp("dm-re2i") / "run"
    done = launch("finetune.dm_re2i", *_args(paired_dataset, output))
    assert done.returncode == 0, done.stderr
    assert "EVRNet: val accuracy" in done.stdout and "EG-DDPM: val loss" in done.stdout
    return output


def _eeg(dataset: Path, count: int) -> torch.Tensor:
    return collate(EEGDataset(dataset, "test"), list(range(count))).eeg.float()


def test_both_stages_write_a_complete_model_and_their_records(trained: Path, paired_dataset: Path) -> None:
    about = json.loads((trained / "model" / "dreamscale.json").read_text())
    assert about["kind"] == "eg_ddpm" and about["labels"] == ["circle", "square"]
    assert about["evrnet_val_accuracy"] >= 0.8  # the sign of the evoked response shows the category
    assert json.loads((trained / "status.json").read_text())["state"] == "done"
    assert {"loss", "shuffled"} == set(about["val"])
    for folder, steps in ((trained, 6), (trained / "evrnet", 30)):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == steps and all(np.isfinite(line.get("train/loss", 0)) for line in lines)
        assert (folder / "plots" / "loss.png").stat().st_size > 1000
    assert (trained / "plots" / "samples.png").is_file()
    spec = json.loads((trained / "model" / "preprocess.json").read_text())
    assert spec == EEGDataset(paired_dataset).spec.to_dict()
    unet = EGDDPM.from_pretrained(trained / "model" / "unet")
    assert unet.condition_std.min() > 0 and unet.condition_mean.abs().max() > 0


def test_the_generator_takes_any_batch_and_keeps_each_trials_noise(trained: Path, paired_dataset: Path) -> None:
    generator, eeg = load_generator(trained), _eeg(paired_dataset, 3)
    assert isinstance(generator, DMRE2IGenerator) and generator.spec == EEGDataset(paired_dataset).spec
    images = generator.generate(eeg, steps=3, guidance_scale=2.0, seeds=[1, 2, 3])
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    alone = generator.generate(eeg[1:2], steps=3, guidance_scale=2.0, seeds=[2])
    assert np.abs(alone[0].astype(int) - images[1].astype(int)).max() <= 1
    other = generator.generate(eeg[1:2], steps=3, guidance_scale=2.0, seeds=[9])
    assert np.abs(other.astype(int) - alone.astype(int)).mean() > 5


def test_controls_of_the_generator(trained: Path, paired_dataset: Path, tmp_path: Path) -> None:
    """Check the controls `no_eeg` and `class` (mean feature of the category), and the default sampling settings."""
    generator, eeg = load_generator(trained), _eeg(paired_dataset, 4)
    assert isinstance(generator, DMRE2IGenerator)
    assert generator.choose_sampling() == Sampling(sampler="ddim", steps=25, guidance_scale=2.0)
    seeds, metas = [1, 2, 3, 4], [{"label": label} for label in (0, 1, 1, 0)]

    def images(eeg: torch.Tensor, source: Source) -> np.ndarray:
        return generator.generate(eeg, seeds=seeds, steps=3, source=source, metas=metas)

    for source in ("no_eeg", "class"):
        np.testing.assert_array_equal(images(eeg, source), images(eeg.flip(0), source))
    assert (images(eeg, "no_eeg") != images(eeg, "class")).any() and (images(eeg, "eeg") != images(eeg, "class")).any()
    data = EEGDataset(paired_dataset, "train")
    x = read_trials(data, group_repeats(data, 1), data.spec)
    e_BD, _ = compute_features(generator.guide.network, x)
    labels = torch.tensor([data.meta(number)["label"] for number in range(len(data))])
    means = ClassMeans.load(trained / "model", 16)
    torch.testing.assert_close(means.mean_KD[1], e_BD[labels == 1].mean(0), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="no train trial"):
        generator.generate(eeg[:1], seeds=[1], source="class", metas=[{"label": 2}])
    with pytest.raises(ValueError, match="dpmsolver"):
        generator.generate(eeg, seeds=seeds, sampler="dpmsolver++")
    a = generator.generate(eeg, seeds=seeds, sampler="ddpm", steps=30)
    b = generator.generate(eeg[2:], seeds=seeds[2:], sampler="ddpm", steps=30)
    assert np.abs(a[2:].astype(int) - b.astype(int)).max() <= 1


def test_more_channels_than_the_network_was_made_for_are_refused(
    trained: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = load_generator(trained)
    wide = torch.from_numpy(pad_channels(np.random.default_rng(0).normal(0, 10, (1, 20, 128)))).float()
    with pytest.raises(ValueError, match="takes up to 16 channels, but a trial has 20"):
        generator.generate(wide, steps=2, guidance_scale=1.0, seeds=[0])
    assert run_main(main, _args(paired_dataset, tmp_path / "run", evrnet__channels=8)) == 2
    assert "set evrnet.channels to 16 or more" in capsys.readouterr().err


def _stop_when(path: Path) -> None:
    def wait() -> None:
        while not (path.is_file() and path.stat().st_size):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_a_run_stopped_in_either_stage_resumes_to_the_same_weights(
    paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"evrnet__training__log_every": 1, "evrnet__training__steps": 20, "ddpm__training__steps": 20}
    straight, broken = (_args(paired_dataset, tmp_path / name, **more) for name in ("straight", "broken"))
    assert run_main(main, straight) == 0
    _stop_when(tmp_path / "broken" / "evrnet" / "metrics.jsonl")
    assert run_main(main, broken) == 75
    assert not (tmp_path / "broken" / "model").exists()
    _stop_when(tmp_path / "broken" / "metrics.jsonl")
    assert run_main(main, broken) == 75
    assert json.loads((tmp_path / "broken" / "status.json").read_text())["state"] == "stopped"
    assert run_main(main, broken) == 0
    for name in ("evrnet/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        a, b = (load_file(tmp_path / run / "model" / name) for run in ("straight", "broken"))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    assert run_main(main, broken) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_reads_the_version_of_the_dataset_it_began_with(
    paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], grow: Callable[[Path], None]
) -> None:
    dataset = Path(shutil.copytree(paired_dataset, tmp_path / "dataset"))
    more = {"evrnet__training__log_every": 1, "evrnet__training__steps": 20, "ddpm__training__steps": 20}
    straight, grown = (_args(dataset, tmp_path / name, **more) for name in ("straight", "grown"))
    assert run_main(main, straight) == 0
    # The dataset grows between the two stages. The second stage is stopped and resumed, and reads the old version both
    # times.
    assert run_main(main, [*grown, "--stages", "evrnet"]) == 0
    grow(dataset)
    _stop_when(tmp_path / "grown" / "metrics.jsonl")
    capsys.readouterr()
    assert run_main(main, grown) == 75
    assert run_main(main, grown) == 0
    said = capsys.readouterr().err
    assert said.count(f"dreamscale ddpm: this run began with version 1 of {dataset} and reads this version") == 2
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / run / "model" / name) for run in ("straight", "grown"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-6, rtol=1e-5)
    about = json.loads((tmp_path / "grown" / "model" / "dreamscale.json").read_text())
    assert about["dataset_version"] == 1
    # A finished run no longer needs the old version of the dataset, which compacting the dataset may delete.
    version = dataset / "versions"
    shutil.rmtree(version)
    assert run_main(main, grown) == 0
    assert "nothing to do" in capsys.readouterr().out
    # A new run uses the new version of the dataset.
    assert run_main(main, [*_args(dataset, tmp_path / "new", **more), "--stages", "evrnet"]) == 0
    assert "began with version" not in capsys.readouterr().err


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / name)


def test_two_processes_train_the_guide_as_one_process_does(
    trained: Path, paired_dataset: Path, tmp_path: Path, launch: Launch
) -> None:
    more = {"evrnet_from": trained / "model" / "evrnet", "ddpm__train_guide": True, "ddpm__training__steps": 3}
    losses = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        done = launch("finetune.dm_re2i", *_args(paired_dataset, run, **more), processes=processes)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[processes] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses[1]) == 3
    np.testing.assert_allclose(losses[1], losses[2], rtol=2e-3)
    one, two = (_weights(tmp_path / name, "evrnet/model.safetensors") for name in ("1", "2"))
    before = _weights(trained, "evrnet/model.safetensors")
    assert any(not torch.equal(one[key], before[key]) for key in before)
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=5e-3, rtol=0)


def test_a_frozen_guide_keeps_its_weights_and_a_trained_guide_changes(
    trained: Path, paired_dataset: Path, tmp_path: Path
) -> None:
    name = "evrnet/model.safetensors"
    before, found = _weights(trained, name), {}
    for case, more in {
        "frozen": {},
        "trained": {"ddpm__train_guide": True},
        "logits": {"ddpm__train_guide": True, "ddpm__guide": "logits", "ddpm__drop": 0},
    }.items():
        more = {"evrnet_from": trained / "model" / "evrnet", **more}
        assert run_main(main, _args(paired_dataset, tmp_path / case, device="cpu", **more)) == 0
        found[case] = _weights(tmp_path / case, name)
        assert not (tmp_path / case / "evrnet").exists()
    assert all(torch.equal(before[key], found["frozen"][key]) for key in before)

    def changed(case: str) -> set[str]:
        return {key for key in before if not torch.equal(before[key], found[case][key])}

    weights = {key for key in before if "running" not in key and "batches" not in key and key != "whitening_CC"}
    # A guide that uses EVRNet's feature does not train the last layer (`fc`). No guide changes the running statistics
    # of its own batch norms.
    assert changed("trained") == {key for key in weights if not key.startswith("fc.")}
    assert changed("logits") == weights
    unet = EGDDPM.from_pretrained(tmp_path / "logits" / "model" / "unet")
    assert unet.config.condition_dim == 2 and unet.null is None
    # The generator must use the trained weights of the guide, and the stored mean vectors must come from these weights.
    generator = load_generator(tmp_path / "logits")
    assert isinstance(generator, DMRE2IGenerator) and generator.choose_sampling().guidance_scale == 1.0
    data = EEGDataset(paired_dataset, "train")
    e_BD = generator.guide.compute(read_trials(data, group_repeats(data, 1), data.spec))
    means = ClassMeans.load(tmp_path / "logits" / "model", 2)
    labels = torch.tensor([data.meta(number)["label"] for number in range(len(data))])
    torch.testing.assert_close(means.mean_KD[0], e_BD[labels == 0].mean(0), atol=1e-4, rtol=1e-3)
    assert generator.generate(_eeg(paired_dataset, 2), seeds=[1, 2], steps=2).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="cannot use guidance"):
        generator.generate(_eeg(paired_dataset, 2), seeds=[1, 2], guidance_scale=2.0)
    with pytest.raises(ValueError, match="trained with drop 0"):
        generator.generate(_eeg(paired_dataset, 2), seeds=[1, 2], source="no_eeg")


@pytest.mark.parametrize("train_guide", [False, True])
def test_a_pretrained_encoder_guides_without_evrnet(
    train_guide: bool, paired_dataset: Path, encoder_package: Path, tmp_path: Path
) -> None:
    more = {"ddpm__guide": "encoder", "ddpm__encoder": encoder_package, "ddpm__train_guide": train_guide}
    assert run_main(main, _args(paired_dataset, tmp_path / "run", device="cpu", **more)) == 0
    assert not (tmp_path / "run" / "evrnet").exists() and not (tmp_path / "run" / "model" / "evrnet").exists()
    generator, eeg = load_generator(tmp_path / "run"), _eeg(paired_dataset, 3)
    assert isinstance(generator, DMRE2IGenerator) and generator.guide.kind == "encoder"
    before = EEGEncoder.from_pretrained(encoder_package)
    tokens_BND = before.tokens(before.scale_for_model(eeg))
    x_BCT = generator.guide.scaling(generator.spec).scale_for_model(eeg)
    same = torch.equal(generator.guide.compute(x_BCT), tokens_BND.mean(1).detach())
    assert same != train_guide
    assert generator.generate(eeg, seeds=[1, 2, 3], steps=2).shape == (3, 16, 16, 3)


def test_two_processes_train_the_same_weights_as_one(
    paired_dataset: Path, trained: Path, tmp_path: Path, launch: Launch
) -> None:
    """Compare the weights of the U-Net after training the second stage on one and on two processes.

    Both runs use the same trained EVRNet.
    """
    more = {"evrnet_from": trained / "model" / "evrnet"}
    two = launch("finetune.dm_re2i", *_args(paired_dataset, tmp_path / "two", **more), processes=2)
    assert two.returncode == 0, two.stderr
    name = "model/unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(trained / name), load_file(tmp_path / "two" / name)
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ddpm__image_size": 17}, "ddpm.image_size must be a multiple of 2"),
        ({"evrnet__widths": "[4,8]"}, "widths"),
        ({"ddpm__bass_channels": 8}, "did you mean 'ddpm.base_channels'"),
        ({"num_processes": 2}, "num_processes is 2, but 1 process was started"),
        ({"evrnet_from": "nowhere"}, "nowhere"),
        ({"ddpm__guide": "encoder"}, "give ddpm.encoder for the guide"),
        ({"ddpm__guide": "encoder", "ddpm__encoder": "nowhere"}, "nowhere: no such encoder package"),
        ({"ddpm__backbone": "unet2d"}, "ddpm.heads is a key for ddpm.backbone 'paper'"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    more: dict, message: str, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, _args(paired_dataset, tmp_path / "run", **more)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_without_images_is_refused(
    unpaired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, _args(unpaired_dataset, tmp_path / "run")) == 2
    assert "no paired images" in capsys.readouterr().err


def test_an_incomplete_model_is_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    for name, message in (
        ("evrnet/model.safetensors", "no such file"),
        ("unet/diffusion_pytorch_model.safetensors", "no weights in a"),
        ("scheduler/scheduler_config.json", "no such file"),
        ("preprocess.json", "no such file"),
    ):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(trained / "model", copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=message):
            load_generator(copy)
