"""Tests that only the chosen parts of Stable Diffusion change in training, also with options for speed and memory."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import run_main
from finetune.base_models.load import load_base
from finetune.stable_diffusion.model import EEGDiffusion, find_cross_attention
from finetune.stable_diffusion.train import StableDiffusionConfig, build, choose_noising, main
from finetune.training.compute import UNetComputeConfig, apply_to_encoder, apply_to_unet, compile_blocks
from finetune.training.config import TrainingConfig
from finetune.training.parameters import make_optimizer, trainables
from pretrain.encoder.encoder import EEGEncoder

STEPS = ["--training.steps", "3", "--training.batch_size", "8", "--training.warmup", "1", "--training.lr", "1e-2"]
OPTIONS = ["--compute.checkpointing", "true", "--compute.channels_last", "true", "--compute.tf32", "true"]


@pytest.fixture
def fine_tune(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, fresh_accelerate: None
) -> Any:
    def run(*more: str, name: str = "run") -> Path:
        paths = {"dataset": paired_dataset, "encoder": encoder_package, "base": miniature / "stable-diffusion"}
        args = [str(word) for key, path in {**paths, "output": tmp_path / name}.items() for word in (f"--{key}", path)]
        assert run_main(main, [*args, "--device", "cpu", "--tracker.kind", "none", *STEPS, *more]) == 0
        return tmp_path / name

    return run


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize(
    "options",
    [
        ["--training.precision", "fp32"],
        ["--training.precision", "bf16"],
        ["--training.precision", "bf16", *OPTIONS, "--compute.frozen_bf16", "true"],
    ],
    ids=["fp32", "bf16", "bf16 and options"],
)
def test_vae_text_encoder_and_the_rest_of_the_unet_do_not_change_a_bit(
    options: list[str], fine_tune: Any, miniature: Path
) -> None:
    run = fine_tune(*options)
    base, tuned = miniature / "stable-diffusion", run / "model" / "pipeline"
    files = sorted(path.relative_to(base) for path in base.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(tuned) for path in tuned.rglob("*.safetensors"))
    trained = set(find_cross_attention(load_base(base).unet))
    changed = set()
    for file in files:
        before, after = load_file(base / file), load_file(tuned / file)
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert after[name].dtype == weight.dtype
            if not torch.equal(after[name], weight):
                changed.add(f"{file.parent}/{name}")
    assert changed == {f"unet/{name}" for name in trained}


def test_frozen_weights_in_bf16_give_the_same_losses(fine_tune: Any) -> None:
    bf16 = ["--training.precision", "bf16", "--training.log_every", "1"]
    plain = losses(fine_tune(*bf16, name="plain"))
    half = losses(fine_tune(*bf16, "--compute.frozen_bf16", "true", name="half"))
    torch.testing.assert_close(half, plain, rtol=1e-4, atol=1e-5)


def test_frozen_weights_in_bf16_need_a_training_in_bf16() -> None:
    with pytest.raises(ValueError, match=r"needs training.precision bf16"):
        StableDiffusionConfig(dataset="", encoder="", base="", output="", compute=UNetComputeConfig(frozen_bf16=True))


def built(encoder: Path, miniature: Path, **keys: Any) -> EEGDiffusion:
    torch.manual_seed(0)
    config = StableDiffusionConfig(
        dataset="-", encoder=str(encoder), base=str(miniature / "stable-diffusion"), output="-", **keys
    )
    pipeline = load_base(config.base)
    return build(config, pipeline, EEGEncoder.from_pretrained(encoder), None, choose_noising(config, pipeline))


@pytest.mark.parametrize("tune", ["E+A", "E", "A"])
def test_the_optimiser_holds_each_trainable_weight_once(tune: Any, encoder_package: Path, miniature: Path) -> None:
    model = built(encoder_package, miniature, tune=tune)
    optimizer = make_optimizer(model, TrainingConfig(), lambda name: 0.5 if name.startswith("unet") else 1.0)
    held = [id(p) for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)]
    assert len(held) == len(set(held))
    assert (
        set(held)
        == {id(p) for p in model.parameters() if p.requires_grad}
        == {id(p) for p in trainables(model).values()}
    )


def test_checkpointing_and_channels_last_do_not_change_the_gradients(encoder_package: Path, miniature: Path) -> None:
    b = 2
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(b, 128, 128, generator=generator),
        "latent": torch.randn(b, 4, 8, 8, generator=generator),
        "noise": torch.randn(b, 4, 8, 8, generator=generator),
        "time": torch.tensor([10, 700]),
        "keep": torch.tensor([True, False]),
    }
    gradients = []
    for config in (UNetComputeConfig(), UNetComputeConfig(checkpointing=True, channels_last=True)):
        model = built(encoder_package, miniature)
        apply_to_encoder(model.encoder, config)
        apply_to_unet(model.unet, config)
        assert model.unet.is_gradient_checkpointing == config.checkpointing
        model.train()
        model(**inputs)["loss"].backward()
        gradients.append({name: p.grad for name, p in trainables(model).items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_compiling_blocks_keeps_the_names_of_the_weights(encoder_package: Path, miniature: Path) -> None:
    model = built(encoder_package, miniature)
    before = list(model.state_dict())
    compile_blocks(model.unet)
    compiled = [name for name, part in model.unet.named_modules() if part._compiled_call_impl is not None]
    assert any(".transformer_blocks." in name for name in compiled) and any(".resnets." in name for name in compiled)
    assert list(model.state_dict()) == before
