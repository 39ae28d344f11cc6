"""The register tile of a small product: its K loop, in the function that it is part of, and what it leaves in C.

Columns of a tile are ``Run`` s. Where a K step takes two values of K (``kr`` of the family), rows of B are interleaved
on their way into registers, or were once for all tiles. No column or value of K beyond the operands is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import ir
from .arguments import Given
from .composition import Composition
from .ir import Ptr, Size, Value
from .microkernel import A_ROWS_PER_POINTER, RowOffsets
from .walks import LINE

LAST_STEPS, LAST_STEPS_OF_ONE_VECTOR, LEAST_ROWS = 4, 2, 4
"""So many K steps of a tile of two vectors, and of one, are computed row by row at the end, if it has as many rows: its
stores, 16 at once of 512 bits, else cost 30 cycles (Zen 4, docs/experiments/0101-batches-of-small-products.md).
bfloat16 gains 1 %, for a tenth of a kernel's size."""


@dataclass(frozen=True)
class Run:
    """Columns of a tile that lie side by side.

    Attributes:
      at: the first one.
      lanes: elements of its vectors.
      vectors: how many there are.
      active: how many columns exist, if not all; the others are neither read nor written.
    """

    at: Size
    lanes: int
    vectors: int = 1
    active: Size | None = None

    def mask(self, first: int, lanes: int, element_bytes: int) -> Value | None:
        """Which of so many lanes exist from the column ``first`` of the run on."""
        if self.active is None:
            return None
        return ir.lane_mask(self.active - first, lanes, "int16" if element_bytes == 2 else "int32")


@dataclass(frozen=True)
class SmallTile:
    """A tile of ``rows`` rows.

    Attributes:
      gemm: what the kernel is composed of.
      runs: its columns.
      interleaved: whether B is: ``b`` points to units, of which a row has those of a tile's most columns, ``rsb``
        apart.
      fetches: whether the same tile of the next product is prefetched into L2 meanwhile, from ``next_a``, ``next_b``
        and ``next_c`` elements further on.
    """

    gemm: Composition
    rows: int
    runs: Sequence[Run]
    interleaved: bool = False
    fetches: bool = False

    def emit(self, x: Given) -> None:
        """All of it. ``a``, ``b`` and ``c`` are where its rows and columns begin."""
        family, rows = self.gemm.family, self.rows
        bases = [x.a.at(i * x.rsa) for i in range(0, rows, A_ROWS_PER_POINTER)]
        a_row = RowOffsets(x.rsa * ir.elem_bytes(self.gemm.a))
        vectors = [run.lanes for run in self.runs for _ in range(run.vectors)]
        ahead = self._begin_fetching(x) if self.fetches else []
        fetched_steps = self._fetched_steps(x)

        def k_step(_: Any, *carried: Any) -> list[Any]:
            fetched, pointers, b, acc = self._parts(carried, len(ahead), len(bases))
            if self.fetches:
                self._fetch(fetched)
            held = [v for run in self.runs for v in self._load_b(b, x.rsb, run)]
            for i in range(rows):
                unit = self._unit_of_a(a_row.of(pointers[i // A_ROWS_PER_POINTER], i % A_ROWS_PER_POINTER))
                acc = self._row_of_products(i, unit, vectors, held, acc)
            return [
                *(p.at(by) for p, by in zip(fetched, fetched_steps, strict=True)),
                *(p.at(x.csa * family.kr) for p in pointers),
                b.at(x.rsb if self.interleaved else x.rsb * family.kr),
                *acc,
            ]

        zeros = [ir.zeros(lanes, family.acc) for lanes in vectors] * rows
        steps, last = x.k // family.kr, self._steps_by_rows
        by_rows = ir.at_least(steps, last) if last else False
        before = steps - ir.select_size(by_rows, last, 0)
        out = ir.loop(0 - before, 0, 1, [*ahead, *bases, x.b, *zeros], k_step)
        fetched, pointers, b, sums = self._parts(out, len(ahead), len(bases))
        for finishes in ir.branches(by_rows):
            if finishes:
                self._by_rows(x, fetched, pointers, a_row, b, vectors, sums)
                continue
            done = sums
            if family.kr > 1:
                done = self._last_value_of_k(x, pointers, a_row, b, vectors, sums)
            for i in range(rows):
                self._store(x.c.at(i * x.rsc), done[i * len(vectors) : (i + 1) * len(vectors)])

    @property
    def _steps_by_rows(self) -> int:
        """The last K steps, which are computed row by row."""
        gemm = self.gemm
        if self.rows < LEAST_ROWS or gemm.family.kr > 1 or gemm.target.vector_bits < 512 or gemm.a != gemm.b:
            return 0
        return LAST_STEPS if sum(run.vectors for run in self.runs) > 1 else LAST_STEPS_OF_ONE_VECTOR

    def _by_rows(
        self,
        x: Given,
        fetched: Sequence[Ptr],
        pointers: Sequence[Ptr],
        a_row: RowOffsets,
        b: Ptr,
        vectors: Sequence[int],
        sums: list[Value],
    ) -> None:
        """The last K steps, each row's one after the other, so that it is stored while others are computed."""
        steps = range(self._steps_by_rows)
        held = []
        for s in steps:
            if self.fetches:
                self._fetch([p.at(by * s) for p, by in zip(fetched, self._fetched_steps(x), strict=True)])
            held.append([v for run in self.runs for v in self._load_b(b.at(x.rsb * s), x.rsb, run)])
        ir.keep_order()
        for i in range(self.rows):
            for s in steps:
                first = pointers[i // A_ROWS_PER_POINTER].at(x.csa * s)
                unit = self._unit_of_a(a_row.of(first, i % A_ROWS_PER_POINTER))
                sums = self._row_of_products(i, unit, vectors, held[s], sums)
            self._store(x.c.at(i * x.rsc), sums[i * len(vectors) : (i + 1) * len(vectors)])
            ir.keep_order()

    def _parts(self, carried: Sequence[Any], ahead: int, bases: int) -> tuple[Any, Any, Ptr, list[Value]]:
        """What the K loop carries, taken apart."""
        pointers = carried[ahead : ahead + bases]
        return carried[:ahead], pointers, carried[ahead + bases], list(carried[ahead + bases + 1 :])

    def _row_of_products(
        self, i: int, unit: Value, vectors: Sequence[int], held: Sequence[Value], acc: Sequence[Value]
    ) -> list[Value]:
        """The sums with the products of row ``i`` and all columns added."""
        new, first = list(acc), i * len(vectors)
        for j, lanes in enumerate(vectors):
            new[first + j] = self.gemm.family.product(ir.splat(unit, lanes), held[j], new[first + j])
        return new

    def _unit_of_a(self, at: Ptr) -> Value:
        # It is no better aligned than its elements.
        return at.as_type(self.gemm.family.unit).load(alignment=ir.elem_bytes(self.gemm.a))

    def _load_b(self, row: Ptr, rsb: Size, run: Run) -> list[Value]:
        """The vectors of a run in one K step."""
        if self.interleaved:
            return [row.at(run.at).at(j * run.lanes).load(run.lanes) for j in range(run.vectors)]
        family = self.gemm.family
        if family.kr > 1:
            return interleave(row.at(run.at), row.at(rsb).at(run.at), run)
        mask = run.mask(0, run.lanes, ir.elem_bytes(self.gemm.b))
        return [family.prepare_b(row.at(run.at).load(run.lanes, mask), self.gemm.b, 0)]

    def _last_value_of_k(
        self, x: Given, pointers: Sequence[Ptr], a_row: RowOffsets, b: Ptr, vectors: Sequence[int], sums: list[Value]
    ) -> list[Value]:
        """The step of the one value of K that is left where K is odd: the other one of its pair is zero."""

        def last() -> list[Value]:
            new = sums
            held: list[Value] = []
            for run in self.runs:
                if self.interleaved:
                    held += self._load_b(b, 0, run)
                else:
                    held += interleave(b.at(run.at), None, run)
            for i in range(self.rows):
                at = a_row.of(pointers[i // A_ROWS_PER_POINTER], i % A_ROWS_PER_POINTER)
                unit = ir.widened_bits(at.as_type("int16").load(), self.gemm.family.unit)
                new = self._row_of_products(i, unit, vectors, held, new)
            return new

        return ir.if_(ir.is_set(x.k % self.gemm.family.kr), last, lambda: sums, like=sums)

    def _store(self, row: Ptr, sums: Sequence[Value]) -> None:
        """Leaves a row of the tile in C."""
        size = ir.elem_bytes(self.gemm.out)
        for run in self.runs:
            own, sums = sums[: run.vectors], sums[run.vectors :]
            column = 0
            for v in self.gemm.family.narrowed(own, self.gemm.out):
                row.at(run.at).at(column).store(v, run.mask(column, ir.lanes_of(v), size))
                column += ir.lanes_of(v)

    # --- the next product -------------------------------------------------------------------------------------

    def _begin_fetching(self, x: Given) -> list[Ptr]:
        """Fetches the tile of the next C; returns where its rows of A and of B begin."""
        for i in range(self.rows):
            for at in self._lines(self.gemm.out):
                x.c.at(x.next_c + i * x.rsc).at(at).prefetch(level=2)
        a = x.a.at(x.next_a).as_type("int8")
        return [a] if self.interleaved else [a, x.b.at(x.next_b)]

    def _fetch(self, ahead: Sequence[Ptr]) -> None:
        """In each K step a share of A's rows, and of B that is read where it lies the row."""
        a, *others = ahead
        a.prefetch(level=2)
        for b in others:
            for at in self._lines(self.gemm.b):
                b.at(at).prefetch(level=2)

    def _fetched_steps(self, x: Given) -> list[Size]:
        """From what a K step fetches to what the next one does, in bytes of A and in elements of B."""
        if not self.fetches:
            return []
        # Of A rows that lie one behind the other, or the elements of each K step.
        size = ir.elem_bytes(self.gemm.a) * self.gemm.family.kr
        a = ir.select_size(ir.equal(x.csa, 1), self.rows * size, x.csa * size)
        return [a] if self.interleaved else [a, x.rsb]

    def _lines(self, dtype: str) -> range:
        """Columns that begin the lines of its rows, as far as these begin with one."""
        columns = sum(run.lanes * run.vectors for run in self.runs)
        return range(0, columns, LINE // ir.elem_bytes(dtype))


def interleave(first: Ptr, second: Ptr | None, run: Run) -> list[Value]:
    """Pairs of elements of 16 bits of two rows as vectors of ``run.lanes`` of them; without a second row of zeros."""
    lanes, total = run.lanes, run.lanes * run.vectors
    mask = run.mask(0, total, 2)
    a = ir.bitcast(first.load(total, mask), total, "int16")
    b = ir.zeros_like(a) if second is None else ir.bitcast(second.load(total, mask), total, "int16")
    out = []
    for begin in range(0, total, lanes):
        pairs = ir.shuffle(a, b, [x for i in range(begin, begin + lanes) for x in (i, total + i)])
        out.append(ir.bitcast(pairs, lanes, "int32"))
    return out
