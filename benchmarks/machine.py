"""Describe the machine of a benchmark, so that each result says where and when it was measured; measure memory."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "NPY_DISABLE_CPU_FEATURES", "OPENBLAS_CORETYPE")
"""Environment variables that make PyTorch, oneDNN, NumPy and OpenBLAS compute as on an older processor."""


def describe_machine() -> str:
    """Return a text: the CPU model, AMX and AVX-512, the usable cores, and the variables of `LIMITS` that are set."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    values = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    model, flags = values.get("model name", platform.processor() or "CPU"), values.get("flags", "").split()
    has = ["with AMX" if "amx_tile" in flags else "no AMX", "with AVX-512" if "avx512f" in flags else "no AVX-512"]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    limited = f", limited by {' '.join(limits)}" if limits else ""
    return f"{model} ({', '.join(has)}), {len(os.sched_getaffinity(0))} cores{limited}"


def describe_run() -> dict[str, object]:
    """Return the machine, the date, and the load of the machine before the benchmark (mean of one minute)."""
    load = round(os.getloadavg()[0], 1)
    return {"machine": describe_machine(), "date": datetime.date.today().isoformat(), "load": load}


def start_memory(device: torch.device) -> float:
    """Begin to measure the peak of the memory; return the memory in GiB that is used now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**30
    # First give memory that was freed earlier back to the system. Otherwise the program would reuse it, and the growth
    # would not include it. Writing 5 to /proc/self/clear_refs sets the peak of this process's memory (VmHWM) to its
    # present size.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status("VmRSS")


def peak_memory(device: torch.device) -> float:
    """Return the peak of the memory in GiB since `start_memory`."""
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else _read_status("VmHWM")


def _read_status(key: str) -> float:
    """Return an entry of /proc/self/status in GiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 2**20
