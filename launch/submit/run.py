"""The command ``dreamscale submit``: read its arguments, render the job file and submit the job."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError
from launch.submit.config import SubmitConfig
from launch.submit.kubernetes import follow_pods
from launch.submit.render import render
from launch.submit.slurm import check_logs, follow
from launch.submit.stage import check_stage

COMMANDS = {"slurm": ["sbatch", "--parsable"], "ray": ["bash", "-s"], "k8s": ["kubectl", "create", "-f", "-"]}
"""For each scheduler, the command that reads a job file from standard input and submits the job."""
TOOLS = {"slurm": "sbatch", "ray": "ray", "k8s": "kubectl"}
"""For each scheduler, the program that must be installed to submit a job."""
REPEATED = ("sbatch", "env", "secret", "toleration", "node_selector", "label")
"""Options that may be given several times."""
SWITCHES = ("dry_run", "preflight")
"""Options that may be given without a value."""


def submit(config: SubmitConfig, text: str) -> int:
    """Submit a job file. Print the number or the name of the job on stdout, and on stderr how to follow the job.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    text : str
        Text of the job file.

    Returns
    -------
    int
        0, or 1 if the cluster refused the job.

    Raises
    ------
    RequestError
        If the cluster's command-line tool is not installed on this machine, or the job cannot write its log.
    """
    tool = TOOLS[config.scheduler]
    # Also search for the program in the folder of this Python: the program `ray` is there even if the environment is
    # not activated.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    if shutil.which(tool, path=path) is None:
        raise RequestError(
            f"'{tool}' is not on the PATH of this machine; submit from a machine that has it, or use --dry-run"
        )
    slurm = config.scheduler == "slurm"
    if slurm:
        check_logs(config.logs)
    done = subprocess.run(
        COMMANDS[config.scheduler],
        input=text,
        stdout=None if config.scheduler == "ray" else subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path},
        check=False,
    )
    if done.returncode:
        print(f"dreamscale: {tool} refused the job (exit code {done.returncode})", file=sys.stderr)
        return EXIT_FAILED
    if slurm:
        # With several clusters, sbatch prints NUMBER;CLUSTER.
        job = done.stdout.strip().partition(";")[0]
        print(follow(job, config.name, config), file=sys.stderr)
        print(job)
    elif config.scheduler == "k8s":
        print(follow_pods(config.name, config, config.nodes), file=sys.stderr)
        print(config.name)
    return EXIT_DONE


def _normalise_flags(words: list[str]) -> list[str]:
    """Make a user's words readable for the parser.

    Write ``--gpus_per_node`` for ``--gpus-per-node``, ``--dry_run=true`` for ``--dry-run`` and the other `SWITCHES`,
    and one list for all ``--sbatch``, and for each other option of `REPEATED`.
    """
    normal: list[str] = []
    options: dict[str, list[str]] = {}
    skip = False
    for word, after in itertools.pairwise([*words, ""]):
        if skip:
            skip = False
            continue
        if word.startswith("--"):
            key, sign, value = word.partition("=")
            word = "--" + key[2:].replace("-", "_") + sign + value
            name = key[2:].replace("-", "_")
            if name in REPEATED:
                options.setdefault(name, []).append(value if sign else after)
                skip = not sign
                continue
        normal.append(f"{word}=true" if word[2:] in SWITCHES and after not in ("true", "false") else word)
    lists = [word for name, values in options.items() for word in (f"--{name}", json.dumps(values))]
    return [*normal, *lists]


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale submit slurm|ray|k8s STAGE [CONFIG] [--key value ...] [-- ARGUMENTS OF THE STAGE]``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; `sys.argv[1:]` by default.

    Returns
    -------
    int
        Exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    own, extra = words[:end], words[end + 1 :]

    def render_and_submit(config: SubmitConfig) -> int:
        text = render(config, check_stage(config, extra))
        if config.dry_run:
            print(text, end="")
            return EXIT_DONE
        return submit(config, text)

    positionals = ("scheduler", "stage", "stage_config")
    run = command(SubmitConfig, render_and_submit, prog="dreamscale submit", positionals=positionals)
    return run(_normalise_flags(own))
