"""End a command when its parent process ends. This module imports little, because it is imported by every command."""

import os
import sys

PARENT = "DREAMSCALE_PARENT"
"""Environment variable with the process id of the parent of a command. The command ends when this parent ends."""


def end_with_parent() -> None:
    """Ask the system to send SIGTERM to this process when its parent dies; this works on Linux only."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGTERM))  # 1: PR_SET_PDEATHSIG


def end_with_named_parent() -> None:
    """End this process when its parent dies, if the environment variable `PARENT` contains the parent's process id.

    `launch.chain` sets the environment variable `PARENT` for its steps. If the demo or an ablation is killed, its
    running step must end, too: a restarted demo or ablation writes to the same folder.
    """
    if os.environ.pop(PARENT, None) == str(os.getppid()):
        end_with_parent()
