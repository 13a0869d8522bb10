"""Run several short trainings in one launch, because DeepSpeed starts slowly: ``torchrun jobs_worker.py JOBS.json``.

Each job in JOBS.json has ``words``, the command line of 'dreamscale pretrain', and ``stop_after``, the number of steps
after which the worker requests a stop; null means no stop. If the output folder of a job exists, the job resumes the
run in this folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_sharding.common.config import parse_config
from pretrain.runs.directory import RunDirectory
from pretrain.runs.distributed import choose_device, import_deepspeed, launched_world, process_group
from pretrain.runs.stop import StopSignal
from pretrain.train import FREE, check_request, train_in
from pretrain.training.config import PretrainConfig


class StopAfter(StopSignal):
    """Requests a stop after a number of steps. The config of the training must write a line of metrics in each step."""

    def __init__(self, run: RunDirectory, steps: int | None) -> None:
        self.run, self.steps = run, steps

    @property
    def requested(self) -> bool:  # type: ignore[override]
        # Only rank 0 writes lines of metrics, so only rank 0 can count them and request a stop. All processes then
        # stop.
        if self.steps is None or self.run.rank:
            return False
        return sum("lr" in line for line in self.run.metrics()) >= self.steps - 1


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    device = choose_device("cpu")
    deepspeed = import_deepspeed(device)
    rank, size = launched_world()
    with process_group(deepspeed, device) as world:
        for job in jobs:
            words = [*job["words"], "--num_processes", str(size)]
            config = parse_config(PretrainConfig, words, prog="test", positionals=("config",))
            train, held_out = check_request(config)
            run = RunDirectory(config.output, config, rank=rank, free=FREE)
            train_in(world, deepspeed, config, run, train, held_out, StopAfter(run, job.get("stop_after")))
            run.close()
            # Let the other ranks wait for rank 0, because rank 0 still writes files after the last collective
            # operation.
            world.barrier()


if __name__ == "__main__":
    main()
