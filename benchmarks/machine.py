"""Describe the machine of a benchmark, so that each result says where and when it was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Return the CPU model, whether the CPU has AMX and AVX-512, and the number of cores."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    values = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    model, flags = values.get("model name", platform.processor() or "CPU"), values.get("flags", "").split()
    has = ["with AMX" if "amx_tile" in flags else "no AMX", "with AVX-512" if "avx512f" in flags else "no AVX-512"]
    return f"{model} ({', '.join(has)}), {len(os.sched_getaffinity(0))} cores"


def describe_run() -> dict[str, object]:
    """Return the machine, the date, and the load of the machine before the benchmark (mean of one minute)."""
    load = round(os.getloadavg()[0], 1)
    return {"machine": describe_machine(), "date": datetime.date.today().isoformat(), "load": load}
