"""Finished sums in float32 as rows of the result: an epilogue, and the rounding to the result's dtype."""

from __future__ import annotations

from functools import partial

from jax_nano._core.spec import DTYPES, QUANTIZED_ROWS

from .. import ir
from ..arguments import Given
from ..epilogue import Epilogue
from ..ir import Ptr
from ..target import Target
from .formats import CHUNK
from .rows import Rows, address


def emit(module: ir.Module, prefix: str, target: Target) -> None:
    """Adds what ``finish`` calls."""
    rows = Rows(module, prefix, target.lanes(4))
    rows.emit_store()
    if target.lanes(4) == CHUNK:
        rows.emit_gather()
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


def add_scaled(module: ir.Module, prefix: str, target: Target, x: Given) -> None:
    """Adds ``m`` rows of ``n`` sums times their columns' scales to others, or stores them if there are none."""
    lanes = target.lanes(4)
    rows = Rows(module, prefix, lanes)
    rows.gather(x.scale, x.scale_dtype, x.rs_scale, x.scales, x.n)
    whole = x.n // lanes * lanes
    for stores in ir.branches(ir.is_set(x.keep_x)):
        for i in ir.range_(0, x.m):
            source, to = x.sums.at(i * x.rsx), x.y.at(i * x.nc)
            for step, begin, end in ((lanes, 0, whole), (None, whole, x.n)):
                for j in ir.range_(begin, end, step or 1):
                    v, scale, p = source.at(j).load(step), x.scales.at(j).load(step), to.at(j)
                    p.store(ir.multiply(v, scale) if stores else ir.fma(v, scale, p.load(step)))


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
