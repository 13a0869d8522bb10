"""Render the job file of a stage from the template of a scheduler."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound

from data_sharding.common.errors import RequestError
from data_sharding.common.shipped import shipped_configs
from launch.submit.config import SubmitConfig
from launch.submit.ray import stop_environment
from launch.submit.stage import Work

TEMPLATES = {"slurm": "slurm.sh.j2", "ray": "ray.sh.j2", "k8s": "k8s.yaml.j2"}
"""Job template in ``configs/cluster`` for each scheduler."""


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
    stage = work.stage
    python, arguments = shlex.quote(config.python), shlex.join(work.words)
    index = '"$SLURM_NODEID"' if config.scheduler == "slurm" else '"$NODE_INDEX"'
    alone = f"{python} -m launch {config.stage} {arguments}".rstrip()
    if stage.uses_ray and config.scheduler == "ray":
        return f"{alone} --ray.address auto"
    if config.scheduler == "ray" and work.nodes > 1:
        where = f"--nodes {work.nodes} --gpus-per-node {work.gpus}"
        return f"{python} -m launch.ray_train {where} {config.stage} {arguments}"
    if stage.uses_ray and work.nodes > 1:
        where = f'--nodes {work.nodes} --index {index} --head "$HEAD_NODE" --port "$PORT"'
        return f"{python} -m launch.ray_nodes {where} -- {config.stage} {arguments}"
    # One process needs no launcher. On one machine of a Ray cluster, 'dreamscale' starts the launcher itself.
    if stage.launcher is None or work.processes == 1 or config.scheduler == "ray":
        return alone
    if stage.launcher == "torchrun":
        flags = f"torchrun --nnodes {work.nodes} --nproc-per-node {work.local} --node-rank {index}"
        flags += ' --master-addr "$HEAD_NODE" --master-port "$PORT"'
    else:
        flags = f"accelerate --multi_gpu --num_processes {work.processes} --num_machines {work.nodes}"
        flags += f' --machine_rank {index} --main_process_ip "$HEAD_NODE" --main_process_port "$PORT"'
        flags += " --mixed_precision no --dynamo_backend no"
    return f"{python} -m launch.agent {flags} -m launch.worker {stage.module} {arguments}"


def _make_environment() -> Environment:
    """Return Jinja's environment for the job templates, with filters that quote values for a shell or for YAML."""
    environment = Environment(
        loader=FileSystemLoader(shipped_configs() / "cluster"),
        undefined=StrictUndefined,
        # Do not escape values for HTML. The filters `shell` and `json` quote values for a shell and for YAML. Values in
        # Slurm's comments cannot be quoted, so `SlurmOptions` refuses special characters.
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
    try:
        template = _make_environment().get_template(TEMPLATES[config.scheduler])
    except TemplateNotFound as error:
        raise RequestError(
            f"{shipped_configs() / 'cluster' / str(error)}: no such file; install Dreamscale again, with pip"
        ) from None
    # A stage without a launcher and without Ray runs as one process, which uses all cores of the machine. With Ray,
    # each core reads a recording.
    processes = config.cpus_per_node if work.stage.uses_ray else work.local if work.stage.launcher else 1
    command = build_command(config, work)
    directory = config.directory or str(Path.cwd())
    if config.scheduler == "slurm":
        command = config.run_in_container(command, work.gpus, directory)
    return template.render(
        config=config,
        name=config.name,
        nodes=work.nodes,
        cpus=config.cpus_per_node,
        gpus=work.gpus,
        threads=max(1, config.cpus_per_node // processes),
        ray_nodes=work.stage.uses_ray and work.nodes > 1,
        directory=directory,
        launch=command,
        address=config.address,
        stop_environment=stop_environment(config.stop_s),
        image=config.image,
        namespace=config.namespace,
        claim=config.claim,
        mount=config.mount,
    )
