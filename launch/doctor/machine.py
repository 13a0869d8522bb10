"""Checks of one machine: packages, devices, memory, disks, clock and limits."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from data_sharding.common.cores import count_cores
from launch.doctor.finding import Finding

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
REQUIRED = (
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


SKEW_NOTE_S, SKEW_FAILS_S = 2.0, 60.0
"""Differences in seconds between two clocks, from which on the doctor gives advice, and from which on it fails."""
OPEN_FILES, PROCESSES = 4096, 4096
"""Lowest limits of open files and of processes that need no advice."""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> Finding:
    """Name the Python interpreter."""
    return Finding(what="Python", state="ok", found=f"{platform.python_version()} at {sys.executable}")


def check_packages(names: tuple[str, ...] = REQUIRED) -> list[Finding]:
    """Check that all necessary packages are installed."""
    findings = []
    for name in names:
        version = _version(name)
        if version is None or importlib.util.find_spec(name) is None:
            findings.append(Finding(what=name, state="fails", found="not installed", advice=f"pip install {name}"))
        else:
            findings.append(Finding(what=name, state="ok", found=version))
    return findings


def check_device(processes: int = 1) -> Finding:
    """Check that torch works, and that each process of this machine has a GPU if the machine has GPUs."""
    try:
        import torch
    except ImportError as error:
        advice = "pip install --force-reinstall torch"
        return Finding(what="device", state="fails", found=f"torch does not import: {error}", advice=advice)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found = f"{count} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
        if count < processes:
            advice = f"start at most {count} processes on this machine"
            return Finding(what="device", state="fails", found=f"{found}, for {processes} processes", advice=advice)
        return Finding(what="device", state="ok", found=found)
    cores = count_cores()
    if shutil.which("nvidia-smi") is not None and "+cpu" in torch.__version__:
        advice = "this machine has a GPU, but torch is built without CUDA: install a CUDA build of torch"
        return Finding(what="device", state="note", found=f"{cores} CPU cores", advice=advice)
    return Finding(
        what="device",
        state="note",
        found=f"{cores} CPU cores, no GPU",
        advice="enough for the demo; larger trainings need a GPU",
    )


def check_compiler() -> Finding:
    """Look for a C++ compiler."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        return Finding(what="compiler", state="ok", found=found)
    advice = "needed only for DeepSpeed's own kernels: install g++ (Debian: apt install g++)"
    return Finding(what="compiler", state="note", found="none", advice=advice)


def check_deepspeed(device: str = "auto") -> Finding:
    """Import DeepSpeed, and list its kernels that this machine can compile."""
    from pretrain.runs.distributed import choose_device, import_deepspeed

    deepspeed = import_deepspeed(choose_device(device))
    kernels: dict[str, Any] = deepspeed.ops.__compatible_ops__
    fit = sorted(name.removeprefix("deepspeed_") for name, compatible in kernels.items() if compatible)
    if fit:
        return Finding(what="DeepSpeed kernels", state="ok", found=f"can be compiled: {', '.join(fit)}")
    advice = "Dreamscale needs none of them; only settings under the key 'deepspeed' can, and then need g++ or nvcc"
    return Finding(what="DeepSpeed kernels", state="note", found="none can be compiled here", advice=advice)


def check_readers() -> list[Finding]:
    """Check the packages that read file formats."""
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


def check_disk(path: str) -> Finding:
    """Check the space on the disk of a folder."""
    folder = _find_folder(path)
    free = shutil.disk_usage(folder).free / 2**30
    if not os.access(folder, os.W_OK):
        return Finding(what="disk", state="note", found=f"{folder} is not writable", advice="choose another folder")
    if free < 3:
        return Finding(
            what="disk", state="note", found=f"{free:.1f} GiB free at {folder}", advice="the demo needs 2 GiB"
        )
    return Finding(what="disk", state="ok", found=f"{free:.0f} GiB free at {folder}")


def _find_folder(path: str) -> Path:
    """Return a folder, or the first of its parents that exists."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_file_clock(path: str) -> Finding:
    """Compare the clock of the file server of a folder with the clock of this machine."""
    folder = _find_folder(path)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dreamscale-doctor-") as file:
            before = time.time()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            written, after = Path(file.name).stat().st_mtime, time.time()
    except OSError as error:
        advice = "choose another folder with --path"
        return Finding(what="clock of the disk", state="note", found=f"{folder}: {error.strerror}", advice=advice)
    # The disk may store times with a resolution of two seconds.
    skew = max(before - written, written - after, 0.0)
    return judge_skew("clock of the disk", skew, f"{folder} and this machine differ by")


def judge_skew(what: str, skew: float, text: str) -> Finding:
    """Return the finding for a difference of two clocks.

    Parameters
    ----------
    what : str
        What was examined.
    skew : float
        Difference in seconds.
    text : str
        Which clocks differ; the difference is written behind it.
    """
    state = "fails" if skew > SKEW_FAILS_S else "note" if skew > SKEW_NOTE_S else "ok"
    advice = "" if state == "ok" else "run a time service, such as chrony, on all machines and servers"
    return Finding(what=what, state=state, found=f"{text} {skew:.2f} s", advice=advice)


def check_shared_memory(processes: int = 1, folder: Path = Path("/dev/shm")) -> Finding:
    """Check the shared memory, through which the loader gets its samples."""
    if not folder.is_dir():
        return Finding(what="shared memory", state="note", found=f"no {folder}", advice="set num_workers: 0")
    free, needed = shutil.disk_usage(folder).free / 2**30, max(1.0, 0.5 * processes)
    if free < needed:
        advice = (
            "in a container: start it with --shm-size=16g (Kubernetes: --shared-memory 16Gi); or set num_workers: 0"
        )
        found = f"{free:.2f} GiB free for {processes} {'process' if processes == 1 else 'processes'}"
        return Finding(what="shared memory", state="note", found=found, advice=advice)
    return Finding(what="shared memory", state="ok", found=f"{free:.0f} GiB free")


def check_limits(infiniband: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Check the limits that the system sets for a process (``ulimit``)."""
    import resource

    def limit(number: int) -> float:
        soft = resource.getrlimit(number)[0]
        return float("inf") if soft == resource.RLIM_INFINITY else soft

    findings = []

    def add(what: str, value: float, fits: bool, unit: str, advice: str) -> None:
        found = f"no limit of {unit}" if value == float("inf") else f"{value:.0f} {unit}"
        state = "ok" if fits else "note"
        findings.append(Finding(what=what, state=state, found=found, advice="" if fits else advice))

    files = limit(resource.RLIMIT_NOFILE)
    add("open files", files, files >= OPEN_FILES, "open files", "ulimit -n 65536 (Slurm: in the prologue)")
    count = limit(resource.RLIMIT_NPROC)
    add("processes", count, count >= PROCESSES, "processes of this user", "ulimit -u 65536, or ask the administrator")
    locked = limit(resource.RLIMIT_MEMLOCK)
    cards = infiniband.is_dir() and any(infiniband.iterdir())
    # InfiniBand needs locked memory; without InfiniBand the limit does not matter.
    advice = "InfiniBand needs 'ulimit -l unlimited'; ask the administrator"
    add("locked memory", locked / 2**20, locked == float("inf") or not cards, "MiB of locked memory", advice)
    for what, number in (("file size", resource.RLIMIT_FSIZE), ("address space", resource.RLIMIT_AS)):
        size = limit(number) / 2**20
        letter = "f" if what == "file size" else "v"
        add(
            what,
            size,
            size == float("inf"),
            f"MiB of {what}",
            f"ulimit -{letter} unlimited; shards and torch need more",
        )
    return findings


def check_clusters() -> list[Finding]:
    """Look for the programs that submit jobs."""
    findings = []
    for tool, name in (("sbatch", "Slurm"), ("kubectl", "Kubernetes")):
        path = shutil.which(tool)
        advice = "" if path else f"needed only for 'dreamscale submit': put {tool} on the PATH"
        findings.append(
            Finding(what=name, state="ok" if path else "note", found=path or "not installed", advice=advice)
        )
    return findings
