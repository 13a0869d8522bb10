"""Small datasets that tests can change, and functions that run code with limited time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_sharding.common.files import sha256_file
from data_sharding.dataset.dataset import write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec

ROOT = Path(__file__).parents[2]
SPEC = PreprocessSpec(sfreq=100.0, highpass=1.0, lowpass=40.0, window=50, stride=50)
MEMORY_GB = 4
"""Memory limit of child processes in GB (1e9 bytes), for the data of the process (RLIMIT_DATA)."""
SECONDS = 120
"""Time limit of child processes in seconds. It is long, so that the tests also pass on slow machines."""
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv.pop(1)),) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""


def make_samples(count: int = 4, **entries: Any) -> list[Sample]:
    """Return samples of two channels; `entries` are added to the metadata of each sample."""
    rng = np.random.default_rng(0)
    return [
        Sample(
            key=f"rec-{i:06d}",
            eeg=rng.normal(0, 10, (2, SPEC.window)),
            meta={
                "n": 2, "ch_names": ["Cz", "Pz"], "positions": [None, None], "reference": "average", "sfreq": 100.0,
                "start": i / 2, "recording": "rec", "subject": "s", "session": "", "corpus": "lab", "bads": [],
                "split": "train", **entries,
            },
        )
        for i in range(count)
    ]  # fmt: skip


class Dataset:
    """A small dataset whose files a test changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_dataset(root, {"train": make_samples()}, SPEC)
        self.tar, self.idx = root / "train" / "000000.tar", root / "train" / "000000.idx"
        self.manifest = root / "manifest.json"

    def change_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the values of the manifest."""
        values = json.loads(self.manifest.read_text())
        change(values)
        self.manifest.write_text(json.dumps(values))

    def change_shard(self, **values: Any) -> None:
        """Change values of the shard's entry in the manifest."""
        self.change_manifest(lambda manifest: manifest["splits"]["train"][0].update(values))

    def change_index(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Change the entries of the index, and write the new checksum of the index to the manifest."""
        entries = json.loads(self.idx.read_text())
        change(entries)
        self.idx.write_text(json.dumps(entries))
        self.sign()

    def sign(self) -> None:
        """Write the checksums and the size of the changed files to the manifest, as an attacker would."""
        self.change_shard(
            sha256=sha256_file(self.tar), index_sha256=sha256_file(self.idx), bytes=self.tar.stat().st_size
        )

    def replace_in_tar(self, old: bytes, new: bytes) -> None:
        """Replace text by text of the same length in the tar, and correct the checksums in the tar headers and in the
        manifest."""
        assert len(old) == len(new)
        data = bytearray(self.tar.read_bytes())
        assert old in data
        data = bytearray(bytes(data).replace(old, new))
        for at in range(0, len(data) - 512, 512):
            if data[at + 257 : at + 262] == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        self.tar.write_bytes(data)
        self.sign()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "dataset")


def _run_limited(
    code: str, *arguments: object, folder: Path | None = None, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process with `MEMORY_GB` of memory, for at most `seconds`."""
    command = [sys.executable, "-c", LIMITED + code, str(int(MEMORY_GB * 1e9)), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder, env=environment)


def _run_command(*words: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a ``dreamscale`` command with the limits of `run_limited`."""
    return _run_limited("from launch.cli import main\nsys.exit(main(sys.argv[1:]))", *words, folder=folder)


def _assert_refused(done: subprocess.CompletedProcess[str], *names: str) -> None:
    """Check that a command ended with exit code 2 and one line that contains the given texts."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dreamscale: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(name in lines[0] for name in names), lines[0]


@pytest.fixture(scope="session", name="run_limited")
def run_limited_fixture() -> Callable[..., subprocess.CompletedProcess[str]]:
    return _run_limited


@pytest.fixture(scope="session", name="run_command")
def run_command_fixture() -> Callable[..., subprocess.CompletedProcess[str]]:
    return _run_command


@pytest.fixture(scope="session", name="assert_refused")
def assert_refused_fixture() -> Callable[..., None]:
    return _assert_refused
