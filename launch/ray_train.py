"""Run pretraining on a Ray cluster, through Ray Train.

``python -m launch.ray_train CONFIG.yaml [--dotted.key value ...]`` starts `num_processes` workers in the Ray cluster at
RAY_ADDRESS, or in a new cluster on this machine if RAY_ADDRESS is not set. Each worker runs ``pretrain.train``. Each
worker gets a GPU if the cluster has enough GPUs and the key `device` allows GPUs. Dataset and output must have the same
path on all machines.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_FAILED, one_line, run_main
from data_sharding.common.files import atomic_write_text
from data_sharding.job.cluster import require_token

_STOP, _EXIT = "stop", "exit"


def _train(job: dict[str, Any]) -> None:
    """Run the training in one worker process of Ray."""
    from pretrain.runs.stop import STOP_FILE
    from pretrain.train import main

    # Ray starts workers in another folder. Go back to the folder in which the user started the command, so that
    # relative paths in the config are right.
    os.chdir(job["cwd"])
    folder = Path(job["folder"])
    os.environ[STOP_FILE] = str(folder / _STOP)
    code = main(job["words"])
    if code == EXIT_FAILED:
        raise RuntimeError("training failed; the error of the training is printed above")
    if os.environ["RANK"] == "0":
        atomic_write_text(folder / _EXIT, str(code))


def launch(words: list[str]) -> int:
    """Run pretraining on Ray.

    Parameters
    ----------
    words : list of str
        Arguments of ``dreamscale pretrain``.

    Returns
    -------
    int
        Exit code of the training; 75 if SIGTERM, SIGINT or SIGUSR1 stopped it.

    Raises
    ------
    RequestError
        If the arguments or the config are wrong.
    """
    from pretrain.training.config import PretrainConfig

    config = parse_config(PretrainConfig, words, prog="dreamscale pretrain", positionals=("config",))
    if "RAY_ADDRESS" not in os.environ:
        require_token()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(log_to_driver=True, include_dashboard=False, configure_logging=False)
    output = Path(config.output).absolute()
    # Ray's own records, and the files `_STOP` and `_EXIT` of this module, go to a separate folder and not to the run
    # directory, because the run directory must not be created before the config has been checked. Delete Ray's records
    # of an earlier launch, so that Ray does not try to resume: the training itself resumes from its checkpoints.
    folder = output.with_name(f".{output.name}.ray")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda *_: (folder / _STOP).touch())
    gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= config.num_processes
    trainer = TorchTrainer(
        _train,
        train_loop_config={"words": words, "cwd": str(Path.cwd()), "folder": str(folder)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_processes, use_gpu=gpus),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=config.restarts),
        ),
    )
    try:
        trainer.fit()
        return int((folder / _EXIT).read_text())
    except Exception as error:
        print(f"dreamscale: training on Ray failed ({type(error).__name__}: {one_line(error)})", file=sys.stderr)
        return EXIT_FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)
        ray.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Pretrain on Ray: ``CONFIG.yaml [--dotted.key value ...]``; returns the exit code."""
    return run_main(launch, argv)


if __name__ == "__main__":
    sys.exit(main())
