"""Small products in one function: no call and no copy for a tile.

Products of one tile, of up to a vector of columns, masked, or of half a vector where that is enough:

    for each product of the batch
      a register tile: all of k

Others:

    for each product of the batch
      for i in m by height                panels of A of equal height
        for j in n by two vectors         the last one ends with the last column, and is of half the width if it can be
          a register tile: all of k       one of the tiles of 1, 2 ... rows, each with its K loop in this function

What a row of tiles and a microkernel are called with (``unblocked``) takes as long as a product of 8x8x8, and a tile of
one vector has more rows here, so that its K loop does not wait for one product to add the next one to it
(docs/experiments/0095-small-products-in-one-function.md, 0101-batches-of-small-products.md).

An element of C is the same sum in the same order as in every other path whose block of K is the whole of it, so the
generated function takes this path by itself where it applies. Columns that two vectors share are computed twice, alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import ir
from .arguments import Given
from .composition import Composition
from .ir import Ptr, Size, Value
from .small_tile import Run, SmallTile, interleave

MOST = 64
"""The largest m, n and k. Above them main microkernels, which are unrolled and prefetch, take over."""

ROWS_OF_ONE_VECTOR, ROWS_OF_ONE_VECTOR_512 = 12, 16
ROWS_OF_PAIRS, ROWS_OF_PAIRS_512 = 6, 8
"""The most rows of a tile of one vector and of two. Of 512 bits a core stores one in two cycles, and waits where it
gets many at a time (``unblocked``)."""

FAR_BYTES, FAR_PRODUCT_BYTES, FAR_VECTORS, FAR_SIZE = 8 << 20, 32 << 10, 4, 24
"""Batches of more than so many bytes come from L3 or from memory. There the hardware prefetches what the next product
reads by itself, unless products are larger or rows longer than this (Zen 4)."""


@dataclass(frozen=True)
class Small:
    """The path, for a kernel that can broadcast A's elements where they lie.

    Attributes:
      gemm: what the kernel is composed of.
      lanes: elements of its vectors.
    """

    gemm: Composition
    lanes: int

    def applies(self, x: Given) -> Value | bool:
        """Whether a call is of small products, each a single sum that is stored as it is."""
        kr = self.gemm.family.kr
        other = x.inner | x.sweep | x.accumulate | x.more | x.epilogue
        if kr == 1:
            fits: Value | bool = ir.equal(other | x.pack_a | x.pack_b, 0)
        else:
            # Operands that others must copy are read where they lie; A that may be read there and is not, is not here.
            must = ir.is_set((x.k | x.rsa) % kr)
            given = ir.select_size(must, 0, x.pack_a)
            fits = ir.both(ir.equal(other | given, 0), ir.both(ir.equal(x.csa, 1), ir.equal(x.csb, 1)))
        whole = ir.both(ir.at_least(x.kc, x.k), ir.at_least(x.nc, x.n))
        largest = ir.maximum(ir.maximum(x.m, x.n), x.k)
        sizes = ir.both(ir.less(0, x.m), ir.both(ir.at_least(x.n, self._least), ir.at_least(MOST, largest)))
        return ir.both(fits, ir.both(whole, sizes))

    @property
    def parts(self) -> dict[str, Callable[[Given], None]]:
        """What emits the loops, by names: each is a function of its own, with all registers for itself."""
        parts: dict[str, Callable[[Given], None]] = {"one_tile": self._tiles_alone}
        for name, fetches in (("near", False), ("far", True)) if self._fetches else (("near", False),):
            parts[name] = partial(self._products, fetches=fetches)
        return parts

    def part_of(self, x: Given) -> Iterator[str]:
        """Emits for each part what comes after it where a call is for it."""
        is_one = ir.both(ir.at_least(self.lanes, x.n), ir.at_least(self._most_rows_alone, x.m))
        for alone in ir.branches(is_one):
            for is_far in [False] if alone else ir.branches(self._is_far(x) if self._fetches else False):
                yield "one_tile" if alone else "far" if is_far else "near"

    @property
    def _fetches(self) -> bool:
        """Whether there are loops that prefetch: not for the sake of operands of two dtypes."""
        return self.gemm.a == self.gemm.b

    @property
    def _masks(self) -> bool:
        """Whether tiles may be masked: 512-bit targets store masked vectors as fast as whole ones."""
        return self.gemm.target.vector_bits == 512

    @property
    def _half(self) -> int:
        """Columns of the narrowest vectors. A core that runs 512-bit instructions in two halves computes only one."""
        return self.lanes // 2 if self._masks else self.lanes

    @property
    def _least(self) -> int:
        """The fewest columns."""
        return 1 if self._masks else self.lanes

    def _is_far(self, x: Given) -> Value | bool:
        """Whether products come from far away, and the hardware does not fetch them ahead by itself."""
        size = ir.elem_bytes(self.gemm.a)
        largest = ir.maximum(ir.maximum(x.m, x.n), x.k)
        elements = x.m * x.k + (x.m + x.k) * x.n
        far = ir.both(ir.less(FAR_SIZE, largest), ir.less(FAR_BYTES // size, elements * x.batch))
        large = ir.select_size(ir.less(FAR_PRODUCT_BYTES // size, elements), 1, 0)
        wide = ir.select_size(ir.at_least(x.n, FAR_VECTORS * self.lanes), 1, 0)
        return ir.both(far, ir.is_set(large | wide))

    # --- one tile ---------------------------------------------------------------------------------------------

    @property
    def _most_rows_alone(self) -> int:
        return ROWS_OF_ONE_VECTOR_512 if self._masks else ROWS_OF_ONE_VECTOR

    def _tiles_alone(self, x: Given) -> None:
        """Products of one tile each. What they differ in is decided once, before all of them."""
        for is_more in ir.branches(ir.less(self._half, x.n) if self._masks else True):
            run = Run(0, self.lanes if is_more else self._half, active=x.n if self._masks else None)
            cases = [
                partial(self._batch_of, SmallTile(self.gemm, m, [run]), x) for m in range(1, self._most_rows_alone + 1)
            ]
            ir.switch(x.m, cases, first=1)

    def _batch_of(self, tile: SmallTile, x: Given) -> None:
        def one(_: Any, a: Ptr, b: Ptr, c: Ptr) -> list[Any]:
            tile.emit(x.but(a=a, b=b, c=c))
            return [a.at(x.bsa), b.at(x.bsb), c.at(x.bsc)]

        ir.loop(0, x.batch, 1, [x.a, x.b, x.c], one)

    # --- more -------------------------------------------------------------------------------------------------

    def _products(self, x: Given, *, fetches: bool) -> None:
        height = _height(x.m, self._rows_of_pairs)
        for index in ir.range_(0, x.batch):
            a, b, c = (operand.at(index * by) for operand, by in ((x.a, x.bsa), (x.b, x.bsb), (x.c, x.bsc)))
            product = x.but(b=b)
            if self._interleaves:
                product = product.but(b=Ptr(x.b_pack.value, self.gemm.family.unit), rsb=2 * self.lanes)
            if fetches:
                goes_on = ir.less(index + 1, x.batch)
                product = product.but(
                    next_a=ir.select_size(goes_on, x.bsa, 0),
                    next_b=ir.select_size(goes_on, x.bsb, 0),
                    next_c=ir.select_size(goes_on, x.bsc, 0),
                )
            if self._interleaves:
                # An operand that all products share is interleaved once.
                for _ in ir.when(ir.is_set(ir.select_size(ir.equal(index, 0), 1, x.bsb))):
                    self._interleave(x.but(b=b), product.b, product.next_b if fetches else None)
            for i in ir.range_(0, x.m, height):
                panel = product.but(a=a.at(i * x.rsa), c=c.at(i * x.rsc), rows=ir.minimum(x.m - i, height))
                if fetches:
                    # Each operand once: B by the first panel, A by the first columns.
                    panel = panel.but(next_b=ir.select_size(ir.equal(i, 0), product.next_b, 0))
                self._row(panel, fetches)

    def _row(self, x: Given, fetches: bool) -> None:
        """All tiles of a panel of A, from left to right."""
        for j in ir.range_(0, x.n, 2 * self.lanes):
            # Interleaved, two vectors of all of K come before the next ones.
            here = x.but(b=x.b.at(j * ir.ceil_div(x.k, 2) if self._interleaves else j), c=x.c.at(j))
            if fetches:
                here = here.but(next_a=ir.select_size(ir.equal(j, 0), x.next_a, 0))
            for runs in self._runs(x.n - j):
                cases = [partial(self._tile, here, rows, runs, fetches) for rows in range(1, self._rows_of_pairs + 1)]
                ir.switch(x.rows, cases, first=1)

    def _runs(self, left: Size) -> Iterator[list[Run]]:
        """What a tile takes of the columns that are left: emits what comes after it for each way to do so."""
        lanes, half = self.lanes, self._half
        for is_pair in ir.branches(ir.less(lanes, left)):
            if self.gemm.family.kr > 1:
                yield [Run(0, lanes, 2 if is_pair else 1, active=left)]
                continue
            before = lanes if is_pair else 0
            for is_whole in ir.branches(ir.less(before + half, left) if half < lanes else True):
                width = lanes if is_whole else half
                if is_pair:
                    yield [Run(0, lanes), Run(ir.minimum(left, 2 * lanes) - width, width)]
                else:
                    yield [Run(0, width, active=left) if self._masks else Run(left - width, width)]

    def _tile(self, x: Given, rows: int, runs: Sequence[Run], fetches: bool) -> None:
        SmallTile(self.gemm, rows, runs, self._interleaves, fetches).emit(x)

    @property
    def _interleaves(self) -> bool:
        """Whether rows of B are interleaved once for all panels of A."""
        return self.gemm.family.kr > 1

    def _interleave(self, x: Given, to: Ptr, next_b: Size | None) -> None:
        """Leaves pairs of rows of B in ``to``: vectors of units."""
        lanes, pairs = self.lanes, ir.ceil_div(x.k, 2)
        for j in ir.range_(0, x.n, 2 * lanes):
            left = x.n - j
            here = to.at(j * pairs)
            for vectors in (2 if is_pair else 1 for is_pair in ir.branches(ir.less(lanes, left))):
                run = Run(0, lanes, vectors, active=left)
                for pair in ir.range_(0, x.k // 2):
                    first = x.b.at(pair * (2 * x.rsb) + j)
                    second = first.at(x.rsb)
                    for row in [] if next_b is None else [first, second]:
                        row.at(next_b).prefetch(level=2)
                    self._put(here.at(pair * (2 * lanes)), interleave(first, second, run))
                for _ in ir.when(ir.is_set(x.k % 2)):
                    last = x.b.at((x.k - 1) * x.rsb + j)
                    self._put(here.at((pairs - 1) * (2 * lanes)), interleave(last, None, run))

    def _put(self, to: Ptr, vectors: Sequence[Value]) -> None:
        for i, v in enumerate(vectors):
            to.at(i * self.lanes).store(v)

    @property
    def _rows_of_pairs(self) -> int:
        return ROWS_OF_PAIRS_512 if self.gemm.target.vector_bits == 512 else ROWS_OF_PAIRS


def serves(gemm: Composition) -> bool:
    """Whether a kernel has this path: it takes units of A and rows of B, or pairs of them, where they lie."""
    pairs = gemm.family.kr == 2 and not gemm.family.column_sums and gemm.target.vector_bits == 512
    return gemm.direct_a and (gemm.direct_b or pairs)


def _height(m: Size, most: int) -> Size:
    """Rows of panels of equal height, of at most so many."""
    return ir.ceil_div(m, ir.ceil_div(m, most))
