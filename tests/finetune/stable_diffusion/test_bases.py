"""Tests of fine-tuning and generation with base models in the published layouts (see `layouts`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.common.errors import run_main
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from finetune.base_models.conditions import embed_nothing, embed_texts, make_sizes
from finetune.base_models.load import find_networks, load_base
from finetune.diffusion import Sampling, make_scheduler
from finetune.generators import load_generator
from finetune.stable_diffusion.check import estimate_bytes
from finetune.stable_diffusion.model import StableDiffusionGenerator, find_cross_attention
from finetune.stable_diffusion.portable.pipeline import choose_sampler, sample_images
from finetune.stable_diffusion.train import StableDiffusionConfig, build, choose_noising, main
from finetune.training.config import TrainingConfig
from pretrain.encoder.encoder import EEGEncoder
from tests.finetune.base_models.layouts import LAYOUTS, Layout, make_pipeline, write_directory, write_single_file

# Load the package in a process that cannot import this project.
PROGRAM = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("data_sharding", "pretrain", "finetune", "launch"):
            raise ImportError(f"the package used {name} of the project")

sys.meta_path.insert(0, Guard())
import numpy as np
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

folder, eeg, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert isinstance(pipeline.pipeline, StableDiffusionXLPipeline)
np.save(out, pipeline(np.load(eeg), seeds=[5, 6], num_inference_steps=1, output_type="np").images)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny base model of each layout."""
    root = tmp_path_factory.mktemp("bases")
    for layout in LAYOUTS:
        write_directory(root / layout, layout, variant="fp16" if layout == "sdxl" else None)
    return root


def train(base: Path, dataset: Path, encoder: Path, output: Path, *more: object) -> int:
    """Fine-tune a base model for two steps."""
    words = ["--dataset", dataset, "--encoder", encoder, "--base", base, "--output", output, "--device", "cpu"]
    words += ["--tracker.kind", "none", "--training.warmup", 1, "--training.batch_size", 4, "--training.steps", 2]
    words += ["--training.lr", 1e-2, "--training.evaluation.every", 2, "--val_trials", 4, *more]
    return run_main(main, [*map(str, words)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_before_training_the_model_without_eeg_equals_the_base_model(
    layout: Layout, folders: Path, paired_dataset: Path, encoder_package: Path
) -> None:
    pipeline = load_base(folders / layout)
    z, time = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    states, pooled = embed_nothing(pipeline)
    added = None if pooled is None else {"text_embeds": pooled.expand(2, -1), "time_ids": make_sizes(64).expand(2, -1)}
    with torch.no_grad():
        base = pipeline.unet(z, time, states.expand(2, -1, -1), added_cond_kwargs=added).sample
        config = StableDiffusionConfig(dataset=str(paired_dataset), encoder="-", base="-", output="-")
        model = build(
            config, pipeline, EEGEncoder.from_pretrained(encoder_package), None, choose_noising(config, pipeline)
        )
        torch.testing.assert_close(model.predict(z, time, model.conditioner.null(2)), base)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_gives_the_images_of_the_stock_pipeline(layout: Layout, folders: Path) -> None:
    pipeline = load_base(folders / layout)
    states, pooled = embed_texts(pipeline, ["a bar", "a ring"])
    sizes = None if pooled is None else make_sizes(64).expand(2, -1)
    condition = (states, None, pooled, sizes)
    null = tuple(None if part is None else torch.zeros_like(part) for part in condition[:3])
    noise = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    config = pipeline.scheduler.config
    for scale in (1.0, 3.0):
        sampling = Sampling(sampler="ddim", steps=3, guidance_scale=scale)
        made = sample_images(pipeline.unet, pipeline.vae, config, condition, (*null, sizes), sampling, [3, 4])
        pipeline.scheduler = make_scheduler("ddim", config, clip_sample=False)
        words: dict[str, Any] = {"prompt_embeds": states, "negative_prompt_embeds": null[0], "latents": noise}
        if pooled is not None:
            words |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": null[2]}
        theirs = pipeline(**words, num_inference_steps=3, guidance_scale=scale, output_type="pt").images
        torch.testing.assert_close((made.clamp(-1, 1) + 1) / 2, theirs, rtol=0, atol=1e-4)


def test_sdxl_turbo_is_fine_tuned_and_generates_in_one_to_four_steps(
    folders: Path, paired_dataset: Path, encoder_package: Path, tmp_path: Path
) -> None:
    assert train(folders / "sdxl_turbo", paired_dataset, encoder_package, tmp_path / "run") == 0
    model = tmp_path / "run" / "model"
    before = find_networks(load_base(folders / "sdxl_turbo"))
    after = find_networks(load_base(model / "pipeline"))
    # Only the cross-attentions of the U-Net have changed.
    changed = {
        f"{part}.{name}"
        for part in before
        for name, value in after[part].state_dict().items()
        if not torch.equal(value, before[part].state_dict()[name])
    }
    assert changed and changed <= {f"unet.{name}" for name in find_cross_attention(after["unet"])}

    # The space that was checked before the training was enough for the checkpoints and the model.
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    encoder = EEGEncoder.from_pretrained(encoder_package)
    needed = estimate_bytes(load_base(folders / "sdxl_turbo"), encoder, "E+A", TrainingConfig(steps=2, ema=0.99))
    assert written < 1.5 * needed < 20 * written

    generator = load_generator(model)
    assert isinstance(generator, StableDiffusionGenerator)
    chosen = generator.choose_sampling()
    assert (chosen.sampler, chosen.steps, chosen.guidance_scale) == ("euler", 4, 1.0)
    assert generator.conditioner.null_P.any() and generator.conditioner.pooled_mapper.weight.any()
    data = EEGDataset(paired_dataset, "test")
    eeg = collate(data, [0, 1]).eeg.float()
    made = {steps: generator.generate(eeg, seeds=[5, 6], steps=steps) for steps in (1, 4)}
    guided = generator.generate(eeg, seeds=[5, 6], steps=4, guidance_scale=2.0)
    assert all(images.shape == (2, 64, 64, 3) and len(np.unique(images)) > 20 for images in made.values())
    assert (made[1] != made[4]).any() and (made[4] != guided).any()
    captioned = generator.generate(eeg, seeds=[5, 6], steps=1, source="class", metas=collate(data, [0, 1]).metas)
    assert (captioned != made[1]).any()

    np.save(tmp_path / "eeg.npy", eeg[:, :6].numpy())
    ours = generator.generate(collate(data, [0, 1]).eeg.float(), seeds=[5, 6], steps=1)
    paths = [str(path) for path in (model, tmp_path / "eeg.npy", tmp_path / "alone.npy")]
    done = subprocess.run([sys.executable, "-I", "-c", PROGRAM, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # The package and this project run the same operations, but may add numbers in a different order.
    assert np.abs(np.load(tmp_path / "alone.npy").astype(int) - ours.astype(int)).max() <= 1
    assert "StableDiffusionXLPipeline" in (model / "README.md").read_text()


def test_wrong_requests_are_named_before_an_image_is_encoded(
    folders: Path,
    paired_dataset: Path,
    encoder_package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = shutil.copytree(paired_dataset, tmp_path / "dataset")
    names = {path.relative_to(dataset) for path in dataset.rglob("*")}

    def change(part: str, **values: object) -> Path:
        folder = shutil.copytree(folders / "sd15", tmp_path / f"base{len(list(tmp_path.iterdir()))}")
        path = folder / part
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    scheduler = "scheduler/scheduler_config.json"
    for base, more, message in (
        (tmp_path, (), "not a diffusers pipeline"),
        (folders / "sd15", ("--order", "joint", "--target.model", folders), "the file config.json is missing"),
        (folders / "sd15", ("--num_processes", 3), "must be a multiple of num_processes"),
        (folders / "sd15", ("--training.micro_batch_size", 3), "must divide 4"),
        (folders / "sd15", ("--encoder", folders), "encoder"),
        (folders / "sd15", ("--prediction", "epsilon", "--zero_snr", "true"), "zero_snr needs"),
        (folders / "sd15", ("--training.checkpoint.keep", 10**12), "GB of free space"),
        (change(scheduler, prediction_type="flow"), (), "'flow' is not one of"),
        (change("unet/config.json", sample_size=4096), (), "sample_size"),
        (change("unet/config.json", class_embed_type="timestep"), (), "unet"),
    ):
        assert train(base, dataset, encoder_package, tmp_path / "run", *more) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error, error
    assert {path.relative_to(dataset) for path in dataset.rglob("*")} == names


def test_a_single_file_of_sd21_is_fine_tuned_with_velocity_prediction(
    folders: Path, paired_dataset: Path, encoder_package: Path, tmp_path: Path
) -> None:
    write_single_file(tmp_path / "sd21.safetensors", make_pipeline("sd21"))
    more = ("--base_config", folders / "sd21", "--time_path", "false", "--tune", "E")
    assert train(tmp_path / "sd21.safetensors", paired_dataset, encoder_package, tmp_path / "run", *more) == 0
    model = tmp_path / "run" / "model"
    scheduler = json.loads((model / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    generator = load_generator(model)
    assert generator.choose_sampling().sampler == "dpmsolver++"
    images = generator.generate(collate(EEGDataset(paired_dataset, "test"), [0]).eeg.float(), seeds=[0], steps=2)
    assert images.shape == (1, 64, 64, 3)


def test_the_default_sampler_fits_the_base_model(folders: Path) -> None:
    chosen = {layout: choose_sampler(load_base(folders / layout).scheduler) for layout in LAYOUTS}
    assert chosen == {"sd15": "dpmsolver++", "sd21": "dpmsolver++", "sdxl": "dpmsolver++", "sdxl_turbo": "euler"}


def test_an_autoencoder_that_overflows_in_fp16_decodes_in_fp32(folders: Path) -> None:
    pipeline = load_base(folders / "sdxl")
    vae = pipeline.vae
    with torch.no_grad():
        # Make numbers that are too large for fp16, as the autoencoder of SDXL has. The norm before the last layer
        # makes them small again.
        vae.decoder.conv_in.weight.mul_(1e6).clamp_(-6e4, 6e4)
    states, pooled = embed_texts(pipeline, ["a bar"])
    condition = (states, None, pooled, make_sizes(64)[None])
    sampling = Sampling(sampler="euler", steps=1, guidance_scale=1.0)

    def generate() -> torch.Tensor:
        return sample_images(pipeline.unet, vae, pipeline.scheduler.config, condition, condition, sampling, [0])

    expected = generate()
    vae.to(torch.float16)
    torch.testing.assert_close(generate(), expected, rtol=0, atol=0.02)
    assert vae.dtype == torch.float16
    vae.register_to_config(force_upcast=False)
    assert not torch.isfinite(generate()).all()
