"""Tests of `dreamscale compare` and `dreamscale evaluate` with results that somebody changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_sharding.common.errors import RequestError, run_main
from data_sharding.common.storage import as_path
from launch.cli import main
from tests.security.test_shared_machine import is_clean


def write_results(folder: Path, metric: str = "psnr", **values: Any) -> Path:
    """Write the files of an evaluation of 12 trials; `values` replace entries of the first trial."""
    folder.mkdir()
    about = {"dataset_id": "d", "split": "test", "labels": ["a"], "classifier": {"sha256": "0" * 64}}
    (folder / "metrics.json").write_text(json.dumps(about))
    trials: list[dict[str, Any]] = [
        {"key": f"k{i}", "subject": f"s{i % 3}", "image_id": f"i{i % 4}", "values": {metric: i / 7}} for i in range(12)
    ]
    trials[0].update(values)
    (folder / "trials.json").write_text(json.dumps({"schema": 1, "trials": trials}))
    return folder


def compare(a: Path, b: Path, *words: str) -> int:
    return main(["compare", str(a), str(b), "--resamples", "99", *words])


@pytest.mark.parametrize("metric", ["\x1b[31mred", "[/]", "[/red]", "[link=file:///etc/passwd]x", "\u202egpj", "a\nb"])
def test_names_of_metrics_do_not_change_a_terminal(
    metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(write_results(tmp_path / "a", metric), write_results(tmp_path / "b", metric)) == 0
    output = capsys.readouterr()
    assert is_clean(output.out) and is_clean(output.err)
    assert "\x1b" in metric or metric[0] != "[" or metric in output.out


@pytest.mark.parametrize("key", ["subject", "image_id"])
def test_a_very_long_name_is_refused(
    key: str, tmp_path: Path, run_command: Callable[..., Any], assert_refused: Callable[..., None]
) -> None:
    """In a NumPy array of the type str, every entry takes as much memory as the longest entry. So one very long name
    would need gigabytes."""
    folders = [write_results(tmp_path / name, "psnr", **{key: "x" * 5_000_000}) for name in "ab"]
    for folder in folders:
        values = json.loads((folder / "trials.json").read_text())
        values["trials"] += [{**values["trials"][1], "key": f"more{i}"} for i in range(2000)]
        (folder / "trials.json").write_text(json.dumps(values))
    assert_refused(run_command("compare", *folders, "--resamples", 99), "trials.json", f"{key} has 5000000 characters")


@pytest.mark.parametrize(
    "values",
    [{"values": {"psnr": 10**301}}, {"values": {"psnr": True}}, {"values": [1]}, {"subject": 5}, {"shuffled": None}],
    ids=["huge", "bool", "list", "subject", "shuffled"],
)
def test_changed_values_are_refused(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(write_results(tmp_path / "a", "psnr", **values), write_results(tmp_path / "b")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "trials.json" in error


def test_large_whole_numbers_are_numbers(tmp_path: Path) -> None:
    assert compare(write_results(tmp_path / "a", values={"psnr": 10**299}), write_results(tmp_path / "b")) == 0


def test_outputs_that_cannot_be_written_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_results(tmp_path / "a"), write_results(tmp_path / "b")
    (tmp_path / "folder").mkdir()
    for words in (["-o", str(tmp_path / "folder")], ["-o", "/proc/x/y.json"], ["--resamples", "1000000000000"]):
        capsys.readouterr()
        assert compare(a, b, *words) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", ["~no-such-user/x", "x" * 300, "a/" * 5000, "file://" + "x" * 300])
def test_paths_that_no_system_accepts_are_refused(path: str) -> None:
    with pytest.raises(RequestError, match=r"too long|no user of this machine") as caught:
        as_path(path)
    assert len(str(caught.value)) < 200


def test_the_line_of_an_error_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: list[str]) -> int:
        raise RequestError(f"file.json: the key {'x' * 10**6} is unknown; copy the file again")

    assert run_main(refuse, []) == 2
    error = capsys.readouterr().err
    assert (
        len(error) < 3000 and error.startswith("dreamscale: file.json: the key xxx") and "copy the file again" in error
    )
