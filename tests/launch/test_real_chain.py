"""Tests on real recordings with the commands that a user types: shard, pretrain, export and encode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CORPUS = Path(os.environ.get("DREAMSCALE_EEG_CORPUS") or "/nonexistent")

pytestmark = pytest.mark.skipif(
    not CORPUS.is_dir(), reason="DREAMSCALE_EEG_CORPUS does not name a folder with the real recordings"
)


def dreamscale(*words: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


def test_real_recordings_become_a_dataset_an_encoder_and_embeddings(tmp_path: Path) -> None:
    dataset, run, encoder = tmp_path / "dataset", tmp_path / "run", tmp_path / "encoder"
    dreamscale("shard", "configs/data_sharding/real_corpus.yaml", "--output", dataset)
    # All bytes are right. But the subjects are unknown, so "verify" cannot decide whether the splits share data, and
    # returns the exit code 3.
    dreamscale("verify", dataset, code=3)
    counts = json.loads((dataset / "manifest.json").read_text())["counts"]
    assert counts["sharded"] + counts["duplicate"] + counts["quarantined"] + counts["excluded"] == counts["found"]

    dreamscale(
        *("pretrain", "configs/pretrain/real_corpus.yaml", "--dataset", dataset, "--output", run),
        *("--steps", "30", "--evaluation.every", "15", "--checkpoint.every", "30"),
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(np.isfinite(losses))
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "plots" / "reconstruction.png").stat().st_size > 10_000

    dreamscale("export", run, encoder)
    for recording, windows in (("nihon-kohden/MB0400FU.EDF", 23), ("egi/test_egi_pns.mff", 10)):
        out = tmp_path / f"{Path(recording).stem}.npz"
        dreamscale("encode", encoder, CORPUS / recording, "-o", out)
        with np.load(out) as found:
            assert found["tokens"].shape[:2] == (windows, 64) and np.isfinite(found["tokens"]).all()
            assert found["pooled"].shape == (windows, found["tokens"].shape[2])
            # Windows at different times must have different embeddings.
            assert found["pooled"].std(axis=0).max() > 1e-3
