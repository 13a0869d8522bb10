"""A Slurm of two hosts on this machine, and jobs that ``dreamscale submit`` renders for it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.submit.run import main as submit

ROOT = Path(__file__).parents[3]
SANDBOX = Path(__file__).with_name("sandbox.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")
WAIT_S = 240.0
"""Time limit for every wait. A machine that is busy with other tests can be very slow."""


def why_not() -> str:
    """Return why this machine cannot have the sandbox; an empty text if it can."""
    if sys.platform != "linux" or os.geteuid():
        return "a Slurm of two hosts needs Linux and root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
    # A container may forbid what the sandbox needs: namespaces, and mounts inside them.
    probe = ["unshare", "--net", "--uts", "--mount", "sh", "-c", "mount --make-rprivate / && hostname probe"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"this machine allows no namespaces: {done.stderr.strip()}" if done.returncode else ""


class Cluster:
    """A running sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(self, *words: str, check: bool = True, text: str | None = None) -> str:
        """Run a command of Slurm, and return what it prints."""
        # Give jobs the environment of a user, not the one of a test: RANK or WANDB_* would change a job.
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "DREAMSCALE_CACHE")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}:/usr/sbin:/sbin"
        environment |= {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            ["bash", str(SANDBOX), "run", str(self.folder), *words],
            input=text, capture_output=True, text=True, env=environment, timeout=60, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, text: str, *options: str) -> str:
        """Submit a job file, and return the number of the job."""
        return self.call("sbatch", "--parsable", *options, text=text)

    def show(self, job: str) -> dict[str, str]:
        """Return what Slurm says about a job."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).split() if "=" in word)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of some states; by default, until it has ended."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")
        until(lambda: self.show(job)["JobState"] in wanted)
        return self.show(job)

    def signal(self, job: str, number: int) -> None:
        """Send a signal to the processes of a job, as Slurm does before the time limit."""
        self.call("scancel", f"--signal={number}", job)

    def preempt(self) -> str:
        """Submit a short job that preempts all other jobs; return its number."""
        job = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --exclusive\n#SBATCH --partition=urgent\nsleep 1\n"
        return self.submit(job, "--output=/dev/null")

    @contextlib.contextmanager
    def cancels(self) -> Iterator[None]:
        """Cancel all jobs at the end of the block, and wait until the hosts are idle."""
        try:
            yield
        finally:
            self.call("scancel", "--user=root", check=False)
            self.call("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            until(lambda: not self.call("squeue", "--noheader"))


@contextlib.contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the sandbox in a folder, and end it."""
    up = subprocess.run(["bash", str(SANDBOX), "up", str(folder)], capture_output=True, text=True, check=False)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", str(SANDBOX), "down", str(folder)], capture_output=True, check=False)


def render_job(stage: str, *words: str) -> str:
    """Render a Slurm job with one process per host, which uses one core. Words after -- are for the stage."""
    end = words.index("--") if "--" in words else len(words)
    own = list(words[:end])
    for key, value in {"--cpus-per-node": "1", "--gpus-per-node": "0", "--python": sys.executable}.items():
        own += [] if key in own else [key, value]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert submit(["slurm", stage, *own, "--dry-run", *words[end:]]) == 0
    return text.getvalue()


def until(true: Callable[[], object], seconds: float = WAIT_S, alive: Callable[[], object] | None = None) -> None:
    """Wait until a condition is true; fail if it does not become true, or `alive` is false."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition did not become true in time"
        assert alive is None or alive()
        time.sleep(0.2)
