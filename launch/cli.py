"""The ``dreamscale`` command.

A signal that stops the command can arrive at any moment, also during slow imports. So this module first imports only
the code that handles such signals.
"""

import os
import sys

from data_sharding.common.early_stop import end_on_stop_signals


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 wrong request, 3 too many recordings quarantined, 75 stopped on request.
    """
    if argv is None:
        end_on_stop_signals()
    from data_sharding.common.errors import run_main
    from data_sharding.common.stop import end_command
    from launch.commands import dispatch

    # The threads of a numerical operation (OpenMP) wait for each other. By default, a waiting thread keeps a core busy,
    # although another thread may need the core. On a busy machine, this makes a command several times slower, so let
    # the threads sleep while they wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run_main(dispatch, argv)
    return end_command(code) if argv is None else code


if __name__ == "__main__":
    sys.exit(main())
