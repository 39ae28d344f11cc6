"""Microkernels of inner products: accumulators are vectors along K, and both operands are read where they lie.

``rows x cols`` accumulators take a vector of each of some rows of A and columns of B at a time; their lanes are added
at the end, as a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from . import ir
from .arguments import Given
from .ir import I64, Ptr, Size, Value
from .microkernel import A_ROWS_PER_POINTER, RowOffsets
from .nanokernel import Corrected, Family
from .tile import Tile

VECTORS_WITH_POINTERS = 4  # so many have a pointer each


@dataclass(frozen=True)
class InnerMicrokernel:
    """``rows`` rows of A against ``cols`` columns of B, over all of K.

    Attributes:
      rows, cols: the tile.
      lanes: units in a vector.
      family: the nanokernel's instructions.
      a, b, out: dtype names in the caller's buffers.
      masks: whether the target loads masked vectors of both.
      prefetches: "a" or "b" if it prefetches into L2 what that operand will be read of later, else empty.
      distance: how many vectors later that is.
    """

    rows: int
    cols: int
    lanes: int
    family: Family
    a: str
    b: str
    out: str
    masks: bool
    prefetches: str = ""
    distance: int = 0

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold sums as they are."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    @property
    def params(self) -> tuple[str, ...]:
        """``sums``: where to leave them as they are, instead of rounding them to C."""
        return ("a", "b", "rsa", "csb", "k", "c", "rsc", *(("sums",) if self.narrow_out else ()))

    @property
    def tile(self) -> Tile:
        """Its accumulators as a register tile: a vector along K for each row and column.

        Where A's values are shifted, one more row of them is the columns' corrections.
        """
        return Tile(self.rows + self.family.column_sums, self.cols, self.lanes)

    def name(self, prefix: str) -> str:
        return f"{prefix}_inner_{self.rows}x{self.cols}{f'_ahead_in_{self.prefetches}' if self.prefetches else ''}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        pointers = {"a": self.a, "b": self.b, "c": self.out}
        name = self.name(prefix)
        module.function(name, {p: pointers.get(p, "i64") for p in self.params}, self._body, internal=True)
        return name

    def _body(self, *args: Any) -> None:
        x = Given(dict(zip(self.params, args, strict=True)))
        a_rows, b_cols = _Vectors(x.a, x.rsa, self.rows), _Vectors(x.b, x.csb, self.cols)
        distance = (x.rsa if self.prefetches == "a" else x.csb) * self.distance
        shifts = [cast(Corrected, self.family).shift()] if self.family.column_sums else []
        sums = _KLoop(self, a_rows, b_cols, distance, shifts).sums(x.k)
        if self.narrow_out:
            whole_sums = Ptr.of_address(x.sums, self.family.acc)
            for rounded in ir.branches(ir.equal(x.sums, 0)):
                self._store(sums, x.c, x.rsc) if rounded else self._store(sums, whole_sums, self.lanes)
        else:
            self._store(sums, x.c, x.rsc)

    def _store(self, sums: Sequence[Value], to: Ptr, stride: Size) -> None:
        for n, s in enumerate(sums):
            i, j = divmod(n, self.cols)
            to.at(i * stride + j).store(ir.convert(s, self.family.acc, to.elem))


@dataclass(frozen=True)
class _KLoop:
    """The sums of a tile.

    Attributes:
      micro: the microkernel.
      a_rows, b_cols: the vectors along K, where they begin.
      distance: elements from what is read to what is prefetched.
      shifts: the value that A's are shifted by, if they are.
    """

    micro: InnerMicrokernel
    a_rows: _Vectors
    b_cols: _Vectors
    distance: Size
    shifts: list[Value]

    @property
    def _chunk(self) -> int:
        """Values of K in a vector of units."""
        return self.micro.lanes * self.micro.family.kr

    @property
    def _pointers(self) -> int:
        """How many pointers the loop carries, before its accumulators."""
        return len(self.a_rows.first) + len(self.b_cols.first)

    def sums(self, k: I64) -> list[Value]:
        """A scalar for each row and column: whole vectors first, then what K leaves beyond them."""
        micro, chunk = self.micro, self._chunk
        zero = ir.zeros(micro.lanes, micro.family.acc)
        state = [*self.a_rows.first, *self.b_cols.first, *[zero] * micro.tile.accumulators]
        out = ir.loop(0 - k // chunk, 0, 1, state, self._vectors)
        at, acc = out[: self._pointers], out[self._pointers :]
        rest = k % chunk
        if micro.masks:
            mask = ir.lane_mask(rest, chunk)
            acc = ir.if_(ir.less(0, rest), lambda: self._products(at, acc, mask), lambda: acc, like=acc)
        if self.shifts:
            count = micro.rows * micro.cols
            acc = [ir.subtract(v, acc[count + n % micro.cols]) for n, v in enumerate(acc[:count])]
        sums = [ir.tree_sum(v) for v in acc]
        if micro.masks:
            return sums
        return ir.loop(0, rest, 1, [*at, *sums], self._elements)[self._pointers :]

    def _vectors(self, _: I64, *carried: Any) -> list[Any]:
        """One vector of each row and column. The pointers move, so that no index needs a register."""
        at = carried[: self._pointers]
        if self.micro.prefetches:
            of_a, of_b = self._places([p.at(self.distance) for p in at])
            for p in of_a if self.micro.prefetches == "a" else of_b:
                p.prefetch(level=2)
        return [*(p.at(self._chunk) for p in at), *self._products(at, carried[self._pointers :], None)]

    def _elements(self, _: I64, *carried: Any) -> list[Any]:
        """One value of each row and column."""
        micro = self.micro
        x, y = (
            [ir.convert(p.load(), source, micro.family.acc) for p in ps]
            for ps, source in zip(self._places(carried), (micro.a, micro.b), strict=True)
        )
        so_far = carried[self._pointers :]
        sums = [ir.multiply_add(x[n // micro.cols], y[n % micro.cols], s) for n, s in enumerate(so_far)]
        return [*(p.at(1) for p in carried[: self._pointers]), *sums]

    def _places(self, carried: Sequence[Any]) -> tuple[list[Ptr], list[Ptr]]:
        """Where each row and each column is when the carried pointers are there."""
        first = len(self.a_rows.first)
        return self.a_rows.all(carried[:first]), self.b_cols.all(carried[first : self._pointers])

    def _products(self, at: Sequence[Ptr], so_far: Sequence[Value], mask: Value | None) -> list[Value]:
        """The sums with one vector of each row and column, beyond ``mask`` zeros; behind them B's with the shift.

        The smaller side is held in registers, as in ``nanokernel.step``.
        """
        micro, family, shifts = self.micro, self.micro.family, self.shifts
        xs, ys = self._places(at)
        acc = list(so_far)

        def add(i: int, x: Value, j: int, y: Value) -> None:
            acc[i * micro.cols + j] = family.product(x, y, acc[i * micro.cols + j])

        if micro.cols > micro.rows:
            held = [*(self._units(p, mask, family.prepare_a, micro.a) for p in xs), *shifts]
            for j, p in enumerate(ys):
                y = self._units(p, mask, family.prepare_b, micro.b)
                for i, x in enumerate(held):
                    add(i, x, j, y)
        else:
            held = [self._units(p, mask, family.prepare_b, micro.b) for p in ys]
            for i in range(micro.rows + len(shifts)):
                x = self._units(xs[i], mask, family.prepare_a, micro.a) if i < micro.rows else shifts[0]
                for j, y in enumerate(held):
                    add(i, x, j, y)
        return acc

    def _units(self, p: Ptr, mask: Value | None, prepare: Callable[[Value, str, int], Value], source: str) -> Value:
        """A vector of units."""
        micro = self.micro
        return ir.bitcast(prepare(p.load(self._chunk, mask), source, 0), micro.lanes, micro.family.unit)


class _Vectors:
    """Some vectors along K, ``stride`` apart: a pointer for each, or, of many, one for several."""

    def __init__(self, first: Ptr, stride: Size, count: int):
        self._count, self._each = count, 1 if count <= VECTORS_WITH_POINTERS else A_ROWS_PER_POINTER
        self._offsets = RowOffsets(stride * ir.elem_bytes(first.elem))
        self.first = [first.at(i * stride) for i in range(0, count, self._each)]

    def all(self, pointers: Sequence[Ptr]) -> list[Ptr]:
        """Where each of them is when the first ones are there."""
        return [self._offsets.of(pointers[i // self._each], i % self._each) for i in range(self._count)]
