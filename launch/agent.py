"""Run torchrun or ``accelerate launch``, without their tracebacks, and return the exit code of the training.

``python -m launch.agent torchrun|accelerate [LAUNCHER'S ARGUMENTS] -m launch.worker MODULE [ARGUMENTS]``
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from data_sharding.common.errors import EXIT_BAD_REQUEST, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from launch.stages import import_quickly
from launch.worker import FOLDER, end_with_parent, read_numbers


def _launch(kind: str, words: list[str]) -> tuple[int, bool]:
    """Run a launcher; return the exit code of the first failed process, and whether a signal ended the launcher."""
    import logging
    import warnings

    module = import_quickly("torch.distributed.run" if kind == "torchrun" else "accelerate.commands.launch")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Hide the log of the launchers, because it repeats the error messages of the training processes.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        if kind == "torchrun":
            module.main(words)
        else:
            module.launch_command(module.launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and failure.signal_name() != "SIGTERM":
            print(
                f"dreamscale: training process {rank} was ended by {failure.signal_name()}; if nobody sent this "
                "signal, the system probably ran out of memory",
                file=sys.stderr,
            )
        return failure.exitcode if failure.exitcode > 0 else EXIT_FAILED, False
    except SignalException:
        return EXIT_FAILED, True
    return EXIT_DONE, False


def main(argv: list[str] | None = None) -> int:
    """Run a launcher in this process.

    Parameters
    ----------
    argv : list of str, optional
        ``torchrun`` or ``accelerate``, and the arguments for that launcher.

    Returns
    -------
    int
        The most serious exit code of the training processes on this machine; 75 if a signal stopped the training.
    """
    kind, *words = sys.argv[1:] if argv is None else argv
    end_with_parent()
    # Let torchrun handle SIGUSR1, because this signal would otherwise kill torchrun. Clusters send SIGUSR1 before they
    # stop a node.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "100")
    # The training processes find each other through addresses in a key-value store. PyTorch's backend gloo must not use
    # the same store as torchrun, because after a restart, gloo would read the addresses of the former processes.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    own = None if FOLDER in os.environ else tempfile.mkdtemp(prefix="dreamscale-launch-")
    if own:
        os.environ[FOLDER] = own
    try:
        code, signalled = _launch(kind, words)
        found = set(read_numbers(Path(os.environ[FOLDER]), "exit").values())
    finally:
        if own:
            shutil.rmtree(own, ignore_errors=True)
    for worst in (EXIT_BAD_REQUEST, EXIT_FAILED, EXIT_STOPPED):
        if worst in found:
            return worst
    return EXIT_STOPPED if signalled else code


if __name__ == "__main__":
    sys.exit(main())
