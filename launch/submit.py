"""The command ``dreamscale submit slurm|ray|k8s STAGE CONFIG``: write the job file for a cluster, and submit it."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound

from data_sharding.common.config import command, parse_config
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError, show
from data_sharding.common.shipped import shipped_configs
from launch.stages import STAGES, Stage

TEMPLATES = {"slurm": "slurm.sh.j2", "ray": "ray.sh.j2", "k8s": "k8s.yaml.j2"}
"""Job template in ``configs/cluster`` for each scheduler."""
COMMANDS = {"slurm": ["sbatch"], "ray": ["bash", "-s"], "k8s": ["kubectl", "apply", "-f", "-"]}
"""For each scheduler, the command that reads a job file from standard input and submits the job."""
TOOLS = {"slurm": "sbatch", "ray": "ray", "k8s": "kubectl"}
"""For each scheduler, the program that must be installed to submit a job."""


@dataclass(kw_only=True)
class SubmitConfig:
    """Write a cluster job that runs a command (the stage), and submit the job. Arguments after '--' go to the stage."""

    scheduler: Literal["slurm", "ray", "k8s"]
    """Scheduler that runs the job."""
    stage: str
    """Command to run: shard, pretrain, align, or the command of a paper (finetune, ddpm, linear)."""
    stage_config: str
    """Config file (YAML) of the stage; its path must exist on the machines of the cluster."""
    dry_run: bool = False
    """Print the job file instead of submitting it."""
    nodes: int = 1
    """Number of machines that the job uses."""
    gpus_per_node: int = 8
    """GPUs on each machine. Training runs one process on each GPU. With 0, each machine runs one process on its CPU."""
    cpus_per_node: int = 64
    """CPU cores per machine; not used with Ray."""
    name: str = ""
    """Name of the job; by default dreamscale-STAGE."""
    directory: str = ""
    """Folder on the cluster in which the job runs; by default the current folder."""
    python: str = "python"
    """Python interpreter on the cluster, in an environment with Dreamscale."""
    time: str = "24:00:00"
    """Slurm: time limit. When the time is over, the job goes back into the queue and later resumes."""
    partition: str = ""
    """Slurm: partition for the job; by default the cluster's default partition."""
    account: str = ""
    """Slurm: account to charge; by default the user's default account."""
    logs: str = "."
    """Slurm: folder for the log file of the job."""
    address: str = "http://127.0.0.1:8265"
    """Ray: address of the cluster's job server."""
    image: str = "dreamscale:latest"
    """Kubernetes: container image with Dreamscale installed."""
    namespace: str = "default"
    """Kubernetes: namespace of the job."""
    claim: str = "dreamscale-data"
    """Kubernetes: persistent volume claim that holds data, configs and runs."""
    mount: str = "/data"
    """Kubernetes: folder at which the claim is mounted."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0 or self.cpus_per_node < 1:
            raise ValueError("nodes and cpus_per_node must be at least 1, and gpus_per_node at least 0")
        self.name = self.name or f"dreamscale-{self.stage}"
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", self.name):
            raise ValueError(f"name '{self.name}': use only lower-case letters, digits and '-', at most 52 characters")
        for key in ("time", "partition", "account", "logs", "address", "image", "namespace", "claim", "mount"):
            # Slurm reads its options from comments of the job file. Values cannot be quoted there, and a blank or '#'
            # would end the value.
            if not re.fullmatch(r"([\w./:@%+=,~\[\]][\w./:@%+=,~\[\]-]*)?", getattr(self, key)):
                raise ValueError(
                    f"{key} '{getattr(self, key)}': use only letters, digits and . / : @ % + = , ~ [ ] _ - in this "
                    "value, and no - at its beginning"
                )
        for key in ("stage_config", "directory", "python"):
            check_printable(key, getattr(self, key))

    @property
    def processes(self) -> int:
        """Total number of training processes on all machines."""
        return self.nodes * max(1, self.gpus_per_node)


def check_printable(key: str, value: str) -> None:
    """Refuse a value with a line break or another control character, because it could add a line to the job file.

    Raises
    ------
    ValueError
        If the value has a line break or another control character.
    """
    if not value.isprintable():
        raise ValueError(f"{key} '{show(value)}': use no line breaks and no other control characters in this value")


def check_stage(config: SubmitConfig, extra: list[str]) -> tuple[Stage, list[str]]:
    """Check the arguments of the stage, and add the key ``num_processes`` to them if the stage has a launcher.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    extra : list of str
        Arguments after '--', for the stage.

    Returns
    -------
    stage : Stage
        The stage to run.
    words : list of str
        All arguments of the stage.

    Raises
    ------
    RequestError
        If the stage does not exist, or its arguments are wrong.
    """
    available = [name for name, stage in STAGES.items() if stage.config]
    stage = STAGES.get(config.stage)
    if stage is None or stage.config is None:
        raise RequestError(f"stage '{config.stage}' cannot be submitted; use one of {', '.join(available)}")
    if config.nodes > 1 and stage.launcher is None and not stage.uses_ray:
        raise RequestError(f"{config.stage} runs on one machine; leave --nodes out")
    if config.nodes > 1 and stage.uses_ray and config.scheduler != "ray":
        raise RequestError(f"{config.stage} uses several machines only through Ray; use 'submit ray', or --nodes 1")
    if config.nodes > 1 and not stage.uses_ray and config.scheduler == "ray":
        raise RequestError("with ray, training runs on one machine; use slurm or k8s for more nodes")
    words = [config.stage_config, *extra]
    for word in extra:
        try:
            check_printable("argument", word)
        except ValueError as error:
            raise RequestError(str(error)) from None
    if stage.launcher is not None:
        words += ["--num_processes", str(config.processes)]
    module, name = stage.config.split(":")
    parse_config(
        getattr(importlib.import_module(module), name),
        words,
        prog=f"dreamscale {config.stage}",
        positionals=("config",),
    )
    return stage, words


def build_command(config: SubmitConfig, stage: Stage, words: list[str]) -> str:
    """Build the command that runs on each node.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    stage : Stage
        The stage to run.
    words : list of str
        Arguments of the stage.

    Returns
    -------
    str
        Command line for a shell. The shell must set the variables HEAD_NODE and PORT, and SLURM_NODEID or NODE_INDEX.
    """
    python, arguments = shlex.quote(config.python), shlex.join(words)
    if stage.launcher is None:
        name = stage.module.removesuffix(".__main__")
        joined = " --ray.address auto" if config.scheduler == "ray" and stage.uses_ray else ""
        return f"{python} -m {name} {arguments}{joined}"
    if config.scheduler == "ray":
        return f"{python} -m launch {config.stage} {arguments}"
    index = "$SLURM_NODEID" if config.scheduler == "slurm" else "$NODE_INDEX"
    local = max(1, config.gpus_per_node)
    if stage.launcher == "torchrun":
        flags = f"torchrun --nnodes {config.nodes} --nproc-per-node {local} --node-rank {index}"
        flags += " --master-addr $HEAD_NODE --master-port $PORT"
    else:
        several = "--multi_gpu " if config.processes > 1 else ""
        flags = f"accelerate {several}--num_processes {config.processes} --num_machines {config.nodes}"
        flags += f" --machine_rank {index} --main_process_ip $HEAD_NODE --main_process_port $PORT"
        flags += " --mixed_precision no --dynamo_backend no"
    return f"{python} -m launch.agent {flags} -m launch.worker {stage.module} {arguments}"


def _make_environment() -> Environment:
    """Return Jinja's environment for the job templates, with filters that quote values for a shell or for YAML."""
    environment = Environment(
        loader=FileSystemLoader(shipped_configs() / "cluster"),
        undefined=StrictUndefined,
        # Do not escape values for HTML. The filters `shell` and `json` quote values for a shell and for YAML. Values in
        # Slurm's comments cannot be quoted, so `SubmitConfig` refuses special characters.
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shell"] = shlex.quote
    # Quote YAML strings as JSON, because every JSON string is also a YAML string. Jinja's filter `tojson` would also
    # escape HTML characters.
    environment.filters["json"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


def render(config: SubmitConfig, stage: Stage, words: list[str]) -> str:
    """Render the job file.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    stage : Stage
        The stage to run.
    words : list of str
        Arguments of the stage.

    Returns
    -------
    str
        Text of the job file.

    Raises
    ------
    RequestError
        If the template is not installed.
    """
    try:
        template = _make_environment().get_template(TEMPLATES[config.scheduler])
    except TemplateNotFound as error:
        raise RequestError(
            f"{shipped_configs() / 'cluster' / str(error)}: no such file; install Dreamscale again, with pip"
        ) from None
    # A stage without a launcher and without Ray runs as one process, which uses all cores of the machine.
    processes = max(1, config.gpus_per_node) if stage.launcher or stage.uses_ray else 1
    return template.render(
        name=config.name,
        nodes=config.nodes,
        cpus=config.cpus_per_node,
        # A stage without a launcher, such as shard, needs no GPU.
        gpus=config.gpus_per_node if stage.launcher else 0,
        threads=max(1, config.cpus_per_node // processes),
        time=config.time,
        partition=config.partition,
        account=config.account,
        logs=config.logs,
        directory=config.directory or str(Path.cwd()),
        launch=build_command(config, stage, words),
        address=config.address,
        image=config.image,
        namespace=config.namespace,
        claim=config.claim,
        mount=config.mount,
    )


def submit(config: SubmitConfig, text: str) -> int:
    """Submit a job file.

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
        If the cluster's command-line tool is not installed on this machine.
    """
    tool = TOOLS[config.scheduler]
    # Also search for the program in the folder of this Python: the program `ray` is there even if the environment is
    # not activated.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    if shutil.which(tool, path=path) is None:
        raise RequestError(
            f"'{tool}' is not on the PATH of this machine; submit from a machine that has it, or use --dry-run"
        )
    done = subprocess.run(
        COMMANDS[config.scheduler], input=text, text=True, env={**os.environ, "PATH": path}, check=False
    )
    if done.returncode:
        print(f"dreamscale: {tool} refused the job (exit code {done.returncode})", file=sys.stderr)
    return EXIT_FAILED if done.returncode else EXIT_DONE


def _normalise_flags(words: list[str]) -> list[str]:
    """Write ``--gpus_per_node`` for ``--gpus-per-node``, and ``--dry_run=true`` for ``--dry-run``."""
    normal = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            key, sign, value = word.partition("=")
            word = "--" + key[2:].replace("-", "_") + sign + value
        normal.append("--dry_run=true" if word == "--dry_run" and following not in ("true", "false") else word)
    return normal


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale submit slurm|ray|k8s STAGE CONFIG [--key value ...] [-- ARGUMENTS OF THE STAGE]``.

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
        text = render(config, *check_stage(config, extra))
        if config.dry_run:
            print(text, end="")
            return EXIT_DONE
        return submit(config, text)

    positionals = ("scheduler", "stage", "stage_config")
    run = command(SubmitConfig, render_and_submit, prog="dreamscale submit", positionals=positionals)
    return run(_normalise_flags(own))


if __name__ == "__main__":
    sys.exit(main())
