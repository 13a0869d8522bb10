"""Start and stop several training processes on this machine, and return one exit code for all processes.

The launcher (torchrun or Accelerate) runs in its own session, so that Ctrl-C reaches only this process and not the
launcher. This process then asks the training processes directly to stop. If the launcher received the signal, it would
kill the training processes after a time limit, perhaps before their checkpoint is complete.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from data_sharding.common.cores import count_cores
from data_sharding.common.errors import EXIT_BAD_REQUEST, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from data_sharding.common.plain_yaml import MAX_YAML, parse_yaml
from data_sharding.common.shipped import find_config
from data_sharding.common.untrusted import read_limited
from launch.stages import Stage
from launch.worker import FOLDER, read_numbers

LONE_REFUSAL_S = 20.0
"""If a training process ends with exit code 2 (wrong config), the other training processes have this many seconds to
end before they are killed."""
LAST_CHECKPOINT_S = 110.0
"""If the launcher has died, the training processes have this many more seconds to write a checkpoint."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def processes_wanted(argv: Sequence[str]) -> int:
    """Find out how many processes to launch, from the arguments of a command, without importing the command.

    Parameters
    ----------
    argv : sequence of str
        The stage's arguments.

    Returns
    -------
    int
        `num_processes` from the command line, or else from the YAML file. 0 if the command must run in this process,
        without a launcher. This is so in four cases: `num_processes` is 1 and `restarts` is 0; the user asks for the
        help text or for the config; a launcher has already started this process; or the arguments cannot be read (the
        command then reports the reason).
    """
    if {"-h", "--help"} & set(argv) or any(word.startswith("--print_config") for word in argv):
        return 0
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return 0
    count = max(1, number_wanted(argv, "num_processes", 1))
    return count if count > 1 or number_wanted(argv, "restarts", 0) > 0 else 0


def number_wanted(argv: Sequence[str], name: str, default: int) -> int:
    """Read the value of an integer key from the arguments of a command, without importing the command.

    Parameters
    ----------
    argv : sequence of str
        The stage's arguments.
    name : str
        Key of the integer.
    default : int
        Result if the key is missing, or if its value cannot be read (the command then reports the reason).

    Returns
    -------
    int
        The value on the command line, or else the value in the YAML file.
    """
    wanted: object = None
    # For some commands, the first argument is the folder of a model, not a config.
    files = [argv[0]] if argv and not argv[0].startswith("-") and not Path(argv[0]).is_dir() else []
    for position, word in enumerate(argv):
        key, _, value = word.partition("=")
        value = value or (argv[position + 1] if position + 1 < len(argv) else "")
        if key == "--config":
            files.append(value)
        elif key == f"--{name}":
            wanted = value
    if wanted is None:
        import yaml

        for file in files:
            try:
                content = parse_yaml(read_limited(find_config(file), MAX_YAML))
            except (OSError, ValueError, yaml.YAMLError):
                return default
            if isinstance(content, dict):
                wanted = content.get(name, wanted)
    try:
        return int(str(wanted))
    except ValueError:
        return default


def launcher_command(
    stage: Stage,
    argv: Sequence[str],
    processes: int,
    *,
    nodes: int = 1,
    index: int = 0,
    address: str = "127.0.0.1",
    port: int | None = None,
) -> list[str]:
    """Build the launcher's command line for one machine.

    Parameters
    ----------
    stage : Stage
        The stage to run.
    argv : sequence of str
        The stage's arguments.
    processes : int
        Number of processes on this machine.
    nodes : int
        Number of machines; each of them starts the launcher.
    index : int
        Number of this machine, from 0 on.
    address : str
        Address of machine 0.
    port : int, optional
        Port of the launcher on machine 0; by default a free port of this machine.

    Returns
    -------
    list of str
        The command line, as a list for `subprocess`.
    """
    port = find_free_port() if port is None else port
    # Accelerate can start several processes only if there are at least two, so torchrun starts a single process.
    launcher = stage.launcher if nodes * processes > 1 else "torchrun"
    if launcher == "torchrun":
        flags = ["--nnodes", str(nodes), "--nproc-per-node", str(processes), "--node-rank", str(index)]
        flags += ["--master-addr", address, "--master-port", str(port)]
    else:
        # With '--cpu --num_processes 2', Accelerate silently runs one process. '--multi_gpu' starts all processes, even
        # on a machine without GPUs.
        flags = ["--multi_gpu", "--num_processes", str(nodes * processes), "--num_machines", str(nodes)]
        flags += ["--machine_rank", str(index), "--mixed_precision", "no", "--dynamo_backend", "no"]
        flags += ["--main_process_ip", address, "--main_process_port", str(port)]
    return [
        sys.executable,
        "-m",
        "launch.agent",
        str(launcher),
        *flags,
        "-m",
        "launch.worker",
        stage.module,
        *argv,
    ]


def find_free_port() -> int:
    """Return a port of this machine that no program uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _environment(folder: Path, processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment[FOLDER] = str(folder)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // processes)))
    # Let each process keep freed memory for its next tensors. By default, the C library returns the memory of every
    # large tensor to the system, and the system must clear it before it can be used again, in every training step.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**25))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    return environment


class Processes:
    """The launcher and the training processes that it started on this machine.

    Parameters
    ----------
    command : list of str
        Command line of the launcher.
    folder : Path
        Folder into which the training processes write their process ids and exit codes.
    count : int
        Number of training processes on this machine.
    **environment : str
        Further environment variables for the launcher.
    """

    def __init__(self, command: list[str], folder: Path, count: int, **environment: str) -> None:
        self.folder, self.count = folder, count
        self.requests = 0
        self.killed = False
        more = {**_environment(folder, count), **environment}
        self.agent = subprocess.Popen(command, env=more, start_new_session=True)

    def ask_to_stop(self, number: int, _: FrameType | None) -> None:
        """Send a request to stop to the training processes; at the second Ctrl-C, kill all processes."""
        self.requests += 1
        if number == signal.SIGINT and self.requests > 1:
            self.killed = True
            self.kill(signal.SIGKILL)
            return
        workers = read_numbers(self.folder, "pid")
        if len(workers) < self.count:
            # Some training processes are still starting, so there are no results yet that could be lost.
            self.kill(signal.SIGTERM)
        for pid in workers.values():
            _send(pid, signal.SIGTERM)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the launcher and to all processes that it started."""
        if number == signal.SIGKILL:
            for pid in read_numbers(self.folder, "pid").values():
                _send(pid, number, group=True)
        _send(self.agent.pid, number, group=True)

    def wait(self, look: Callable[[], None] | None = None) -> int:
        """Wait until the launcher ends, and return one exit code for all processes.

        Parameters
        ----------
        look : callable, optional
            Function that is called several times a second.

        Returns
        -------
        int
            The exit code.
        """
        lone_since = None
        while self.agent.poll() is None:
            time.sleep(0.1)
            if look:
                look()
            codes = read_numbers(self.folder, "exit")
            if EXIT_BAD_REQUEST in codes.values() and len(codes) < self.count:
                lone_since = lone_since or time.monotonic()
                if time.monotonic() - lone_since > LONE_REFUSAL_S:
                    self.kill(signal.SIGKILL)
        code = self.agent.returncode
        found = read_numbers(self.folder, "exit").values()
        if EXIT_BAD_REQUEST in found:
            return EXIT_BAD_REQUEST
        if self.requests and code not in (EXIT_DONE, EXIT_STOPPED) and EXIT_FAILED not in found:
            how = "killed, without a new checkpoint" if self.killed else "stopped before training began"
            print(f"dreamscale: {how}; run the same command again", file=sys.stderr)
            return EXIT_STOPPED
        return code if code >= 0 else EXIT_FAILED

    def any_died(self, code: int) -> bool:
        """Wait until all processes have ended; return whether a process died without a request to stop."""
        if code != EXIT_FAILED or self.requests:
            return False
        until = time.monotonic() + LAST_CHECKPOINT_S
        workers = read_numbers(self.folder, "pid")
        # If the launcher has died, the training processes may still be writing their checkpoint.
        while (left := [pid for pid in workers.values() if _alive(pid)]) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            _send(pid, signal.SIGKILL, group=True)
        found = read_numbers(self.folder, "exit")
        return len(found) < self.count or EXIT_FAILED not in found.values()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A process that has ended is still listed (in state Z) until its parent has read its exit code.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, PermissionError):
        return False
    except OSError:
        return sys.platform != "linux"


def _send(pid: int, number: signal.Signals, *, group: bool = False) -> None:
    try:
        (os.killpg if group else os.kill)(pid, number)
    except (ProcessLookupError, PermissionError):
        if group:
            _send(pid, number)


def run_launched(stage: Stage, argv: Sequence[str], processes: int) -> int:
    """Run a stage in several processes of this machine.

    Parameters
    ----------
    stage : Stage
        The stage to run.
    argv : sequence of str
        The stage's arguments.
    processes : int
        Number of processes.

    Returns
    -------
    int
        The stage's exit code; 75 after a requested stop, whatever the launcher returns.
    """
    restarts = number_wanted(argv, "restarts", 0)
    for left in range(restarts, -1, -1):
        code, died = _run_once(stage, argv, processes)
        if not died:
            break
        hint = f"restarting (restarts left: {left - 1})" if left else "run the same command again"
        print(f"dreamscale: a training process died; {hint}", file=sys.stderr)
    return code


def _run_once(stage: Stage, argv: Sequence[str], processes: int) -> tuple[int, bool]:
    """Launch a stage once; return the exit code, and whether a process died without a request to stop."""
    folder = Path(tempfile.mkdtemp(prefix="dreamscale-launch-"))
    try:
        running = Processes(launcher_command(stage, argv, processes), folder, processes)
        before = {number: signal.signal(number, running.ask_to_stop) for number in _SIGNALS}
        try:
            code = running.wait()
            died = running.any_died(code)
        finally:
            if running.agent.poll() is None:
                running.kill(signal.SIGKILL)
                running.agent.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return code, died
