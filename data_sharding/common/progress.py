"""Show the progress of long work: a live display on a terminal, or regular lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from data_sharding.common.errors import printable


@contextlib.contextmanager
def progress(
    description: str, total: int, *, enabled: bool = True, every_s: float = 10.0
) -> Iterator[Callable[..., None]]:
    """Show the progress of a loop. Control characters in the description and in the notes are shown as codes.

    Parameters
    ----------
    description : str
        Description of the loop, shown before the bar.
    total : int
        Total number of steps of the loop.
    enabled : bool
        Whether to show the progress; False on all ranks except rank 0.
    every_s : float
        Seconds between two lines if the output is not a terminal.

    Yields
    ------
    callable
        Function ``advance(n=1, note="")``: call it after `n` more steps; `note` is shown next to the bar.
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

        # Without `markup=False`, square brackets in the name of a file would be read as colour codes.
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(printable(description), total=total, note="")
            yield lambda n=1, note="": bar.update(task, advance=n, note=printable(note))
        return
    done, last = 0, time.monotonic()

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done >= total or now - last >= every_s:
            last = now
            print(printable(f"{description}: {done}/{total} {note}".rstrip()), file=sys.stderr, flush=True)

    yield advance


class JobProgress:
    """Shows the progress of reading recordings: a live table on a terminal, or regular lines in a log file.

    Parameters
    ----------
    sizes : dict of str to int
        Size in bytes of each recording, by key. The remaining time is estimated from the number of unread bytes,
        because recordings have very different sizes.
    every_s : float
        Seconds between two lines if the output is not a terminal.
    """

    def __init__(self, sizes: dict[str, int], *, every_s: float = 10.0) -> None:
        self.sizes, self.every_s = sizes, every_s
        self.statuses: Counter[str] = Counter()
        self.seconds = self.channel_seconds = 0.0
        self.running = self.from_earlier_run = 0
        self._left = self._read = 0
        self._left = sum(sizes.values())
        self._began = self._last = time.monotonic()
        self._live: Any = None

    @property
    def done(self) -> int:
        """Number of recordings that are finished."""
        return self.statuses.total()

    def add(self, key: str, status: str, *, seconds: float, channels: int, from_earlier_run: bool = False) -> None:
        """Count a recording that is finished.

        Parameters
        ----------
        key : str
            Key of the recording.
        status : str
            Status of the recording in the ledger.
        seconds : float
            Length of the recording in seconds.
        channels : int
            Number of channels of the recording.
        from_earlier_run : bool
            Whether an earlier run of the job had already read the recording.
        """
        self.statuses[status] += 1
        size = self.sizes.get(key, 0)
        self._left -= size
        self.seconds += seconds
        self.from_earlier_run += from_earlier_run
        if not from_earlier_run:
            self._read += size
            self.channel_seconds += seconds * channels

    def figures(self) -> dict[str, str]:
        """Return the values that the display shows, by title.

        Returns
        -------
        dict of str to str
            Number of finished recordings; how many of them were not sharded, for each status; hours of the finished
            recordings; speed; number of recordings that are being read; elapsed time; and remaining time.
        """
        passed = max(time.monotonic() - self._began, 1e-9)
        eta = f"{_clock(self._left * passed / self._read)}" if self._read else "?"
        aside = ", ".join(f"{n} {name}" for name, n in sorted(self.statuses.items()) if name != "sharded")
        taken = f" ({self.from_earlier_run} from an earlier run)" if self.from_earlier_run else ""
        return {
            "recordings": f"{self.done}/{len(self.sizes)}{taken}",
            "set aside": aside or "none",
            "hours": f"{self.seconds / 3600:.2f}",
            "channel-hours/s": f"{self.channel_seconds / 3600 / passed:.2f}",
            "in flight": str(self.running),
            "elapsed": _clock(passed),
            "left": eta if self.done < len(self.sizes) else _clock(0),
        }

    def look(self, running: int) -> None:
        """Update the display, unless the last update was very recent.

        Parameters
        ----------
        running : int
            Number of recordings that workers are reading now.
        """
        self.running = running
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._last >= self.every_s:
            self._say()

    def _say(self) -> None:
        self._last = time.monotonic()
        text = ", ".join(f"{title} {value}" for title, value in self.figures().items())
        print(f"reading: {text}", file=sys.stderr, flush=True)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title="reading recordings", title_justify="left", show_edge=False, show_header=True)
        figures = self.figures()
        for title in figures:
            table.add_column(title, no_wrap=title != "set aside")
        table.add_row(*figures.values())
        return table

    def __enter__(self) -> JobProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self._table(), console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = 0
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()
        else:
            self._say()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
