"""The ``dreamscale`` command."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib import metadata

from data_sharding.common.errors import EXIT_DONE, RequestError, run_main
from launch.stages import STAGES


def help_text() -> str:
    """Return what ``dreamscale --help`` prints.

    Returns
    -------
    str
        Usage, one line a command, and what the exit codes mean.
    """
    lines = [
        "usage: dreamscale COMMAND [CONFIG.yaml] [--dotted.key value ...]",
        "",
        "Raw EEG recordings, of any maker, to a pretrained encoder and on to images of what was seen.",
        "",
        "commands:",
        *(f"  {name:<10} {stage.help}" for name, stage in STAGES.items()),
        "",
        "'dreamscale COMMAND --help' explains every key; '--print_config' prints the resolved config.",
        "exit codes: 0 done, 1 failed, 2 wrong request, 3 too much was set aside, 75 stopped on request (run it again)",
    ]
    return "\n".join(lines)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_DONE
    if argv[0] in ("-V", "--version"):
        print(f"dreamscale {metadata.version('dreamscale')}")
        return EXIT_DONE
    name, words = argv[0], argv[1:]
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'dreamscale --help' lists the commands"
        raise RequestError(f"unknown command '{name}'; {hint}")
    stage = STAGES[name]
    if stage.launcher is not None:
        from launch.local import processes_wanted, run_launched

        count = processes_wanted(words)
        if count:
            return run_launched(stage, words, count)
    return importlib.import_module(stage.module).main(words)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 wrong request, 3 too much set aside, 75 stopped on request.
    """
    return run_main(_dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
