"""Tests of ``dreamscale compare`` with files that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_sharding.common.errors import run_main
from finetune.evaluation.compare import main


def write(folder: Path, *, metric: str = "accuracy", trials: list[dict[str, Any]] | None = None, **about: Any) -> str:
    folder.mkdir()
    values: dict[str, Any] = {"dataset_id": "1", "split": "test", "labels": ["cat"], "classifier": {"sha256": "1"}}
    (folder / "metrics.json").write_text(json.dumps(values | about))
    rows = trials or [{"key": f"t{n}", "subject": "s", "image_id": f"i{n}"} for n in range(4)]
    rows = [{**row, "values": {metric: float(number)}} for number, row in enumerate(rows)]
    (folder / "trials.json").write_text(json.dumps({"trials": rows}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "other"}, "have no metric in common"),
        ({"classifier": None}, "b/metrics.json: damaged or changed (classifier is"),
        ({"trials": [{"key": "t1", "subject": "s", "image_id": "i2"}]}, "trial t1 has another person or image"),
        ({"trials": [{"key": "t1", "subject": "s", "image_id": "i1"}] * 2}, "a trial occurs twice"),
    ],
)
def test_files_that_contradict_each_other_are_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [write(tmp_path / "a"), write(tmp_path / "b", **changes)]
    assert run_main(main, [*words, "--resamples", "99"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
