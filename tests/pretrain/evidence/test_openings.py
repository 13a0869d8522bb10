import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_sharding.common.errors import RequestError
from pretrain.evidence.openings import NAME, count_openings, record_opening


def _record(dataset: Path, out: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "command": "generate",
        "dataset_id": "0" * 64,
        "model_digest": "a" * 64,
        "config": {"output": str(out), "steps": 3},
    }
    return record_opening(dataset, changes.pop("split", "test"), fallback=out, **values | changes)


def test_openings_are_counted_by_split_and_model(tmp_path: Path) -> None:
    dataset, out = tmp_path / "dataset", tmp_path / "out"
    dataset.mkdir(), out.mkdir()
    assert _record(dataset, out, split="val") is None and not (dataset / NAME).exists()
    assert _record(dataset, out).openings == 1
    assert _record(dataset, out, model_digest="b" * 64).models == 2
    found = _record(dataset, out, command="evaluate", model_digest="")
    assert (found.openings, found.models) == (3, 2)
    assert found.describe("test") == (
        f"The test split was opened 3 times so far, for 2 different models ({dataset / NAME})."
    )
    text = (dataset / NAME).read_text()
    assert str(out) not in text, "the log of a dataset that travels must not name folders of the user"
    assert {json.loads(line)["command"] for line in text.splitlines()} == {"generate", "evaluate"}


def test_the_log_of_a_dataset_that_cannot_be_written_stands_beside_the_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert _record(tmp_path / "no such dataset", out).log == str(out / NAME)
    assert _record(Path("s3://bucket/dataset"), out).openings == 2
    with pytest.raises(RequestError, match="cannot record"):
        _record(tmp_path / "nowhere", tmp_path / "nowhere either")


def test_a_link_or_a_damaged_log_is_refused(tmp_path: Path) -> None:
    dataset, out = tmp_path / "dataset", tmp_path / "out"
    dataset.mkdir(), out.mkdir()
    target = tmp_path / "victim"
    target.write_text("keep")
    (dataset / NAME).symlink_to(target)
    # The log is not written through a symbolic link, so it goes to the folder of the result.
    assert _record(dataset, out).log == str(out / NAME) and target.read_text() == "keep"
    (out / NAME).write_text("{broken\n")
    with pytest.raises(RequestError, match="line 1 is not JSON"):
        count_openings(out / NAME, "test")
    (out / NAME).write_text('{"time": 3}\n')
    with pytest.raises(RequestError, match="time of line 1"):
        count_openings(out / NAME, "test")
    assert count_openings(tmp_path / "nothing", "test") is None


def test_a_named_pipe_is_not_waited_for_and_urls_of_files_are_understood(tmp_path: Path) -> None:
    dataset, out = tmp_path / "dataset", tmp_path / "out"
    dataset.mkdir(), out.mkdir()
    assert record_opening(
        f"file://{dataset}", "test", command="x", dataset_id="", model_digest="", config={}, fallback=out
    ) == count_openings(dataset / NAME, "test")
    (dataset / NAME).unlink()
    os.mkfifo(dataset / NAME)
    assert _record(dataset, out).log == str(out / NAME)
