"""Several short trainings in one launch, since starting DeepSpeed takes longer: ``torchrun jobs_worker.py JOBS.json``.

Each job: ``words``, the command line of 'dreamscale pretrain', and ``stop_after``, steps after which somebody asks the
training to stop (null for never). Jobs of an output that exists go on with it.
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
    """As if a signal had come in the last of some steps; each step has logged its line."""

    def __init__(self, run: RunDirectory, steps: int | None) -> None:
        self.run, self.steps = run, steps

    @property
    def requested(self) -> bool:  # type: ignore[override]
        # The first process alone has the lines for sure, and one that asks is enough.
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
            # Nobody begins the next one while the first process is still copying what the others read.
            world.barrier()


if __name__ == "__main__":
    main()
