"""Run a command (stage) in a process that a launcher started, and write the command's exit code to a file.

``python -m launch.worker MODULE [ARGUMENTS]``. A launcher treats every exit code except 0 as a failure and then ends
the other processes. Therefore, if a signal stopped the command, ``launch.worker`` exits with 0, and ``dreamscale``
reads the true exit code from the file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, run_main
from data_sharding.common.files import atomic_write_text
from launch.parent import end_with_parent
from launch.stages import import_quickly

FOLDER = "DREAMSCALE_LAUNCH_FOLDER"
"""Environment variable that names the folder for the files with process ids and exit codes."""


def read_numbers(folder: Path, suffix: str) -> dict[int, int]:
    """Read the process ids or the exit codes that the training processes wrote to a folder.

    Parameters
    ----------
    folder : Path
        Folder with the files.
    suffix : str
        Kind of files to read: ``pid`` or ``exit``.

    Returns
    -------
    dict of int to int
        Process id or exit code of each rank.
    """
    return {int(path.stem): int(path.read_text()) for path in folder.glob(f"[0-9]*.{suffix}")}


def main(argv: list[str] | None = None) -> int:
    """Run a stage, write its exit code to a file, and return the exit code for the launcher.

    Parameters
    ----------
    argv : list of str, optional
        The stage's module and its arguments.

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
    code, report = EXIT_FAILED, True
    try:
        code = run_main(import_quickly(module).main, words)
    except RuntimeError as error:
        # The system may kill a worker process of the DataLoader because memory is short. Do not write an exit code
        # then, so that the run is restarted as if this training process had been killed.
        report = not str(error).startswith("DataLoader worker")
        raise
    finally:
        if folder and report and Path(folder).is_dir():
            atomic_write_text(Path(folder) / f"{rank}.exit", str(code))
    return EXIT_DONE if code == EXIT_STOPPED and folder else code


if __name__ == "__main__":
    sys.exit(main())
