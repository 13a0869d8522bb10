"""Tests of the frozen image generators: equality with the stock pipelines of diffusers, and wrong files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableUnCLIPImg2ImgPipeline
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_sharding.common.errors import RequestError
from finetune.base_models.load import load_base
from finetune.diffusion import (
    FEW_STEP,
    SamplerName,
    Sampling,
    count_steps,
    draw_noise,
    make_generators,
    make_scheduler,
    sample,
)
from finetune.frozen_decoder.config import DecoderConfig
from finetune.frozen_decoder.decoders import load_decoder
from finetune.images import to_pixels
from tests.finetune.base_models.layouts import Layout, make_pipeline, write_directory
from tests.finetune.frozen_decoder.layouts import WIDTH, write_adapter, write_unclip

SEEDS = [3, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tiny base models, IP-Adapters and a Stable unCLIP."""
    root = tmp_path_factory.mktemp("decoders")
    for layout in ("sd15", "sdxl_turbo"):
        write_directory(root / layout, layout)
        write_adapter(root / f"{layout}.safetensors", make_pipeline(layout).unet)
    write_unclip(root / "unclip")
    return root


def make_embeddings() -> torch.Tensor:
    return torch.randn(len(SEEDS), WIDTH, generator=torch.Generator().manual_seed(0)) * 3


def ip_adapter(folder: Path, layout: Layout, **options: Any) -> DecoderConfig:
    base, adapter = str(folder / layout), str(folder / f"{layout}.safetensors")
    return DecoderConfig(kind="ip_adapter", base=base, adapter=adapter, **options)


@pytest.mark.parametrize("layout", ["sd15", "sdxl_turbo"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_ip_adapter_generates_as_the_stock_pipeline(layout: Layout, guidance_scale: float, folder: Path) -> None:
    decoder = load_decoder(ip_adapter(folder, layout, scale=0.7, prompt="a ring"))
    assert decoder.width == WIDTH and decoder.image_size == 64
    words: dict[str, Any] = {"safety_checker": None, "feature_extractor": None} if layout == "sd15" else {}
    stock = DiffusionPipeline.from_pretrained(folder / layout, **words)
    stock.register_modules(feature_extractor=CLIPImageProcessorPil())
    stock.load_ip_adapter(folder, subfolder="", weight_name=f"{layout}.safetensors", image_encoder_folder=None)
    stock.set_ip_adapter_scale(0.7)
    stock.scheduler = make_scheduler("ddim", stock.scheduler.config, clip_sample=False)
    embeds, generators = make_embeddings(), make_generators(SEEDS)
    noise = draw_noise(decoder.latent_shape, generators, "cpu")
    # The stock pipeline repeats embeddings for all images of a batch, so it generates one image at a time.
    expected = []
    for number in range(len(SEEDS)):
        own = embeds[number : number + 1]
        both = torch.cat([torch.zeros_like(own), own]) if guidance_scale > 1 else own
        out = stock(
            "a ring",
            ip_adapter_image_embeds=[both[:, None]],
            latents=noise[number : number + 1],
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            output_type="np",
        )
        expected.append(out.images[0])
    sampling = Sampling(sampler="ddim", steps=2, guidance_scale=guidance_scale)
    condition = decoder.embed(embeds, torch.zeros_like(embeds))
    found = to_pixels(decoder.sample(condition, noise, sampling, generators))
    assert np.abs(found / 255 - np.stack(expected)).max() < 0.004
    # The embedding and the text matter.
    for other in (decoder.embed(-embeds, embeds), decoder.embed_captions(["a bar"] * 2), decoder.embed_nothing(2)):
        assert (to_pixels(decoder.sample(other, noise, sampling, generators)) != found).any()


@pytest.mark.parametrize("guidance_scale", [1.0, 10.0])
def test_unclip_generates_as_the_stock_pipeline(guidance_scale: float, folder: Path) -> None:
    decoder = load_decoder(DecoderConfig(kind="unclip", base=str(folder / "unclip"), noise_level=300))
    assert decoder.width == WIDTH
    stock = StableUnCLIPImg2ImgPipeline.from_pretrained(
        folder / "unclip", feature_extractor=CLIPImageProcessorPil.from_pretrained(folder / "unclip/feature_extractor")
    )
    stock.scheduler = make_scheduler("ddim", stock.scheduler.config, clip_sample=False)
    embeds, generators = make_embeddings(), make_generators(SEEDS)
    noise = draw_noise(decoder.latent_shape, generators, "cpu")
    expected = stock(
        prompt=[""] * len(SEEDS),
        image_embeds=embeds,
        noise_level=300,
        generator=torch.Generator().manual_seed(9),
        latents=noise,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    drawn = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(9))
    sampling = Sampling(sampler="ddim", steps=2, guidance_scale=guidance_scale)
    found = to_pixels(decoder.sample(decoder.embed(embeds, drawn), noise, sampling, generators))
    assert np.abs(found / 255 - expected).max() < 0.004


@pytest.mark.parametrize("sampler", [name for name in get_args(SamplerName) if name not in ("lcm", "ddpm")])
def test_a_start_with_a_strength_is_that_of_the_stock_pipeline(sampler: SamplerName, folder: Path) -> None:
    pipeline = load_base(folder / "sd15")
    config = pipeline.scheduler.config
    stock = StableDiffusionImg2ImgPipeline(**pipeline.components)
    stock.scheduler = make_scheduler(sampler, config, clip_sample=False)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = stock(
        "a bar",
        image=start,
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images
    states = stock.encode_prompt("a bar", "cpu", 1, False)[0]
    found = sample(
        lambda x, time, condition: pipeline.unet(x, time, condition[0]).sample,
        make_scheduler(sampler, config, clip_sample=False),
        noise,
        (states,),
        None,
        steps=5,
        guidance_scale=1.0,
        generators=make_generators([0]),
        start=start,
        strength=0.6,
    )
    torch.testing.assert_close(found, expected)
    assert count_steps(5, 0.6) == 3 and count_steps(1, 0.9) == 0 and count_steps(4, 1.0) == 4


def test_defaults_of_the_sampling(folder: Path) -> None:
    decoder = load_decoder(ip_adapter(folder, "sd15"))
    assert decoder.choose_sampling(sampler=None, steps=None, guidance_scale=None) == Sampling(
        sampler="dpmsolver++", steps=25, guidance_scale=5.0
    )
    for sampler in FEW_STEP:
        assert decoder.choose_sampling(sampler=sampler, steps=2, guidance_scale=None).guidance_scale == 1.0  # type: ignore[arg-type]
    decoder = load_decoder(ip_adapter(folder, "sdxl_turbo"))
    assert decoder.choose_sampling(sampler=None, steps=None, guidance_scale=None) == Sampling(
        sampler="euler", steps=4, guidance_scale=1.0
    )
    decoder = load_decoder(ip_adapter(folder, "sdxl_turbo", steps=1, guidance_scale=1.5))
    assert decoder.choose_sampling(sampler=None, steps=None, guidance_scale=None) == Sampling(
        sampler="euler", steps=1, guidance_scale=1.5
    )
    with pytest.raises(ValueError, match="steps is 5000"):
        decoder.choose_sampling(sampler=None, steps=5000, guidance_scale=None)


def test_wrong_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "sd15.safetensors")
    plus = {name.replace("image_proj.proj", "image_proj.proj_in"): value for name, value in weights.items()}
    cases: list[tuple[dict[str, torch.Tensor] | None, str, str]] = [
        (plus, "plus.safetensors", "the kinds Plus, Full and FaceID"),
        ({"a": torch.zeros(1)}, "other.safetensors", "not the weights of a plain IP-Adapter"),
        ({n: v for n, v in weights.items() if "ip_adapter.3.to_k" not in n}, "less.safetensors", "another base model"),
        ({**weights, "image_proj.proj.weight": torch.zeros(3, WIDTH)}, "small.safetensors", "another base model"),
        (None, "missing.safetensors", "no such file"),
        (None, "adapter.bin", "can hold code"),
    ]
    for values, name, message in cases:
        if values is not None:
            save_file(values, tmp_path / name)
        with pytest.raises(RequestError, match=message):
            load_decoder(DecoderConfig(base=str(folder / "sd15"), adapter=str(tmp_path / name)))
    with pytest.raises(RequestError, match="is for another base model"):
        load_decoder(DecoderConfig(base=str(folder / "sdxl_turbo"), adapter=str(folder / "sd15.safetensors")))


def test_wrong_unclip_models_are_refused(folder: Path, tmp_path: Path) -> None:
    def load(path: Path, **options: Any) -> None:
        load_decoder(DecoderConfig(kind="unclip", base=str(path), **options))

    with pytest.raises(RequestError, match="not a StableUnCLIPImg2ImgPipeline"):
        load(folder / "sd15")
    with pytest.raises(RequestError, match="at most 999"):
        load(folder / "unclip", noise_level=1000)
    copy = shutil.copytree(folder / "unclip", tmp_path / "copy")
    path = copy / "image_normalizer" / "diffusion_pytorch_model.safetensors"
    for values in ({"mean": torch.zeros(1, WIDTH)}, {"mean": torch.zeros(1, 3), "std": torch.ones(1, 3)}):
        save_file(values, path)
        with pytest.raises(RequestError, match="mean and the standard deviation"):
            load(copy)
    shutil.copy(folder / "unclip" / "image_normalizer" / path.name, path)
    index = json.loads((copy / "model_index.json").read_text())
    index["image_noising_scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="not a DDPMScheduler"):
        load(copy)
