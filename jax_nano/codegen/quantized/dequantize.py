"""A block of weights as float32: (q - zero point) * scale, rounded once, for products that the plain kernels compute.

Columns that lie side by side stay so: ``out[kk, j]``. Weights along K stay along K: ``out[j, kk]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import ir
from ..ir import I64, Ptr, Size, Value
from .columns import bytes_of
from .formats import CHUNK, Format
from .rows import Rows


@dataclass(frozen=True)
class Dequantize:
    """The loops of one kernel. Pointers are to the block's own parts; of its first group, ``first`` values of K come
    before it.
    """

    module: ir.Module
    prefix: str
    form: Format
    rows: Rows

    def _stretch(
        self,
        q: Ptr,
        out: Ptr,
        count: Size,
        finish: Callable[[Value, Size, int], Value],
        tail: tuple[Ptr, Ptr],
    ) -> None:
        """``count`` weights that lie side by side; ``finish(v, first, j)`` makes vector j, of those from ``first``."""
        form = self.form
        some, result = tail

        def chunk(source: Ptr, first: Size, to: Ptr) -> None:
            for j, v in enumerate(form.chunk(source)):
                to.at(j * form.lanes).store(finish(v, first, j))

        whole = count // CHUNK * CHUNK
        ir.loop(0, whole, CHUNK, [], lambda i: chunk(q.at(i * form.bits // 8), i, out.at(i)))

        def rest() -> None:
            left = count - whole
            used = (left * form.bits + 7) // 8
            ir.loop(0, used, 1, [], lambda i: some.at(i).store(q.at(whole * form.bits // 8 + i).load()))
            chunk(some, whole, result)
            ir.loop(0, left, 1, [], lambda i: out.at(whole + i).store(result.at(i).load()))

        ir.if_(ir.less(whole, count), rest)

    def by_columns(self, x: dict[str, Any]) -> None:
        """Of weights whose columns lie side by side. ``scales`` and ``zeros`` hold a row each."""
        form, rows, n = self.form, self.rows, x["n"]
        tail = ir.alloca(CHUNK, "int8"), ir.alloca(CHUNK, "float32")
        tail[0].store(ir.zeros(CHUNK, "int8"))
        scales, zeros, has_points = x["scales"], x["zeros"], ir.negate(ir.equal(x["zero"], 0))
        zero = ir.zeros(form.lanes, "float32")
        ir.loop(0, n, form.lanes, [], lambda j: zeros.at(j).store(zero))

        def finish(v: Value, first: Size, j: int) -> Value:
            at = first + j * form.lanes
            return ir.multiply(ir.subtract(v, zeros.at(at).load(form.lanes)), scales.at(at).load(form.lanes))

        def group(number: I64) -> None:
            begin, end = _part(x, number)
            rows.load(x["scale"] + number * x["rs_scale"] * bytes_of(x["scale_dtype"]), x["scale_dtype"], scales, n)

            def points() -> None:
                rows.load(x["zero"] + number * x["rs_zero"] * bytes_of(x["zero_dtype"]), x["zero_dtype"], zeros, n)

            ir.if_(has_points, points)

            def row(kk: I64) -> None:
                self._stretch(x["q"].at(kk * x["rsq"]), x["y"].at(kk * x["nc"]), n, finish, tail)

            ir.loop(begin, end, 1, [], row)

        groups = (x["first"] + x["k"] + (x["group"] - 1)) // x["group"]
        ir.loop(0, groups, 1, [], group)

    def along_k(self, x: dict[str, Any]) -> None:
        """Of weights that lie along K."""
        form, rows = self.form, self.rows
        tail = ir.alloca(CHUNK, "int8"), ir.alloca(CHUNK, "float32")
        tail[0].store(ir.zeros(CHUNK, "int8"))
        has_points = ir.negate(ir.equal(x["zero"], 0))
        none = [ir.scalar_constant(0, "float32")]

        def column(j: I64) -> None:
            def group(number: I64) -> None:
                begin, end = _part(x, number)
                scale = rows.scalar(x["scale"], x["scale_dtype"], j * x["rs_scale"] + number)
                (point,) = ir.if_(
                    has_points,
                    lambda: [rows.scalar(x["zero"], x["zero_dtype"], j * x["rs_zero"] + number)],
                    lambda: none,
                    like=none,
                )
                factor, zero = ir.splat(scale, form.lanes), ir.splat(point, form.lanes)
                source = x["q"].at(j * x["rsq"] + begin * form.bits // 8)
                self._stretch(
                    source,
                    x["y"].at(j * x["nc"] + begin),
                    end - begin,
                    lambda v, _first, _j: ir.multiply(ir.subtract(v, zero), factor),
                    tail,
                )

            groups = (x["first"] + x["k"] + (x["group"] - 1)) // x["group"]
            ir.loop(0, groups, 1, [], group)

        ir.loop(0, x["n"], 1, [], column)


def _part(x: dict[str, Any], number: Size) -> tuple[Size, Size]:
    """Where in the block a group begins and ends."""
    begin = number * x["group"] - x["first"]
    return ir.select_size(ir.less(begin, 0), 0, begin), ir.minimum(begin + x["group"], x["k"])
