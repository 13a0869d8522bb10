"""Describe the machine of a benchmark, so that each result says where and when it was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

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
