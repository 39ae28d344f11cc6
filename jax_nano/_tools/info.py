"""What runs on this machine, and why: `jax_nano.info()` and `python -m jax_nano info`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Final

from jax_nano._core import machine, native, packs, thread_limit, tuned
from jax_nano._tools import explain

_ENVIRONMENT: Final = ("JAX_NANO_", "JAX_", "XLA_FLAGS", "NPROC", "PJRT_NPROC", "PYTHONPATH")
_PACKAGES: Final = ("jax_nano", "jax", "jaxlib")


@dataclass(frozen=True)
class Target:
    """A set of instructions that kernels were composed for."""

    name: str
    kernels: int
    """How many this build has."""
    why_not: str
    """Why this machine does not run them; "" if it does."""


@dataclass(frozen=True)
class Signature:
    """Dtypes of a product, as NumPy names them, and what serves it here."""

    lhs: str
    rhs: str
    out: str
    algorithm: str
    """A jax.lax.DotAlgorithmPreset's name, or "default"."""
    target: str | None
    """None if XLA computes it."""
    passed_over: tuple[tuple[str, str], ...]
    """Better targets with a kernel for it, and why they do not serve it."""

    def __str__(self) -> str:
        named = "" if self.algorithm == "default" else f" ({self.algorithm})"
        return f"{self.lhs} x {self.rhs} -> {self.out}{named}"


@dataclass(frozen=True)
class Pack:
    """Kernels for given products."""

    file: str
    kernels: int
    """How many."""


@dataclass(frozen=True)
class Info:
    """This machine, what of the build runs on it, and versions. `str` of it is text, as is its `repr`."""

    cpu: str
    cores: int
    """That this process may use."""
    threads: int
    """In XLA's pool."""
    thread_limit: int | None
    """How many of them work for a call at most: JAX_NANO_THREADS, a container's share, or `jax_nano.threads`."""
    caches: dict[str, int]
    """Bytes of "l1d", "l2" and "l3"; empty on a platform without kernels."""
    features: tuple[str, ...]
    """Instruction sets, as far as targets ask for them."""
    costs: str
    """What the planner's predictions rest on."""
    packs: tuple[Pack, ...]
    """What `python -m jax_nano specialize` has kept and this process uses."""
    targets: tuple[Target, ...]
    """The best first; empty on a platform without kernels."""
    signatures: tuple[Signature, ...]
    error: str | None
    """What is wrong with JAX_NANO_TARGET, if anything is."""
    versions: dict[str, str]
    environment: dict[str, str]
    """The variables that matter and are set."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        sections = {
            "machine": self._machine_lines(),
            "targets": self._target_lines(),
            "signatures": self._signature_lines(),
            "versions": [f"{name:9} {version}" for name, version in self.versions.items()],
            "environment": [f"{name}={value}" for name, value in self.environment.items()]
            or ["none of the variables that matter is set"],
        }
        if self.error is not None:
            del sections["signatures"]
        return "\n".join("\n".join([title, *(f"  {line}" for line in lines), ""]) for title, lines in sections.items())

    __repr__ = __str__

    def _machine_lines(self) -> list[str]:
        lines = [
            f"CPU     {self.cpu}",
            f"cores   {self.cores} that this process may use",
            f"threads {self.threads} in XLA's pool, or one for each device if there are more",
        ]
        if self.thread_limit is not None:
            lines.append(
                f"limit   {self.thread_limit} of them {'works' if self.thread_limit == 1 else 'work'} for a call"
            )
        if self.caches:
            names = (("L1", "l1d"), ("L2", "l2"), ("L3", "l3"))
            lines.append("caches  " + ", ".join(f"{level} {explain.size(self.caches[key])}" for level, key in names))
            lines.append("has     " + " ".join(self.features))
            lines.append(f"costs   {self.costs}")
        lines += [
            f"pack    {x.kernels} kernel{'s' if x.kernels > 1 else ''} for given products, in {x.file}"
            for x in self.packs
        ]
        return lines

    def _target_lines(self) -> list[str]:
        if not self.targets:
            return ["none: this platform has no kernels, XLA computes every product"]
        rows = [
            (x.name, f"{x.kernels} kernels", f"not usable: {x.why_not}" if x.why_not else "usable")
            for x in self.targets
        ]
        return table([("target, best first", "in this build", "here"), *rows])

    def _signature_lines(self) -> list[str]:
        if not self.signatures:
            return ["none: this CPU has none of the targets, XLA computes every product"]
        missing = {x.name for x in self.targets if x.why_not}
        rows = []
        for x in self.signatures:
            passed = [name if name in missing else f"{name}: {why}" for name, why in x.passed_over]
            rows.append((str(x), x.target or "XLA", ", ".join(passed)))
        return table([("signature", "served by", "better ones that this machine does not use"), *rows])


def info() -> Info:
    """This machine, the targets of the build, which one serves what and why, versions and environment variables.

    Raises:
      ImportError: on x86-64 Linux, if the extension was not built or does not load.
    """
    runtime = native.runtime()
    signatures: tuple[Signature, ...] = ()
    error = None
    try:
        signatures = _signatures(runtime)
    except ValueError as wrong:  # JAX_NANO_TARGET
        error = str(wrong)
    return Info(
        cpu=machine.cpu_name(),
        cores=machine.cores(),
        threads=machine.threads(),
        thread_limit=thread_limit.current(),
        caches={} if runtime is None else dict(runtime.caches()),
        features=() if runtime is None else tuple(runtime.features()),
        costs="" if runtime is None else _costs(runtime),
        packs=tuple(Pack(str(x.file), len(x.kernels)) for x in packs.used()),
        targets=_targets(runtime),
        signatures=signatures,
        error=error,
        versions=_versions(),
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)},
    )


def _costs(runtime: Any) -> str:
    file = tuned.path(runtime)
    if file is not None and file.exists():
        return f"measured here by `python -m jax_nano tune`, in {file}"
    cpu = runtime.profile()
    if runtime.profile_is_measured(cpu):
        return f"those of {cpu}, measured"
    return f"thresholds; those of {cpu} are published numbers. `python -m jax_nano tune` measures this CPU"


def _targets(runtime: Any) -> tuple[Target, ...]:
    if runtime is None:
        return ()
    kernels = runtime.kernels()
    return tuple(
        Target(x["name"], sum(kernel["target"] == x["name"] for kernel in kernels), x["why"]) for x in runtime.targets()
    )


def _signatures(runtime: Any) -> tuple[Signature, ...]:
    """Each that some kernel of the build has; ValueError if JAX_NANO_TARGET is wrong."""
    if runtime is None or not runtime.selected_target():
        return ()
    by_name = {kernel["name"]: kernel for kernel in runtime.kernels()}
    found = []
    for lhs, rhs, out, algorithm in dict.fromkeys(
        (kernel["lhs"], kernel["rhs"], kernel["out"], kernel["algorithm"]) for kernel in by_name.values()
    ):
        try:
            labels = (0, 1), (1, 2), (0, 2)
            plan = runtime.plan((64, 64), (64, 64), *labels, lhs, rhs, out, 1, algorithm=algorithm)
        except ValueError:  # no usable target has a kernel for it
            found.append(Signature(lhs, rhs, out, algorithm, None, ()))
            continue
        kernel = by_name[plan["kernel"]]
        found.append(Signature(lhs, rhs, out, algorithm, kernel["target"], tuple(explain.passed_over(runtime, kernel))))
    return tuple(found)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return {**found, "Python": sys.version.split()[0]}


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first of them titles."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
