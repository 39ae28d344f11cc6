"""What the operating system says about this machine, and what XLA makes of it, for people who read reports."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cpu_fields() -> dict[str, str]:
    """The first CPU's entry of /proc/cpuinfo; empty where there is none."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def cpu_name() -> str:
    fields = cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(devices: int = 1) -> int:
    """Threads that XLA's pool has, or will have: one for each CPU, or what the environment says, at least `devices`."""
    for name in ("PJRT_NPROC", "NPROC"):  # the first that is a number counts; XLA's DefaultThreadPoolSize
        if re.fullmatch(r"\s*[+-]?[0-9]+\s*", value := os.environ.get(name, "")):
            return max(int(value), 1, devices)
    return max(cores(), devices)


def splits_512_bit(fields: dict[str, str]) -> bool:
    """Whether the CPU executes 512-bit instructions in two halves: AMD's Zen 4 (family 25) does."""
    return fields.get("vendor_id") == "AuthenticAMD" and fields.get("cpu family") == "25"
