"""Tests of the comparison of classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.errors import run_main
from finetune.dm_re2i.classification.compare import CompareConfig, main, summarise_runs

CONFIG = """
dataset: {dataset}
output: unused
evrnet:
  channels: 16
  widths: [4, 8, 8, 16, 16]
  dropout: 0.1
  whiten: 0.05
  training: {{steps: 20, batch_size: 16, lr: 0.01, warmup: 2, evaluation: {{every: 10}}}}
"""


def test_all_networks_are_compared_on_the_test_split(
    paired_dataset: Path, encoder_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=paired_dataset))
    args = [str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    args += ["--networks", "[evrnet, eegnet, frozen]", "--encoder", str(encoder_package)]
    assert run_main(main, args) == 0
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["split"] == "test" and result["trials"] == 16 and result["people"] == 2 and result["chance"] == 0.5
    assert set(result["networks"]) == {"evrnet", "eegnet", "frozen"}
    for network, found in result["networks"].items():
        run = tmp_path / "out" / f"{network}_seed0"
        # The accuracies in comparison.json are those of the trained package on the test split.
        stored = json.loads((run / "test" / "classification.json").read_text())
        assert stored["split"] == "test" and stored["accuracy"] == pytest.approx(found["accuracy"])
        assert {name: one["accuracy"] for name, one in stored["subjects"].items()} == pytest.approx(found["people"])
        status = json.loads((run / "evrnet" / "status.json").read_text())["config"]["evrnet"]
        assert status["dropout"] == (0.1 if network == "evrnet" else None) and not status["permute_labels"]
        control = json.loads((tmp_path / "out" / f"{network}_shuffled_seed0/evrnet/status.json").read_text())
        assert control["config"]["evrnet"]["permute_labels"]
        assert found["minus_shuffled"]["mean"] == pytest.approx(found["accuracy"] - found["shuffled"]["accuracy"])
    assert result["networks"]["evrnet"]["accuracy"] >= 0.8
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 5
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    # If the same command is given again, nothing is trained.
    assert run_main(main, args) == 0
    assert "val accuracy" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result


def test_differences_count_whole_people() -> None:
    people = [f"p{i // 10}" for i in range(80)]
    images = [f"i{i % 10}" for i in range(80)]
    good, bad = np.ones(80), np.tile([1.0, 0.0], 40)
    worse = bad.copy()
    worse[:10] = 0.0
    found = summarise_runs({("a", False): good, ("a", True): bad, ("b", False): worse}, people, images, ["a", "b"])
    assert found["a"]["accuracy"] == 1 and found["a"]["shuffled"]["accuracy"] == 0.5
    assert found["a"]["minus_shuffled"]["mean"] == 0.5
    # All 8 people have a difference of 0.5, so only two of the 2^8 combinations of signs (all plus, all minus) give a
    # mean difference of this size.
    assert found["a"]["minus_shuffled"]["p_people"] == pytest.approx(2 / 256)
    assert "minus_first" not in found["a"] and "shuffled" not in found["b"]
    assert found["b"]["people"]["p0"] == 0 and found["b"]["people"]["p1"] == 0.5
    low, high = found["b"]["minus_first"]["interval_people"]
    mean = found["b"]["minus_first"]["mean"]
    assert mean == pytest.approx(worse.mean() - 1) and low <= mean <= high < 0


def test_wrong_requests_are_refused(paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="need an encoder package; set the key 'encoder'"):
        CompareConfig(settings="c", output="o", networks=("frozen",))
    with pytest.raises(ValueError, match="must not be empty"):
        CompareConfig(settings="c", output="o", seeds=())
    (tmp_path / "config.yaml").write_text(CONFIG.format(dataset=paired_dataset).replace("widths", "widhts"))
    assert run_main(main, [str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'evrnet.widths'" in capsys.readouterr().err and not (tmp_path / "out").exists()
