"""End a command when its parent process ends. This module imports little, because every command imports it."""

import os
import sys

PARENT = "DREAMSCALE_PARENT"
"""Environment variable with the process id of a parent process. A command ends when the parent process ends."""


def end_with_parent() -> None:
    """Ask the system to send SIGTERM to this process when its parent dies; this works on Linux only."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGTERM))  # 1: PR_SET_PDEATHSIG


def end_with_named_parent() -> None:
    """End this process when its parent dies, if the environment variable `PARENT` names the parent.

    `launch.chain` sets the environment variable `PARENT` for its steps. If the demo or an ablation is killed, its
    current step must end too, because a restarted run writes to the same folder.
    """
    if os.environ.pop(PARENT, None) == str(os.getppid()):
        end_with_parent()
