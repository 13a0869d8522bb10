"""Tests of low-rank adapters of the cross-attentions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import run_main
from finetune.base_models.load import load_base
from finetune.generators import load_generator
from finetune.stable_diffusion.lora import LoRAConfig, add_adapters, find_adapters
from finetune.stable_diffusion.model import find_cross_attention
from finetune.stable_diffusion.train import StableDiffusionConfig, main
from finetune.training.parameters import trainables


def test_new_adapters_change_nothing_and_are_on_the_cross_attentions_only(miniature: Path) -> None:
    unet = load_base(miniature / "stable-diffusion").unet
    z, time = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    states = torch.randn(2, 77, int(unet.config.cross_attention_dim))
    with torch.no_grad():
        before = unet(z, time, states).sample
        unet.requires_grad_(False)
        add_adapters(unet, LoRAConfig(rank=2))
        torch.testing.assert_close(unet(z, time, states).sample, before)
    # The miniature has four transformer blocks, whose cross-attention has four linear layers with two matrices each.
    assert len(find_adapters(unet)) == 4 * 4 * 2
    assert all(".attn2." in name for name in find_adapters(unet))
    assert trainables(unet).keys() == find_adapters(unet).keys()


def test_only_the_adapters_train_and_the_merged_model_equals_base_and_adapters(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, fresh_accelerate: None
) -> None:
    base, run = miniature / "stable-diffusion", tmp_path / "run"
    args = ["--dataset", paired_dataset, "--encoder", encoder_package, "--base", base, "--output", run]
    args += ["--tracker.kind", "none", "--training.steps", 3, "--training.batch_size", 8, "--training.warmup", 1]
    args += ["--training.lr", 1e-2, "--lora.rank", 2, "--lora.alpha", 4, "--device", "cpu"]
    args += ["--training.precision", "bf16", "--compute.frozen_bf16", "true", "--compute.checkpointing", "true"]
    assert run_main(main, [str(arg) for arg in args]) == 0

    model = run / "model"
    before = load_base(base).unet.state_dict()
    tuned = load_base(model / "pipeline").unet
    after = tuned.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in find_cross_attention(tuned) if ".attn2." in name and not name.endswith("bias")}
    assert changed == matrices
    adapter = load_file(model / "lora" / "pytorch_lora_weights.safetensors")
    assert len(adapter) == 2 * len(matrices)

    # The stock pipeline of diffusers can add the adapters to the base model.
    stock = load_base(base)
    stock.load_lora_weights(str(model / "lora"))
    z, time = torch.randn(1, 4, 8, 8), torch.tensor([500])
    states = torch.randn(1, 77, int(tuned.config.cross_attention_dim))
    with torch.no_grad():
        expected = tuned(z, time, states).sample
        torch.testing.assert_close(stock.unet(z, time, states).sample, expected, rtol=1e-3, atol=1e-4)
    images = load_generator(run).generate(torch.zeros(1, 128, 128), seeds=[1], steps=2, guidance_scale=1.0)
    assert images.shape == (1, 32, 32, 3)


def test_adapters_need_the_cross_attentions() -> None:
    with pytest.raises(ValueError, match="tune"):
        StableDiffusionConfig(dataset="", encoder="", base="", output="", tune="E", lora=LoRAConfig(rank=4))
    with pytest.raises(ValueError, match=r"lora\.rank"):
        LoRAConfig(rank=-1)
