"""Start a Ray cluster on the machines of one job, and run a command on the cluster.

``python -m launch.ray_nodes --nodes N --index I --head HOST --port PORT -- STAGE ARGUMENTS``

A job starts this module once on each machine. Machine 0 starts the head of the cluster and runs the command; the other
machines join the cluster. When the command has ended, the cluster ends on all machines.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from data_sharding.common.cores import count_cores
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, error_line, printable
from data_sharding.common.stop import find_child_processes, kill_processes
from data_sharding.job.cluster import HEAD_S, OBJECT_STORE, head_answers, short_temporary_folder
from data_sharding.job.isolation import owned_folder

START_S = 300.0
"""Seconds within which the head of the cluster must answer."""
QUICK_S = 300.0
"""If Ray ends on a machine within this number of seconds, its start has failed."""
START_TRIES = 3
"""Number of failed starts in a row after which a machine gives up."""
_ELSEWHERE = "192.0.2.1"
"""An address for examples (RFC 5737). The way to it starts at the interface for outgoing connections."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def _ignore_signals() -> None:
    """Let a process ignore stop signals: a cluster sends them to all processes, and only the command handles them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _start_ray(address: str, own: str, folder: Path, *, head: bool) -> subprocess.Popen[bytes]:
    """Start Ray on this machine; the process runs until Ray ends."""
    if head:
        words = ["--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false"]
    else:
        words = ["--address", address]
    # Without --temp-dir, a machine that joins would use the path of the head's folder, and nobody would remove it.
    words += ["--temp-dir", str(folder / "ray")]
    words += ["--node-ip-address", own, "--num-cpus", str(count_cores()), "--object-store-memory", str(OBJECT_STORE)]
    program = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    with (folder / "ray.log").open("ab") as log:
        return subprocess.Popen(
            [program, "start", "--block", "--disable-usage-stats", *words],
            stdout=log,
            stderr=log,
            preexec_fn=_ignore_signals,
        )


def _wait_for_head(ip: str, port: int, ray: subprocess.Popen[bytes] | None) -> bool:
    """Wait until the head of the cluster answers; return False if it does not answer in time."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and (ray is None or ray.poll() is None):
        if head_answers(ip, port):
            return True
        time.sleep(0.5)
    return False


class _Driver:
    """The command that uses the cluster. Signals to this process are passed on to the command."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.signalled = 0
        for number in _SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, _: FrameType | None) -> None:
        self.signalled = number
        if self.process is not None:
            self.process.send_signal(number)

    def run(self, words: list[str]) -> int:
        # A signal that arrived while Ray started must also stop the command.
        self.process = subprocess.Popen([sys.executable, "-m", "launch", *words])
        if self.signalled:
            self.process.send_signal(self.signalled)
        code = self.process.wait()
        return code if code >= 0 else 128 - code


def _lead(ip: str, port: int, nodes: int, words: list[str], folder: Path) -> int:
    """Start the head of the cluster, run the command, and return the exit code of the command."""
    driver = _Driver()
    address = f"{ip}:{port}"
    ray = _start_ray(address, ip, folder, head=True)
    if not _wait_for_head(ip, port, ray):
        return _failed(f"Ray did not start at {address}", folder)
    return driver.run([*words, "--ray.address", address, "--ray.min_nodes", str(nodes)])


def _join(ip: str, port: int, folder: Path) -> int:
    """Join the cluster, and return when the head of the cluster has ended."""
    # Only the head decides when the work is done, also after a stop signal.
    _ignore_signals()
    if not _wait_for_head(ip, port, None):
        return _failed(f"the head of the Ray cluster at {ip}:{port} does not answer", folder)
    own = _find_outgoing_address(ip)
    ray = _start_ray(f"{ip}:{port}", own, folder, head=False)
    seen = started = time.monotonic()
    failures = 0
    while time.monotonic() - seen < HEAD_S:
        if head_answers(ip, port):
            seen = time.monotonic()
            if ray.poll() is not None:
                # Ray has ended on this machine, although the cluster is still there, so join the cluster again.
                failures = failures + 1 if seen - started < QUICK_S else 0
                if failures == START_TRIES:
                    print(f"dreamscale: Ray did not start on {own} in {failures} tries", file=sys.stderr)
                    return EXIT_FAILED
                if failures == 1:
                    _failed(f"Ray did not start on {own}; the start is tried again", folder)
                ray = _start_ray(f"{ip}:{port}", own, folder, head=False)
                started = time.monotonic()
        time.sleep(1.0)
    return EXIT_DONE


def _failed(text: str, folder: Path) -> int:
    """Print the end of Ray's log and a message, and return the exit code of a failure."""
    log = folder / "ray.log"
    for line in log.read_text(errors="replace").splitlines()[-20:] if log.is_file() else []:
        print(f"ray: {printable(line)}", file=sys.stderr)
    print(f"dreamscale: {text}; the lines above are Ray's own messages", file=sys.stderr, flush=True)
    return EXIT_FAILED


def _find_outgoing_address(target: str) -> str:
    """Return the address of this machine from which it reaches another address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # Sends nothing, but chooses the address.
        return probe.getsockname()[0]


def find_head(name: str, index: int, nodes: int) -> str:
    """Return the address at which the machines of a job find machine 0.

    Parameters
    ----------
    name : str
        Name or address of machine 0.
    index : int
        Number of this machine.
    nodes : int
        Number of machines.

    Returns
    -------
    str
        The address. On machine 0, the own name is often a loopback address (Debian writes 127.0.1.1 into /etc/hosts).
        The other machines cannot use it, so the address of the interface for outgoing connections is returned instead.

    Raises
    ------
    OSError
        If the name has no address that the other machines can use.
    """
    try:
        ip = socket.gethostbyname(name)
    except OSError as error:
        raise OSError(f"the name of the first machine, {name}, has no address here ({error})") from None
    if index or nodes == 1 or not ipaddress.ip_address(ip).is_loopback:
        return ip
    try:
        ip = _find_outgoing_address(_ELSEWHERE)
    except OSError as error:
        raise OSError(
            f"the name of this machine, {name}, means {ip} here, and no interface for other machines was found "
            f"({error}); write the machine's address in the network into /etc/hosts"
        ) from None
    return ip


def main(argv: list[str] | None = None) -> int:
    """Run a command on a Ray cluster of the job's machines.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; `sys.argv[1:]` by default.

    Returns
    -------
    int
        On machine 0, the exit code of the command. On the other machines 0, or 1 if the head did not answer or Ray did
        not start.
    """
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--")
    parser = argparse.ArgumentParser(prog="python -m launch.ray_nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True, help="number of machines")
    parser.add_argument("--index", type=int, required=True, help="number of this machine, from 0 on")
    parser.add_argument("--head", required=True, help="name or address of machine 0")
    parser.add_argument("--port", type=int, required=True, help="port of the head on machine 0")
    job = parser.parse_args(words[:end])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ip = find_head(job.head, job.index, job.nodes)
    except OSError as error:
        print(f"dreamscale: {error_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    with owned_folder(Path(short_temporary_folder()), "ds-ray") as folder:
        try:
            if job.index == 0:
                return _lead(ip, job.port, job.nodes, words[end + 1 :], folder)
            return _join(ip, job.port, folder)
        finally:
            kill_processes(find_child_processes())


if __name__ == "__main__":
    sys.exit(main())
