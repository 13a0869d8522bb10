"""torchrun and ``accelerate launch``, ending without their traceback: the training process has shown its own.

``python -m launch.agent torchrun|accelerate [LAUNCHER'S ARGUMENTS]``
"""

from __future__ import annotations

import sys

from data_sharding.errors import EXIT_FAILED
from launch.worker import end_with_parent


def main(argv: list[str] | None = None) -> int:
    """Run a launcher in this process.

    Parameters
    ----------
    argv : list of str, optional
        ``torchrun`` or ``accelerate``, and what its command line takes.

    Returns
    -------
    int
        0, or the exit code of the first process that failed.
    """
    kind, *words = sys.argv[1:] if argv is None else argv
    end_with_parent()
    import logging
    import warnings

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # They repeat, at length, what the training process has said.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        if kind == "torchrun":
            from torch.distributed.run import main as torchrun

            torchrun(words)
        else:
            from accelerate.commands.launch import launch_command, launch_command_parser

            launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"dreamscale: training process {rank} was ended by {failure.signal_name()}; out of memory, if nobody did it",
                file=sys.stderr,
            )
        return failure.exitcode if failure.exitcode > 0 else EXIT_FAILED
    except SignalException:
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
