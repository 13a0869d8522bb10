"""Tests of metrics in TensorBoard, in wandb, and on the terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pretrain.train import main

from ..conftest import ROOT, environment, losses, metrics, write_config


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Return the records of a file in which wandb stores a run.

    The file has LevelDB's log format: a header of 7 bytes, then blocks of 32 KiB.
    """
    place, whole = 7, b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


class TestTracking:
    def test_tensorboard_gets_the_metrics_of_the_file(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = tmp_path / "run"
        config = write_config(
            tmp_path / "c.yaml",
            dataset=str(unpaired_dataset),
            output=str(run),
            steps=3,
            tracker={"kind": "tensorboard"},
            peak_tflops=0.5,
        )
        assert main([str(config)]) == 0
        lines = [line for line in metrics(run) if "loss" in line]
        assert {"mfu", "data_stall_share", "tokens_per_s", "memory_peak_gib", "grad_norm"} <= lines[0].keys()
        assert 0 < lines[-1]["mfu"] < 1
        assert 0 <= lines[-1]["data_stall_share"] < 1
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert [e.value for e in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
        held = next(line for line in metrics(run) if "val_loss" in line)
        # The 24 val windows are of one corpus: a third have 19 channels, a third have 32, and a third have 64.
        assert held["val_loss_corpus/tiny"] == pytest.approx(held["val_loss"])
        parts = [held[f"val_loss_channels/{n:03d}"] for n in (19, 32, 64)]
        assert np.mean(parts) == pytest.approx(held["val_loss"])
        assert len(set(parts)) == 3

    def test_wandb_offline_stores_the_run(self, unpaired_dataset: Path, tmp_path: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        run = tmp_path / "run"
        config = write_config(
            tmp_path / "c.yaml", dataset=str(unpaired_dataset), output=str(run), steps=3, tracker={"kind": "wandb"}
        )
        assert main([str(config)]) == 0
        (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
        # wandb writes the file in another process. This process may still be writing when the run has ended.
        logged: list[float] = []
        until = time.monotonic() + 30
        while len(logged) < 3 and time.monotonic() < until:
            logged.clear()
            time.sleep(0.2)
            for data in leveldb_records(file.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                logged += [float(i.value_json) for i in record.history.item if list(i.nested_key) == ["loss"]]
        assert logged == pytest.approx(losses(run))

    def test_wandb_without_a_connection_stores_the_run_with_a_warning(self, tmp_path: Path) -> None:
        # Write an API key as 'wandb login' does, for a server at port 9, where no server listens.
        keys = tmp_path / "netrc"
        keys.write_text(f"machine 127.0.0.1:9\n  login user\n  password {'a' * 40}\n")
        program = (
            "from pathlib import Path\n"
            "from pretrain.runs.tracking import TrackerConfig, open_tracker\n"
            f"log, close = open_tracker(TrackerConfig(kind='wandb'), Path({str(tmp_path)!r}), {{}})\n"
            "log(1, {'loss': 0.5})\n"
            "close()\n"
        )
        variables = {"NETRC": str(keys), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
        settings = {k: v for k, v in environment().items() if not k.startswith("WANDB")} | variables
        ids = set()
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env=settings, capture_output=True, text=True, check=True
            )
            assert "wandb cannot be reached" in done.stderr
            ids.add((tmp_path / "wandb" / "run_id").read_text())
        # wandb gives a resumed run the id that the run had before.
        assert len(ids) == 1
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2

    def test_a_terminal_shows_a_table_and_a_log_gets_lines(self) -> None:
        program = (
            "from pretrain.runs.tracking import live_table\n"
            "with live_table('pretrain', 2) as show:\n"
            "    show(1, {'loss': 0.5, 'samples_per_s': 12.0})\n"
            "    show(2, {'loss': 0.25, 'val_loss': 0.3, 'mfu': 0.41})\n"
        )
        ours, theirs = pty.openpty()
        subprocess.run(
            [sys.executable, "-c", program],
            stderr=theirs,
            check=True,
            cwd=ROOT,
            env=environment() | {"TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
        text = shown.decode()
        assert all(word in text for word in ("held-out loss", "0.3000", "windows / s", "41.0%", "2/2"))
        plain = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env=environment()
        )
        assert plain.stderr == "pretrain: 2/2 loss 0.2500\n"
