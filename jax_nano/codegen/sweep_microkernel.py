"""Microkernels of sweeps: some columns of a few rows of B that lie side by side, added to sums in memory.

    for j in columns by vectors           sums[rows, j] += A[rows, kk...] B[kk..., j]

A's values of these rows stay in registers. What an instruction wants side by side along K is interleaved on its way
into registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import ir
from .arguments import Given
from .ir import I64, Ptr, Size, Value
from .microkernel import A_ROWS_PER_POINTER, RowOffsets
from .nanokernel import Family
from .tile import Tile


@dataclass(frozen=True)
class SweepMicrokernel:
    """One sweep of ``rows`` rows of A over a block of columns of B.

    Attributes:
      rows: of A.
      depth: values of K, each a row of B; where it is no multiple of the nanokernel's kr, the last step is padded.
      lanes: accumulators in a vector.
      family: the nanokernel's instructions.
      a, b: dtype names in the caller's buffers.
      masks_b: whether the target loads masked vectors of B's elements.
      prefetches: whether it prefetches the rows of B behind these, which lie in memory, into L2. (Of an operand that L3
        holds it would read each line twice as often: 66 instead of 77 GB/s.)
    """

    rows: int
    depth: int
    lanes: int
    family: Family
    a: str
    b: str
    masks_b: bool
    prefetches: bool = False

    PARAMS = ("a", "b", "rsa", "csa", "rsb", "sums", "rs_sums", "cols")

    @property
    def tile(self) -> Tile:
        """The sums that one step adds to: as many vectors of columns as interleaved rows of B give."""
        return Tile(self.rows, self.family.kr, self.lanes)

    def name(self, prefix: str) -> str:
        return f"{prefix}_sweep_{self.rows}x{self.depth}{'_ahead' if self.prefetches else ''}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        pointers = {"a": self.a, "b": self.b, "sums": self.family.acc}
        name = self.name(prefix)
        module.function(name, {p: pointers.get(p, "i64") for p in self.PARAMS}, self._body, internal=True)
        return name

    def _body(self, *args: Any) -> None:
        x = Given(dict(zip(self.PARAMS, args, strict=True)))
        group = self.lanes * self.family.kr
        rest = x.cols % group
        load_rest = self._rest_loader(rest)
        masks = [ir.lane_mask(rest - g * self.lanes, self.lanes) for g in range(self.family.kr)]
        columns = _Columns(
            micro=self,
            row_of_sums=RowOffsets(x.rs_sums * ir.elem_bytes(self.family.acc)),
            row_of_b=RowOffsets(x.rsb * ir.elem_bytes(self.b)),
            next_rows=x.rsb * self.depth,
            units=[[self._unit(x.a.at(i * x.rsa), x.csa, step) for i in range(self.rows)] for step in self.steps],
        )

        def whole_group(_: I64, *at: Ptr) -> list[Ptr]:
            columns.add(at, lambda p: p.load(group), [None] * self.family.kr, prefetches=self.prefetches)
            return [p.at(group) for p in at]

        first = [x.sums, *(x.b.at(r * x.rsb) for r in range(0, self.depth, A_ROWS_PER_POINTER))]
        at = ir.loop(0 - x.cols // group, 0, 1, first, whole_group)
        ir.if_(ir.less(0, rest), lambda: columns.add(at, load_rest, masks, prefetches=False))

    @property
    def steps(self) -> list[range]:
        """K steps: the rows of B that each of them takes."""
        kr = self.family.kr
        return [range(kk, min(kk + kr, self.depth)) for kk in range(0, self.depth, kr)]

    def _unit(self, p: Ptr, csa: Size, step: Iterable[int]) -> Value:
        """A's values of one step in every lane, zero where there is none."""
        values = [self.family.prepare_a(p.at(kk * csa).load(), self.a, 0) for kk in step]
        values += [ir.zeros_like(values[0])] * (self.family.kr - len(values))
        return ir.splat(values[0] if len(values) == 1 else ir.pair(*values), self.lanes)

    def interleaved(self, rows: Sequence[Value]) -> list[Value]:
        """One step's rows as vectors of units, each of ``lanes`` columns. A row that does not exist is zero."""
        kr, lanes = self.family.kr, self.lanes
        if kr == 1:
            return list(rows)
        first, second = (*rows, ir.zeros_like(rows[0]))[:2]
        wide = kr * lanes
        order = [[r * wide + g * lanes + lane for lane in range(lanes) for r in range(kr)] for g in range(kr)]
        return [ir.shuffle(first, second, x) for x in order]

    def _rest_loader(self, rest: Size) -> Callable[[Ptr], Value]:
        """What loads the columns of B that are left of a group."""
        group = self.lanes * self.family.kr
        if self.masks_b:
            mask = ir.lane_mask(rest, group)
            return lambda p: p.load(group, mask)
        scratch = ir.alloca(group, self.b)
        scratch.store(ir.zeros(group, self.b))

        def load(p: Ptr) -> Value:
            for lane in ir.range_(0, rest):
                scratch.at(lane).store(p.at(lane).load())
            return scratch.load(group)

        return load


@dataclass(frozen=True)
class _Columns:
    """What a group of columns needs, the same for all of them.

    Attributes:
      micro: the microkernel.
      row_of_sums, row_of_b: addresses of rows.
      next_rows: elements from these rows of B to those behind them.
      units: A's values by K step and row.
    """

    micro: SweepMicrokernel
    row_of_sums: RowOffsets
    row_of_b: RowOffsets
    next_rows: Size
    units: list[list[Value]]

    def add(
        self, at: Sequence[Ptr], load: Callable[[Ptr], Value], masks: Sequence[Value | None], *, prefetches: bool
    ) -> None:
        """Adds to the sums of a group of columns: ``at`` points to its sums, then to its rows of B."""
        micro, family, kr, lanes = self.micro, self.micro.family, self.micro.family.kr, self.micro.lanes
        places = [(self.row_of_sums.of(at[0], i).at(g * lanes), masks[g]) for i in range(micro.rows) for g in range(kr)]
        acc = [p.load(lanes, mask) for p, mask in places]
        for step, of_a in zip(micro.steps, self.units, strict=True):
            rows = [self.row_of_b.of(at[1 + r // A_ROWS_PER_POINTER], r % A_ROWS_PER_POINTER) for r in step]
            for p in rows if prefetches else ():
                p.at(self.next_rows).prefetch(level=2)
            raw = [load(p) for p in rows]
            vectors = micro.interleaved([family.prepare_b(v, micro.b, 0) for v in raw])
            for i, unit in enumerate(of_a):
                for g, v in enumerate(vectors):
                    acc[i * kr + g] = family.product(unit, v, acc[i * kr + g])
        for (p, mask), v in zip(places, acc, strict=True):
            p.store(v, mask)
