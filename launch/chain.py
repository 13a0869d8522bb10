"""Run commands one after another, as steps of a chain. A complete step does not run again; a stopped step resumes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RequestError, StopRequested, printable
from data_sharding.common.files import atomic_write_text, digest_of, open_to_append, read_json, write_json
from data_sharding.common.untrusted import check_group, check_number
from launch.parent import PARENT

TAIL = 25
"""Number of lines at the end of a step's log that are printed if the step fails."""
GRACE_S = 120.0
"""When a step is asked to stop, it has this many seconds to write a checkpoint and end; then it is killed."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a chain, which runs one command."""

    name: str
    title: str
    """Title of the step, which is shown to the user and says what the step does."""
    words: list[str]
    """Arguments of the command that the step runs."""
    outputs: list[str]
    """Folders that the step writes, relative to the folder of the chain."""
    proofs: list[str] = field(default_factory=list)
    """Files, relative to the folder of the chain, that must exist when the step is complete."""
    needs: list[str] = field(default_factory=list)
    """Names of the earlier steps of the chain that write the inputs of this step."""
    config: dict[str, Any] | None = None
    """Config of the step, written to ``configs/NAME.yaml`` in the folder of the chain before the step runs."""
    resumes: bool = False
    """What happens to the output folders of a former run if the command, the config or an input of the step has
    changed. If `resumes` is False, the folders are removed before the step runs. If `resumes` is True, they are kept,
    and the command of the step decides whether it can resume."""
    program: tuple[str, ...] = ("-m", "launch")
    """Arguments of the Python interpreter that come before `words`; they choose the program."""

    @property
    def command(self) -> str:
        """The command of the step, as a user would type the command."""
        import shlex

        program = "dreamscale" if self.program == ("-m", "launch") else " ".join(("python", *self.program))
        return f"{program} {shlex.join(self.words)}"


class StepFailedError(Exception):
    """A step failed.

    Parameters
    ----------
    step : Step
        The step.
    code : int
        The step's exit code.
    """

    def __init__(self, step: Step, code: int) -> None:
        super().__init__(f"step '{step.name}' ended with exit code {code}")
        self.step, self.code = step, code


class Chain:
    """Runs the steps of a chain that are not complete yet.

    Parameters
    ----------
    out : Path
        Folder of the chain.
    say : callable
        Function that prints a line for the user.
    """

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self.out, self.say = out, say
        self.keys: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.child: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def run(self, step: Step, position: str) -> None:
        """Run a step, unless it is already complete.

        Parameters
        ----------
        step : Step
            The step to run. All steps in ``step.needs`` must be complete.
        position : str
            Number of the step, such as ``[ 2/14]``, printed before the title.

        Raises
        ------
        StepFailedError
            If the step failed.
        StopRequested
            If a signal asked the chain to stop.
        """
        key = digest_of([step.words, step.config, *(self.keys[name] for name in step.needs)])
        self.keys[step.name] = key
        marker, begun = self._marker(step, "done"), self._marker(step, "begun")
        if self._matches(marker, key) and all((self.out / name).exists() for name in (*step.outputs, *step.proofs)):
            self.seconds[step.name] = _read_seconds(marker)
            self.say(f"{position} {step.title}: already complete ({_format_time(self.seconds[step.name])})")
            return
        marker.unlink(missing_ok=True)
        spent = 0.0
        if self._matches(begun, key):
            spent = _read_seconds(begun)
        elif not step.resumes:
            for folder in step.outputs:
                shutil.rmtree(self.out / folder, ignore_errors=True)
        write_json(begun, {"key": key, "seconds": spent})
        if step.config is not None:
            import yaml

            path = self.out / "configs" / f"{step.name}.yaml"
            atomic_write_text(path, yaml.safe_dump(step.config, sort_keys=False))
        self.say(f"{position} {step.title}\n        $ {step.command}")
        started = time.monotonic()
        try:
            code = self._spawn(step)
        finally:
            spent += time.monotonic() - started
            write_json(begun, {"key": key, "seconds": round(spent, 2)})
        if self.stopping or code == EXIT_STOPPED:
            raise StopRequested(f"in step '{step.name}'; run the same command to resume")
        if code != EXIT_DONE:
            raise StepFailedError(step, code)
        write_json(marker, {"key": key, "seconds": round(spent, 2), "command": step.command})
        begun.unlink()
        self.seconds[step.name] = round(spent, 2)

    def run_all(self, steps: Sequence[Step], more: int = 0) -> int:
        """Run steps one after another, up to the first step that fails.

        Parameters
        ----------
        steps : sequence of Step
            The steps.
        more : int
            Number of steps that the caller runs afterwards; the numbers of the steps that are shown count them, too.

        Returns
        -------
        int
            Exit code: `EXIT_DONE`, or the exit code of the step that failed. The end of its log is then printed.

        Raises
        ------
        StopRequested
            If a signal asked the chain to stop.
        """
        try:
            for number, step in enumerate(steps, 1):
                self.run(step, f"[{number:2d}/{len(steps) + more}]")
        except StepFailedError as error:
            self.print_tail(error.step)
            print(f"dreamscale: {error}; the log of this step is {self.log(error.step)}", file=sys.stderr)
            return error.code if error.code > 0 else EXIT_FAILED
        return EXIT_DONE

    def _marker(self, step: Step, what: str) -> Path:
        return self.out / "steps" / f"{step.name}.{what}.json"

    def _matches(self, marker: Path, key: str) -> bool:
        """Return whether the marker file of a step is from a run with the same command, config and inputs."""
        try:
            return read_json(marker)["key"] == key
        except (RequestError, KeyError, TypeError):
            return False

    def print_tail(self, step: Step) -> None:
        """Print the last lines of the log of a step that failed."""
        for line in self.log(step).read_text(errors="replace").splitlines()[-TAIL:]:
            print(printable(f"  | {line}"), file=sys.stderr)

    def log(self, step: Step) -> Path:
        """Return the path of the log file of a step."""
        return self.out / "logs" / f"{step.name}.log"

    def _spawn(self, step: Step) -> int:
        log = self.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ) | {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with os.fdopen(open_to_append(log), "ab") as stream:
            stream.write(f"$ {step.command}\n".encode())
            stream.flush()
            self.child = subprocess.Popen(
                [sys.executable, *step.program, *step.words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
            try:
                with _display_progress(log) as refresh:
                    while (code := self.child.poll()) is None:
                        time.sleep(0.1)
                        refresh()
                return code
            finally:
                if self.child.poll() is None:
                    self._stop_child()
                self.child = None

    def _stop_child(self) -> None:
        assert self.child is not None
        self.child.terminate()
        try:
            self.child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """While the context is active, a signal that asks the chain to stop is sent on to the running step."""

        def stop(number: int, _: FrameType | None) -> None:
            again = self.stopping
            self.stopping = True
            if self.child is None:
                raise StopRequested("run the same command to resume")
            if again and number == signal.SIGINT:
                os.killpg(self.child.pid, signal.SIGKILL)
            else:
                self.child.terminate()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _read_seconds(marker: Path) -> float:
    """Read from a step's marker file how long the step ran."""
    return check_number(check_group(read_json(marker), str(marker)).get("seconds"), str(marker), "seconds")


def _format_time(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _read_last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 2000))
        lines = stream.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _display_progress(log: Path) -> Iterator[Callable[[], None]]:
    """Show the elapsed time of a step and the last line of its log; without a terminal, print only the total time."""
    started = time.monotonic()
    if not sys.stderr.isatty():
        yield lambda: None
        print(f"        {_format_time(time.monotonic() - started)}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    with console.status("") as status:

        def refresh() -> None:
            note = escape(printable(_read_last_line(log)))[: max(20, console.width - 20)]
            status.update(f"[bold]{_format_time(time.monotonic() - started)}[/bold] [dim]{note}[/dim]")

        yield refresh
    console.print(f"        [green]{_format_time(time.monotonic() - started)}[/green]")


def say(text: str) -> None:
    """Print a line for the user: the title of a step, and below it the command."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.markup import escape

    title, _, command = text.partition("\n")
    marked = f"[bold]{escape(title)}[/bold]" + (f"\n[cyan]{escape(command)}[/cyan]" if command else "")
    Console(stderr=True, highlight=False).print(marked, soft_wrap=True)
