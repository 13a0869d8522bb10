"""Tests of loading base models in all published layouts, from directories, the hub's cache and single files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_sharding.common.errors import RequestError
from finetune.base_models.conditions import embed_nothing, embed_texts
from finetune.base_models.load import find_networks, load_base
from tests.finetune.base_models.layouts import (
    LAYOUTS,
    Layout,
    make_pipeline,
    write_directory,
    write_hub,
    write_single_file,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny base model of each layout."""
    root = tmp_path_factory.mktemp("bases")
    for layout in LAYOUTS:
        write_directory(root / layout, layout)
    return root


def same_weights(one: Any, two: Any, rtol: float = 0) -> bool:
    """Return True if all networks of two pipelines have equal weights, up to a relative difference."""
    first, second = find_networks(one), find_networks(two)
    assert first.keys() == second.keys()
    for name in first:
        a, b = first[name].state_dict(), second[name].state_dict()
        if a.keys() != b.keys() or not all(torch.allclose(a[k], b[k], rtol=rtol, atol=rtol) for k in a):
            return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_loaded_and_generates_as_the_stock_pipeline(layout: Layout, folders: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = load_base(folders / layout)
    networks = find_networks(pipeline)
    assert all(p.dtype == torch.float32 and not p.requires_grad for n in networks.values() for p in n.parameters())
    assert same_weights(pipeline, make_pipeline(layout))
    expected = "v_prediction" if layout == "sd21" else "epsilon"
    assert pipeline.scheduler.config.prediction_type == expected
    words: dict[str, Any] = {"safety_checker": None, "feature_extractor": None} if layout == "sd15" else {}
    stock = DiffusionPipeline.from_pretrained(folders / layout, **words)
    drawn = [
        made(
            "a bar",
            num_inference_steps=2,
            guidance_scale=1.0,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )
        for made in (pipeline, stock)
    ]
    assert (drawn[0].images == drawn[1].images).all() and drawn[0].images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_are_encoded_as_by_the_stock_pipeline(layout: Layout, folders: Path) -> None:
    pipeline = load_base(folders / layout)
    states, pooled = embed_texts(pipeline, ["a bar", "a ring"])
    theirs = pipeline.encode_prompt(
        ["a bar", "a ring"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    torch.testing.assert_close(states, theirs[0])
    null_states, null_pooled = embed_nothing(pipeline)
    if pooled is None:
        assert layout.startswith("sd1") or layout == "sd21"
        torch.testing.assert_close(null_states[0], embed_texts(pipeline, [""])[0][0])
        assert null_pooled is None
    else:
        assert pooled.shape == (2, 24) and states.shape == (2, 77, 40)
        torch.testing.assert_close(pooled, theirs[2])
        # Stable Diffusion XL was trained with zeros in place of an empty text.
        torch.testing.assert_close(null_states[0], theirs[1][0])
        assert not null_states.any() and null_pooled is not None and not null_pooled.any()


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_directory_with_weights_in_fp16_only_is_converted_to_fp32(layout: Layout, tmp_path: Path) -> None:
    write_directory(tmp_path / "base", layout, variant="fp16")
    assert not [path for path in tmp_path.rglob("*.safetensors") if ".fp16." not in path.name]
    pipeline = load_base(tmp_path / "base")
    assert all(p.dtype == torch.float32 for n in find_networks(pipeline).values() for p in n.parameters())
    assert same_weights(pipeline, make_pipeline(layout), rtol=1e-3)


def test_weights_in_fp32_are_preferred_and_only_they_are_measured(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "sd15", tmp_path / "base")
    fp16 = write_directory(tmp_path / "fp16", "sd15", variant="fp16")
    for path in fp16.rglob("*.safetensors"):
        shutil.copy(path, folder / path.relative_to(fp16))
    assert same_weights(load_base(folder), make_pipeline("sd15"))
    # A network may be as large as the fp32 weights, and not as large as all weight files together.
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "layers_per_block": 6}))
    with pytest.raises(RequestError, match="larger than its weights file"):
        load_base(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_id_is_loaded_from_the_cache_without_network(
    variant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "base", "sdxl_turbo", variant=variant)
    write_hub(tmp_path / "hub", "owner/turbo", tmp_path / "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same_weights(load_base("owner/turbo"), make_pipeline("sdxl_turbo"), rtol=1e-3 if variant else 0)
    with pytest.raises(RequestError, match="owner/other: cannot be loaded"):
        load_base("owner/other")


@pytest.mark.parametrize("layout", ["sd15", "sd21", "sdxl"])
def test_a_single_file_is_loaded_with_the_configs_of_a_pipeline(layout: Layout, folders: Path, tmp_path: Path) -> None:
    write_single_file(tmp_path / "model.safetensors", make_pipeline(layout))
    # The pipeline that gives the configs needs no weights.
    configs = shutil.copytree(folders / layout, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = load_base(tmp_path / "model.safetensors", configs)
    assert same_weights(pipeline, make_pipeline(layout))
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if layout == "sd21" else "epsilon")


def test_wrong_bases_are_refused_with_the_reason(folders: Path, tmp_path: Path) -> None:
    write_single_file(tmp_path / "model.safetensors", make_pipeline("sd15"))
    torch.save({}, tmp_path / "model.ckpt")

    def change(part: str, **values: object) -> Path:
        folder = shutil.copytree(folders / "sdxl", tmp_path / f"{len(list(tmp_path.iterdir()))}")
        path = folder / part
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    half = shutil.copytree(folders / "sd15", tmp_path / "half")
    from safetensors.torch import load_file, save_file

    unet = half / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: v for n, v in load_file(unet).items() if not n.startswith("conv_out")}, unet)
    mixed = shutil.copytree(folders / "sd21", tmp_path / "mixed")
    shutil.rmtree(mixed / "text_encoder")
    shutil.copytree(folders / "sd15" / "text_encoder", mixed / "text_encoder")
    odd = shutil.copytree(folders / "sd15", tmp_path / "odd")
    for path in (odd / "unet").glob("*.safetensors"):
        for variant in ("ema", "pruned"):
            shutil.copy(path, path.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
        path.unlink()
    for base, config, message in (
        (tmp_path / "model.ckpt", None, "can hold code and are not read"),
        (tmp_path / "none.safetensors", None, "no such file"),
        ("models/none.safetensors", None, "no such file"),
        (tmp_path / "model.safetensors", None, "set 'base_config'"),
        (tmp_path / "model.safetensors", folders / "sdxl", "no weights whose names begin with conditioner"),
        (tmp_path / "model.safetensors", folders / "sd21", "larger than its weights|do not fit|cannot be loaded"),
        (folders / "sd15", folders / "sd15", "only for a single file"),
        (change("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"), None, "StableDiffusionXLImg2Img"),
        (change("model_index.json", text_encoder_2=["transformers", "T5Model"]), None, "'text_encoder_2' is no CLIP"),
        (change("unet/config.json", sample_size=10), None, "cannot be halved 2 times"),
        (change("unet/config.json", in_channels=9), None, "inpainting"),
        (change("vae/config.json", shift_factor=0.1), None, "latents are shifted"),
        (half, None, "missing conv_out"),
        (mixed, None, "the parts are from different models"),
        (odd, None, "keep the files of one variant"),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            load_base(base, config)
        assert "\n" not in str(refused.value)
