"""Features are computed once, by all processes and runs together, and no damaged file is used."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from upath import UPath

from data_sharding.common.errors import RequestError
from finetune.targets.cache import BLOCK, FOLDER, Job, load_features

ROWS = 4 * BLOCK + 5
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from finetune.targets.cache import BLOCK, Job, load_features
from pretrain.runs.distributed import World

dataset, log, rows, rank, size, last = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
if size > 1:
    dist.init_process_group("gloo", init_method="file://" + log + ".group", rank=rank, world_size=size)
own = []

def compute(chosen):
    own.extend(chosen)
    if len(own) > last * BLOCK:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(log, "a") as stream:
        stream.write("".join(f"{row}\\n" for row in chosen))
    time.sleep(0.05)
    return torch.tensor(chosen).float()[:, None] + torch.arange(3)

job = Job(what="numbers", key={"model": 1}, rows=rows, compute=compute, name_row=str)
found = load_features(job, Path(dataset), World(rank=rank, size=size))
assert torch.equal(found, torch.arange(rows).float()[:, None] + torch.arange(3)), found
"""


def _start(dataset: Path, log: Path, rank: int = 0, size: int = 1, last: int = 99) -> subprocess.Popen[str]:
    words = [str(word) for word in (dataset, log, ROWS, rank, size, last)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words], env=env, stdout=subprocess.PIPE, text=True)


def _computed(log: Path) -> list[int]:
    return sorted(map(int, log.read_text().split()))


@pytest.fixture
def count() -> tuple[list[int], Callable[..., torch.Tensor]]:
    """Return a list of the rows that were computed, and a function that loads the features of a dataset folder."""
    rows: list[int] = []

    def compute(chosen: list[int]) -> torch.Tensor:
        rows.extend(chosen)
        return torch.tensor(chosen).float()[:, None] + torch.arange(3)

    def load(dataset: Path | UPath, model: int = 1) -> torch.Tensor:
        job = Job(what="numbers", key={"model": model}, rows=ROWS, compute=compute, name_row=str, batch_size=10)
        return load_features(job, dataset)

    return rows, load


def test_features_are_computed_once_and_kept_beside_the_dataset(
    count: tuple[list[int], Callable[..., torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, load = count
    first = load(tmp_path)
    assert rows == list(range(ROWS)) and torch.equal(first[:, 0], torch.arange(ROWS).float())
    assert f"{ROWS} of {ROWS} computed" in capsys.readouterr().out
    again = load(tmp_path)
    assert torch.equal(first, again) and len(rows) == ROWS
    assert f"0 of {ROWS} computed" in capsys.readouterr().out
    (file,) = (tmp_path / FOLDER).iterdir()
    # The file is mapped into memory, and not copied.
    assert str(file) in Path("/proc/self/maps").read_text()
    load(tmp_path, 2)
    assert len(rows) == 2 * ROWS and len(list((tmp_path / FOLDER).iterdir())) == 2


def test_a_dataset_that_is_remote_or_cannot_be_written_uses_the_cache_of_the_user(
    count: tuple[list[int], Callable[..., torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, load = count
    monkeypatch.setenv("DREAMSCALE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".cache").write_text("a file, so that the folder cannot be made")
    load(tmp_path / "data")
    load(UPath("memory://data"))
    assert len(rows) == ROWS and len(list((tmp_path / "cache" / "targets").iterdir())) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".cache").symlink_to(tmp_path / "data")
    with pytest.raises(RequestError, match="a link, not a folder"):
        load(tmp_path / "other")


@pytest.mark.parametrize("damage", ["value", "short", "text", "header", "pipe", "link", "other"])
def test_a_damaged_file_is_computed_again(
    damage: str,
    count: tuple[list[int], Callable[..., torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, load = count
    expected = load(tmp_path).clone()
    (file,) = (tmp_path / FOLDER).iterdir()
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "value":
        data[-2] ^= 1
    elif damage == "short":
        del data[-8:]
    elif damage == "text":
        data = bytearray(b"no features")
    elif damage == "header":
        data[:8] = (2**60).to_bytes(8, "little")
    elif damage == "other":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"]["digest"] = "0" * 64
        data[8 : 8 + length] = json.dumps(header).encode().ljust(length)
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(data)
    capsys.readouterr()
    assert torch.equal(load(tmp_path), expected) and len(rows) == 2 * ROWS
    assert "the features are computed again" in capsys.readouterr().out
    assert file.is_file() and not file.is_symlink()


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def compute(chosen: list[int]) -> torch.Tensor:
        return torch.where(torch.tensor(chosen) == 70, torch.nan, 1.0)[:, None]

    job = Job(what="numbers of m", key={}, rows=ROWS, compute=compute, name_row=lambda row: f"image i{row}")
    with pytest.raises(RequestError, match="numbers of m: the features of image i70 are NaN or infinite"):
        load_features(job, tmp_path)


def test_a_killed_run_keeps_its_blocks_and_a_damaged_block_is_computed_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert _start(tmp_path, log, last=2).wait(120) == -9
    assert _computed(log) == list(range(2 * BLOCK))
    (damaged,) = (tmp_path / FOLDER).glob("*.parts/00000001.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert _start(tmp_path, log).wait(120) == 0
    assert _computed(log) == sorted([*range(ROWS), *range(BLOCK, 2 * BLOCK)])
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.suffix == ".safetensors"


@pytest.mark.parametrize("together", [True, False])
def test_two_processes_and_two_runs_share_the_work(together: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    size = 2 if together else 1
    runs = [_start(tmp_path, log, rank=rank if together else 0, size=size) for rank in range(2)]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert _computed(log) == list(range(ROWS))
    if together:
        assert f"{ROWS} of {ROWS} computed" in said[0] and not said[1]
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.suffix == ".safetensors"
