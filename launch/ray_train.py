"""Run a command that trains or generates on a Ray cluster, through Ray Train.

``python -m launch.ray_train [--nodes N] [--gpus-per-node N] STAGE [ARGUMENTS]`` starts `num_processes` processes in the
Ray cluster at RAY_ADDRESS, or in a new cluster on this machine if RAY_ADDRESS is not set. Each worker of Ray Train
starts the launcher of the command (torchrun or Accelerate), and the launcher starts the processes of this worker. The
folder in which the command runs, the data and the output must have the same paths on all machines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from data_sharding.common.cores import count_cores
from data_sharding.common.errors import (
    EXIT_BAD_REQUEST,
    EXIT_FAILED,
    EXIT_STOPPED,
    RequestError,
    one_line,
    run_main,
)
from data_sharding.common.files import atomic_write_text
from data_sharding.job.cluster import ClusterFailed, check_head, require_token, say, watch_head
from launch.local import LAST_CHECKPOINT_S, LONE_REFUSAL_S, Processes, find_free_port, launcher_command
from launch.stages import STAGES
from launch.worker import read_numbers
from pretrain.runs.stop import StopSignal

START_OF_RUN = "DREAMSCALE_RAY_RUN"
"""Environment variable of all processes of one start of a run. After a failure, Ray Train starts the run again. The
processes that are still there from the time before the failure are found by this variable."""
START_S = 10.0
"""If no process has started this number of seconds after a request to stop, the command ends without them."""
_STOP, _STARTED = "stop", ".started"


def _run_group(job: dict[str, Any]) -> None:
    """Run the processes of one group, in a worker of Ray Train; write their common exit code to a file."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    folder, index = Path(job["folder"]), get_context().get_world_rank()
    own = ray.util.get_node_ip_address()
    if index == 0:
        for old in (*folder.glob("*.exit"), *folder.glob(f"*{_STARTED}")):
            old.unlink()
    # No group starts its processes before group 0 has deleted the exit codes of the time before a failure.
    address, port = broadcast_from_rank_zero((own, find_free_port()))
    _end_leftovers(job["run"])
    # Ray starts workers in another folder. Go back to the folder in which the user started the command, so that
    # relative paths in the config are right.
    os.chdir(job["cwd"])
    stage, local = STAGES[job["stage"]], job["local"]
    command = launcher_command(stage, job["words"], local, nodes=job["groups"], index=index, address=address, port=port)
    launched = Path(tempfile.mkdtemp(prefix="dreamscale-launch-"))
    try:
        running = Processes(command, launched, local, **_environment(job, own))
        (folder / f"{index}{_STARTED}").touch()
        code = running.wait(_Look(running, folder))
        died = running.any_died(code)
    finally:
        shutil.rmtree(launched, ignore_errors=True)
    if died and not (folder / _STOP).exists():
        raise RuntimeError("a process died")
    atomic_write_text(folder / f"{index}.exit", str(code))


def _environment(job: dict[str, Any], own: str) -> dict[str, str]:
    """Return the environment variables of the processes of a group."""
    import psutil
    from ray.train import get_context

    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join((root, *filter(None, [os.environ.get("PYTHONPATH")])))
    more = {"PYTHONPATH": path, START_OF_RUN: job["run"]}
    # Ray sets OMP_NUM_THREADS in its workers to the number of cores that it has reserved. Use all cores instead, unless
    # the user has set the variable: then Ray's process on this machine has it, too.
    more["OMP_NUM_THREADS"] = str(max(1, count_cores() // (get_context().get_local_world_size() * job["local"])))
    with contextlib.suppress(psutil.Error):
        if parent := psutil.Process().parent():
            more["OMP_NUM_THREADS"] = parent.environ().get("OMP_NUM_THREADS", more["OMP_NUM_THREADS"])
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # By default, gloo uses the address of the machine's name, which is a loopback address on many machines.
        for name, addresses in psutil.net_if_addrs().items():
            if own in [one.address for one in addresses]:
                more["GLOO_SOCKET_IFNAME"] = name
    return more


class _Look:
    """Passes a request to stop on to the processes of a group, and ends them if another group has failed."""

    def __init__(self, running: Processes, folder: Path) -> None:
        self.running, self.folder = running, folder
        self.failed: dict[int, float] = {}

    def __call__(self) -> None:
        if not self.running.requests and (self.folder / _STOP).exists():
            self.running.ask_to_stop(signal.SIGTERM, None)
        with contextlib.suppress(OSError, ValueError):
            for code in read_numbers(self.folder, "exit").values():
                self.failed.setdefault(code, time.monotonic())
        for code, limit in ((EXIT_BAD_REQUEST, LONE_REFUSAL_S), (EXIT_FAILED, LAST_CHECKPOINT_S)):
            if time.monotonic() - self.failed.get(code, math.inf) > limit:
                self.running.kill(signal.SIGKILL)


def _end_leftovers(run: str) -> None:
    """Wait for the processes on this machine from the time before a failure; kill them if they need too long.

    Ray ends its workers at a failure. The processes of the workers then get SIGTERM, and may be writing a checkpoint.
    """
    import psutil

    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(START_OF_RUN) == run:
                left.append(process)
    until = time.monotonic() + LAST_CHECKPOINT_S
    while (left := [process for process in left if _is_running(process)]) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _is_running(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        # A process that has ended is a zombie until its parent reads its exit code.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _read_words(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.ray_train", description=__doc__)
    parser.add_argument("--nodes", type=int, help="machines; each runs the same number of processes; by default, Ray "
                        "puts each process where there is room")  # fmt: skip
    parser.add_argument("--gpus-per-node", type=int, help="GPUs per machine; by default, each process gets a GPU if "
                        "the cluster has enough GPUs and the key 'device' allows it")  # fmt: skip
    parser.add_argument("stage", help="command to run, such as pretrain, align or generate")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser.parse_args(words)


def launch(words: list[str]) -> int:
    """Run a command on Ray.

    Parameters
    ----------
    words : list of str
        Options of this module, name of the command, and arguments of the command.

    Returns
    -------
    int
        Exit code of the command; 75 if SIGTERM, SIGINT or SIGUSR1 stopped it.

    Raises
    ------
    RequestError
        If the arguments or the config are wrong.
    """
    given = _read_words(words)
    stage = STAGES.get(given.stage)
    if stage is None or stage.launcher is None:
        names = ", ".join(name for name, stage in STAGES.items() if stage.launcher)
        raise RequestError(f"'{given.stage}' cannot run on Ray Train; use one of {names}")
    config = stage.read(given.words)
    processes = config.num_processes
    groups = processes if given.nodes is None else given.nodes
    if groups < 1 or processes % groups:
        raise RequestError(
            f"num_processes {processes} cannot be divided among {groups} machines (--nodes); change one of them"
        )
    if "RAY_ADDRESS" not in os.environ:
        require_token()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(log_to_driver=True, include_dashboard=False, configure_logging=False)
    there = ray.cluster_resources()
    gpus = given.gpus_per_node
    if gpus is None:
        has_gpus = getattr(config, "device", "auto") != "cpu" and there.get("GPU", 0) >= processes
        gpus = processes // groups if has_gpus else 0
    job = {"stage": given.stage, "words": given.words, "cwd": str(Path.cwd()), "local": processes // groups}
    job |= {"groups": groups, "spread": given.nodes is not None and groups > 1}
    machines = sum(node["Alive"] for node in ray.nodes())
    if (job["spread"] and machines < groups) or there.get("GPU", 0) < gpus * groups:
        say(
            f"dreamscale: {given.stage} needs {groups if job['spread'] else 1} machines and {gpus * groups} GPUs, and "
            f"the Ray cluster has {machines} machines and {there.get('GPU', 0):g} GPUs; waiting until there are more"
        )
    try:
        return _run(job, gpus, getattr(config, "restarts", 0))
    finally:
        ray.shutdown()


def _run(job: dict[str, Any], gpus: int, restarts: int) -> int:
    """Run a job through Ray Train, and return its exit code."""
    # Ray's own records, and the files of this module, go to a folder of their own. The same command uses the same
    # folder again, so delete what a killed command has left: Ray must not try to resume its records.
    name = hashlib.sha256("\0".join([job["stage"], *job["words"]]).encode()).hexdigest()[:12]
    folder = Path(job["cwd"]) / f".dreamscale-ray-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as error:
        raise RequestError(f"{folder}: cannot be made ({error.strerror}); run the command in another folder") from None
    job |= {"folder": str(folder), "run": f"{folder}-{os.getpid()}-{time.time():.0f}"}
    fit = _Fit(job, folder, gpus, restarts)
    asked = None
    try:
        with StopSignal() as stop, watch_head("Run the same command again"):
            fit.start()
            while fit.is_alive():
                fit.join(0.5)
                check_head()
                if stop.requested and asked is None:
                    asked = time.monotonic()
                    (folder / _STOP).touch()
                if asked and time.monotonic() - asked > START_S and not any(folder.glob(f"*{_STARTED}")):
                    say(f"dreamscale: {job['stage']} was stopped before its processes started")
                    return EXIT_STOPPED
        codes = set(read_numbers(folder, "exit").values())
    except ClusterFailed as error:
        say(f"dreamscale: {error} Run the same command again")
        return EXIT_FAILED
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if fit.error is not None:
        say(
            f"dreamscale: {job['stage']} on Ray failed ({type(fit.error).__name__}: {one_line(fit.error)}); run the "
            "same command again"
        )
        return EXIT_FAILED
    return next(
        (code for code in (EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_STOPPED) if code in codes),
        max(codes, default=EXIT_FAILED),
    )


class _Fit(threading.Thread):
    """Runs Ray Train in a thread, because in the main thread Ray Train would replace the handler of SIGINT."""

    def __init__(self, job: dict[str, Any], folder: Path, gpus: int, restarts: int) -> None:
        super().__init__(daemon=True)
        self.job, self.folder, self.gpus, self.restarts = job, folder, gpus, restarts
        self.error: Exception | None = None

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        resources = {"CPU": float(self.job["local"])} | ({"GPU": float(self.gpus)} if self.gpus else {})
        try:
            DataParallelTrainer(
                _run_group,
                train_loop_config=self.job,
                scaling_config=ScalingConfig(
                    num_workers=self.job["groups"],
                    use_gpu=self.gpus > 0,
                    resources_per_worker=resources,
                    placement_strategy="STRICT_SPREAD" if self.job["spread"] else "PACK",
                ),
                run_config=RunConfig(
                    name=self.folder.name,
                    storage_path=str(self.folder.parent),
                    failure_config=FailureConfig(max_failures=self.restarts),
                ),
            ).fit()
        except Exception as error:
            self.error = error


def main(argv: list[str] | None = None) -> int:
    """Run a command on Ray: ``[--nodes N] [--gpus-per-node N] STAGE [ARGUMENTS]``; returns the exit code."""
    return run_main(launch, argv)


if __name__ == "__main__":
    sys.exit(main())
