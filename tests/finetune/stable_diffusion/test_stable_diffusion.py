import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.common.errors import run_main
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from finetune.base_models.load import load_base
from finetune.generators import load_generator
from finetune.stable_diffusion.model import EEGDiffusion, find_cross_attention
from finetune.stable_diffusion.train import StableDiffusionConfig, build, choose_noising, main
from finetune.targets.config import TargetConfig
from finetune.targets.load import Targets
from pretrain.encoder.encoder import EEGEncoder

Launch = Callable[..., subprocess.CompletedProcess[str]]
TINY = ["--tracker.kind", "none", "--training.warmup", "2", "--training.log_every", "1", "--training.batch_size", "8"]


def _args(dataset: Path, encoder: Path, miniature: Path, output: Path, *more: object) -> list[str]:
    paths = {"dataset": dataset, "encoder": encoder, "base": miniature / "stable-diffusion", "output": output}
    return [*(str(w) for k, v in paths.items() for w in (f"--{k}", v)), *TINY, *map(str, more)]


def _built(
    dataset: Path, encoder: Path, miniature: Path, targets: Targets | None = None, **keys: object
) -> EEGDiffusion:
    config = StableDiffusionConfig(
        dataset=str(dataset), encoder=str(encoder), base=str(miniature / "stable-diffusion"), output="-", **keys
    )
    pipeline = load_base(config.base)
    return build(config, pipeline, EEGEncoder.from_pretrained(encoder), targets, choose_noising(config, pipeline))


@pytest.mark.parametrize("tune", ["E+A", "E", "A"])
def test_only_the_named_parts_train(tune: str, paired_dataset: Path, encoder_package: Path, miniature: Path) -> None:
    model = _built(paired_dataset, encoder_package, miniature, tune=tune)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    # The miniature's U-Net has one transformer block in its downward path, one in the middle, and two in its upward
    # path. Each attention layer has three matrices without bias, an output matrix with bias, and a norm.
    blocks = {
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    }
    parts = ("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_out.0.weight")
    parts += ("attn2.to_out.0.bias", "norm2.weight", "norm2.bias")
    attention = {f"unet.{block}.transformer_blocks.0.{part}" for block in blocks for part in parts}
    eeg = {name for name, _ in model.named_parameters() if name.startswith(("encoder.", "conditioner."))}
    assert trains == (attention if "A" in tune else set()) | (eeg if "E" in tune else set())


def test_norm2_of_residual_blocks_does_not_train(miniature: Path) -> None:
    unet = load_base(miniature / "stable-diffusion").unet
    assert any("resnets" in name and ".norm2." in name for name, _ in unet.named_parameters())
    assert all(".transformer_blocks." in name for name in find_cross_attention(unet))


def test_without_eeg_the_new_model_equals_the_base_model(
    paired_dataset: Path, encoder_package: Path, miniature: Path
) -> None:
    pipeline = load_base(miniature / "stable-diffusion")
    model = _built(paired_dataset, encoder_package, miniature)
    z, time = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    ids = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        empty = pipeline.text_encoder(ids)[0].expand(2, -1, -1)
        base = pipeline.unet(z, time, empty).sample
        torch.testing.assert_close(model.predict(z, time, model.conditioner.null(2)), base)


def test_joint_training_adds_the_clip_loss(paired_dataset: Path, encoder_package: Path, miniature: Path) -> None:
    b, width = 3, 64
    embeds = [torch.nn.functional.normalize(torch.randn(b, width), dim=-1) for _ in range(2)]
    targets = Targets(embeds=embeds, groups=[torch.arange(b)] * 2, weights=[1.0, 0.5])
    keys = {"order": "joint", "target": TargetConfig(model="c"), "clip_weight": 2.0}
    model = _built(paired_dataset, encoder_package, miniature, targets, **keys)
    x = torch.randn(b, 128, 128)
    out = model(
        x,
        torch.randn(b, 4, 8, 8),
        torch.randn(b, 4, 8, 8),
        torch.randint(1000, (b,)),
        torch.ones(b, dtype=torch.bool),
        targets.choose(np.arange(b))[0],
    )
    image, text = (1 - torch.cosine_similarity(model.head(model.encoder(x)), embed).mean() for embed in embeds)
    torch.testing.assert_close(out["loss"], out["denoise"] + 2 * image + text)
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.unet.conv_in.weight.grad is None


def test_joint_training_runs_with_images_and_texts(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = _args(paired_dataset, encoder_package, miniature, tmp_path / "run", "--training.steps", 2)
    args += ["--order", "joint", "--target.model", str(miniature / "clip"), "--target.text_weight", "0.5"]
    assert run_main(main, [*args, "--device", "cpu"]) == 0
    (line, *_) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["train/loss"] == pytest.approx(line["train/denoise"] + line["train/cosine"], rel=1e-5)
    assert "embeddings of the train captions" in capsys.readouterr().out


def test_fine_tuning_changes_only_what_trains_and_two_processes_agree(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, launch: Launch
) -> None:
    more = ["--training.steps", 4, "--training.evaluation.every", 2, "--training.lr", 1e-2]
    curves = []
    for processes in (1, 2):
        args = _args(paired_dataset, encoder_package, miniature, tmp_path / str(processes), *more)
        done = launch("finetune.stable_diffusion", *args, processes=processes)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["train/loss"] for line in lines if "train/loss" in line])
        assert all(line["val/loss"] != line["val/shuffled"] for line in lines if "val/loss" in line)
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=1e-4)

    model = tmp_path / "1" / "model"
    assert json.loads((model / "dreamscale.json").read_text())["kind"] == "stable_diffusion"
    base, tuned = load_base(miniature / "stable-diffusion").unet, load_base(model / "pipeline").unet
    # The stock pipeline of diffusers can use the U-Net, although the U-Net was trained with a second input.
    assert tuned.config.class_embed_type is None
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])}
    assert changed and changed <= set(find_cross_attention(tuned))
    before, after = EEGEncoder.from_pretrained(encoder_package), EEGEncoder.from_pretrained(model / "encoder")
    assert not torch.equal(before.backbone.norm.weight, after.backbone.norm.weight)

    # The command does not train a finished run again. If the config differs, the command refuses to start.
    args = _args(paired_dataset, encoder_package, miniature, tmp_path / "1", *more)
    stamp = (model / "dreamscale.json").stat().st_mtime_ns
    assert run_main(main, [*args, "--device", "cpu"]) == 0
    assert (model / "dreamscale.json").stat().st_mtime_ns == stamp
    assert run_main(main, [*args, "--device", "cpu", "--seed", "5"]) == 2


def test_a_trials_image_does_not_depend_on_the_batch(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path
) -> None:
    args = _args(paired_dataset, encoder_package, miniature, tmp_path / "run", "--training.steps", 1)
    args += ["--projector", "resampler", "--resampler_depth", "1", "--resampler_heads", "2"]
    assert run_main(main, [*args, "--device", "cpu", "--tune", "E", "--time_path", "false"]) == 0
    generator = load_generator(tmp_path / "run")
    data = EEGDataset(paired_dataset, "test")
    assert generator.kind == "stable_diffusion" and generator.spec == data.spec
    eeg = collate(data, [0, 1, 2]).eeg.float()
    for guidance in (1.0, 2.0):
        together = generator.generate(eeg, steps=3, guidance_scale=guidance, seeds=[5, 6, 7])
        alone = generator.generate(eeg[1:2], steps=3, guidance_scale=guidance, seeds=[6])
        assert together.shape == (3, 32, 32, 3) and together.dtype.name == "uint8"
        assert abs(together[1].astype(int) - alone[0]).max() <= 1
        assert (together[0] != together[1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--base", "."], "not a diffusers pipeline"),
        (["--dataset", "UNPAIRED"], "no paired images"),
        (["--order", "joint"], "target.model"),
        (["--tune", "everything"], "tune"),
        (["--projector", "resampler", "--resampler_heads", "7"], "give a divisor of"),
    ],
)
def test_wrong_requests_end_with_one_line(
    change: list[str],
    message: str,
    paired_dataset: Path,
    unpaired_dataset: Path,
    encoder_package: Path,
    miniature: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = _args(paired_dataset, encoder_package, miniature, tmp_path / "run", "--device", "cpu")
    args += [str(unpaired_dataset) if word == "UNPAIRED" else word for word in change]
    assert run_main(main, args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
