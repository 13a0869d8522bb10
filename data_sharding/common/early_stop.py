"""End a command if a stop signal arrives before the command has done any work.

This module imports little, so that a command can call `end_on_stop_signals` before its slow imports. Without this
module, a signal during the slow imports would end the command with another exit code and without a message.
"""

import os
import signal
from types import FrameType

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that stop a command. Slurm sends SIGUSR1 some time before the time limit of a job."""


def stop_reason(number: int) -> str:
    """Return one line for the user: which signal stopped the command, and how to resume."""
    return f"{signal.Signals(number).name}: all finished work is kept; run the same command to resume"


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, f"dreamscale: stopped on request; {stop_reason(number)}\n".encode())
    os._exit(EXIT_STOPPED)


def end_on_stop_signals() -> None:
    """Install signal handlers that end this process immediately if one of `SIGNALS` arrives.

    Call this function only while the process has no child processes and has written no files.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def restore_default_signals() -> None:
    """Undo `end_on_stop_signals`, for commands without stop handlers, and commands that install such handlers later.

    SIGUSR1 then interrupts a command as Ctrl-C does, because the exit code 75 tells a cluster to run the command again.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler, signal.default_int_handler)
    for number, handler in zip(SIGNALS, defaults, strict=True):
        if signal.getsignal(number) is _end:
            signal.signal(number, handler)
