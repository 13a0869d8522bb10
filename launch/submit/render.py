"""Render the job file of a stage from the template of a scheduler."""

from __future__ import annotations

import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound

from data_sharding.common.errors import RequestError
from data_sharding.common.shipped import shipped_configs
from launch.stages import STAGES
from launch.submit.config import SubmitConfig
from launch.submit.kubernetes import render_manifests
from launch.submit.ray import stop_environment
from launch.submit.stage import Work

TEMPLATES = {"slurm": "slurm.sh.j2", "ray": "ray.sh.j2"}
"""Job template in ``configs/cluster`` of the schedulers whose job file is a shell script."""
PREFLIGHT_PORT = 2000
"""The check before the stage uses the port of the stage plus this number."""


def build_command(config: SubmitConfig, work: Work) -> str:
    """Build the command that runs on each node.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    work : Work
        The stage and its arguments.

    Returns
    -------
    str
        Command line for a shell. The shell must set the variables HEAD_NODE and PORT, and SLURM_NODEID or NODE_INDEX.
    """
    return _launch(config, work, config.stage, work.stage.launcher, work.words, '"$PORT"')


def build_preflight(config: SubmitConfig, work: Work) -> str:
    """Build the command that checks each node before the stage starts.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    work : Work
        The stage and its arguments.

    Returns
    -------
    str
        Command line for a shell, as from `build_command`; empty if the user wants no check.
    """
    if not config.preflight:
        return ""
    words = ["--preflight", "true", "--device", "cuda" if work.gpus else "cpu"]
    launcher = "torchrun" if work.stage.launcher else None
    if work.stage.uses_ray:
        words += ["--start_ray", "true"]
    elif launcher:
        words += ["--num_processes", str(work.processes)]
    # The port of the stage may still be in use on one machine when the stage starts on another machine.
    return _launch(config, work, "doctor", launcher, words, f'"$((PORT + {PREFLIGHT_PORT}))"')


def _launch(config: SubmitConfig, work: Work, name: str, launcher: str | None, words: list[str], port: str) -> str:
    """Build the command that runs a stage, or the check before the stage, on each node."""
    python, arguments = shlex.quote(config.python), shlex.join(words)
    index = '"$SLURM_NODEID"' if config.scheduler == "slurm" else '"$NODE_INDEX"'
    alone = f"{python} -m launch {name} {arguments}".rstrip()
    if work.stage.uses_ray and config.scheduler == "ray":
        return f"{alone} --ray.address auto"
    if config.scheduler == "ray" and work.nodes > 1:
        where = f"--nodes {work.nodes} --gpus-per-node {work.gpus}"
        return f"{python} -m launch.ray_train {where} {name} {arguments}"
    if work.stage.uses_ray and work.nodes > 1:
        where = f'--nodes {work.nodes} --index {index} --head "$HEAD_NODE" --port {port}'
        return f"{python} -m launch.ray_nodes {where} -- {name} {arguments}"
    # One process needs no launcher. On one machine of a Ray cluster, 'dreamscale' starts the launcher itself.
    if launcher is None or work.processes == 1 or config.scheduler == "ray":
        return alone
    if launcher == "torchrun":
        flags = f"torchrun --nnodes {work.nodes} --nproc-per-node {work.local} --node-rank {index}"
        flags += f' --master-addr "$HEAD_NODE" --master-port {port}'
    else:
        flags = f"accelerate --multi_gpu --num_processes {work.processes} --num_machines {work.nodes}"
        flags += f' --machine_rank {index} --main_process_ip "$HEAD_NODE" --main_process_port {port}'
        flags += " --mixed_precision no --dynamo_backend no"
    return f"{python} -m launch.agent {flags} -m launch.worker {STAGES[name].module} {arguments}"


def _make_environment() -> Environment:
    """Return Jinja's environment for the job templates, with a filter that quotes values for a shell."""
    environment = Environment(
        loader=FileSystemLoader(shipped_configs() / "cluster"),
        undefined=StrictUndefined,
        # Do not escape values for HTML. The filter `shell` quotes values for a shell. Values in Slurm's comments cannot
        # be quoted, so `SlurmOptions` refuses special characters.
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shell"] = shlex.quote
    return environment


def render(config: SubmitConfig, work: Work) -> str:
    """Render the job file.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    work : Work
        The stage and its arguments.

    Returns
    -------
    str
        Text of the job file.

    Raises
    ------
    RequestError
        If the template is not installed.
    """
    # A stage without a launcher and without Ray runs as one process, which uses all cores of the machine. With Ray,
    # each core reads a recording.
    processes = config.cpus_per_node if work.stage.uses_ray else work.local if work.stage.launcher else 1
    threads = max(1, config.cpus_per_node // processes)
    command, preflight = build_command(config, work), build_preflight(config, work)
    if config.scheduler == "k8s":
        return render_manifests(
            config,
            f"{preflight} && exec {command}" if preflight else f"exec {command}",
            name=config.name,
            nodes=work.nodes,
            gpus=work.gpus,
            cpus=config.cpus_per_node,
            threads=threads,
            directory=config.directory,
        )
    try:
        template = _make_environment().get_template(TEMPLATES[config.scheduler])
    except TemplateNotFound as error:
        raise RequestError(
            f"{shipped_configs() / 'cluster' / str(error)}: no such file; install Dreamscale again, with pip"
        ) from None
    directory = config.directory or str(Path.cwd())
    if config.scheduler == "slurm":
        command = config.run_in_container(command, work.gpus, directory)
        preflight = preflight and config.run_in_container(preflight, work.gpus, directory)
    return template.render(
        config=config,
        name=config.name,
        nodes=work.nodes,
        cpus=config.cpus_per_node,
        gpus=work.gpus,
        threads=threads,
        ray_nodes=work.stage.uses_ray and work.nodes > 1,
        directory=directory,
        launch=command,
        preflight=preflight,
        address=config.address,
        stop_environment=stop_environment(config.stop_s),
    )
