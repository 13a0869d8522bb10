"""Tests that batch norm over all processes computes the same as one process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from finetune.training.batch_norm import SyncBatchNorm2d, synchronise_batch_norms

from ..conftest import LAUNCH_ENV

PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from finetune.training.batch_norm import synchronise_batch_norms

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
x, target = torch.randn(8, 2, 9, 7).double(), torch.randn(8, 4, 5, 3).double()
rank, size = 0, 1
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    synchronise_batch_norms(net)
own = DistributedDataParallel(net) if size > 1 else net
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
found = {}
for step in range(3):
    part = x[rank::size] * (1 + step) + step
    out = own(part)
    loss = (out - target[rank::size]).square().mean()
    loss.backward()
    found |= {f"{step}/{name}": p.grad.clone() for name, p in net.named_parameters()}
    found[f"{step}/loss"], found[f"{step}/out"] = loss.detach(), out.detach()
    optimizer.step()
    optimizer.zero_grad()
found |= {f"state/{name}": value for name, value in net.state_dict().items()}
save_file({k: v.contiguous() for k, v in found.items()}, f"{sys.argv[1]}/{size}-{rank}.safetensors")
"""


def test_two_processes_compute_the_same_as_one(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path)]
        done = subprocess.run(command, env=LAUNCH_ENV, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one = load_file(tmp_path / "1-0.safetensors")
    two = [load_file(tmp_path / f"2-{rank}.safetensors") for rank in range(2)]
    assert one.keys() == two[0].keys()
    for name, value in one.items():
        if name.endswith("/loss"):
            torch.testing.assert_close((two[0][name] + two[1][name]) / 2, value)
        elif name.endswith("/out"):
            for rank in range(2):
                torch.testing.assert_close(two[rank][name], value[rank::2])
        else:
            for rank in range(2):
                torch.testing.assert_close(two[rank][name], value)


def test_replacing_keeps_weights_statistics_and_results() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.ReLU()))
    x = torch.randn(4, 1, 8, 8)
    net(x)
    expected = net.eval()(x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    synchronise_batch_norms(net)
    norm = net[1][0]
    assert isinstance(norm, SyncBatchNorm2d) and norm.momentum == 0.3 and not norm.training
    assert net.state_dict().keys() == before.keys()
    torch.testing.assert_close(net.state_dict(), before, atol=0, rtol=0)
    torch.testing.assert_close(net(x), expected, atol=0, rtol=0)
