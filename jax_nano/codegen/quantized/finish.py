"""Finished sums in float32 as rows of the result: an epilogue, and the rounding to the result's dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

from jax_nano._core.spec import DTYPES, QUANTIZED_ROWS

from .. import ir
from ..epilogue import Epilogue
from ..ir import I64, Ptr
from ..target import Target
from .columns import bytes_of
from .rows import Rows


def emit(module: ir.Module, prefix: str, target: Target) -> None:
    """Adds what ``finish`` calls."""
    Rows(module, prefix, target.lanes(4)).emit_store()
    for name in _floats():
        _epilogue(target, name).emit(module, f"{prefix}_{name}")


def finish(module: ir.Module, prefix: str, target: Target, x: dict[str, Any]) -> None:
    """``m`` rows of ``n`` sums in ``y``, ``nc`` apart, given the fields of the arguments."""
    rows = Rows(module, prefix, target.lanes(4))

    def plain() -> None:
        def row(i: I64) -> None:
            to = x["out"] + i * x["rs_out"] * bytes_of(x["out_dtype"])
            rows.store(x["y"].at(i * x["nc"]), to, x["out_dtype"], x["n"])

        ir.loop(0, x["m"], 1, [], row)

    def by_epilogue(name: str) -> None:
        to = Ptr.of_address(x["out"], name)
        arguments = {
            "sums": x["y"],
            "ld": x["nc"],
            "rows": x["m"],
            "cols": x["n"],
            "c": to,
            "rsc": x["rs_out"],
            "old": x["y"],
            "rs_old": 0,
            "mode": 0,
            "column": 0,
            "epilogue": x["epilogue"],
        }
        module.call(f"{prefix}_{name}_epilogue", [arguments[p] for p in Epilogue.PARAMS])

    def finished() -> None:
        ir.switch(x["out_dtype"], [partial(by_epilogue, name) for name in _floats()])

    ir.if_(ir.equal(x["epilogue"], 0), plain, finished)


def _floats() -> list[str]:
    return [name for name in QUANTIZED_ROWS if DTYPES[name].kind == "float"]


def _epilogue(target: Target, out: str) -> Epilogue:
    masks = all(target.masks(DTYPES[x].bytes) for x in ("float32", out))
    return Epilogue(out, "float32", target.lanes(4), masks)
