"""The command ``dreamscale demo``: simulate recordings, and run all other commands on them, on two CPU cores."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED, RequestError
from data_sharding.common.files import read_json, write_json
from launch.chain import Chain, say
from launch.demo.steps import make_steps


@dataclass(kw_only=True)
class DemoConfig:
    """Run every stage on simulated recordings, from EEG to images, and write a report."""

    out: str = "runs/demo"
    """Folder for all files of the demo. Steps that are already complete in this folder do not run again."""
    seed: int = 0
    """Seed for people, pictures and training. If the folder already has a demo with another seed, the new demo is
    written to its subfolder seed-N."""
    profile: Literal["full", "smoke"] = "full"
    """full or smoke. smoke runs the same steps with very little training, as a quick test of the installation; its
    images have no meaning."""


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


def run_demo(config: DemoConfig) -> int:
    """Run all steps and write the report.

    Parameters
    ----------
    config : DemoConfig
        Config of the demo.

    Returns
    -------
    int
        0 if the generated pictures show what people saw; 1 if they do not; if a step failed, the exit code of this
        step. A complete smoke run has the exit code 0, whatever its pictures show.

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
    chain = Chain(folder, say)
    with chain.forward_signals():
        if code := chain.run_all(steps, more=1):
            return code
        say(f"[{len(steps) + 1:2d}/{len(steps) + 1}] write the report")
        conclusion, passed = write_report(folder, steps, chain.seconds, seed=config.seed, profile=config.profile)
    say(conclusion)
    print(folder / "report.html", flush=True)
    # A smoke run trains too little to show anything, so the exit code of a smoke run only says whether all steps work.
    return EXIT_DONE if passed or config.profile == "smoke" else EXIT_FAILED


main = command(DemoConfig, run_demo, prog="dreamscale demo", positionals=())

if __name__ == "__main__":
    sys.exit(main())
