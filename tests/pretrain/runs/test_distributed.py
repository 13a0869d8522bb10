"""Tests of sums, decisions and other values that all processes of a run share, with and without a process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_sharding.common.errors import RequestError
from pretrain.runs.checkpoint import CheckpointReader, step_folder
from pretrain.runs.distributed import World, check_num_processes, choose_device

from ..conftest import torchrun

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from pretrain.runs.checkpoint import divide_by_size
from pretrain.runs.checkpoint_writer import CheckpointWriter
from pretrain.runs.distributed import World

dist.init_process_group("gloo")
folder = Path(sys.argv[1])
world = World(rank=dist.get_rank(), size=dist.get_world_size())
found = {
    "sum": world.all_reduce_sum(1.0, world.rank),
    "max": world.all_reduce_max(world.rank, -world.rank),
    "any": [world.any(world.rank == 1), world.any(False)],
    "broadcast": world.broadcast({"from": world.rank}),
    "gather": world.all_gather(f"rank {world.rank}"),
}
(folder / f"{world.rank}.json").write_text(json.dumps(found))

# As in data-parallel fine-tuning, both processes hold all tensors, and each process writes its share.
tensors = {f"weights/{i}": torch.full((i + 1,), float(i)) for i in range(6)}
mine = divide_by_size({name: value.numel() for name, value in tensors.items()}, world.size)[world.rank]
writer = CheckpointWriter(folder / "checkpoints", world)
writer.begin(7, {name: tensors[name] for name in mine}, {"losses": [1.0]})
assert writer.wait()
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_agree_and_share_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = torchrun([str(tmp_path / "program.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {
        "sum": [2.0, 1.0],
        "max": [1.0, 0.0],
        "any": [True, False],
        "broadcast": {"from": 0},
        "gather": ["rank 0", "rank 1"],
    }
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
    folder = step_folder(tmp_path / "checkpoints", 7)
    assert len(list(folder.glob("state_*.safetensors"))) == 2
    with CheckpointReader(folder) as saved:
        saved.check_names(f"weights/{i}" for i in range(6))
        assert all(torch.equal(saved[f"weights/{i}"], torch.full((i + 1,), float(i))) for i in range(6))
        assert saved.manifest["world_size"] == 2


def test_one_process_needs_no_process_group() -> None:
    world = World()
    assert not torch.distributed.is_initialized()
    assert world.first
    assert world.all_reduce_sum(2, 3.5) == [2.0, 3.5]
    assert world.all_reduce_max(2) == [2.0]
    assert world.any(True) and not world.any(False)
    assert world.broadcast("value") == "value"
    assert world.all_gather("value") == ["value"]
    world.barrier()


def test_a_launcher_must_start_as_many_processes_as_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    check_num_processes(1, "torchrun {}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_num_processes(2, "torchrun {}")
    with pytest.raises(RequestError, match=r"num_processes is 4, but 2 processes were started; .* 'torchrun 4'"):
        check_num_processes(4, "torchrun {}")


def test_an_unknown_device_is_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RequestError, match="device is gpu; use auto, cpu or cuda"):
        choose_device("gpu")
