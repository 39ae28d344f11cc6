"""Sweeps: a few rows of weights that lie side by side, times a few rows of x, added to sums in memory.

    for each register of columns
      sums[rows, fields] += x[rows, kk..] * (fields of the weights [- zero points])

The rows are as many streams, which the hardware prefetches; those that come next are prefetched into L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ir
from ..arguments import Given
from ..ir import I64, Ptr, Size, Value
from ..microkernel import A_ROWS_PER_POINTER, RowOffsets
from ..target import Target
from ..walks import LINE
from .formats import Format, block, field_count

ROWS = 4  # of x at once: with more of them products, not memory, are the limit


@dataclass(frozen=True)
class Sweep:
    """One sweep of ``depth`` rows of weights with ``rows`` rows of x.

    With the least depth it also takes columns that do not fill a register; else they are the caller's.
    """

    form: Format
    target: Target
    rows: int
    depth: int
    points: bool

    PARAMS = {  # noqa: RUF012
        "q": "int8",
        "rsq": "i64",
        **dict.fromkeys(("x", "sums", "zeros"), "float32"),
        "cols": "i64",
    }

    def name(self, prefix: str) -> str:
        return f"{prefix}_sweep_{self.rows}x{self.depth}{'_points' if self.points else ''}"

    def emit(self, module: ir.Module, prefix: str) -> None:
        """Adds the function."""
        module.function(self.name(prefix), self.PARAMS, self._body, internal=True)

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
        return LINE // (4 * self.form.lanes) if self.rows == 1 and self.depth > self.form.step else 1

    def _body(self, *values: Any) -> None:
        x, form, lanes = Given(dict(zip(self.PARAMS, values, strict=True))), self.form, self.form.lanes
        width = block(form)
        columns = _Columns(self, x, RowOffsets(x.rsq), x.rsq * self.depth, form.constants())

        def step(_: I64, *at: Ptr) -> list[Any]:
            for r in range(self.registers):
                columns.register(columns.next(at, r), lambda p: p, prefetches=self.depth > form.step and r == 0)
            return columns.next(at, self.registers)

        first = [x.q.at(d * x.rsq) for d in range(0, self.depth, A_ROWS_PER_POINTER)]
        at = ir.loop(0, x.cols // (self.registers * width), 1, [*first, x.sums, x.zeros], step)
        if self.depth == form.step:
            words = (x.cols % width) * form.bits // 32
            mask = ir.lane_mask(words, lanes)
            for _ in ir.when(ir.less(0, words)):
                columns.register(at, lambda p: p.as_type("int32").load(lanes, mask, alignment=1), prefetches=False)


@dataclass(frozen=True)
class _Columns:
    """What a register of columns needs, the same for all of them.

    Attributes:
      sweep: whose they are.
      x: the function's arguments.
      offsets: addresses of rows of weights.
      next_rows: bytes from these rows to those behind them.
      constants: what makes fields of a register.
    """

    sweep: Sweep
    x: Given
    offsets: RowOffsets
    next_rows: Size
    constants: Sequence[Value]

    def register(self, at: Sequence[Ptr], load: Callable[[Ptr], Ptr | Value], *, prefetches: bool) -> None:
        """A register of columns: ``at`` points to rows of weights, then to sums, then to zeros."""
        sweep, form, lanes, rows = self.sweep, self.sweep.form, self.sweep.form.lanes, self.sweep.rows
        count = field_count(form)
        *of_q, total, zero = at
        rows_of_q = [self.offsets.of(of_q[d // A_ROWS_PER_POINTER], d % A_ROWS_PER_POINTER) for d in range(sweep.depth)]
        for first in range(0, count, sweep.fields_at_once):
            which = range(first, first + sweep.fields_at_once)
            places = [[total.at((i * count + f) * lanes) for f in which] for i in range(rows)]
            acc = [[p.load(lanes) for p in of_row] for of_row in places]
            for d in range(0, sweep.depth, form.step):
                some = rows_of_q[d : d + form.step]
                for row in some if prefetches and first == 0 else []:
                    row.at(self.next_rows).prefetch(level=2)
                # Or LLVM keeps what every row of weights needs in registers, of which there are not enough.
                ir.keep_order()
                at_x = d // form.step * rows
                factors = [ir.splat(self.x.x.at(at_x + i).load(), lanes) for i in range(rows)]
                for j, v in enumerate(form.of_rows([load(row) for row in some], which, self.constants)):
                    w = ir.subtract(v, zero.at(which[j] * lanes).load(lanes)) if sweep.points else v
                    for i, factor in enumerate(factors):
                        acc[i][j] = form.product(factor, w, acc[i][j])
            for of_row, values in zip(places, acc, strict=True):
                for p, v in zip(of_row, values, strict=True):
                    p.store(v)

    def next(self, at: Sequence[Ptr], registers: int) -> list[Ptr]:
        """The same pointers some registers further on."""
        *of_q, total, zero = at
        lanes, elements = self.sweep.form.lanes, registers * field_count(self.sweep.form) * self.sweep.form.lanes
        moved = (total.at(elements * self.sweep.rows), zero.at(elements if self.sweep.points else 0))
        return [*(p.at(registers * lanes * 4) for p in of_q), *moved]


def sweeps(form: Format, target: Target) -> list[Sweep]:
    """All of a kernel."""
    kinds = (False, True) if form.is_integer else (False,)
    depths = (form.depth, form.step)
    return [Sweep(form, target, m, depth, p) for m in range(1, ROWS + 1) for depth in depths for p in kinds]
