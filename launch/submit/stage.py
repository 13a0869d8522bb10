"""Check the arguments of a stage before its job is submitted."""

from __future__ import annotations

from dataclasses import dataclass

from data_sharding.common.errors import RequestError
from launch.stages import STAGES, Stage
from launch.submit.config import SubmitConfig
from launch.submit.values import check_printable

GPUS = 8
"""GPUs per machine of a stage that trains with a launcher, if the user gives no number."""


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
    for word in extra:
        try:
            check_printable("argument", word)
        except ValueError as error:
            raise RequestError(str(error)) from None
    words = [config.stage_config] if config.stage_config else []
    work = Work(stage=stage, words=words + extra, nodes=config.nodes, gpus=_count_gpus(config, stage))
    if stage.launcher is not None:
        work.words.extend(["--num_processes", str(work.processes)])
    stage.read(work.words)
    return work


def _count_gpus(config: SubmitConfig, stage: Stage) -> int:
    """Return the GPUs per machine of a stage; raise `RequestError` if `gres` asks for another number."""
    wanted = config.gres_gpus
    if stage.uses_ray:
        if wanted:
            raise RequestError(f"gres '{config.gres}': {config.stage} uses no GPU; leave gpu out of --gres")
        return 0
    gpus = config.gpus_per_node
    if gpus is None and stage.launcher is None:
        gpus = wanted if wanted and config.scheduler == "slurm" else 0
    elif gpus is None:
        gpus = GPUS
    if wanted is not None and wanted != gpus:
        raise RequestError(
            f"gres '{config.gres}' ({wanted} GPUs per machine) and gpus_per_node {gpus} contradict each other; give "
            "both equal"
        )
    return gpus
