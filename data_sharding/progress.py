"""Progress of long work: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(
    description: str, total: int, *, enabled: bool = True, every_s: float = 10.0
) -> Iterator[Callable[..., None]]:
    """Show how far a loop is.

    Parameters
    ----------
    description : str
        What is being done.
    total : int
        Number of steps.
    enabled : bool
        False for every rank but the first.
    every_s : float
        Seconds between lines where there is no terminal (a job's log).

    Yields
    ------
    callable
        ``advance(n=1, note="")``: `n` more steps are done; `note` is shown beside the bar.
    """
    if not enabled:
        yield lambda n=1, note="": None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, note="")
            yield lambda n=1, note="": bar.update(task, advance=n, note=note)
        return
    done, last = 0, time.monotonic()

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done >= total or now - last >= every_s:
            last = now
            print(f"{description}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
