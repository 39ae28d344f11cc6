"""Small products in one function: no call, no copy and no mask for a tile.

    for each product of the batch
      for j in n by two vectors           the last vector ends with the last column, over columns of the one before
        for i in m by height              panels of A of equal height
          a register tile: all of k       one of the tiles of 1, 2 ... rows, each with its K loop in this function

With 512-bit vectors fewer columns than one holds are computed by the same loops with vectors of half the width.

What a row of tiles and a microkernel are called with (``unblocked``) takes as long as a product of 8x8x8, and a tile of
one vector has more rows here, so that its K loop does not wait for one product to add the next one to it
(docs/experiments/0095-small-products-in-one-function.md).

An element of C is the same sum in the same order as in every other path whose block of K is the whole of it, so the
generated function takes this path by itself where it applies. Columns that two vectors share are computed twice, alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import ir
from .arguments import Given
from .composition import Composition, OneProduct
from .ir import Ptr, Size, Value
from .microkernel import A_ROWS_PER_POINTER, RowOffsets
from .nanokernel import step
from .tile import Tile

MOST = 24
"""The largest m, n and k. Above them calls count less, and main microkernels, which are unrolled, take over."""

ROWS_OF_ONE_VECTOR = 12
ROWS_OF_PAIRS, ROWS_OF_PAIRS_512 = 6, 8
"""The most rows of a tile of one vector and of two. Of 512 bits a core stores one in two cycles, and waits where it
gets many at a time (``unblocked``)."""


MOST_UNROLLED = 640
"""Products of a register tile that stand one behind the other, of a k that is known: they and their loads fit into
what a core keeps of decoded instructions several times."""


def _steps_at_once(k: int, tile: Tile) -> int:
    """The most steps of a known k that are not too many, and divide it."""
    return max(n for n in range(1, k + 1) if k % n == 0 and (n == 1 or n * tile.accumulators <= MOST_UNROLLED))


@dataclass(frozen=True)
class Small:
    """The path, for a kernel that can read A and B where they lie.

    Attributes:
      gemm: what the kernel is composed of.
      lanes: elements of its vectors.
    """

    gemm: Composition
    lanes: int

    def applies(self, x: Given) -> Value | bool:
        """Whether a call is of small products, each a single sum that is stored as it is."""
        other = x.inner | x.sweep | x.pack_a | x.pack_b | x.accumulate | x.more | x.epilogue
        whole = ir.both(ir.at_least(x.kc, x.k), ir.at_least(x.nc, x.n))
        largest = ir.maximum(ir.maximum(x.m, x.n), x.k)
        sizes = ir.both(ir.less(0, x.m), ir.both(ir.at_least(x.n, self._least), ir.at_least(MOST, largest)))
        return ir.both(ir.equal(other, 0), ir.both(whole, sizes))

    def emit(self, x: Given) -> None:
        """The loops, by vectors that the columns fill."""
        if self.gemm.one is not None:
            lanes = self._least if self.gemm.one.n < self.lanes else self.lanes
            Small(self.gemm, lanes)._one_product(x, self.gemm.one)
            return
        for is_narrow in ir.branches(ir.less(x.n, self.lanes) if self._least < self.lanes else False):
            Small(self.gemm, self._least if is_narrow else self.lanes)._products(x)

    def _one_product(self, x: Given, one: OneProduct) -> None:
        """The only product, by tiles of the shape that the kernel has."""
        lanes, tile = self.lanes, self.gemm.tile
        vectors = [min(j, one.n - lanes) for j in range(0, one.n, lanes)]
        for index in ir.each(x.batch):
            a, b, c = (operand.at(index * by) for operand, by in ((x.a, x.bsa), (x.b, x.bsb), (x.c, x.bsc)))
            for first in range(0, len(vectors), tile.nv):
                self._panels(x.but(a=a, b=b, c=c), vectors[first : first + tile.nv], tile.mr)

    def _products(self, x: Given) -> None:
        lanes = self.lanes
        for index in ir.range_(0, x.batch):
            a, b, c = (operand.at(index * by) for operand, by in ((x.a, x.bsa), (x.b, x.bsb), (x.c, x.bsc)))
            for j in ir.range_(0, x.n, 2 * lanes):
                left = x.n - j
                for is_pair in ir.branches(ir.less(lanes, left)):
                    if is_pair:
                        at, second = j, ir.minimum(left - lanes, lanes)
                        self._panels(x.but(a=a, b=b.at(at), c=c.at(at)), [0, second], self._rows_of_pairs)
                    else:
                        at = x.n - lanes
                        self._panels(x.but(a=a, b=b.at(at), c=c.at(at)), [0], ROWS_OF_ONE_VECTOR)

    @property
    def _least(self) -> int:
        """The fewest columns."""
        return self.lanes // 2 if self.gemm.target.vector_bits == 512 else self.lanes

    @property
    def _rows_of_pairs(self) -> int:
        return ROWS_OF_PAIRS_512 if self.gemm.target.vector_bits == 512 else ROWS_OF_PAIRS

    def _panels(self, x: Given, columns: Sequence[Size], most: int) -> None:
        """All rows of the vectors that begin at ``columns``, at most so many at a time."""
        height = ir.ceil_div(x.m, ir.ceil_div(x.m, most))
        for i, rows_here in ir.starts_of_blocks(x.m, height):
            panel = x.but(a=x.a.at(i * x.rsa), c=x.c.at(i * x.rsc))
            if rows_here is not None:
                self._tile(panel, rows_here, columns)
                continue
            cases = [partial(self._tile, panel, rows, columns) for rows in range(1, most + 1)]
            ir.switch(ir.minimum(x.m - i, height), cases, first=1)

    def _tile(self, x: Given, rows: int, columns: Sequence[Size]) -> None:
        """One register tile."""
        family, lanes = self.gemm.family, self.lanes
        tile = Tile(rows, len(columns), lanes)
        bases = [x.a.at(i * x.rsa) for i in range(0, rows, A_ROWS_PER_POINTER)]
        a_row = RowOffsets(x.rsa * ir.elem_bytes(self.gemm.a))

        def k_step(_: Any, *carried: Any) -> list[Any]:
            pointers, b_row, acc = carried[: len(bases)], carried[len(bases)], carried[len(bases) + 1 :]

            def load_a(i: int) -> Value:
                at: Ptr = a_row.of(pointers[i // A_ROWS_PER_POINTER], i % A_ROWS_PER_POINTER)
                return ir.splat(at.load(), lanes)

            def load_b(j: int) -> Value:
                return family.prepare_b(b_row.at(columns[j]).load(lanes), self.gemm.b, 0)

            new = step(tile, family, load_a, load_b, acc)
            return [*(p.at(x.csa) for p in pointers), b_row.at(x.rsb), *new]

        zero = ir.zeros(lanes, family.acc)
        out: list[Any] = [*bases, x.b, *[zero] * tile.accumulators]
        at_once = _steps_at_once(x.k, tile) if isinstance(x.k, int) else 1

        def k_steps(_: Any, *carried: Any) -> list[Any]:
            state = list(carried)
            for _step in range(at_once):
                state = k_step(_step, *state)
                ir.keep_order()  # as in microkernels: else LLVM spills
            return state

        if at_once == x.k:
            out = k_steps(0, *out)
        elif at_once > 1:
            out = ir.loop(0, x.k // at_once, 1, out, k_steps)
        else:
            out = ir.loop(0 - x.k, 0, 1, out, k_step)
        for n, v in enumerate(out[len(bases) + 1 :]):
            i, j = divmod(n, tile.nv)
            (narrow,) = family.narrowed([v], self.gemm.out)
            x.c.at(i * x.rsc).at(columns[j]).store(narrow)
