"""Find and run the command that the first argument of ``dreamscale`` names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_sharding.common.early_stop import restore_default_signals
from data_sharding.common.errors import EXIT_DONE, RequestError
from launch.stages import STAGES, import_quickly

STOPPED_AT_ANY_MOMENT = "shard"
"""Name of the command that handles stop signals itself, so that it can be stopped properly at any moment."""


def help_text() -> str:
    """Return the text that ``dreamscale --help`` prints."""
    lines = [
        "usage: dreamscale COMMAND [CONFIG.yaml] [--dotted.key value ...]",
        "",
        "Turn EEG recordings of any maker into a pretrained encoder, and EEG into images of what a person saw.",
        "",
        "commands:",
        *(f"  {name:<10} {stage.help}" for name, stage in STAGES.items()),
        "",
        "'dreamscale COMMAND --help' explains every key of a command.",
        "'dreamscale COMMAND ... --print_config' prints the config that would be used, and stops.",
        "exit codes: 0 done, 1 failed, 2 wrong request, 3 too many recordings quarantined, 75 stopped on request "
        "(resume",
        "            with the same command)",
    ]
    return "\n".join(lines)


def _check_words(name: str, words: list[str]) -> None:
    """If a command needs arguments and was called without any, raise an error before slow libraries are imported."""
    usage = STAGES[name].usage
    if not words and usage and not usage.startswith("["):
        raise RequestError(
            f"usage: dreamscale {name} {usage} [--key value ...]; 'dreamscale {name} --help' explains every key"
        )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Show a message on the terminal while a command is imported, because importing PyTorch takes seconds."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"dreamscale {name}: loading ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            # Erase the line with the "loading" message.
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def dispatch(argv: list[str]) -> int:
    """Run a command, and return its exit code. The first argument is the name of the command."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_DONE
    if argv[0] in ("-V", "--version"):
        from importlib import metadata

        print(f"dreamscale {metadata.version('dreamscale')}")
        return EXIT_DONE
    name, words = argv[0], argv[1:]
    if name not in STAGES:
        import difflib

        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'dreamscale --help' lists the commands"
        raise RequestError(f"unknown command '{name}'; {hint}")
    _check_words(name, words)
    stage = STAGES[name]
    if name != STOPPED_AT_ANY_MOMENT:
        restore_default_signals()
    if stage.launcher is not None:
        from launch.local import processes_wanted, run_launched

        count = processes_wanted(words)
        if count:
            return run_launched(stage, words, count)
    with _loading(name):
        module = import_quickly(stage.module)
    return module.main(words)
