"""Tests of ``dreamscale retrieve`` with real datasets: ridge regression, an alignment run, and wrong requests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.common.errors import RequestError, run_main
from finetune.generation.trials import NotApplicableError
from finetune.images import ImageTable, open_paired
from finetune.retrieval import run as retrieval
from finetune.retrieval.run import _check_embeddings, _check_images, _check_output, _embed_with_neighbours, main
from finetune.targets.images import embed_images
from finetune.targets.models import load_image_model
from pretrain.evidence.ridge import STRENGTHS
from pretrain.evidence.rules import NotApplicable


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny DINOv2 with random weights in the layout of transformers."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    path = tmp_path_factory.mktemp("dino") / "dino"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(path)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def test_ridge_finds_images_above_chance_and_shuffled_eeg_does_not(
    paired_dataset: Path, dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["ridge", str(paired_dataset), "-o", str(out), "--target", str(dino), "--resamples", "500"]
    assert main([*words, "--n_way", "[4]"]) == 0
    result = json.loads((out / "retrieval.json").read_text())
    row = result["rows"]["single trials"]
    assert row["scores"]["identification"]["mean"] > row["shuffled"]["identification"]["mean"] + 0.1
    assert row["scores"]["top1[4]"]["chance"] == 0.25 and row["scores"]["top1[4]"]["mean"] > 0.3
    # Each recording of this small dataset has one label, so no score can be evidence of a response.
    assert row["verdict"]["word"] == "confounded" and "only one label" in row["verdict"]["why"][0]
    assert {"baseline", "noise", "no_eeg", "judge"} <= row["verdict"]["not_applicable"].keys()
    assert list(result["penalties"]) == [""] and result["penalties"][""] in STRENGTHS and result["channels"] == 16
    assert 0 <= row["matching"]["accuracy"] <= 1 and row["hubness"]["k"] >= 1
    assert all(not person["in_train"] for person in row["by_person"].values())
    # The dataset records how often the test split was opened, and the report shows this number.
    log = paired_dataset / "openings.jsonl"
    before = len(log.read_text().splitlines())
    assert str(log) in result["openings"] and result["openings"] in (out / "retrieval.html").read_text()
    ranks = json.loads((out / "ranks.json").read_text())["trials"]["single trials"]
    assert len(ranks) == row["trials"] and all(1 <= entry["rank"] <= row["images"] for entry in ranks.values())
    assert "verdict: " in capsys.readouterr().out
    # A second run in the same folder replaces the first result; a folder with other content is kept.
    assert main([*words, "--n_way", "[4]", "--layer", "1", "--design_evidence", "drawn by a random generator"]) == 0
    again = json.loads((out / "retrieval.json").read_text())
    assert again["layer"] == 1 and f"opened {before + 1} times" in again["openings"]
    verdict = again["rows"]["single trials"]["verdict"]
    assert verdict["word"] == "confounded"
    assert any("declared in the config: drawn by a random generator" in sentence for sentence in verdict["why"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("keep")
    assert run_main(main, [*words[:3], str(tmp_path / "mine"), *words[4:]]) == 2


def test_an_alignment_run_is_measured_with_its_own_clip(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.align import main as align

    run = tmp_path / "run"
    words = {"dataset": paired_dataset, "encoder": encoder_package, "target.model": miniature / "clip", "output": run}
    settings = ["--training.steps", "2", "--training.batch_size", "8", "--tracker.kind", "none"]
    assert align([*(str(w) for k, v in words.items() for w in (f"--{k}", v)), *settings]) == 0
    out = tmp_path / "out"
    capsys.readouterr()
    assert main([str(run), str(paired_dataset), "-o", str(out), "--split", "val", "--resamples", "500"]) == 0
    # The images were embedded by the alignment.
    said = capsys.readouterr().out
    assert f"train images ({miniature / 'clip'}): 0 of 64 computed" in said
    assert f"val images ({miniature / 'clip'}): 0 of 16 computed" in said
    result = json.loads((out / "retrieval.json").read_text())
    assert result["target"] == str(miniature / "clip") and len(result["model_digest"]) == 64
    assert result["penalties"] is None and result["channels"] is None
    assert result["openings"] is None, "only openings of the test split are recorded"
    assert main([str(run), str(paired_dataset), "-o", str(out), "--require", "signal", "--split", "val"]) == 1


def test_wrong_requests_end_with_one_line(
    paired_dataset: Path, dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")]
    for words, text in (
        (["ridge", str(paired_dataset), *out], "needs the key 'target'"),
        ([str(tmp_path), str(paired_dataset), *out], "not a complete alignment run"),
        (["ridge", str(paired_dataset), *out, "--target", str(tmp_path)], "not a frozen image model"),
        (["ridge", str(paired_dataset), *out, "--target", str(dino), "--layer", "9"], "2 hidden layers"),
        (["ridge", str(paired_dataset), *out, "--target", str(dino), "--fit", "each"], "is not in the train split"),
    ):
        assert run_main(main, words) == 2
        assert text in capsys.readouterr().err


def test_final_and_hidden_embeddings_of_dinov2(paired_dataset: Path, dino: Path) -> None:
    table = ImageTable(open_paired(paired_dataset, "val"))
    model, processor, _ = load_image_model(dino)
    values = processor(images=[table.pixels([0])[0]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(pixel_values=values, output_hidden_states=True)
    for layer, expected in ((None, out.pooler_output), (1, out.hidden_states[1][:, 0])):
        found = embed_images(table, dino, layer=layer)
        torch.testing.assert_close(found[:1], torch.nn.functional.normalize(expected, dim=-1))


def test_the_neighbours_of_a_mean_are_the_neighbours_of_each_presentation(
    paired_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_paired(paired_dataset, "test")

    def embed(groups: list[list[int]]) -> np.ndarray:
        return np.array([[np.mean(group)] for group in groups])

    assert _embed_with_neighbours(embed, data, [[0], [1]], 0)[1] is None
    monkeypatch.setattr(retrieval, "exchange_within", lambda data, groups, seed: [[4, 5], [8, 9]])
    own, neighbours = _embed_with_neighbours(embed, data, [[0, 1], [2, 3]], 0)
    assert own.tolist() == [[0.5], [2.5]] and isinstance(neighbours, np.ndarray)
    assert neighbours.tolist() == [[4.5], [8.5]]

    def refuse(*_: object) -> None:
        raise NotApplicableError("no times")

    monkeypatch.setattr(retrieval, "exchange_within", refuse)
    assert _embed_with_neighbours(embed, data, [[0, 1], [2, 3]], 0)[1] == NotApplicable(reason="no times")


def test_data_that_cannot_be_searched_are_refused(paired_dataset: Path, tmp_path: Path) -> None:
    data = open_paired(paired_dataset, "test")
    table = ImageTable(data)
    _check_images(data, table)
    table.labels = table.labels.copy()
    table.labels[2] = 1 - table.labels[2]
    with pytest.raises(RequestError, match="has two labels"):
        _check_images(data, table)
    table.ids = table.ids[:1]
    with pytest.raises(RequestError, match="only one image"):
        _check_images(data, table)
    with pytest.raises(RequestError, match="of 1 of 2 are NaN"):
        _check_embeddings(np.array([[0.0, np.nan], [1.0, 2.0]]), "model: the EEG embeddings")
    _check_output(tmp_path / "new")
    (tmp_path / "openings.jsonl").write_text("")
    _check_output(tmp_path)
    (tmp_path / "manifest.json").write_text("")
    with pytest.raises(RequestError, match="does not hold a retrieval"):
        _check_output(tmp_path)
