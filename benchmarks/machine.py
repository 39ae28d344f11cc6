"""Facts about the machine that are reported with every number measured on it."""

from __future__ import annotations

import os
import pathlib
import platform
from typing import Any

_VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


def cpus() -> tuple[int, ...]:
    """The CPUs that this process may use, in order."""
    return tuple(sorted(os.sched_getaffinity(0)))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 32 MiB where the system does not tell."""
    sizes = [_size(path.read_text().strip()) for path in _caches() if path.name == "size"]
    return max(sizes, default=32 << 20)


def free_memory() -> int:
    """Bytes that programs may take now."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return 0


def describe() -> dict[str, Any]:
    """What the report says about the machine."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(cpus()),
        "caches": _cache_sizes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),  # anything much above 0 before a run spoils it
    }


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    family, model = fields.get("cpu family", "?"), fields.get("model", "?")
    flags = fields.get("flags", "").split()
    wide = [name for name in _VECTOR_FLAGS if name in flags]
    return f"{fields.get('model name', platform.processor())} (family {family}, model {model}; {' '.join(wide)})"


def _caches() -> list[pathlib.Path]:
    return sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))


def _cache_sizes() -> dict[str, int]:
    sizes = {}
    for path in _caches():
        kind = (path.parent / "type").read_text().strip()
        if kind != "Instruction":
            sizes[f"L{(path.parent / 'level').read_text().strip()}"] = _size(path.read_text().strip())
    return sizes


def _size(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * factor
