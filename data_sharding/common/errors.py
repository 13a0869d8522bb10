"""Errors that all parts of the project share, and the exit codes of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_REQUEST = 2
EXIT_SET_ASIDE = 3
EXIT_NOT_KNOWN = 3
EXIT_STOPPED = 75


class RequestError(ValueError):
    """A request cannot be carried out; the user can correct the request.

    The message is one line. It names the file, key or recording, the fault, and the fix.
    """


class RankError(RequestError):
    """A `RequestError` that only one training process finds. This process must print the error itself."""


class StopRequested(BaseException):
    """Raised after a signal to stop. All finished work is kept, and the same command resumes the work.

    Like `KeyboardInterrupt`, this class is no `Exception`: the exception may be raised inside of a library, and
    libraries catch every `Exception` in many places.
    """


def one_line(text: object) -> str:
    """Join the lines of a message to one line.

    Parameters
    ----------
    text : object
        The message, or an object whose `str` is the message.

    Returns
    -------
    str
        The message, with every run of white space replaced by one space.
    """
    return " ".join(str(text).split())


def run_main(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run the body of a command and turn its errors into exit codes.

    Parameters
    ----------
    main : callable
        The body: takes the arguments and returns an exit code.
    argv : list of str, optional
        Arguments without the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        0: done; 1: failed; 2: the request was wrong; 3: too many recordings were quarantined, or the result is
        not known; 75: stopped on request.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except RequestError as error:
        # All ranks find the same fault, so only one rank of each machine prints the message.
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", rank) == "0" or rank == "0" or isinstance(error, RankError):
            who = f"process {rank}: " if rank != "0" else ""
            print(f"dreamscale: {who}{one_line(error)}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    except StopRequested as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(
                f"dreamscale: stopped on request; {one_line(stop) or 'run the same command to resume'}",
                file=sys.stderr,
            )
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("dreamscale: interrupted; run the same command to resume", file=sys.stderr)
        return EXIT_STOPPED
