"""Cluster jobs: ``dreamscale submit slurm|ray|k8s STAGE CONFIG`` renders a job file and hands it in."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError, run_main
from data_sharding.common.shipped import shipped_configs
from launch.stages import STAGES, Stage

_FILES = {"slurm": "slurm.sh", "ray": "ray.sh", "k8s": "k8s.yaml"}
_TOOLS = {"slurm": "sbatch", "ray": "ray", "k8s": "kubectl"}


@dataclass(kw_only=True)
class SubmitConfig:
    """Render a cluster job for a stage and submit it. What follows '--' goes to the stage."""

    scheduler: Literal["slurm", "ray", "k8s"]
    """Who runs it."""
    stage: str
    """shard, pretrain, align, finetune or ddpm."""
    stage_config: str
    """The stage's YAML file, at a path that the cluster's machines see."""
    dry_run: bool = False
    """Print the job file instead of submitting it."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs, and so processes, of each machine; 0 trains one process a machine on the CPU."""
    cpus_per_node: int = 64
    """Cores of each machine; Ray is asked for none."""
    name: str = ""
    """Name of the job; dreamscale-STAGE by default."""
    directory: str = ""
    """Folder to run in, as the cluster sees it; this one by default."""
    python: str = "python"
    """Python of an environment with Dreamscale, as the cluster sees it."""
    time: str = "24:00:00"
    """Slurm: limit of one stretch; training goes on in the next one."""
    partition: str = ""
    """Slurm."""
    account: str = ""
    """Slurm."""
    logs: str = "."
    """Slurm: folder for the job's output."""
    address: str = "http://127.0.0.1:8265"
    """Ray: the cluster's job server."""
    image: str = "dreamscale:latest"
    """Kubernetes: container image with Dreamscale."""
    namespace: str = "default"
    """Kubernetes."""
    claim: str = "dreamscale-data"
    """Kubernetes: persistent volume claim with data, configs and runs."""
    mount: str = "/data"
    """Kubernetes: where it is mounted."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0 or self.cpus_per_node < 1:
            raise ValueError("need nodes >= 1, gpus_per_node >= 0 and cpus_per_node >= 1")
        self.name = self.name or f"dreamscale-{self.stage}"
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", self.name):
            raise ValueError(f"name '{self.name}': lower-case letters, digits and '-' only, at most 52 of them")
        for key in ("time", "partition", "account", "logs", "address", "image", "namespace", "claim", "mount"):
            if re.search(r"[\s\"'`$\\]", getattr(self, key)):
                raise ValueError(f"{key} '{getattr(self, key)}': no blanks, quotes, '$' or '\\' can be used here")

    @property
    def processes(self) -> int:
        """Training processes of the whole job."""
        return self.nodes * max(1, self.gpus_per_node)


def stage_words(config: SubmitConfig, extra: list[str]) -> tuple[Stage, list[str]]:
    """Check the stage's own request, and complete it with the number of processes.

    Parameters
    ----------
    config : SubmitConfig
        The request.
    extra : list of str
        Keys for the stage.

    Returns
    -------
    stage : Stage
        What is to run.
    words : list of str
        Its arguments.

    Raises
    ------
    RequestError
        If there is no such stage, or its request is wrong.
    """
    able = [name for name, stage in STAGES.items() if stage.config]
    stage = STAGES.get(config.stage)
    if stage is None or stage.config is None:
        raise RequestError(f"stage '{config.stage}' cannot be submitted; it is one of {', '.join(able)}")
    if stage.launcher is None and config.nodes > 1 and config.scheduler != "ray":
        raise RequestError(f"{config.stage} spreads over machines by itself, through Ray; use 'submit ray', or nodes 1")
    if stage.launcher is not None and config.nodes > 1 and config.scheduler == "ray":
        raise RequestError("ray runs training on one machine of its cluster; use slurm or k8s for more nodes")
    words = [config.stage_config, *extra]
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


def launch_line(config: SubmitConfig, stage: Stage, words: list[str]) -> str:
    """Build the command of one node.

    Parameters
    ----------
    config : SubmitConfig
        The request.
    stage : Stage
        What to run.
    words : list of str
        Its arguments.

    Returns
    -------
    str
        For a shell that knows HEAD_NODE, PORT and the node's index.
    """
    python, arguments = shlex.quote(config.python), shlex.join(words)
    if stage.launcher is None:
        name = "data_sharding" if stage.module == "data_sharding.job.run" else stage.module
        joined = " --ray.address auto" if config.scheduler == "ray" else ""
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


def render(config: SubmitConfig, stage: Stage, words: list[str]) -> str:
    """Write the job file.

    Parameters
    ----------
    config : SubmitConfig
        The request.
    stage : Stage
        What to run.
    words : list of str
        Its arguments.

    Returns
    -------
    str
        The file's text.

    Raises
    ------
    RequestError
        If an argument cannot be put into such a file.
    """
    template = shipped_configs() / "cluster" / _FILES[config.scheduler]
    if not template.is_file():
        raise RequestError(f"{template}: no such file; install Dreamscale again, with pip")
    line = launch_line(config, stage, words)
    if config.scheduler != "ray" and re.search(r"['\"\\\n]", line):
        raise RequestError(
            f"{config.stage}: arguments with blanks or quotes belong into the YAML file, not behind '--'"
        )
    gpus = config.gpus_per_node
    options = [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(config, key))]
    resources = f" --entrypoint-num-gpus {gpus}" if stage.launcher and gpus else ""
    values: dict[str, Any] = {
        "NAME": config.name,
        "NODES": config.nodes,
        "RETRIES": 3 * config.nodes,
        "CPUS": config.cpus_per_node,
        "THREADS": max(1, config.cpus_per_node // max(1, gpus)),
        "GPU_LINE": f"#SBATCH --gpus-per-node={gpus}" if gpus and stage.launcher else "",
        "EXTRA_LINES": "\n".join(f"#SBATCH {option}" for option in options),
        "TIME": config.time,
        "LOGS": config.logs,
        "DIRECTORY": config.directory or str(Path.cwd()),
        "LAUNCH": line,
        # Ray begins wherever its head was started.
        "SHELL": shlex.join(["bash", "-c", f"cd {shlex.quote(config.directory or str(Path.cwd()))} && exec {line}"]),
        "ADDRESS": config.address,
        "RESOURCES": resources,
        "IMAGE": config.image,
        "NAMESPACE": config.namespace,
        "CLAIM": config.claim,
        "MOUNT": config.mount,
        "LIMITS": f"{{nvidia.com/gpu: {gpus}}}" if gpus and stage.launcher else "{}",
    }
    if config.scheduler == "slurm":
        values["DIRECTORY"] = shlex.quote(values["DIRECTORY"])
    text = re.sub(r"@([A-Z_]+)@", lambda match: str(values[match.group(1)]), template.read_text())
    return re.sub(r"\n\n+(#SBATCH)", r"\n\1", text)


def submit(config: SubmitConfig, text: str) -> int:
    """Hand a job file in.

    Parameters
    ----------
    config : SubmitConfig
        The request.
    text : str
        The job file.

    Returns
    -------
    int
        0, or 1 where the cluster refused.

    Raises
    ------
    RequestError
        If the cluster's tool is not installed here.
    """
    tool = _TOOLS[config.scheduler]
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), beside))
    if shutil.which(tool, path=path) is None:
        raise RequestError(
            f"'{tool}' is not on this machine's PATH; run this where jobs are submitted, or use --dry-run"
        )
    command = {"slurm": ["sbatch"], "ray": ["bash", "-s"], "k8s": ["kubectl", "apply", "-f", "-"]}[config.scheduler]
    done = subprocess.run(command, input=text, text=True, env={**os.environ, "PATH": path}, check=False)
    if done.returncode:
        print(f"dreamscale: {tool} refused the job (exit code {done.returncode})", file=sys.stderr)
    return EXIT_FAILED if done.returncode else EXIT_DONE


def _main(argv: list[str]) -> int:
    own, extra = argv, []
    if "--" in argv:
        own, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    words = []
    for position, word in enumerate(own):
        if word.startswith("--"):
            key, sign, value = word.partition("=")
            word = key[:2] + key[2:].replace("-", "_") + sign + value
        following = own[position + 1] if position + 1 < len(own) else ""
        words.append("--dry_run=true" if word == "--dry_run" and following not in ("true", "false") else word)
    config = parse_config(
        SubmitConfig, words, prog="dreamscale submit", positionals=("scheduler", "stage", "stage_config")
    )
    stage, arguments = stage_words(config, extra)
    text = render(config, stage, arguments)
    if config.dry_run:
        print(text, end="")
        return EXIT_DONE
    return submit(config, text)


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale submit slurm|ray|k8s STAGE CONFIG [--key value ...] [-- STAGE'S KEYS]``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(_main, argv)
