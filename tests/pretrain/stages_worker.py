"""Several short trainings in one launch: ``torchrun stages_worker.py CONFIG OUTPUT STAGE,PRECISION[,MICRO] ...``."""

from __future__ import annotations

import sys
from pathlib import Path

from data_sharding.config import parse_config
from pretrain.config import PretrainConfig
from pretrain.distributed import choose_device, import_deepspeed, launched_world, process_group
from pretrain.run import RunDirectory, StopSignal
from pretrain.train import check_request, train_in


def main() -> None:
    config_path, output, *variants = sys.argv[1:]
    device = choose_device("cpu")
    deepspeed = import_deepspeed(device)
    rank, size = launched_world()
    with process_group(deepspeed, device) as world:
        for variant in variants:
            stage, precision, *micro = variant.split(",")
            words = [config_path, "--output", str(Path(output) / f"{variant}_{size}"), "--num_processes", str(size)]
            words += ["--zero_stage", stage, "--precision", precision]
            words += ["--micro_batch_size", micro[0]] if micro else []
            config = parse_config(PretrainConfig, words, prog="test", positionals=("config",))
            train, held_out = check_request(config)
            run = RunDirectory(config.output, config, rank=rank)
            train_in(world, deepspeed, config, run, train, held_out, StopSignal())
            run.close()


if __name__ == "__main__":
    main()
