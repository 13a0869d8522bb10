"""Tests of ``dreamscale decode``: from EEG to images of a frozen generator, with controls and an evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.common.errors import RequestError, run_main
from data_sharding.common.files import write_json
from finetune.clip_head import ClipHead, ClipHeadConfig
from finetune.evaluation.evaluate import main as evaluate
from finetune.frozen_decoder.embeddings import EmbeddingScale, measure_norm
from finetune.frozen_decoder.train import main
from finetune.generate import main as generate
from finetune.generators import load_generator
from finetune.images import ImageTable, open_paired
from finetune.targets.images import embed_images
from finetune.targets.models import load_clip
from pretrain.encoder.encoder import EEGEncoder
from tests.finetune.base_models.layouts import make_pipeline, write_directory
from tests.finetune.frozen_decoder.layouts import WIDTH, write_adapter, write_clip, write_unclip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny CLIP, an SDXL-Turbo with an IP-Adapter, and a Stable unCLIP."""
    root = tmp_path_factory.mktemp("parts")
    write_clip(root / "clip")
    write_directory(root / "base", "sdxl_turbo")
    write_adapter(root / "adapter.safetensors", make_pipeline("sdxl_turbo").unet)
    write_unclip(root / "unclip")
    return root


def make_words(dataset: Path, folder: Path, output: Path, **changes: Any) -> list[str]:
    """Return the command line; the default is the IP-Adapter of SDXL-Turbo and a ridge regression."""
    values: dict[str, Any] = {
        "dataset": dataset,
        "output": output,
        "clip": folder / "clip",
        "decoder.base": folder / "base",
        "decoder.adapter": folder / "adapter.safetensors",
        "decoder.sampler": "euler",
        "decoder.steps": 2,
        "ridge.bins": 8,
        "low_level.size": 16,
        "device": "cpu",
        "tracker.kind": "none",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [str(word) for name, value in values.items() if value is not None for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def run(paired_dataset: Path, folder: Path) -> Path:
    path = folder / "run"
    words = make_words(paired_dataset, folder, path)
    assert main(words) == 0
    assert main(words) == 0  # A finished run is not fitted again.
    return path


def test_from_eeg_to_images_with_controls_and_evaluation(
    run: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((run / "model" / "dreamscale.json").read_text())
    assert about["val"]["identification"] > 0.6, "the simulated categories are easy to decode"
    out = tmp_path / "out"
    controls = "[shuffle, shuffle_within, noise, no_eeg, class, time, baseline, eyes, nearest]"
    words = [str(run), str(paired_dataset), "-o", str(out), "--controls", controls, "--device", "cpu"]
    assert generate(words) == 0
    own = json.loads((out / "generated.json").read_text())
    assert (own["kind"], own["sampler"], own["steps"], own["guidance_scale"]) == ("frozen_decoder", "euler", 2, 1.0)
    texts = Image.open(out / own["trials"][0]["file"]).text  # type: ignore[attr-defined]
    assert texts["model_digest"] == own["model_digest"]
    images = {}
    for name in ("", "-shuffle", "-noise", "-no_eeg", "-class"):
        part = json.loads((tmp_path / f"out{name}" / "generated.json").read_text())
        assert len(part["trials"]) == len(own["trials"]), name
        files = [tmp_path / f"out{name}" / trial["file"] for trial in part["trials"]]
        images[name] = np.stack([np.asarray(Image.open(file)) for file in files])
    assert images[""].shape[1:] == (64, 64, 3)
    assert all((images[""] != other).any() for name, other in images.items() if name)
    quick = ["--training.steps", "20", "--training.width", "8", "--permutations", "99"]
    assert evaluate([str(out), *quick]) == 0
    assert (out / "report.html").is_file()
    assert "verdict" in capsys.readouterr().out


def test_embeddings_of_the_decoder_have_the_mean_and_the_norm_of_images(
    run: Path, paired_dataset: Path, folder: Path
) -> None:
    scale = EmbeddingScale.load(run / "model")
    table = ImageTable(open_paired(paired_dataset, "train"))
    model, processor = load_clip(folder / "clip")
    raw = np.concatenate(
        [
            model(**processor(images=[image], return_tensors="pt")).image_embeds.detach().numpy()
            for image in table.pixels()
        ]
    )
    assert scale.norm == pytest.approx(float(np.linalg.norm(raw, axis=1).mean()), rel=1e-4)
    assert measure_norm(table, model, processor, "cpu", images=5) == pytest.approx(scale.norm, rel=0.2)
    unit = embed_images(table, folder / "clip").numpy()
    np.testing.assert_allclose(scale.mean_P, unit.mean(axis=0), atol=1e-6)
    # Predictions that are shrunk and moved are restored, up to the norm of each embedding.
    moved = EmbeddingScale.measure(unit, 0.01 * unit + 7, scale.norm)
    restored = moved.restore(0.01 * unit + 7)
    np.testing.assert_allclose(np.linalg.norm(restored, axis=1), scale.norm, rtol=1e-4)
    assert ((restored / scale.norm * unit).sum(axis=1) > 0.9).all()
    assert not np.isnan(moved.restore(moved.predicted_P[None])).any()


def test_the_image_of_a_trial_does_not_depend_on_its_batch(run: Path, paired_dataset: Path) -> None:
    generator = load_generator(run)
    data = open_paired(paired_dataset, "test")
    eeg = torch.stack([torch.as_tensor(np.resize(data[n].eeg, (128, 128))) for n in (0, 1)]).float()
    metas = [data.meta(n) for n in (0, 1)]
    both = generator.generate(eeg, seeds=[1, 2], metas=metas)
    alone = generator.generate(eeg[1:], seeds=[2], metas=metas[1:])
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    with pytest.raises(RequestError, match="no channel E1"):
        generator.generate(eeg[:1], seeds=[1], metas=[{**metas[0], "ch_names": ["Cz"] * 16}])
    generator.use_bf16()
    assert np.abs(generator.generate(eeg[1:], seeds=[2], metas=metas[1:])[0].astype(int) - alone[0]).mean() < 10


def test_unclip_with_a_prior_and_a_low_level_path(
    paired_dataset: Path, folder: Path, tmp_path: Path, encoder_package: Path
) -> None:
    changes = {
        "decoder__kind": "unclip",
        "decoder__base": folder / "unclip",
        "decoder__adapter": None,
        "decoder__sampler": "ddim",
        "low_level__strength": 0.5,
        "prior__enabled": "true",
        "prior__width": 16,
        "prior__depth": 1,
        "prior__training.steps": 4,
        "prior__training.batch_size": 8,
    }
    assert main(make_words(paired_dataset, folder, tmp_path / "run", **changes)) == 0
    about = json.loads((tmp_path / "run" / "model" / "dreamscale.json").read_text())
    assert {"identification", "latent_identification", "prior_loss"} <= about["val"].keys()
    words = [str(tmp_path / "run"), str(paired_dataset), "--device", "cpu", "--limit", "3", "-o"]
    assert generate([*words, str(tmp_path / "out"), "--controls", "[shuffle, no_eeg]"]) == 0
    assert run_main(generate, [*words, str(tmp_path / "one"), "--steps", "1"]) == 2, "half a step cannot be done"
    # Another weight in the frozen base model is noticed.
    other = shutil.copytree(folder / "unclip", tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    values = load_file(weights)
    values["conv_in.weight"][0, 0, 0, 0] += 1
    save_file(values, weights)
    path = tmp_path / "run" / "model" / "dreamscale.json"
    path.write_text(path.read_text().replace(str(folder / "unclip"), str(other)))
    with pytest.raises(RequestError, match="has other weights"):
        load_generator(tmp_path / "run")


def test_coarse_images_come_from_the_autoencoder_alone(paired_dataset: Path, folder: Path, tmp_path: Path) -> None:
    changes = {"decoder__kind": "vae", "decoder__adapter": None, "clip": None, "ridge__fit": "each"}
    assert main(make_words(paired_dataset, folder, tmp_path / "run", **changes)) == 0
    words = [str(tmp_path / "run"), str(paired_dataset), "--device", "cpu", "--limit", "3", "-o"]
    assert run_main(generate, [*words, str(tmp_path / "test")]) == 2, "nobody of the test split has a regression"
    train = [*words, str(tmp_path / "train"), "--split", "train", "--controls", "[no_eeg]"]
    assert generate(train) == 0
    assert Image.open(next((tmp_path / "train" / "images").iterdir())).size == (16, 16)
    found = json.loads((tmp_path / "train-no_eeg" / "generated.json").read_text())
    assert "needs EEG" in found["not_applicable"]


def test_an_alignment_run_predicts_the_embeddings(
    paired_dataset: Path, encoder_package: Path, folder: Path, tmp_path: Path
) -> None:
    run, encoder = tmp_path / "align", EEGEncoder.from_pretrained(encoder_package)
    encoder.save_pretrained(run / "encoder")
    head = ClipHead(ClipHeadConfig(tokens=encoder.n_tokens, dim=encoder.dim, projection=WIDTH))
    head.save_pretrained(run / "align")
    found = {"clip": str(folder / "clip"), "dataset_id": "0" * 64, "eeg": {"tmin": None, "tmax": None}}
    write_json(run / "align" / "result.json", found)
    assert main(make_words(paired_dataset, folder, tmp_path / "run", predictor=run)) == 0
    generator = load_generator(tmp_path / "run")
    assert generator.model.predictor.width == WIDTH  # type: ignore[attr-defined]
    words_of = [str(tmp_path / "run"), str(paired_dataset), "--device", "cpu", "--limit", "2"]
    assert generate([*words_of, "-o", str(tmp_path / "out")]) == 0


def test_wrong_requests_end_with_one_line(
    paired_dataset: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"decoder__adapter": None}, "needs the key 'decoder.adapter'"),
        ({"decoder__kind": "unclip"}, "only for the kind ip_adapter"),
        ({"decoder__kind": "vae", "decoder__adapter": None}, "reads no image embedding"),
        ({"clip": None}, "needs the key 'clip'"),
        ({"low_level__size": 20}, "a multiple of 8"),
        ({"predictor": tmp_path}, "not a complete alignment run"),
        ({"prior__drop": 0}, "needs 'prior.drop' above 0"),
        ({"decoder__base": folder / "clip"}, "not a diffusers pipeline"),
    ]
    for changes, message in cases:
        assert run_main(main, make_words(paired_dataset, folder, tmp_path / "run", **changes)) == 2
        assert message in capsys.readouterr().err


def test_a_clip_of_another_width_is_refused(
    paired_dataset: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "wide.safetensors", make_pipeline("sdxl_turbo").unet, width=WIDTH + 1)
    words = make_words(paired_dataset, folder, tmp_path / "run", decoder__adapter=adapter)
    assert run_main(main, words) == 2
    assert f"have width {WIDTH}, but the decoder" in capsys.readouterr().err
