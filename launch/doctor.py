"""The command ``dreamscale doctor``: show which parts of Dreamscale work on this machine, and what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from data_sharding.common.config import command
from data_sharding.common.cores import count_cores
from data_sharding.common.errors import EXIT_DONE, EXIT_FAILED

State = Literal["ok", "note", "missing"]
_READERS = {
    "antio": ("ANT Neuro .cnt", "antio"),
    "curryreader": ("Curry", "curryreader"),
    "defusedxml": ("Persyst, NEDF and EGI", "defusedxml"),
    "mffpy": ("EGI .mff", "mffpy"),
    "neo": ("Micromed, Blackrock and Neuralynx", "neo"),
    "pymatreader": ("EEGLAB .set of MATLAB 7.3", "pymatreader"),
    "pymef": ("MEF3", "pymef"),
    "pyxdf": ("XDF (LabStreamingLayer)", "pyxdf"),
    "h5py": ("HDF5", "h5py"),
}
_REQUIRED = (
    "numpy",
    "scipy",
    "mne",
    "torch",
    "ray",
    "deepspeed",
    "accelerate",
    "diffusers",
    "transformers",
    "webdataset",
)


@dataclass(kw_only=True)
class DoctorConfig:
    """Show what works on this machine, and what to install."""

    path: str = "."
    """A folder; the free space on its disk is checked."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table that the doctor prints."""

    what: str
    state: State
    found: str
    advice: str = ""
    """Advice for the user; empty if the user does not have to do anything."""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    return Finding(what="Python", state="ok", found=text)


def _packages() -> list[Finding]:
    findings = []
    for name in _REQUIRED:
        version = _version(name)
        if version is None or importlib.util.find_spec(name) is None:
            findings.append(Finding(what=name, state="missing", found="not installed", advice=f"pip install {name}"))
        else:
            findings.append(Finding(what=name, state="ok", found=version))
    return findings


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        advice = "pip install --force-reinstall torch"
        return Finding(what="device", state="missing", found=f"torch does not import: {error}", advice=advice)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding(what="device", state="ok", found=f"{len(names)} x {names[0]}, {memory:.0f} GiB")
    cores, gpu = count_cores(), shutil.which("nvidia-smi") is not None
    if gpu and "+cpu" in torch.__version__:
        advice = "this machine has a GPU, but torch is built without CUDA: install a CUDA build of torch"
        return Finding(what="device", state="note", found=f"{cores} CPU cores", advice=advice)
    return Finding(
        what="device",
        state="note",
        found=f"{cores} CPU cores, no GPU",
        advice="enough for the demo; larger trainings need a GPU",
    )


def _compiler() -> Finding:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        return Finding(what="compiler", state="ok", found=found)
    advice = "needed only for DeepSpeed's own kernels: install g++ (Debian: apt install g++)"
    return Finding(what="compiler", state="note", found="none", advice=advice)


def _readers() -> list[Finding]:
    findings = []
    for module, (formats, package) in _READERS.items():
        there = importlib.util.find_spec(module) is not None
        findings.append(
            Finding(
                what=f"reader {module}",
                state="ok" if there else "note",
                found=f"{_version(package) or 'installed'} ({formats})"
                if there
                else f"{formats} files will be quarantined",
                advice="" if there else f"pip install {package}",
            )
        )
    return findings


def _tracking() -> Finding:
    if _version("wandb") is None:
        return Finding(
            what="wandb", state="note", found="not installed", advice="pip install wandb, or set tracker.kind: none"
        )
    from pretrain.runs.tracking import logged_in

    if logged_in():
        return Finding(what="wandb", state="ok", found="logged in")
    return Finding(
        what="wandb", state="ok", found="not logged in: runs are recorded offline until you call 'wandb login'"
    )


def _disk(path: str) -> Finding:
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if not os.access(folder, os.W_OK):
        return Finding(what="disk", state="note", found=f"{folder} is not writable", advice="choose another folder")
    if free < 3:
        return Finding(
            what="disk", state="note", found=f"{free:.1f} GiB free at {folder}", advice="the demo needs 2 GiB"
        )
    return Finding(what="disk", state="ok", found=f"{free:.0f} GiB free at {folder}")


def _shared_memory() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding(what="shared memory", state="note", found="no /dev/shm", advice="set num_workers: 0")
    free = shutil.disk_usage(shm).free / 2**30
    if free < 1:
        advice = "in a container: start it with --shm-size=8g; or set num_workers: 0"
        return Finding(what="shared memory", state="note", found=f"{free:.2f} GiB free", advice=advice)
    return Finding(what="shared memory", state="ok", found=f"{free:.0f} GiB free")


def _clusters() -> list[Finding]:
    findings = []
    for tool, name in (("sbatch", "Slurm"), ("kubectl", "Kubernetes")):
        path = shutil.which(tool)
        advice = "" if path else f"needed only for 'dreamscale submit': put {tool} on the PATH"
        findings.append(
            Finding(what=name, state="ok" if path else "note", found=path or "not installed", advice=advice)
        )
    return findings


def examine(path: str = ".") -> list[Finding]:
    """Run every check and return the rows of the table, in their order.

    Parameters
    ----------
    path : str
        A folder; the free space on its disk is checked.
    """
    checks: list[Callable[[], Finding | list[Finding]]] = [
        _python,
        _packages,
        _device,
        _compiler,
        _readers,
        _tracking,
        lambda: _disk(path),
        _shared_memory,
        _clusters,
    ]
    findings: list[Finding] = []
    for check in checks:
        found = check()
        findings += found if isinstance(found, list) else [found]
    return findings


def _doctor(config: DoctorConfig) -> int:
    findings = examine(config.path)
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "to do")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "missing": "[red]MISSING[/red]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, finding.found, finding.advice)
    # If the output is not a terminal, print a wide table, because a user cannot copy a path that is wrapped over two
    # lines.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    missing = [finding.what for finding in findings if finding.state == "missing"]
    console.print(f"missing: {', '.join(missing)}" if missing else "every required package is installed")
    return EXIT_FAILED if missing else EXIT_DONE


main = command(DoctorConfig, _doctor, prog="dreamscale doctor", positionals=())

if __name__ == "__main__":
    sys.exit(main())
