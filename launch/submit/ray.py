"""Options of a job on a Ray cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass

from launch.submit.values import check_plain

STOP_S = 150
"""Seconds that ``ray job stop`` waits by default until it kills a job. torchrun waits 100 s for a checkpoint."""


def stop_environment(seconds: int) -> str:
    """Return the runtime environment (JSON) of a job that ``ray job stop`` kills only after a number of seconds.

    Ray itself waits 3 s, which is too short for a checkpoint.
    """
    return json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(seconds)}})


@dataclass(kw_only=True)
class RayOptions:
    """Options for Ray."""

    address: str = "http://127.0.0.1:8265"
    """Ray: address of the cluster's job server."""
    stop_s: int = STOP_S
    """Ray: number of seconds that 'ray job stop' waits for the job to end by itself. In this time, a training writes
    its checkpoint."""

    def check_ray(self) -> None:
        """Check the options.

        Raises
        ------
        ValueError
            If an option cannot be written to the job file.
        """
        check_plain("address", self.address)
        if self.stop_s < 10:
            raise ValueError(f"stop_s is {self.stop_s}; it must be at least 10 seconds")
