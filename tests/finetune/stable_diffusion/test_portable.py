"""Tests of the package of a fine-tuned Stable Diffusion as a diffusers pipeline that loads without this project."""

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
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from data_sharding.common.errors import RequestError
from data_sharding.dataset.samples import pad_channels
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.diffusion import Sampling
from finetune.generators import load_generator
from finetune.stable_diffusion.conditioner import Conditioner, ConditionerConfig
from finetune.stable_diffusion.miniature import make_tokenizer
from finetune.stable_diffusion.model import EEGDiffusion, StableDiffusionGenerator, open_time_path, save_model
from finetune.stable_diffusion.portable.pipeline import sample_images
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
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

eeg, folders = np.load(sys.argv[1]), sys.argv[2:]
for folder in folders:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    own = pipeline(eeg, seeds=[5, 6, 7], sampler="ddim", num_inference_steps=3, output_type="np").images
    picture = pipeline(eeg[:1], num_inference_steps=2).images[0]
    assert picture.size == (16, 16) and picture.mode == "RGB"
    for wrong, text in (
        (dict(seeds=[1]), "one seed"), (dict(eeg=eeg[..., :32]), "reads trials of 64 samples"),
        (dict(sampler="heun"), "'heun' is unknown"), (dict(num_inference_steps=-3), "must be at least 1"),
    ):
        try:
            pipeline(**{{"eeg": eeg, **wrong}})
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(wrong)
    # The stock pipeline works before and after the U-Net was used with EEG, and gives the same images.
    prompt = dict(prompt="a bar", num_inference_steps=2, output_type="np")
    seed = lambda: torch.Generator().manual_seed(0)
    inside = pipeline.pipeline(**prompt, generator=seed()).images
    stock = StableDiffusionPipeline.from_pretrained(folder + "/pipeline")(**prompt, generator=seed()).images
    assert (inside == stock).all()
    half = pipeline.to(torch.bfloat16)(eeg, seeds=[5, 6, 7], sampler="ddim", num_inference_steps=3, output_type="np")
    np.savez(folder + ".npz", own=own, half=half.images)
assert not [name for name in sys.modules if name.split(".")[0] in {OWN}]
"""
CASES: dict[str, dict[str, Any]] = {
    "time path": {"time_path": True, "tokenizer": "temporal", "drop": 0.1, "spec": {}},
    "no time path, montage, resampler": {
        "time_path": False,
        "tokenizer": "montage",
        "projector": "resampler",
        "drop": 0.0,
        "spec": {"scaling": "constant", "scale_uv": 7.0, "clip": 2.0},
    },
}
EEG = np.random.default_rng(0).normal(0, 20, (3, 6, 64)).astype(np.float32)


def make_base() -> StableDiffusionPipeline:
    """Make a tiny Stable Diffusion with random weights, whose images have 16 x 16 pixels."""
    tokenizer = make_tokenizer(["a bar"])
    blocks: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    coders: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        **blocks,
    )
    vae: Any = AutoencoderKL(**coders, **blocks)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=PNDMScheduler(
            skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        feature_extractor=None,  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        requires_safety_checker=False,
    )


def make_package(folder: Path, case: dict[str, Any]) -> Path:
    """Write the package of a tiny model with random weights."""
    torch.manual_seed(0)
    base = make_base()
    spec = PreprocessSpec(sfreq=128.0, lowpass=45.0, window=64, stride=64, **case["spec"])
    shape = EncoderConfig(samples=64, dim=16, depth=1, heads=2, mlp_ratio=2.0, tokenizer=case["tokenizer"])
    encoder = EEGEncoder(shape, spec, n_chans=6)
    if case["tokenizer"] == "montage":
        places = torch.randn(6, 3)
        encoder.positions_C3 = 0.09 * places / places.norm(dim=1, keepdim=True)
    sizes = ConditionerConfig(
        tokens=encoder.n_tokens,
        dim=encoder.dim,
        length=base.tokenizer.model_max_length,
        width=16,
        projector=case.get("projector", "conv"),
        time_dim=open_time_path(base.unet) if case["time_path"] else 0,
    )
    conditioner = Conditioner(sizes)
    for parameter in conditioner.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model = EEGDiffusion(encoder, conditioner, base.unet, DDPMScheduler.from_config(base.scheduler.config)).eval()
    card = {"license": "cc-by-4.0", "data": {"a|b": 1}, "settings": {"drop": case["drop"]}, "results": {"loss": 0.5}}
    save_model(folder, model, base, {"drop": case["drop"]}, card)
    assert base.unet.config.class_embed_type == ("identity" if case["time_path"] else None)
    return folder


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
    assert isinstance(generator, StableDiffusionGenerator)
    ours = generator.generate(torch.from_numpy(pad_channels(EEG)), seeds=[5, 6, 7], sampler="ddim", steps=3)
    assert len(np.unique(ours)) > 20 and (ours[0] != ours[1]).any()
    with np.load(f"{folder}.npz") as alone:
        # The package and this project run the same operations, but may add numbers in a different order.
        assert np.abs(alone["own"].astype(int) - ours.astype(int)).max() <= 1
        difference = np.abs(alone["half"].astype(int) - ours.astype(int)).mean()
        assert 0 < difference < 5


def test_the_package_has_no_pickle_and_a_model_card_with_a_licence(packages: Path) -> None:
    folder = packages / "model0"
    weights = [path for path in folder.rglob("*") if path.stat().st_size and path.suffix in (".bin", ".pt", ".ckpt")]
    assert not weights and len([*folder.rglob("*.safetensors")]) == 5
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "diffusers"
    assert "trust_remote_code=True" in card and "| drop | 0.1 |" in card and "| sfreq | 128.0 |" in card
    assert json.loads((folder / "pipeline" / "unet" / "config.json").read_text())["class_embed_type"] is None


def test_our_own_loader_does_not_run_the_code_of_a_package(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "model", CASES["time path"])
    for path in folder.rglob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(1)\n")
    images = load_generator(folder).generate(torch.from_numpy(pad_channels(EEG[:1])), seeds=[0], steps=2)
    assert images.shape == (1, 16, 16, 3) and not (tmp_path / "ran").exists()


def test_plms_gives_the_images_of_the_stock_pipeline_for_the_same_embeddings(tmp_path: Path) -> None:
    folder = make_package(tmp_path / "model", {**CASES["no time path, montage, resampler"], "drop": 0.2})
    generator = load_generator(folder)
    assert isinstance(generator, StableDiffusionGenerator)
    assert generator.choose_sampling(sampler="plms").steps == 250
    own, null = torch.randn(2, *generator.conditioner.null_LW.shape), generator.conditioner.null(2)[0]
    stock = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    noise = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    for steps, scale in ((1, 1.0), (12, 1.0), (12, 3.0)):
        sampling = Sampling(sampler="plms", steps=steps, guidance_scale=scale)
        config = generator.pipeline.scheduler.config
        conditions = ((own, None, None, None), (null, None, None, None))
        made = sample_images(generator.unet, generator.vae, config, *conditions, sampling, [3, 4])
        options: dict[str, Any] = {"prompt_embeds": own, "negative_prompt_embeds": null, "latents": noise}
        theirs = stock(**options, num_inference_steps=steps, guidance_scale=scale, output_type="pt").images
        torch.testing.assert_close((made.clamp(-1, 1) + 1) / 2, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 1), ("euler", 4), ("lcm", 1), ("lcm", 4)])
def test_samplers_of_few_steps_use_no_guidance_and_keep_each_trials_noise(
    sampler: Any, steps: int, tmp_path: Path
) -> None:
    generator = load_generator(make_package(tmp_path / "model", CASES["time path"]))
    chosen = generator.choose_sampling(sampler=sampler)
    assert (chosen.steps, chosen.guidance_scale) == (4, 1.0)
    eeg = torch.from_numpy(pad_channels(EEG))
    together = generator.generate(eeg, seeds=[1, 2, 3], sampler=sampler, steps=steps)
    alone = generator.generate(eeg[1:2], seeds=[2], sampler=sampler, steps=steps)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1
    assert len(np.unique(together)) > 20
    with pytest.raises(RequestError, match="must not be above 50 for the sampler lcm"):
        generator.choose_sampling(sampler="lcm", steps=51)


def test_euler_with_one_step_returns_the_image_that_the_model_predicts_from_pure_noise(tmp_path: Path) -> None:
    generator = load_generator(
        make_package(tmp_path / "model", {**CASES["no time path, montage, resampler"], "drop": 0.0})
    )
    assert isinstance(generator, StableDiffusionGenerator)
    unet, config = generator.unet, generator.pipeline.scheduler.config
    states = torch.randn(1, *generator.conditioner.null_LW.shape)
    sampling = Sampling(sampler="euler", steps=1, guidance_scale=1.0)
    condition = (states, None, None, None)
    made = sample_images(unet, generator.vae, config, condition, condition, sampling, [3])
    alpha = DDPMScheduler.from_config(config).alphas_cumprod[-1]
    sigma = ((1 - alpha) / alpha).sqrt()
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3)) * sigma
    with torch.no_grad():
        noise = unet(x / (sigma**2 + 1).sqrt(), torch.tensor(999), states).sample
        image = generator.vae.decode((x - sigma * noise) / generator.vae.config.scaling_factor).sample
    torch.testing.assert_close(made, image, rtol=1e-3, atol=1e-3)


def test_images_do_not_depend_on_how_many_the_vae_decodes_at_once(tmp_path: Path) -> None:
    generator = load_generator(make_package(tmp_path / "model", CASES["no time path, montage, resampler"]))
    assert isinstance(generator, StableDiffusionGenerator)
    states, config = generator.conditioner.null(3), generator.pipeline.scheduler.config
    sampling = Sampling(sampler="ddim", steps=2, guidance_scale=1.0)
    parts = [
        sample_images(
            generator.unet, generator.vae, config, states, states, sampling, [1, 2, 3], decode_pixels=16 * 16 * count
        )
        for count in (0, 2, 3)
    ]
    torch.testing.assert_close(parts[0], parts[2])
    torch.testing.assert_close(parts[1], parts[2])
