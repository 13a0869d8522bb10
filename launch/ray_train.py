"""Pretraining on the processes of a Ray cluster, through Ray Train.

``python -m launch.ray_train CONFIG.yaml [--dotted.key value ...]`` asks the cluster of RAY_ADDRESS (or one that it
starts on this machine) for `num_processes` workers, each with a GPU where `device` and the cluster have them, and runs
``pretrain.train`` in each. All of them must reach dataset and output under the same path.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from data_sharding.config import parse_config
from data_sharding.errors import EXIT_FAILED, run_main


def _train(job: dict[str, Any]) -> None:
    """What Ray runs in each worker."""
    import ray.train

    from pretrain.run import STOP_FILE
    from pretrain.train import main

    # Ray works elsewhere; the paths in the config are meant from where the command was given.
    os.chdir(job["cwd"])
    os.environ[STOP_FILE] = job["stop_file"]
    code = main(job["words"])
    if code == EXIT_FAILED:
        raise RuntimeError("training failed; see above")
    ray.train.report({"code": code})


def _ask_to_stop(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def launch(words: list[str]) -> int:
    """Run a pretraining on Ray.

    Parameters
    ----------
    words : list of str
        Arguments of ``dreamscale pretrain``.

    Returns
    -------
    int
        Exit code of the training, 75 after SIGTERM, SIGINT or SIGUSR1 to this process.

    Raises
    ------
    RequestError
        If the request is wrong.
    """
    from pretrain.config import PretrainConfig

    config = parse_config(PretrainConfig, words, prog="dreamscale pretrain", positionals=("config",))
    if "RAY_ADDRESS" not in os.environ:
        # A cluster of its own must not ask for a token that nobody has given out.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(log_to_driver=True, include_dashboard=False, configure_logging=False)
    output = Path(config.output).absolute()
    # Outside the run directory, which a refused request must not make.
    stop_file = output.with_name(f".{output.name}.stop")
    stop_file.unlink(missing_ok=True)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda *_: _ask_to_stop(stop_file))
    gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= config.num_processes
    trainer = TorchTrainer(
        _train,
        train_loop_config={"words": words, "cwd": str(Path.cwd()), "stop_file": str(stop_file)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_processes, use_gpu=gpus),
        run_config=RunConfig(
            name=f".{output.name}.ray",
            storage_path=str(output.parent),
            failure_config=FailureConfig(max_failures=config.restarts),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        print(f"dreamscale: training on Ray failed ({type(error).__name__}); see above", file=sys.stderr)
        return EXIT_FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop_file.unlink(missing_ok=True)
        ray.shutdown()
    return int((result.metrics or {}).get("code", EXIT_FAILED))


def main(argv: list[str] | None = None) -> int:
    """Pretrain on Ray from the command line.

    Parameters
    ----------
    argv : list of str, optional
        ``CONFIG.yaml [--dotted.key value ...]``.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(launch, argv)


if __name__ == "__main__":
    sys.exit(main())
