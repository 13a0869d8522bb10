"""Show the progress of a training run in a tracker, and in a live table on the terminal."""

from __future__ import annotations

import contextlib
import netrc
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_sharding.common.errors import one_line, show
from data_sharding.common.files import atomic_write_text
from data_sharding.common.untrusted import check_key, read_limited


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where metrics are sent, in addition to metrics.jsonl."""

    kind: Literal["none", "wandb", "tensorboard"] = "wandb"
    """Kind of tracker. wandb is online if you are logged in ('wandb login' or WANDB_API_KEY), else offline; the
    environment variable WANDB_MODE overrides this choice."""
    project: str = "dreamscale"
    """Name of the project at wandb."""
    name: str | None = None
    """Name of the run; by default the name of the run directory."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^/\\#?%:\x00-\x1f\x7f]{1,128}", self.project):
            raise ValueError(
                f"tracker.project '{show(self.project)}': use 1 to 128 characters, no control characters, and none of "
                "/ \\ # ? % :"
            )


def open_tracker(
    config: TrackerConfig, path: Path, values: dict[str, Any]
) -> tuple[Callable[..., None], Callable[[], None]]:
    """Open the tracker that the config names.

    Parameters
    ----------
    config : TrackerConfig
        Settings of the tracker.
    path : Path
        The run directory.
    values : dict
        Config of the run; the tracker stores this config.

    Returns
    -------
    log : callable
        Function ``log(step, metrics)`` that sends metrics to the tracker. Values that are not numbers are ignored.
    close : callable
        Function ``close()`` that ends the connection to the tracker.
    """
    if config.kind == "wandb":
        return _open_wandb(config, path, values)
    if config.kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(path / "tensorboard"))

        def log(step: int, metrics: dict[str, Any]) -> None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)

        return log, writer.close
    return (lambda step, metrics: None), (lambda: None)


def _open_wandb(
    config: TrackerConfig, path: Path, values: dict[str, Any]
) -> tuple[Callable[..., None], Callable[[], None]]:
    import wandb

    name = config.name or path.name
    # `wandb.init` fails if wandb has neither an API key nor a mode, so always choose a mode.
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    common: dict[str, Any] = {
        "project": config.project,
        "name": name,
        # If wandb is offline, each start or resumption of a training is a separate run at wandb. These runs get the
        # same group.
        "group": os.environ.get("WANDB_RUN_GROUP") or name,
        "dir": str(path),
        "config": values,
        # Pass the settings as a dictionary, not as a wandb.Settings object: wandb would store the run in this object,
        # and a second call of `wandb.init` with it would then continue the first run.
        "settings": {"silent": True, "console": "off"},
    }
    if mode == "online":
        try:
            # The id stays the same when a training is resumed, so the training continues its earlier run at wandb.
            run = wandb.init(**common, mode=mode, id=_run_id(path), resume="allow")
        except wandb.errors.CommError as error:
            print(
                f"dreamscale: wandb cannot be reached ({one_line(error)}); metrics are stored in {path / 'wandb'}; "
                "'wandb sync' sends them later",
                file=sys.stderr,
            )
            mode = "offline"
    if mode != "online":
        run = wandb.init(**common, mode=mode)
    # Use the metric "step" as the x-axis. wandb's own step cannot be used, because wandb does not allow it to decrease,
    # but a training goes back to an earlier step after a loss spike.
    run.define_metric("*", step_metric="step")
    return (lambda step, metrics: run.log({"step": step, **metrics})), run.finish


def logged_in() -> bool:
    """Return whether wandb has an API key, in WANDB_API_KEY or in the file that ``wandb login`` writes."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(wandb.setup().settings.base_url).netloc) is not None


def _run_id(path: Path) -> str:
    """Return the id of the run at wandb; the id stays the same when the training is resumed."""
    known = path / "wandb" / "run_id"
    if "WANDB_RUN_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"]
    if not known.is_file():
        known.parent.mkdir(exist_ok=True)
        atomic_write_text(known, secrets.token_hex(4) + "\n")
    text = read_limited(known, 1000).decode(errors="replace").strip()
    return check_key(text, str(known))


# Rows of the live table. Each row has the name of a metric, a title and a format.
_ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("val_loss", "held-out loss", "{:.4f}"),
    ("val_explained", "explained", "{:.1%}"),
    ("lr", "learning rate", "{:.2e}"),
    ("grad_norm", "gradient norm", "{:.3g}"),
    ("epoch", "epoch", "{:.2f}"),
    ("samples_per_s", "windows / s", "{:,.1f}"),
    ("tokens_per_s", "tokens / s", "{:,.0f}"),
    ("mfu", "model-FLOPs utilisation", "{:.1%}"),
    ("data_stall_share", "waiting for data", "{:.1%}"),
    ("memory_peak_gib", "memory peak", "{:.2f} GiB"),
    ("skipped_steps", "skipped steps", "{:d}"),
    ("rewinds", "rewinds", "{:d}"),
)


def table_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a title and a formatted value for each row of the live table; `metrics` holds the newest values."""
    return [(title, form.format(metrics[name])) for name, title, form in _ROWS if metrics.get(name) is not None]


@contextlib.contextmanager
def live_table(
    title: str, total: int, *, enabled: bool = True, every_s: float = 10.0
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Show the progress of a training: a live table on a terminal, or lines of text if stderr is not a terminal.

    Parameters
    ----------
    title : str
        Name of the training.
    total : int
        Number of optimiser steps in the whole run.
    enabled : bool
        If False, no table and no lines are shown. Only rank 0 should pass True.
    every_s : float
        Number of seconds between two lines of progress, if stderr is not a terminal.

    Yields
    ------
    callable
        Function ``show(step, metrics)``: `step` is the number of steps done, `metrics` holds the new values.
    """
    known: dict[str, Any] = {}
    if not enabled:
        yield lambda step, metrics: None
        return
    if not sys.stderr.isatty():
        last, shown = time.monotonic(), -1

        def line(step: int, metrics: Mapping[str, Any]) -> None:
            nonlocal last, shown
            known.update(metrics)
            now = time.monotonic()
            if step != shown and (step >= total or now - last >= every_s):
                last, shown = now, step
                loss = known.get("loss")
                note = "" if loss is None else f" loss {loss:.4f}"
                print(f"{title}: {step}/{total}{note}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

    bar = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = bar.add_task(title, total=total)
    with Live(bar, console=Console(stderr=True), refresh_per_second=4) as live:

        def show(step: int, metrics: Mapping[str, Any]) -> None:
            known.update(metrics)
            bar.update(task, completed=step)
            table = Table.grid(padding=(0, 2))
            for name, value in table_rows(known):
                table.add_row(name, value)
            live.update(Group(bar, table))

        yield show
