"""The only product of a kernel that is made for it, if it is small: all of it in one function, its sizes constants."""

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

MOST_UNROLLED = 640
"""Products of a register tile that stand one behind the other, of a k that is known: they and their loads fit into
what a core keeps of decoded instructions several times."""


def _steps_at_once(k: int, tile: Tile) -> int:
    """The most steps of a known k that are not too many, and divide it."""
    return max(n for n in range(1, k + 1) if k % n == 0 and (n == 1 or n * tile.accumulators <= MOST_UNROLLED))


@dataclass(frozen=True)
class SmallOne:
    """The path, for a kernel that can read A and B where they lie.

    Attributes:
      gemm: what the kernel is composed of.
      lanes: elements of its vectors, of which the product has as many columns at least.
    """

    gemm: Composition
    lanes: int

    @staticmethod
    def of(gemm: Composition, one: OneProduct) -> SmallOne:
        """With vectors of half the width where the columns fill no whole one."""
        lanes = gemm.tile.lanes
        return SmallOne(gemm, lanes // 2 if one.n < lanes and gemm.target.vector_bits == 512 else lanes)

    def emit(self, x: Given, one: OneProduct) -> None:
        """The only product, by tiles of the shape that the kernel has."""
        lanes, tile = self.lanes, self.gemm.tile
        vectors = [min(j, one.n - lanes) for j in range(0, one.n, lanes)]
        for index in ir.each(x.batch):
            a, b, c = (operand.at(index * by) for operand, by in ((x.a, x.bsa), (x.b, x.bsb), (x.c, x.bsc)))
            for first in range(0, len(vectors), tile.nv):
                self._panels(x.but(a=a, b=b, c=c), vectors[first : first + tile.nv], tile.mr)

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
