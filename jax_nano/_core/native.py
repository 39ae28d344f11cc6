"""Finds the compiled extension and tells XLA about its FFI targets.

On x86-64 Linux a missing extension is an error with a remedy, never a silent fallback. On any other
platform there is none to find, and every product takes lax's own lowering.

With a jaxlib whose FFI does not take our calls (`tested_jax`) it is the same; `refusal()` says so.

Importing this module registers the targets of typed calls if there is an extension; if not, it is `runtime()` that
raises.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import platform
import sys
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

import jax
import numpy as np

from jax_nano._core import custom_calls, installed, packs, spec, tested_jax, thread_limit, tuned, verbosity

TARGET_NAME: Final = spec.DOT_GENERAL_CALL
LINEAR_TARGET_NAME: Final = spec.LINEAR_CALL
ATTENTION_TARGET_NAME: Final = spec.ATTENTION_CALL
ATTENTION_GRADIENTS_TARGET_NAME: Final = spec.ATTENTION_GRADIENTS_CALL
QUANTIZED_TARGET_NAME: Final = spec.QUANTIZED_CALL
UNTYPED_CALLS: Final = (TARGET_NAME, LINEAR_TARGET_NAME)
"""The calls that may also be untyped ones, under the same name."""
ABI: Final = spec.FFI_ABI

# The frontend attribute of a call that names the build which made it. The handlers do not read it, so what one build
# exported is run by another.
BUILD: Final = "jax_nano.build"


_loaded: Final[list[ModuleType]] = []
"""The extension, once it has been imported."""


@cache
def runtime() -> ModuleType | None:
    """The extension module with its targets registered; None where the platform has none, or jaxlib refuses it.

    Raises:
      ImportError: on x86-64 Linux, if the extension was not built or does not load.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    native = _extension()
    if native.ABI_VERSION != ABI:
        raise ImportError(
            f"jax_nano._runtime has ABI version {native.ABI_VERSION}, the Python files expect {ABI}:"
            " the two come from different builds. Reinstall jax_nano."
        )
    _loaded[:] = [native]
    if _refusal(native) is not None:
        return None
    tuned.use(native)
    packs.use(native)
    native.limit_threads(thread_limit.initial())
    native.log_calls(verbosity.verbosity() >= 2)
    return native


def _extension() -> ModuleType:
    """The extension module, beside these files or, for the sources of a clone, in the installed package."""
    name = "jax_nano._runtime"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        why = installed.share() if isinstance(error, ModuleNotFoundError) else "and none is looked for elsewhere"
        if why is None:
            return importlib.import_module(name)
        raise ImportError(
            f"jax_nano's compiled extension {name} is missing or does not load ({error}), {why}. Build it with"
            " `pip install .` in the source tree of jax_nano; if you are in that source tree now, its uncompiled"
            " package may shadow the installed one."
        ) from error


@cache
def _refusal(native: ModuleType) -> str | None:
    """Registers the calls of an extension; why this jaxlib does not take them, None if it does."""
    if tested_jax.IS_UNTESTED:
        fault = tested_jax.ffi_fault(native.FFI_API_VERSION)
        if fault is not None:
            return fault
    try:
        for name, stages in native.registrations().items():
            jax.ffi.register_ffi_target(name, stages, platform="cpu")
    except Exception as error:
        if not tested_jax.IS_UNTESTED:
            raise
        return f"XLA does not register jax_nano's calls: {error}"
    return None


@cache
def _register_untyped(native: ModuleType) -> None:
    """Registers the functions of untyped calls, which believe what a program says of its arrays.

    So a process does it when it writes such a call itself, or is told to (`register`). One that only runs what others
    have exported, which are typed calls, has none of them for a changed program to name.
    """
    for name, function in native.untyped_registrations().items():
        jax.ffi.register_ffi_target(name, function, platform="cpu", api_version=0)


def refusal() -> str | None:
    """Why this jaxlib does not take the calls of the extension that is there; None if it does, or there is none."""
    return _refusal(_loaded[0]) if _loaded else None


def register() -> None:
    """Register all of jax_nano's calls with XLA.

    `import jax_nano` registers those of exported programs. Compiled programs that were pickled, by
    `jax.experimental.serialize_executable`, may have others too, and a process that has not compiled them needs this
    function. Only run pickles that you trust: their calls of the second kind believe what the program says of its
    arrays.

    Raises:
      ImportError: on x86-64 Linux, if the extension was not built or does not load.
    """
    native = runtime()
    if native is not None and custom_calls.UNTYPED:
        _register_untyped(native)


@cache
def build() -> str:
    """The release, and a digest of what it was built from: programs compiled by two builds are never equal.

    The program that JAX lowers may be the same for two builds though they handle its calls, or rewrite it, differently.
    So this must be part of the key of the persistent compilation cache.
    """
    try:
        version = metadata.version("jax_nano")
    except metadata.PackageNotFoundError:  # run from a build folder
        version = "unreleased"
    digest = hashlib.sha256()
    folder = Path(__file__).parent.parent
    native = runtime()
    sources = [x for x in sorted(folder.rglob("*.py")) if "codegen" not in x.parts]  # its output is in the extension
    data = sorted((folder / "profiles" / "xla").glob("*.json"))  # decide what is left to XLA
    files = [*sources, *data, *([Path(str(native.__file__))] if native else [])]
    for file in files:
        digest.update(file.read_bytes())
    return f"{version} {digest.hexdigest()[:12]}"


def target() -> str:
    """The target that was selected for this CPU; "" if there is none."""
    native = runtime()
    return "" if native is None else str(native.selected_target())


def supports(lhs_dtype: str, rhs_dtype: str, out_dtype: str, algorithm: str = spec.DEFAULT_ALGORITHM) -> bool:
    """Whether a kernel for these dtypes runs on this CPU, on the target that was selected."""
    native = runtime()
    return native is not None and bool(native.supports(lhs_dtype, rhs_dtype, out_dtype, algorithm))


def measured_cpu() -> str:
    """The family of this CPU, if the costs of its kernels are built in and were measured; else ""."""
    native = runtime()
    if native is None:
        return ""
    cpu = str(native.profile())
    return cpu if native.profile_is_measured(cpu) else ""


def predicted_ns(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    labels: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
    target: str,
    cpu: str,
) -> float | None:
    """What a product takes one core by the fastest schedule of a target's kernel, in nanoseconds.

    Args:
      shapes: those of lhs and rhs, in numbers.
      labels, dtypes: those of lhs, rhs and out.
      target: of a kernel for them; it need not run here.
      cpu: the name of a profile.

    Returns:
      None if the costs of the kernel on this CPU are not known, or nothing is to be done.

    Raises:
      ValueError: the target has no kernel for them.
    """
    native = runtime()
    assert native is not None  # or there would be no kernel to ask about
    considered = native.considered(*shapes, *labels, *dtypes, target=target, cpu=cpu)
    return float(considered[0]["ns"]) if considered else None


def float32_bits(value: float) -> int:
    """Those of a number as float32, infinities and NaN included."""
    with np.errstate(over="ignore"):
        return int(np.float32(value).view(np.uint32))


class Epilogue(NamedTuple):
    """What a call of `linear` does with its product."""

    activation: str
    scale_bits: int  # of a float32: 0.0 and -0.0 are equal
    bias: bool
    residual: bool

    @classmethod
    def of(cls, activation: str, scale: float, *, bias: bool, residual: bool) -> Epilogue:
        """With the scale as a number."""
        return cls(activation, float32_bits(scale), bias, residual)


@lru_cache(maxsize=4096)
def untyped_call(
    shapes: tuple[tuple[int, ...], ...],
    labels: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
    algorithm: str,
    epilogue: Epilogue | None = None,
) -> str | None:
    """The string that a call of API version 3 carries, which costs less than one through the typed FFI.

    Args:
      shapes, labels, dtypes: those of lhs, rhs and out. A size may be symbolic.
      algorithm: as in the attribute of the typed call.
      epilogue: that of a call of `linear`, None for one of `dot_general`.

    Returns:
      None if the call must be a typed one: shapes are known only when it runs, several threads would compute it, or
      this jaxlib takes no other.
    """
    native = runtime()
    if native is None or not custom_calls.UNTYPED:
        return None
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    description: str | None = native.untyped_call(*shapes, *labels, *dtypes, algorithm, *(epilogue or ()))
    if description is not None:
        _register_untyped(native)
    return description


def supports_attention(q: str, kv: str) -> bool:
    """Whether an attention for queries and for keys and values of these dtypes runs on this CPU."""
    native = runtime()
    return native is not None and bool(native.supports_attention(q, kv))


with contextlib.suppress(ImportError):
    runtime()
