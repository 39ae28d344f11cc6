"""Costs of this machine that `python -m jax_nano tune` measured: where they are kept, and how they are read.

A file for each kind of CPU, in the user's cache folder. JAX_NANO_TUNED names another one, or is "off". They decide
what only moves data (csrc/plan/search.h), so results are the same with and without them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from jax_nano._core import spec

ENVIRONMENT: Final = "JAX_NANO_TUNED"
VERSION: Final = 1
"""Of the format: part of the files' names."""


CORE_FIELDS: Final = 5


class Costs(NamedTuple):
    """What was measured."""

    core: tuple[int, ...]  # the fields of CoreModel (csrc/machine/costs.h)
    kernels: dict[str, list[float]]  # nanoseconds of each of spec.cost_names(), by kernel


def signature(runtime: ModuleType) -> str:
    """This kind of CPU, the model of costs, and the kernels: what a file of costs is good for."""
    caches = runtime.caches()
    facts = (VERSION, caches["l1d"], caches["l2"], caches["l3"], spec.cost_names())
    names = sorted(kernel["name"] for kernel in runtime.kernels())
    digest = hashlib.sha256(repr((facts, names)).encode()).hexdigest()[:8]
    return f"{runtime.cpu_signature()}-{digest}"


def path(runtime: ModuleType) -> Path | None:
    """Where costs are kept for this machine; None if JAX_NANO_TUNED is "off"."""
    if given := os.environ.get(ENVIRONMENT):
        return None if given.strip().lower() == "off" else Path(given)
    return cache_folder() / f"tuned-{signature(runtime)}.json"


def cache_folder() -> Path:
    """Where this package keeps what it has measured for the user."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache") / "jax_nano"


def save(costs: Costs, file: Path, about: dict[str, Any]) -> None:
    """Writes them as JSON, readable for others and writable for the user alone.

    Args:
      costs: what was measured.
      file: where; its folder is made.
      about: what else a reader should know.
    """
    names = spec.cost_names()
    kernels = {
        kernel: {name: float(f"{cost:.4g}") for name, cost in zip(names, ns, strict=True)}
        for kernel, ns in costs.kernels.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, **about, "core": costs.core, "kernels": kernels}, indent=1)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(text + "\n")
    new.chmod(0o644)
    new.replace(file)  # another process reads the old file or the new one


def load(file: Path, known: set[str]) -> Costs:
    """What `save` wrote.

    Args:
      file: where.
      known: names of the kernels that exist; costs of others are left out.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no such file, or others than its owner may write to it.
    """
    state = file.stat()
    if state.st_uid not in (0, os.getuid()) or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError("other users may write to it")
    try:
        found = json.loads(file.read_text())
        if found["version"] != VERSION:
            raise ValueError(f"it has version {found['version']}, not {VERSION}")
        core = tuple(int(x) for x in found["core"])
        kernels = {
            str(kernel): [float(ns[name]) for name in spec.cost_names()]
            for kernel, ns in found["kernels"].items()
            if kernel in known
        }
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it lacks what costs consist of ({type(error).__name__}: {error})") from error
    if len(core) != CORE_FIELDS:
        raise ValueError(f"it has {len(core)} facts of a core, not {CORE_FIELDS}")
    numbers = [*core, *(x for ns in kernels.values() for x in ns)]
    if not all(math.isfinite(x) and x >= 0 for x in numbers):
        raise ValueError("it has a number below zero, or one that is not finite")
    if max(core) >= 1 << 48:
        raise ValueError("it has a core with caches larger than any memory")
    return Costs(core, kernels)


def use(runtime: ModuleType) -> None:
    """Gives the extension the costs that are kept for this machine, if there are any.

    A file that is not usable is left alone, with a warning.
    """
    if not os.environ.get(ENVIRONMENT) and not cache_folder().is_dir():
        return  # without asking the extension for all that a file's name depends on, at every start
    file = path(runtime)
    if file is None or not (file.exists() or os.environ.get(ENVIRONMENT)):
        return
    try:
        costs = load(file, {kernel["name"] for kernel in runtime.kernels()})
    except (OSError, ValueError) as error:
        warnings.warn(
            f"jax_nano does not use the costs in {file}: {error}. `python -m jax_nano tune` measures them again.",
            stacklevel=2,
        )
        return
    runtime.tuning.use_costs(costs.core, costs.kernels)
