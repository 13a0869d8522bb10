"""Errors that all parts of the project share, and the exit codes of the commands."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

from data_sharding.common.early_stop import EXIT_STOPPED

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_REQUEST = 2
EXIT_SET_ASIDE = 3
EXIT_NOT_KNOWN = 3
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers after which no retry can succeed, because the disk is full or read-only."""
# The library safetensors, which is written in Rust, gives the error number only in the text of its errors.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
LONGEST_LINE = 2000
"""Largest number of characters of the line that a command prints for an error."""
LONGEST_IN_FIGURE = 60
"""Largest number of characters of a text from a file in a figure."""
# C0 and C1 control characters, characters that change the direction of text, and surrogates (halves of a character,
# which cannot be printed).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class RequestError(ValueError):
    """Error in a request (arguments, config or input files) that the user can correct.

    The message is one line that names the file, key or recording, and says what is wrong and what to do.
    """


class RankError(RequestError):
    """A `RequestError` that only one training process raises. So this process prints the error, whatever its rank."""


class FailedError(RuntimeError):
    """Failure for which no key of the request is the cause, such as a full disk. The command ends with exit code 1.

    The message is one line that says what failed and what to do.
    """


class StopRequested(BaseException):
    """Raised after a stop signal. All finished work is kept, and the same command resumes the work.

    Like `KeyboardInterrupt`, this class is not a subclass of `Exception`: `StopRequested` can be raised while a library
    runs, and many libraries would catch an `Exception`.
    """


def one_line(text: object) -> str:
    """Join the lines of a message into one line.

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


def printable(text: object) -> str:
    r"""Make a text safe for a terminal.

    File names, channel names and messages come from files that other people wrote. An escape sequence in a text could
    change the title, the colours or the content of a terminal. Right-to-left text could hide the real name of a file.

    Parameters
    ----------
    text : object
        The text, or an object whose `str` is the text.

    Returns
    -------
    str
        The text. Control characters (except line feed and tab), characters that change the direction of text, and
        unpaired surrogates (halves of a character) are replaced by their code, such as ``\x1b``.
    """
    return _UNPRINTABLE.sub(_code, str(text))


def error_line(error: object) -> str:
    """Return the message of an error as one line for a terminal; the middle of a very long message is left out.

    A message can contain a text from a file, which may have millions of characters. The end of a message is kept,
    because it says what to do.
    """
    text = one_line(error)
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE - 500]} ... {text[-490:]}"
    return printable(text)


def _code(match: re.Match[str]) -> str:
    number = ord(match.group())
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def show(value: object, longest: int = 80) -> str:
    """Describe a value from a file in one short line for a message.

    Parameters
    ----------
    value : object
        The value. Lists, dictionaries and other containers are described by their type only, because their text can be
        far longer than the file that they come from.
    longest : int
        Largest number of characters.

    Returns
    -------
    str
        One line without control characters.
    """
    if isinstance(value, bytes | bytearray):
        value = bytes(value[:longest])
    elif isinstance(value, int) and abs(value) >= 10**longest:
        value = "a very large number"
    elif not isinstance(value, str | int | float | complex | type(None) | BaseException):
        value = f"a {type(value).__name__}"
    text = value[: 4 * longest] if isinstance(value, str) else str(value)
    text = printable(one_line(text))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def figure_text(text: object) -> str:
    r"""Make a text from a file safe for a figure.

    Matplotlib draws a text between dollar signs as a formula, and raises an error if the formula is not valid.

    Parameters
    ----------
    text : object
        The text, such as the name of a subject, a channel or a label.

    Returns
    -------
    str
        The text, shortened to `LONGEST_IN_FIGURE` characters. Every dollar sign is written as ``\$``, and matplotlib
        draws ``\$`` as a dollar sign.
    """
    return show(text, LONGEST_IN_FIGURE).replace("$", r"\$")


def describe_full_disk(error: BaseException) -> str | None:
    """Describe an error of a disk that is full or read-only.

    Parameters
    ----------
    error : BaseException
        Any error.

    Returns
    -------
    str or None
        One line with the name of the file, if it is known; None if the error has another cause.
    """
    if isinstance(error, OSError):
        if error.errno not in FULL:
            return None
        name = error.filename2 or error.filename
        return f"{name}: {error.strerror}" if name else str(error.strerror)
    found = _RUST_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return one_line(error) if found and int(found.group(1)) in FULL else None


def run_main(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run the body of a command and turn its errors into exit codes.

    Parameters
    ----------
    main : callable
        The body of the command: a function that takes the arguments and returns an exit code.
    argv : list of str, optional
        Arguments without the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        0: done; 1: failed; 2: error in the request; 3: too many recordings were quarantined, or the leakage check is
        undecided, because subjects are unknown; 75: stopped on request.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except RequestError as error:
        # All ranks raise the same error, so only one rank of each machine prints it.
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", rank) == "0" or rank == "0" or isinstance(error, RankError):
            who = f"process {rank}: " if rank != "0" else ""
            print(f"dreamscale: {who}{error_line(error)}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    except FailedError as error:
        return _report_failure(error)
    except StopRequested as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(
                f"dreamscale: stopped on request; {error_line(stop) or 'run the same command to resume'}",
                file=sys.stderr,
            )
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("dreamscale: interrupted; run the same command to resume", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:
        fault = describe_full_disk(error)
        if fault is None:
            raise
        return _report_failure(
            f"{fault}; free some space on this disk, or make it writable, and run the same command again"
        )


def _report_failure(error: object) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"dreamscale: {f'process {rank}: ' if rank != '0' else ''}{error_line(error)}", file=sys.stderr)
    return EXIT_FAILED
