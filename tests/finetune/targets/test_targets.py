"""Targets of images and texts from frozen models of several kinds, and the losses that compare trials with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from data_sharding.common.errors import RequestError, run_main
from finetune.align import AlignConfig, Aligner, AlignmentLoss
from finetune.align import main as align
from finetune.images import ImageTable, open_paired
from finetune.retrieval.run import main as retrieve
from finetune.targets.config import TargetConfig
from finetune.targets.images import embed_images
from finetune.targets.load import load_targets
from finetune.targets.losses import infonce, soft_contrast
from finetune.targets.models import KINDS, load_image_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _write(kind: str, folder: Path) -> Path:
    """Write a tiny image model with random weights in the layout of transformers."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "image_size": 28, "patch_size": 14}
    classes = {
        "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
        "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
        "vit": (transformers.ViTConfig, transformers.ViTModel),
    }
    if kind == "siglip":
        # The published SigLIP models hold the text encoder, too.
        text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.SiglipConfig(vision_config=sizes, text_config=text)
        transformers.SiglipModel(config).save_pretrained(folder)
    else:
        config_class, model_class = classes[kind]
        model_class(config_class(**sizes)).save_pretrained(folder)
    side = {"height": 28, "width": 28}
    size = {"shortest_edge": 28} if kind.startswith("dinov2") else side
    KINDS[kind].classes()[1](size=size, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny DINOv2."""
    return _write("dinov2", tmp_path_factory.mktemp("models") / "dino")


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit", "siglip"])
def test_every_kind_of_image_model_gives_final_and_hidden_embeddings(
    kind: str, paired_dataset: Path, tmp_path: Path
) -> None:
    folder = _write(kind, tmp_path / kind)
    table = ImageTable(open_paired(paired_dataset, "val"))
    model, processor, found_kind = load_image_model(folder)
    assert found_kind is KINDS[kind]
    values = processor(images=[table.pixels([0])[0]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(pixel_values=values, output_hidden_states=True)
    final = out.last_hidden_state[:, 0] if kind == "vit" else out.pooler_output
    hidden = out.hidden_states[1]
    hidden = hidden.mean(1) if kind == "siglip" else hidden[:, 0]
    for layer, expected in ((None, final), (1, hidden), (-2, hidden)):
        found = embed_images(table, folder, layer=layer)
        torch.testing.assert_close(found[:1], normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match="2 hidden layers"):
        embed_images(table, folder, layer=3)


def test_texts_are_embedded_in_the_space_of_the_images(paired_dataset: Path, miniature: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    table = ImageTable(open_paired(paired_dataset, "val"))
    config = TargetConfig(model=str(miniature / "clip"), image_weight=2.0, text_weight=0.5)
    targets = load_targets(config, table)
    assert targets.weights == [2.0, 0.5] and targets.width == 64
    torch.testing.assert_close(targets.first, embed_images(table, miniature / "clip"))
    clip, tokenizer = CLIPModel.from_pretrained(miniature / "clip"), CLIPTokenizer.from_pretrained(miniature / "clip")
    words = tokenizer(table.captions, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = clip.text_projection(clip.text_model(**words).pooler_output)
    torch.testing.assert_close(targets.embeds[1], normalize(out, dim=-1), rtol=1e-4, atol=1e-5)
    # The images of a category share their caption, so they share their target.
    embeds, groups = targets.choose(table.row_of[:4])
    assert embeds.shape == (4, 2, 64) and groups[:, 0].unique().numel() == 4 and groups[:, 1].unique().numel() == 2
    labels = load_targets(TargetConfig(model=config.model, image_weight=0, text_weight=1, text="labels"), table)
    assert table.label_names[0] in ("circle", "square") and table.captions[0] == f"a {table.label_names[0]}"
    assert not torch.equal(labels.first, targets.embeds[1])


def test_a_model_without_texts_is_refused(paired_dataset: Path, dino: Path, miniature: Path, tmp_path: Path) -> None:
    table = ImageTable(open_paired(paired_dataset, "val"))
    with pytest.raises(RequestError, match="texts are embedded only by a model of type clip"):
        load_targets(TargetConfig(model=str(dino), text_weight=1.0), table)
    for file in (miniature / "clip").iterdir():
        if not file.name.startswith(("tokenizer", "vocab", "merges")):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(RequestError, match="has no tokenizer"):
        load_targets(TargetConfig(model=str(tmp_path), image_weight=0.0, text_weight=1.0), table)
    for keys, message in (
        ({"image_weight": 0.0}, "one of them above 0"),
        ({"text_weight": -1.0}, "at least 0"),
        ({"text_weight": 1.0, "layer": 1}, "cannot be used together"),
    ):
        with pytest.raises(ValueError, match=message):
            TargetConfig(model="m", **keys)


def test_an_alignment_with_a_hidden_layer_is_searched_with_this_layer(
    paired_dataset: Path, encoder_package: Path, dino: Path, tmp_path: Path
) -> None:
    words = {"dataset": paired_dataset, "encoder": encoder_package, "output": tmp_path / "run", "device": "cpu"}
    words |= {"target.model": dino, "target.layer": 1, "loss": "soft", "training.steps": 2, "training.batch_size": 8}
    args = [str(word) for key, value in words.items() for word in (f"--{key}", value)]
    assert run_main(align, [*args, "--tracker.kind", "none", "--training.log_every", "1"]) == 0
    (line, *_) = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["train/soft"] == pytest.approx(line["train/loss"])
    assert run_main(retrieve, [str(tmp_path / "run"), str(paired_dataset), "-o", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert result["target"] == str(dino) and result["layer"] == 1
    assert "hidden layer 1" in (tmp_path / "out" / "retrieval.html").read_text()


def test_the_key_clip_has_a_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(align, ["--dataset", "d", "--encoder", "e", "--output", "o", "--clip", "c"]) == 2
    assert "target.model" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"target\.model"):
        AlignConfig(dataset="d", encoder="e", output="o")


def test_trials_of_one_image_are_not_wrong_pairs() -> None:
    images = normalize(torch.randn(3, 8), dim=-1)
    rows = torch.tensor([0, 1, 1, 2])
    perfect = images[rows]
    alone = infonce(images, images, torch.arange(3), 0.01)
    # Two of the four trials have the same image, so the target of these two trials is a probability of 1/2 for each of
    # the two equal images. With two equal probabilities as the target, the smallest possible loss of a trial is log 2 =
    # 0.693.
    assert infonce(perfect, perfect, rows, 0.01) == pytest.approx(float(alone) + 0.5 * 0.693147, abs=1e-3)
    confused = perfect.roll(1, 0)
    assert infonce(confused, perfect, rows, 0.01) > infonce(perfect, perfect, rows, 0.01)


def test_soft_targets_are_the_formula_and_approach_the_contrastive_loss() -> None:
    torch.manual_seed(0)
    embeds, targets = (normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        p = torch.tensor([torch.exp(targets[i] @ targets[j] / 0.3) for j in range(4)], dtype=torch.float64)
        logits = torch.stack([embeds[i] @ targets[j] / 0.1 for j in range(4)])
        back = torch.stack([embeds[j] @ targets[i] / 0.1 for j in range(4)])
        for values in (logits, back):
            expected -= (p / p.sum() * (values - values.exp().sum().log())).sum() / 8
    torch.testing.assert_close(soft_contrast(embeds, targets, 0.1, 0.3), expected)
    hard = infonce(embeds.float(), targets.float(), torch.arange(4), 0.1)
    torch.testing.assert_close(soft_contrast(embeds.float(), targets.float(), 0.1, 1e-3), hard)


@pytest.mark.parametrize("kind", ["cosine", "infonce", "both", "soft"])
def test_the_loss_is_the_weighted_sum_over_the_targets(kind: Any) -> None:
    nothing: Any = torch.nn.Identity()
    x, target = torch.randn(5, 8), normalize(torch.randn(5, 2, 8), dim=-1)
    group = torch.stack([torch.arange(5), torch.tensor([0, 0, 1, 1, 1])], 1)
    alone = [
        Aligner(nothing, nothing, AlignmentLoss(kind=kind))(x, target[:, k : k + 1], group[:, k : k + 1])["loss"]
        for k in range(2)
    ]
    both = Aligner(nothing, nothing, AlignmentLoss(kind=kind, weights=(2.0, 0.5)))(x, target, group)
    torch.testing.assert_close(both["loss"], 2 * alone[0] + 0.5 * alone[1])
