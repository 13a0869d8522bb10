"""Run directories that somebody changed: checkpoints, metrics, locks and links to files outside the directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_sharding.common.errors import RequestError
from data_sharding.common.files import open_to_append, sha256_file
from pretrain.runs.checkpoint import CheckpointReader, complete_checkpoints, file_record, find_damage, read_manifest
from pretrain.runs.directory import RunDirectory
from pretrain.runs.lock import hold_lock
from pretrain.runs.metrics import read_metrics
from pretrain.training.config import PretrainConfig

GOOD: dict[str, Any] = {
    "format": 3, "step": 4, "epochs": 1.0, "skipped": 0, "skipped_in_a_row": 0, "adam_steps": 4, "zero_stage": 0,
    "world_size": 1, "evaluation_due": False, "recent_losses": [1.0], "interval": {"steps": 0, "losses": [None, 0.5]},
    "loader": {"step": 4, "dataset_id": "d"}, "left_out": [{"batches": [1, 3], "step": 2, "loss": 9.0}],
    "data": {
        "dataset_id": "d", "windows": {"train": 8}, "hours_seen": 0.1, "subjects": 2, "versions": {"d": 1},
        "preprocess": {"sfreq": 100.0}, "people": {"license": {"CC0": 2}, "recordings": 2, "subjects": None},
    },
}  # fmt: skip


def write_checkpoint(run: Path, change: Callable[[dict[str, Any]], object] = lambda values: None) -> Path:
    folder = run / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    save_file({"weights/a": torch.zeros(2)}, folder / "state_00000.safetensors")
    values = json.loads(json.dumps(GOOD))
    values["files"] = {"state_00000.safetensors": file_record(folder / "state_00000.safetensors")}
    change(values)
    (folder / "complete.json").write_text(json.dumps(values))
    return folder


def _set(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *groups, last = place.split(".")
        for name in groups:
            values = values[name]
        values[last] = value

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", "x"),
        ("step", -1),
        ("step", 10**400),
        ("epochs", "many"),
        ("evaluation_due", 5),
        ("recent_losses", "x"),
        ("recent_losses", [None]),
        ("interval", []),
        ("interval.losses", ["x"]),
        ("loader", 5),
        ("loader.step", 1.5),
        ("left_out", [5]),
        ("left_out", [{"batches": [1]}]),
        ("left_out", [{"batches": [0, 10**18]}]),
        ("left_out", [{"batches": [5, 1]}]),
        ("best", [1]),
        ("data", [1]),
        ("data.preprocess", 5),
        ("data.preprocess", {"window": 10**9}),
        ("data.windows", [1]),
        ("data.windows", {"train": "x"}),
        ("data.hours_seen", None),
        ("data.dataset_id", ["x"]),
        ("data.versions", 5),
        ("data.people", [1]),
        ("data.people", {"license": {"CC0": "\x1b[31m"}}),
        ("data.people", {"recordings": "x"}),
        ("files", {"../x": {"bytes": 0, "sha256": "0" * 64}}),
    ],
    ids=str,
)
def test_changed_values_of_a_checkpoint_are_refused(place: str, value: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, _set(place, value))
    with pytest.raises(RequestError, match=r"complete\.json: ") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 500
    assert find_damage(folder, read_bytes=True) and complete_checkpoints(tmp_path / "checkpoints") == []


def test_an_unchanged_checkpoint_is_read_and_missing_values_are_named(tmp_path: Path) -> None:
    with CheckpointReader(write_checkpoint(tmp_path)) as reader:
        assert reader.names == {"weights/a"} and reader.check_manifest("step", "loader.step")["step"] == 4
        for name in ("optimizer_step", "data.shape", "best.loss"):
            with pytest.raises(RequestError, match=f"the value {name} is missing"):
                reader.check_manifest(name)


def test_a_named_pipe_in_a_checkpoint_does_not_block(tmp_path: Path, run_limited: Any) -> None:
    folder = write_checkpoint(tmp_path, lambda values: values["files"]["state_00000.safetensors"].update(bytes=0))
    (folder / "state_00000.safetensors").unlink()
    os.mkfifo(folder / "state_00000.safetensors")
    code = (
        "from pathlib import Path\nfrom pretrain.runs.checkpoint import CheckpointReader, find_damage\n"
        "from data_sharding.common.errors import RequestError\n"
        "print([find_damage(Path(sys.argv[1]), read_bytes=x) for x in (False, True)])\n"
        "try:\n    CheckpointReader(Path(sys.argv[1])).__enter__()\nexcept RequestError as error:\n    print(error)"
    )
    done = run_limited(code, folder)
    assert done.returncode == 0 and done.stdout.count("named pipe") == 3, (done.stdout, done.stderr)
    with pytest.raises(RequestError, match="named pipe"):
        sha256_file(folder / "state_00000.safetensors")


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    lines = [
        b'{"step": 1, "loss": 0.5, "lr": null}', b"{{{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, b'{"step": "x"}',
        b'{"step": -1}', b'{"step": true}', b'{"step": 1e400}', b'{"step": 2, "loss": ' + b"9" * 400 + b', "x": "y"}',
        b'{"step": 3, "loss": NaN}', b'{"step": 4, "step": 5}', b'{"step": 6, "loss": {}}', b'{"step": 7, "lo',
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b"\n".join(lines))
    assert read_metrics(path) == [{"step": 1, "loss": 0.5, "lr": None}, {"step": 2}, {"step": 6}]
    with path.open("wb") as stream:
        stream.truncate(10**11)  # a sparse file, which takes no space on the disk
    with pytest.raises(RequestError, match=r"metrics\.jsonl: damaged or changed \(larger than"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl"])
def test_links_in_a_run_directory_do_not_change_other_files(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    run = tmp_path / "run"
    run.mkdir()
    for make in (
        lambda: (run / name).symlink_to(precious),
        lambda: os.mkfifo(run / name),
        lambda: (run / name).mkdir(),
    ):
        make()
        with pytest.raises(RequestError, match=f"{name}: not a file, but a link"):
            RunDirectory(run, PretrainConfig(dataset="x", output=str(run)))
        if (run / name).is_dir():
            (run / name).rmdir()
        else:
            (run / name).unlink()
        (run / "status.json").unlink(missing_ok=True)
    assert precious.read_text() == "precious\n"


def test_files_of_a_run_are_opened_for_appending(tmp_path: Path) -> None:
    for text in ("a", "b"):
        with os.fdopen(open_to_append(tmp_path / "x"), "a") as stream:
            stream.write(text)
    assert (tmp_path / "x").read_text() == "ab"
    with hold_lock(tmp_path / "lock"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


@pytest.mark.parametrize(
    "text", ["[]", '"x"', "{}", '{"state": 5, "config": {}}', '{"state": "done", "state": "done"}']
)
def test_a_changed_status_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(RequestError, match=r"status\.json: "):
        RunDirectory(tmp_path, PretrainConfig(dataset="x", output=str(tmp_path)))


def test_export_of_a_changed_run_ends_in_one_line(tmp_path: Path, run_command: Any, assert_refused: Any) -> None:
    from data_sharding.common.config import to_yaml

    run = tmp_path / "run"
    write_checkpoint(run, lambda values: values.pop("data"))
    (run / "config.yaml").write_text(to_yaml(PretrainConfig(dataset="x", output=str(run))))
    assert_refused(run_command("export", run, tmp_path / "out"), "complete.json", "data.dataset_id is missing")
    assert not (tmp_path / "out").exists()
