"""Check the arguments of a stage before its job is submitted."""

from __future__ import annotations

from dataclasses import dataclass

from data_sharding.common.errors import RequestError
from launch.stages import STAGES, Stage
from launch.submit.config import GPUS, SubmitConfig
from launch.submit.values import check_printable


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job runs."""

    stage: Stage
    """The command."""
    words: list[str]
    """All arguments of the command."""
    nodes: int
    """Number of machines."""
    gpus: int
    """GPUs per machine."""

    @property
    def local(self) -> int:
        """Number of training processes per machine."""
        return max(1, self.gpus)

    @property
    def processes(self) -> int:
        """Number of training processes on all machines."""
        return self.nodes * self.local


def check_stage(config: SubmitConfig, extra: list[str]) -> Work:
    """Check the arguments of the stage, and add the key ``num_processes`` to them if the stage has a launcher.

    Parameters
    ----------
    config : SubmitConfig
        Config of the job.
    extra : list of str
        Arguments after '--', for the stage.

    Returns
    -------
    Work
        The stage and its arguments.

    Raises
    ------
    RequestError
        If the stage does not exist, or its arguments are wrong.
    """
    stage = STAGES.get(config.stage)
    if stage is None or not stage.submits:
        available = ", ".join(name for name, stage in STAGES.items() if stage.submits)
        raise RequestError(f"stage '{config.stage}' cannot be submitted; use one of {available}")
    if config.nodes > 1 and stage.launcher is None and not stage.uses_ray:
        raise RequestError(f"{config.stage} runs on one machine; leave --nodes out")
    if config.nodes > 1 and stage.uses_ray and config.scheduler == "k8s":
        raise RequestError(f"{config.stage} uses several machines through Ray; use 'submit slurm' or 'submit ray'")
    if config.nodes > 1 and not stage.uses_ray and config.scheduler == "ray":
        raise RequestError("with ray, training runs on one machine; use slurm or k8s for more nodes")
    for word in extra:
        try:
            check_printable("argument", word)
        except ValueError as error:
            raise RequestError(str(error)) from None
    gpus = config.gpus_per_node
    if gpus is None:
        gpus = GPUS if stage.launcher else 0
    words = [config.stage_config] if config.stage_config else []
    work = Work(stage=stage, words=words + extra, nodes=config.nodes, gpus=0 if stage.uses_ray else gpus)
    if stage.launcher is not None:
        work.words.extend(["--num_processes", str(work.processes)])
    stage.read(work.words)
    return work
