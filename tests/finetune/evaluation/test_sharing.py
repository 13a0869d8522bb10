"""Tests of the division of images among processes, with real processes that communicate through gloo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from data_sharding.common.errors import RequestError
from finetune.evaluation.generated import ImageFiles
from finetune.evaluation.networks.sharing import Sharing
from finetune.evaluation.pixel_metrics import ImageRows
from pretrain.runs.distributed import World


def add_up(images_BHW3: np.ndarray) -> np.ndarray:
    return images_BHW3.sum(axis=(1, 2, 3), dtype=np.int64)


def _compute(sharing: Sharing, files: list[Path]) -> None:
    images = ImageFiles(files, (4, 4, 3))
    expected_B = [48 * number for number in range(7)]
    found = list(sharing.compute("sum", add_up, images, block=2))
    assert [len(part) for part in found] == [2, 2, 2, 1] and np.concatenate(found).tolist() == expected_B
    # A caller of `compute` may stop before the last block.
    assert next(iter(sharing.compute("sum", add_up, images, block=1))).tolist() == [0]
    chosen = ImageRows(images, np.array([6, 0, 6]))
    assert np.concatenate(list(sharing.compute("sum", add_up, chosen, block=1))).tolist() == [288, 0, 288]
    assert list(sharing.compute("sum", add_up, ImageFiles([], (4, 4, 3)), block=2)) == []
    broken = ImageFiles([*files[:3], files[0].with_name("missing.png")], (4, 4, 3))
    with pytest.raises(RequestError, match=r"missing\.png"):
        list(sharing.compute("sum", add_up, broken, block=1))


def _run(rank: int, size: int, address: str, files: list[Path]) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    sharing = Sharing(World(rank=rank, size=size))
    if rank == 0:
        with sharing.lead():
            sharing.announce("start")
            _compute(sharing, files)
    else:
        assert sharing.wait() == "start"
        sharing.follow({"sum": add_up})
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_number_of_processes_gives_the_same_blocks(size: int, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(7)]
    for number, file in enumerate(files):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file)
    if size == 1:
        _compute(Sharing(), files)
    else:
        mp.start_processes(_run, (size, f"file://{tmp_path}/store", files), nprocs=size, start_method="spawn")
