"""Finished sums in float32 as rows of the result: an epilogue, and the rounding to the result's dtype."""

from __future__ import annotations

from functools import partial

from jax_nano._core.spec import DTYPES, QUANTIZED_ROWS

from .. import ir
from ..arguments import Given
from ..epilogue import Epilogue
from ..ir import Ptr
from ..target import Target
from .rows import Rows, address


def emit(module: ir.Module, prefix: str, target: Target) -> None:
    """Adds what ``finish`` calls."""
    Rows(module, prefix, target.lanes(4)).emit_store()
    for name in _floats():
        _epilogue(target, name).emit(module, f"{prefix}_{name}")


def finish(module: ir.Module, prefix: str, target: Target, x: Given) -> None:
    """``m`` rows of ``n`` sums in ``y``, ``nc`` apart, given the fields of the arguments."""
    rows = Rows(module, prefix, target.lanes(4))

    for plain in ir.branches(ir.equal(x.epilogue, 0)):
        if plain:
            for i in ir.range_(0, x.m):
                to = address(x.out, i, x.rs_out, x.out_dtype)
                rows.store(x.y.at(i * x.nc), to, x.out_dtype, x.n)
        else:
            ir.switch(x.out_dtype, [partial(_by_epilogue, module, prefix, name, x) for name in _floats()])


def _by_epilogue(module: ir.Module, prefix: str, name: str, x: Given) -> None:
    """All rows at once, as elements of the dtype ``name``."""
    arguments = {
        "sums": x.y,
        "ld": x.nc,
        "rows": x.m,
        "cols": x.n,
        "c": Ptr.of_address(x.out, name),
        "rsc": x.rs_out,
        "old": x.y,
        "rs_old": 0,
        "mode": 0,
        "column": 0,
        "epilogue": x.epilogue,
    }
    module.call_by_name(f"{prefix}_{name}_epilogue", arguments)


def _floats() -> list[str]:
    return [name for name in QUANTIZED_ROWS if DTYPES[name].kind == "float"]


def _epilogue(target: Target, out: str) -> Epilogue:
    masks = all(target.masks(DTYPES[x].bytes) for x in ("float32", out))
    return Epilogue(out, "float32", target.lanes(4), masks)
