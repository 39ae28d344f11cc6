"""Few rows of x and weights whose columns lie side by side, which are read once, where they lie.

      for each group of k
        [zero points of the group]              in the order of fields
        for kk in the group by steps            one sweep: ``depth`` rows of weights
          for each register of columns
            sums[rows, fields] += x[rows, kk..] * (fields of the weights [- zero points])
        y += scales * sums                      in natural order; the sums are zero again

A sweep goes through a few rows of weights side by side, as that many streams which the hardware prefetches, and fetches
those that come next. The caller cuts columns so that sums and what belongs to columns stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core.spec import DTYPES, QUANTIZED_ROWS

from .. import ir
from ..ir import I64, Ptr, Size, Value
from ..microkernel import A_ROWS_PER_POINTER, RowOffsets
from ..target import Target
from .formats import Format, block, field_count, scaled
from .rows import Rows

ROWS = 4  # of x at once: with more of them products, not memory, are the limit
DEPTH = 8  # rows of weights in a sweep


@dataclass(frozen=True)
class Sweep:
    """One sweep of ``depth`` rows of weights with ``rows`` rows of x.

    With a depth of 1 it also takes columns that do not fill a register; else they are the caller's.
    """

    form: Format
    target: Target
    rows: int
    depth: int
    points: bool

    PARAMS = ("q", "rsq", "x", "sums", "zeros", "cols")
    LINE = 64  # bytes

    def name(self, prefix: str) -> str:
        return f"{prefix}_sweep_{self.rows}x{self.depth}{'_points' if self.points else ''}"

    def emit(self, module: ir.Module, prefix: str) -> None:
        pointers = {"q": "int8", "x": "float32", "sums": "float32", "zeros": "float32"}
        params = [pointers.get(p, "i64") for p in self.PARAMS]
        module.function(self.name(prefix), params, self._body, internal=True)

    @property
    def fields_at_once(self) -> int:
        """As many as leave their sums in registers."""
        room, count = self.target.vector_registers - self.form.in_use, field_count(self.form)
        while count > self.form.at_once and count * self.rows > room:
            count //= 2
        return count

    @property
    def registers(self) -> int:
        """Of columns in a step of the loop: with one row of x as many as fill a line, which is fetched once."""
        return self.LINE // (4 * self.form.lanes) if self.rows == 1 and self.depth > 1 else 1

    def _body(self, *args: Any) -> None:
        q, rsq, x, sums, zeros, cols = args
        form, lanes, rows = self.form, self.form.lanes, self.rows
        count, width = field_count(form), block(form)
        offsets = RowOffsets(rsq)
        behind = rsq * self.depth
        constants = form.constants()

        def register(at: Sequence[Ptr], load: Callable[[Ptr], Ptr | Value], *, ahead: bool) -> None:
            """A register of columns: ``at`` points to rows of weights, then to sums, then to zeros."""
            *of_q, total, zero = at
            rows_of_q = [offsets.of(of_q[d // A_ROWS_PER_POINTER], d % A_ROWS_PER_POINTER) for d in range(self.depth)]
            for first in range(0, count, self.fields_at_once):
                which = range(first, first + self.fields_at_once)
                places = [[total.at((i * count + f) * lanes) for f in which] for i in range(rows)]
                acc = [[p.load(lanes) for p in of_row] for of_row in places]
                for d, row in enumerate(rows_of_q):
                    if ahead and first == 0:
                        row.at(behind).prefetch(level=2)
                    # Or LLVM keeps what every row of weights needs in registers, of which there are not enough.
                    ir.keep_order()
                    factors = [ir.splat(x.at(d * rows + i).load(), lanes) for i in range(rows)]
                    for j, v in enumerate(form.fields(load(row), which, constants)):
                        if self.points:
                            v = ir.subtract(v, zero.at(which[j] * lanes).load(lanes))
                        for i, factor in enumerate(factors):
                            acc[i][j] = ir.fma(factor, v, acc[i][j])
                for of_row, values in zip(places, acc, strict=True):
                    for p, v in zip(of_row, values, strict=True):
                        p.store(v)

        def next_of(at: Sequence[Ptr], registers: int) -> list[Ptr]:
            *of_q, total, zero = at
            moved = (
                total.at(registers * rows * count * lanes),
                zero.at(registers * count * lanes if self.points else 0),
            )
            return [*(p.at(registers * lanes * 4) for p in of_q), *moved]

        def body(_: I64, *at: Ptr) -> list[Any]:
            for r in range(self.registers):
                register(next_of(at, r), lambda p: p, ahead=self.depth > 1 and r == 0)
            return next_of(at, self.registers)

        first = [q.at(d * rsq) for d in range(0, self.depth, A_ROWS_PER_POINTER)]
        at = ir.loop(0, cols // (self.registers * width), 1, [*first, sums, zeros], body)
        if self.depth == 1:
            words = (cols % width) * form.bits // 32
            mask = ir.lane_mask(words, lanes)
            ir.if_(
                ir.less(0, words),
                lambda: register(at, lambda p: p.as_type("int32").load(lanes, mask, alignment=1), ahead=False),
            )


def sweeps(form: Format, target: Target) -> list[Sweep]:
    """All of a kernel."""
    kinds = (False, True) if form.is_integer else (False,)
    return [Sweep(form, target, m, depth, p) for m in range(1, ROWS + 1) for depth in (DEPTH, 1) for p in kinds]


@dataclass(frozen=True)
class Columns:
    """The sweeps, and the loops around them."""

    module: ir.Module
    prefix: str
    form: Format
    target: Target
    rows: Rows

    def emit(self) -> None:
        """Adds all functions."""
        module, name = self.module, self._name
        for sweep in sweeps(self.form, self.target):
            sweep.emit(module, self.prefix)
        module.function(name("flush"), ["float32"] * 3 + ["i64"] * 3, self._flush, internal=True)
        module.function(name("clear"), ["float32", "i64"], self._clear, internal=True)
        if self.form.x_factor != 1:
            module.function(name("scale"), ["float32", "i64"], self._scale, internal=True)
        module.function(name("zeros"), ["float32", "float32", "i64"], self._zeros, internal=True)

    def _name(self, what: str) -> str:
        return f"{self.prefix}_columns_{what}"

    def _clear(self, p: Ptr, count: I64) -> None:
        """Whole vectors of zeros."""
        zero = ir.zeros(self.form.lanes, "float32")
        ir.loop(0, count, self.form.lanes, [], lambda i: p.at(i).store(zero))

    def _scale(self, p: Ptr, count: I64) -> None:
        """Numbers of x, with the format's factor."""
        lanes, factor = self.form.lanes, self.form.x_factor
        whole = count // lanes * lanes
        ir.loop(0, whole, lanes, [], lambda i: p.at(i).store(scaled(p.at(i).load(lanes), factor)))
        ir.loop(whole, count, 1, [], lambda i: p.at(i).store(scaled(p.at(i).load(), factor)))

    def _zeros(self, points: Ptr, to: Ptr, registers: I64) -> None:
        """Zero points in the order and the unit of fields; whole registers of float32 are given."""
        form, lanes, count = self.form, self.form.lanes, field_count(self.form)

        def register(_: I64, source: Ptr, target: Ptr) -> list[Any]:
            natural = [source.at(j * lanes).load(lanes) for j in range(count)]
            for f, v in enumerate(form.permuted(natural)):
                target.at(f * lanes).store(scaled(v, form.unit))
            return [source.at(count * lanes), target.at(count * lanes)]

        ir.loop(0, registers, 1, [points, to], register)

    def _flush(self, sums: Ptr, y: Ptr, scales: Ptr, rs_y: I64, registers: I64, rows: I64) -> None:
        """``y += scales * sums`` for whole registers of columns; the sums are zero afterwards."""
        form, lanes, count = self.form, self.form.lanes, field_count(self.form)
        zero = ir.zeros(lanes, "float32")

        def row(j: I64, i: I64) -> None:
            source, target = sums.at((j * rows + i) * (count * lanes)), y.at(i * rs_y + j * (count * lanes))
            fields = [source.at(f * lanes).load(lanes) for f in range(count)]
            for f, v in enumerate(form.natural(fields)):
                p, factor = target.at(f * lanes), scales.at(j * (count * lanes) + f * lanes).load(lanes)
                p.store(ir.fma(scaled(v, form.factor), factor, p.load(lanes)))
            for f in range(count):
                source.at(f * lanes).store(zero)

        def of_register(j: I64) -> None:
            ir.loop(0, rows, 1, [], lambda i: row(j, i))

        ir.loop(0, registers, 1, [], of_register)

    def nest(self, x: dict[str, Any]) -> None:
        """The product, given the fields of the arguments: added to y."""
        module, form, rows = self.module, self.form, self.rows
        width = block(form)

        def pack(i: I64) -> None:
            source = x["x"] + i * x["rsx"] * bytes_of(x["x_dtype"])
            rows.load(source, x["x_dtype"], x["x_pack"].at(i), x["k"], x["m"])

        ir.loop(0, x["m"], 1, [], pack)
        if form.x_factor != 1:
            module.call(self._name("scale"), [x["x_pack"], x["k"] * x["m"]])
        q, sums, y, zeros, scales = (x[name] for name in ("q", "sums", "y", "zeros", "scales"))
        cols = x["n"]
        registers = (cols + (width - 1)) // width
        module.call(self._name("clear"), [sums, registers * width * x["m"]])

        def sweep(rows_of_x: int, points: bool, begin: I64, end: Size) -> None:
            deep, flat = (Sweep(form, self.target, rows_of_x, depth, points) for depth in (DEPTH, 1))
            last = begin + (end - begin) // DEPTH * DEPTH
            at_once = deep.registers * width
            whole = cols // at_once * at_once

            def one(kind: Sweep, kk: I64, first: Size, count: Size) -> None:
                row = q.at(kk * x["rsq"] + first * form.bits // 8)
                to, point = sums.at(first * rows_of_x), zeros.at(first)
                arguments = [row, x["rsq"], x["x_pack"].at(kk * rows_of_x), to, point, count]
                module.call(kind.name(self.prefix), arguments)

            ir.loop(begin, last, DEPTH, [], lambda kk: one(deep, kk, 0, whole))
            ir.loop(last, end, 1, [], lambda kk: one(flat, kk, 0, cols))

            def rest() -> None:
                ir.loop(begin, last, 1, [], lambda kk: one(flat, kk, whole, cols - whole))

            ir.if_(ir.less(whole, cols), rest)

        def by_rows(points: bool, begin: I64, end: Size) -> None:
            ir.switch(x["m"], [partial(sweep, count, points, begin, end) for count in range(1, ROWS + 1)], first=1)

        def group(begin: I64) -> None:
            number = begin // x["group"]
            end = ir.minimum(begin + x["group"], x["k"])
            if form.is_integer:

                def subtracting() -> None:
                    at = x["zero"] + number * x["rs_zero"] * bytes_of(x["zero_dtype"])
                    rows.load(at, x["zero_dtype"], scales, cols)
                    module.call(self._name("zeros"), [scales, zeros, registers])
                    by_rows(True, begin, end)

                ir.if_(ir.equal(x["zero"], 0), partial(by_rows, False, begin, end), subtracting)
            else:
                by_rows(False, begin, end)
            at = x["scale"] + number * x["rs_scale"] * bytes_of(x["scale_dtype"])
            rows.load(at, x["scale_dtype"], scales, cols)
            module.call(self._name("flush"), [sums, y, scales, x["nc"], registers, x["m"]])

        ir.loop(0, x["k"], x["group"], [], group)


def bytes_of(dtype: Size) -> Size:
    """Bytes of an element of one of the dtypes of rows, by its number."""
    size: Size = 0
    for number, name in enumerate(QUANTIZED_ROWS):
        size = ir.select_size(ir.equal(dtype, number), DTYPES[name].bytes, size)
    return size
