"""Tests of the package of a DM-RE2I model as a diffusers pipeline that loads without this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler

from data_sharding.dataset.samples import pad_channels
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.dm_re2i.backbones import build_unet
from finetune.dm_re2i.classification.baselines import ConvolutionConfig, EEGNetClassifier
from finetune.dm_re2i.config import EGDDPMStage
from finetune.dm_re2i.evrnet import EVRNet, EVRNetConfig
from finetune.dm_re2i.guide import EEGGuide
from finetune.dm_re2i.model import ClassMeans, DMRE2IGenerator, save_model
from finetune.generators import load_generator
from finetune.portable.standalone import write_standalone
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import EncoderConfig

OWN = ("data_sharding", "pretrain", "finetune", "launch")
# The program cannot import this project, even if it is installed: -I ignores PYTHONPATH and the current folder, and the
# guard refuses the project's packages.
PROGRAM = f"""
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OWN}:
            raise ImportError(f"the package used {{name}} of the project")

sys.meta_path.insert(0, Guard())
import numpy as np
from diffusers import DiffusionPipeline

eeg, folders = np.load(sys.argv[1]), sys.argv[2:]
for folder in folders:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = {{}}
    for sampler, steps in (("ddim", 3), ("ddpm", 12)):
        options = {{"sampler": sampler, "num_inference_steps": steps, "output_type": "np"}}
        images[sampler] = pipeline(eeg, seeds=[5, 6, 7], **options).images
    picture = pipeline(eeg[:1], num_inference_steps=2).images[0]
    assert picture.size == (8, 8) and picture.mode == "RGB"
    for wrong, text in (
        (dict(seeds=[1]), "give one seed for each of the 3 trials"),
        (dict(num_inference_steps=-3), "must be at least 1"),
    ):
        try:
            pipeline(eeg, **wrong)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(wrong)
    np.savez(folder + ".npz", **images)
assert not [name for name in sys.modules if name.split(".")[0] in {OWN}]
"""
CASES: dict[str, dict[str, Any]] = {
    "the paper's": {"stage": {"drop": 0.0, "sampler": "ddpm"}, "spec": {}},
    "logits, unet2d, constant scaling": {
        "stage": {"guide": "logits", "backbone": "unet2d", "patch": 2, "prediction": "v_prediction"},
        "spec": {"scaling": "constant", "scale_uv": 7.0, "clip": 2.0},
    },
    "EEGNet": {"stage": {"scale_shift": True, "join_first": True, "heads": 2}, "spec": {}, "network": "eegnet"},
    "encoder": {"stage": {"guide": "encoder", "encoder": "x"}, "spec": {}, "tokenizer": "temporal"},
    "montage encoder": {"stage": {"guide": "encoder", "encoder": "x"}, "spec": {}, "tokenizer": "montage"},
}


def make_package(folder: Path, case: dict[str, Any]) -> Path:
    """Write the package of a tiny model with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 8, "base_channels": 8, "multipliers": (1, 2), "head_dim": 4}
    stage = EGDDPMStage(**{**sizes, "noise_steps": 40, **case["stage"]})
    spec = PreprocessSpec(sfreq=128.0, lowpass=45.0, window=64, stride=64, **case["spec"])
    network: Any
    if "tokenizer" in case:
        shape = EncoderConfig(samples=64, dim=16, depth=1, heads=2, mlp_ratio=2.0, tokenizer=case["tokenizer"])
        network = EEGEncoder(shape, spec, n_chans=6)
        if case["tokenizer"] == "montage":
            places = torch.randn(6, 3)
            network.positions_C3 = 0.09 * places / places.norm(dim=1, keepdim=True)
    elif case.get("network") == "eegnet":
        network = EEGNetClassifier(ConvolutionConfig(n_classes=3, n_channels=6, n_times=64, sfreq=128.0, dropout=0.1))
    else:
        network = EVRNet(EVRNetConfig(n_classes=3, n_channels=16, widths=(4, 4, 8, 8, 8), noise_normalisation=True))
        network.whitening_CC.add_(0.01 * torch.randn(16, 16))
    guide = EEGGuide(network, stage.guide)
    unet = build_unet(stage, guide.dim)
    for parameter in (*unet.parameters(), *network.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    unet.set_condition_statistics(torch.randn(guide.dim), torch.rand(guide.dim) + 0.5)
    noising = DDPMScheduler(num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", prediction_type=stage.prediction)
    means = ClassMeans(torch.zeros(3, guide.dim), torch.ones(3, dtype=torch.long))
    card = {"license": "cc-by-4.0", "data": {"a|b": 1}, "settings": {"ddpm": {"drop": 0}}, "results": {"loss": 0.5}}
    save_model(folder, guide, unet, noising, means, spec, {"sampler": stage.sampler, "labels": ["a", "b", "c"]}, card)
    return folder


EEG = np.random.default_rng(0).normal(0, 20, (3, 6, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a package for each case, and run all packages in one process that cannot import this project."""
    root = tmp_path_factory.mktemp("portable")
    folders = [str(make_package(root / f"model{number}", case)) for number, case in enumerate(CASES.values())]
    np.save(root / "eeg.npy", EEG)
    (root / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(root / "eeg.npy"), *folders],
        cwd=root / "elsewhere",
        env={"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", CASES)
def test_the_package_gives_the_same_pixels_without_this_project(name: str, packages: Path) -> None:
    folder = packages / f"model{list(CASES).index(name)}"
    generator = load_generator(folder)
    assert isinstance(generator, DMRE2IGenerator)
    padded = torch.from_numpy(pad_channels(EEG))
    with np.load(f"{folder}.npz") as alone:
        for sampler, steps in (("ddim", 3), ("ddpm", 12)):
            ours = generator.generate(padded, seeds=[5, 6, 7], sampler=sampler, steps=steps)  # type: ignore[arg-type]
            assert len(np.unique(ours)) > 20
            # The package and this project run the same operations, but may add numbers in a different order.
            assert np.abs(alone[sampler].astype(int) - ours.astype(int)).max() <= 1


def test_the_package_has_no_pickle_and_a_model_card_with_a_licence(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "model", CASES["the paper's"])
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".py", ".md", ".safetensors"}
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "diffusers"
    assert "trust_remote_code=True" in card and "| highpass | 5.0 |" in card and "| ddpm.drop | 0 |" in card
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "EEGToImagePipeline"] and index["encoder"] == [None, None]


def test_our_own_loader_does_not_run_the_code_of_a_package(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "model", CASES["the paper's"])
    for path in folder.rglob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(1)\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["os", "system"]}))
    images = load_generator(folder).generate(torch.from_numpy(pad_channels(EEG[:1])), seeds=[0], steps=2)
    assert images.shape == (1, 8, 8, 3) and not (tmp_path / "ran").exists()


def test_code_that_needs_the_project_cannot_be_written_alone() -> None:
    with pytest.raises(ValueError, match=r"encode imports pretrain.encoder.recording|EEGEncoder imports"):
        write_standalone([("pretrain.encoder.encoder", "EEGEncoder")], "x")
