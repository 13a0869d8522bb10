"""The command ``dreamscale demo``: run every stage as an ordinary command on simulated data, on two CPU cores."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RequestError, StopRequested
from data_sharding.common.files import atomic_write_text, digest_of, read_json, write_json
from launch.demo.steps import Step, make_steps
from launch.worker import PARENT

TAIL = 25
"""Number of lines of the log that are printed when a step fails."""
GRACE_S = 120.0
"""After a request to stop, a step has this many seconds to write a checkpoint. Then the step is killed."""


@dataclass(kw_only=True)
class DemoConfig:
    """Run every stage on simulated recordings, from EEG to images, and write a report."""

    out: str = "runs/demo"
    """Folder for all files of the demo. Steps that are already complete in this folder do not run again."""
    seed: int = 0
    """Seed for people, pictures and training. If the folder has a demo with another seed, the subfolder seed-N is
    used."""
    profile: Literal["full", "smoke"] = "full"
    """full or smoke. smoke runs the same steps with very little training, as a quick test. The images of smoke have no
    meaning."""


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


def choose_folder(config: DemoConfig) -> Path:
    """Choose the folder for this seed and profile, so that two demos never share a folder.

    Parameters
    ----------
    config : DemoConfig
        Config of the demo.

    Returns
    -------
    Path
        The folder `out`, or a subfolder of `out` if `out` already has a demo with another seed or profile.

    Raises
    ------
    RequestError
        If `out` is a file, cannot be written, or holds files that are not from a demo.
    """
    out, wanted = Path(config.out), {"seed": config.seed, "profile": config.profile}
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: this is a file; choose a folder")
    if (out / "demo.json").is_file():
        if read_json(out / "demo.json") == wanted:
            return out
        out = out / (f"seed-{config.seed}" + ("-smoke" if config.profile == "smoke" else ""))
    elif out.is_dir() and any(out.iterdir()):
        raise RequestError(f"--out {out}: the folder is not empty and is not a demo; choose another folder")
    try:
        write_json(out / "demo.json", wanted)
    except OSError as error:
        raise RequestError(
            f"--out {out}: the folder cannot be written ({error.strerror}); choose another folder"
        ) from None
    return out


class Chain:
    """Runs those steps of the demo that are not complete yet.

    Parameters
    ----------
    out : Path
        The demo's folder.
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
            The step to run. All steps that this step needs must be complete.
        position : str
            Text that is printed before the title of the step.

        Raises
        ------
        StepFailedError
            If the step failed.
        StopRequested
            If a signal asked the demo to stop.
        """
        key = digest_of([step.words, step.config, *(self.keys[name] for name in step.needs)])
        self.keys[step.name] = key
        marker, begun = self._marker(step, "done"), self._marker(step, "begun")
        if self._matches(marker, key) and all((self.out / name).exists() for name in (*step.outputs, *step.proofs)):
            self.seconds[step.name] = read_json(marker)["seconds"]
            self.say(f"{position} {step.title}: already complete ({_format_time(self.seconds[step.name])})")
            return
        marker.unlink(missing_ok=True)
        spent = 0.0
        if self._matches(begun, key):
            spent = read_json(begun)["seconds"]
        else:
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

    def _marker(self, step: Step, what: str) -> Path:
        return self.out / "steps" / f"{step.name}.{what}.json"

    def _matches(self, marker: Path, key: str) -> bool:
        """Return whether the marker file of a step was written for the same command, config and inputs."""
        try:
            return read_json(marker)["key"] == key
        except (RequestError, KeyError, TypeError):
            return False

    def log(self, step: Step) -> Path:
        """Return the path of the log file of a step."""
        return self.out / "logs" / f"{step.name}.log"

    def _spawn(self, step: Step) -> int:
        log = self.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ) | {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as stream:
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
        """If a signal asks the demo to stop, forward this request to the running step."""

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
            note = escape(_read_last_line(log))[: max(20, console.width - 20)]
            status.update(f"[bold]{_format_time(time.monotonic() - started)}[/bold] [dim]{note}[/dim]")

        yield refresh
    console.print(f"        [green]{_format_time(time.monotonic() - started)}[/green]")


def _say(text: str) -> None:
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.markup import escape

    title, _, command = text.partition("\n")
    marked = f"[bold]{escape(title)}[/bold]" + (f"\n[cyan]{escape(command)}[/cyan]" if command else "")
    Console(stderr=True, highlight=False).print(marked, soft_wrap=True)


def run_demo(config: DemoConfig) -> int:
    """Run all steps and write the report.

    Parameters
    ----------
    config : DemoConfig
        Config of the demo.

    Returns
    -------
    int
        0, or the exit code of the step that failed.

    Raises
    ------
    RequestError
        If the folder cannot be used.
    StopRequested
        If a signal asked the demo to stop.
    """
    from launch.demo.report import write_report

    folder = choose_folder(config)
    steps = make_steps(folder, config.seed, config.profile)
    chain = Chain(folder, _say)
    with chain.forward_signals():
        try:
            for number, step in enumerate(steps, 1):
                chain.run(step, f"[{number:2d}/{len(steps) + 1}]")
        except StepFailedError as error:
            log = chain.log(error.step)
            for line in log.read_text(errors="replace").splitlines()[-TAIL:]:
                print(f"  | {line}", file=sys.stderr)
            print(f"dreamscale: {error}; its log is {log}", file=sys.stderr)
            return error.code if error.code > 0 else EXIT_FAILED
        _say(f"[{len(steps) + 1:2d}/{len(steps) + 1}] write the report")
        conclusion = write_report(folder, steps, chain.seconds, seed=config.seed, profile=config.profile)
    _say(conclusion)
    print(folder / "report.html", flush=True)
    return EXIT_DONE


main = command(DemoConfig, run_demo, prog="dreamscale demo", positionals=())

if __name__ == "__main__":
    sys.exit(main())
