"""What a launcher starts in each process: the stage, with its exit code left where the launching command finds it.

``python -m launch.worker MODULE [ARGUMENTS]``. Launchers take every code but 0 for a failure and end the other
processes; so a requested stop ends with 0 here, and its true code is in the folder.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, run_main
from data_sharding.common.files import atomic_write_text

FOLDER = "DREAMSCALE_LAUNCH_FOLDER"
"""Environment variable: where process ids and exit codes go."""


PARENT = "DREAMSCALE_PARENT"
"""Environment variable: id of the process that a command must not outlive."""


def end_with_parent() -> None:
    """Ask the system for SIGTERM when the parent process dies; only Linux can."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGTERM))  # 1: PR_SET_PDEATHSIG


def read_numbers(folder: Path, suffix: str) -> dict[int, int]:
    """Read what the training processes left.

    Parameters
    ----------
    folder : Path
        Where.
    suffix : str
        ``pid`` or ``exit``.

    Returns
    -------
    dict of int to int
        Rank to process id or exit code.
    """
    return {int(path.stem): int(path.read_text()) for path in folder.glob(f"[0-9]*.{suffix}")}


def main(argv: list[str] | None = None) -> int:
    """Run a stage and leave its exit code.

    Parameters
    ----------
    argv : list of str, optional
        Module and its arguments.

    Returns
    -------
    int
        Exit code for the launcher.
    """
    module, *words = sys.argv[1:] if argv is None else argv
    folder, rank = os.environ.get(FOLDER), os.environ.get("RANK", "0")
    if folder:
        end_with_parent()
        atomic_write_text(Path(folder) / f"{rank}.pid", str(os.getpid()))
    code, tell = EXIT_FAILED, True
    try:
        code = run_main(importlib.import_module(module).main, words)
    except RuntimeError as error:
        # A reading process was killed, the likely victim where memory is short: as if this one had been.
        tell = not str(error).startswith("DataLoader worker")
        raise
    finally:
        if folder and tell and Path(folder).is_dir():
            atomic_write_text(Path(folder) / f"{rank}.exit", str(code))
    return EXIT_DONE if code == EXIT_STOPPED and folder else code


if __name__ == "__main__":
    sys.exit(main())
