"""JAX releases newer than those that jax_nano was tested with: what is checked of them, and what follows.

Nothing refuses to install beside a newer JAX. Instead:

* jaxlib's headers say which version of its FFI it has. It must take calls that were made for the version that the
  extension was built with: the same major version, and no smaller minor one. If not, every product is lax's own.
* XLA checks the same when the calls are registered; if it refuses them, every product is lax's own as well.
* Calls that are not typed (`custom_calls`) are not made: what they rely on cannot be checked.
* `accelerate` needs hooks in JAX, which it looks for (`jax_compat.require_hlo_transformations`) before it changes
  anything; where one is missing it raises RuntimeError and names it.
* Where a private name of JAX that the functions need is gone, functions with a namesake in JAX are that namesake;
  the others raise ImportError.

One warning says which of these it is. It imports no private name of JAX.
"""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any, Final

import jax
import jaxlib.version as _jaxlib

OLDEST: Final = (0, 10)
NEWEST: Final = (0, 12)
"""The releases of JAX and jaxlib that the tests run on, first and last, without the number of the patch."""

IS_UNTESTED: Final[bool] = max(jax.__version_info__, _jaxlib.__version_info__)[:2] > NEWEST
"""Whether this JAX, or its jaxlib, is newer than those."""

_FFI_HEADER: Final = Path("xla", "ffi", "api", "c_api.h")

# Functions of JAX with the same arguments and results.
_NAMESAKES: Final = {
    **dict.fromkeys(
        ("dot", "einsum", "inner", "matmul", "matvec", "tensordot", "vdot", "vecmat"),
        "jax.numpy",
    ),
    "dot_general": "jax.lax",
    "dot_product_attention": "jax.nn",
}

_warned = False


def describe() -> str:
    """The sentence that every warning and error about an untested JAX begins with."""
    oldest, newest = (".".join(map(str, x)) for x in (OLDEST, NEWEST))
    this = f"JAX {jax.__version__} with jaxlib {_jaxlib.__version__}"
    return f"jax_nano was tested with JAX {oldest} to {newest}, and this is {this}"


def ffi_version() -> tuple[int, int] | None:
    """Major and minor version of the FFI of this jaxlib, by its headers; None if they do not say."""
    try:
        text = Path(jax.ffi.include_dir(), _FFI_HEADER).read_text()
    except OSError:
        return None
    found = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE) for part in ("MAJOR", "MINOR")]
    major, minor = (None if x is None else int(x[1]) for x in found)
    return None if major is None or minor is None else (major, minor)


def ffi_fault(built: tuple[int, int]) -> str | None:
    """Why this jaxlib may not take calls that were made for FFI version `built`; None if it does."""
    version = ffi_version()
    if version is None:
        return "its headers do not tell the version of its FFI"
    if version[0] != built[0] or version[1] < built[1]:
        return "its FFI has version {}.{}, jax_nano was built for {}.{}".format(*version, *built)
    return None


def warn_if_untested(fault: str | None) -> None:
    """Says once in a process that this JAX is newer than those tested, and what is computed by whom.

    Args:
      fault: why no product runs on kernels, None if they do.
    """
    global _warned
    if not IS_UNTESTED or _warned:
        return
    _warned = True
    outcome = "Its FFI takes our calls, so products run on kernels" if fault is None else f"XLA computes: {fault}"
    warnings.warn(f"{describe()}. {outcome}.", RuntimeWarning, stacklevel=3)


def instead_of(name: str, error: ImportError | AttributeError) -> Any:
    """What jax_nano.`name` is, when `error` kept its module from being imported.

    Raises:
      ImportError: if JAX has no function of that name and meaning.
      Exception: `error` itself, if it is not about a name that a newer JAX lacks.
    """
    if not IS_UNTESTED or not _is_about_jax(error):
        raise error
    what = f"this JAX lacks something that jax_nano needs: {error}"
    if name not in _NAMESAKES:
        raise ImportError(f"jax_nano.{name} is not available: {describe()}; {what}") from error
    warn_if_untested(what)
    return getattr(importlib.import_module(_NAMESAKES[name]), name)


def _is_about_jax(error: ImportError | AttributeError) -> bool:
    where = error.name if isinstance(error, ImportError) else getattr(error.obj, "__name__", None)
    return str(where).split(".")[0] in ("jax", "jaxlib")
