"""What the operating system says about this machine, and what XLA makes of it, for people who read reports."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
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


def quota(root: Path = Path("/")) -> int | None:
    """CPUs' worth of time that the process's control group may use, rounded up; None if that is not limited.

    Containers are limited so: they see all CPUs, and are stopped for a while where they use more than their share.
    Version 2 of control groups, and version 1.

    Args:
      root: the folder that stands for "/".
    """
    found = [_share(folder) for folder in _control_groups(root)]
    limits = [x for x in found if x is not None]
    return max(1, math.ceil(min(limits))) if limits else None


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the process's control group and those that hold it, as far as they can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controllers and "cpu")
        folder = mount / path.lstrip("/")
        yield from (x for x in (folder, *folder.parents) if x.is_relative_to(mount))


def _share(folder: Path) -> float | None:
    try:
        if (file := folder / "cpu.max").exists():
            most, period = file.read_text().split()
        else:
            most = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(most) / int(period) if int(most) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max": no limit
        return None


def threads(devices: int = 1) -> int:
    """Threads that XLA's pool has, or will have: one for each CPU, or what the environment says, at least `devices`."""
    for name in ("PJRT_NPROC", "NPROC"):  # the first that is a number counts; XLA's DefaultThreadPoolSize
        if re.fullmatch(r"\s*[+-]?[0-9]+\s*", value := os.environ.get(name, "")):
            return max(int(value), 1, devices)
    return max(cores(), devices)


def splits_512_bit(fields: dict[str, str]) -> bool:
    """Whether the CPU executes 512-bit instructions in two halves: AMD's Zen 4 (family 25) does."""
    return fields.get("vendor_id") == "AuthenticAMD" and fields.get("cpu family") == "25"
