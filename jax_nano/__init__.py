"""Matrix products for JAX on CPUs, computed by kernels that an MLIR pipeline composed.

`jax_nano.matmul` and its relatives replace those of `jax.numpy` and `jax.lax`. Names are loaded when they are first
used, so that importing the package costs nothing and `jax_nano.codegen` works without the compiled extension. Importing
it also registers jax_nano's custom calls with XLA as soon as JAX is imported, so that a process can run programs that
were exported by another one; `register` adds what pickled executables may need beyond that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jax_nano._core import imports

if TYPE_CHECKING:
    from jax_nano import checkpoint_policies as checkpoint_policies
    from jax_nano._core.native import register as register
    from jax_nano._core.thread_limit import threads as threads
    from jax_nano._ops.dot_general import dot_general_p as dot_general_p
    from jax_nano._programs.accelerate import accelerate as accelerate
    from jax_nano._tools.explanation import Explanation as Explanation
    from jax_nano._tools.explanation import explain as explain
    from jax_nano._tools.info import Info as Info
    from jax_nano._tools.info import info as info
    from jax_nano._tools.report import Report as Report
    from jax_nano._tools.report import clear_report as clear_report
    from jax_nano._tools.report import report as report
    from jax_nano.api import dot as dot
    from jax_nano.api import dot_general as dot_general
    from jax_nano.api import dot_product_attention as dot_product_attention
    from jax_nano.api import einsum as einsum
    from jax_nano.api import export_checks as export_checks
    from jax_nano.api import inner as inner
    from jax_nano.api import linear as linear
    from jax_nano.api import linear_p as linear_p
    from jax_nano.api import matmul as matmul
    from jax_nano.api import matvec as matvec
    from jax_nano.api import tensordot as tensordot
    from jax_nano.api import vdot as vdot
    from jax_nano.api import vecmat as vecmat
    from jax_nano.flax_attention import attention_fn as attention_fn
    from jax_nano.quantized import QuantizedArray as QuantizedArray
    from jax_nano.quantized import quantize as quantize
    from jax_nano.quantized import quantized_dot_general as quantized_dot_general
    from jax_nano.quantized import quantized_matmul as quantized_matmul

# Where each public name lives.
_HOMES = {
    **dict.fromkeys(
        (
            "dot",
            "dot_general",
            "dot_general_p",
            "dot_product_attention",
            "einsum",
            "export_checks",
            "inner",
            "linear",
            "linear_p",
            "matmul",
            "matvec",
            "tensordot",
            "vdot",
            "vecmat",
        ),
        "jax_nano.api",
    ),
    **dict.fromkeys(("QuantizedArray", "quantize", "quantized_dot_general", "quantized_matmul"), "jax_nano.quantized"),
    "Explanation": "jax_nano._tools.explanation",
    "Info": "jax_nano._tools.info",
    "Report": "jax_nano._tools.report",
    "accelerate": "jax_nano._programs.accelerate",
    "attention_fn": "jax_nano.flax_attention",
    "clear_report": "jax_nano._tools.report",
    "explain": "jax_nano._tools.explanation",
    "info": "jax_nano._tools.info",
    "register": "jax_nano._core.native",
    "report": "jax_nano._tools.report",
    "threads": "jax_nano._core.thread_limit",
}
_MODULES = ("checkpoint_policies",)

__all__ = [
    "Explanation",
    "Info",
    "QuantizedArray",
    "Report",
    "accelerate",
    "attention_fn",
    "checkpoint_policies",
    "clear_report",
    "dot",
    "dot_general",
    "dot_general_p",
    "dot_product_attention",
    "einsum",
    "explain",
    "export_checks",
    "info",
    "inner",
    "linear",
    "linear_p",
    "matmul",
    "matvec",
    "quantize",
    "quantized_dot_general",
    "quantized_matmul",
    "register",
    "report",
    "tensordot",
    "threads",
    "vdot",
    "vecmat",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("jax_nano")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = _load(name)
    return value


def _load(name: str) -> Any:
    """A public name, from where it lives; from JAX itself where that is too new to find what we need in it."""
    if not imports.in_main_interpreter():
        raise ImportError("jax_nano works in the main interpreter of a process only, as JAX does")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except (ImportError, AttributeError) as error:
        from jax_nano._core import tested_jax

        return tested_jax.instead_of(name, error)
    from jax_nano._core import native, tested_jax

    tested_jax.warn_if_untested(native.refusal())
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _register(_: object) -> None:
    importlib.import_module("jax_nano._core.native")  # if that is what imports jax, it registers when it goes on


def _control_threads(threadpoolctl: Any) -> None:
    importlib.import_module("jax_nano._core.thread_limit").control_by(threadpoolctl)


imports.when_imported("jax", _register)
imports.when_imported("threadpoolctl", _control_threads)
