"""The loops of products that need no block, no packing and no prefetching, as batches of small ones.

    for each product of the batch
      for i in m by height                panels of A of equal height
        row of tiles                      all columns

They are generated beside the five of ``macrokernel``, because what those decide on the way takes as long as a product
of 8x8x8 (docs/experiments/0036-unblocked-loops.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import ir
from .arguments import Given
from .composition import Composition
from .ir import Size, Value
from .microkernel import ADD, MORE, walks_min_steps, walks_of
from .packing import Packing

NEAR_STEPS, NEAR_BYTES = 168, 256 << 10
"""With fewer K steps and no more bytes of B nothing is worth prefetching: planning walks takes longer than it saves."""

SHORT_ROWS, SHORT_WIDE_ROWS, WIDE_VECTORS = 4, 8, 4
"""Rows of tiles that are stored often; the latter where a row of C is longer than so many vectors, and B read by more
tiles."""


@dataclass(frozen=True)
class Unblocked:
    """Both loops, for a kernel that can read A and B where they lie.

    Attributes:
      gemm: what the kernel is composed of.
      packing: for the sizes of its K steps.
      row_of_tiles: emits one, given the arguments of ``ROW_PARAMS`` by name.
    """

    gemm: Composition
    packing: Packing
    row_of_tiles: Callable[[Mapping[str, Any]], None]

    def applies(self, x: Given) -> Value | bool:
        """Whether products have one block each, nothing is packed, and sums are too short to prefetch anything."""
        asked_for = x.inner | x.sweep | x.pack_a | x.pack_b
        whole = ir.both(ir.at_least(x.kc, x.k), ir.at_least(x.nc, x.n))
        depth = self.packing.depth(x.k)
        most = ir.select_size(self._b_is_near(x), NEAR_STEPS, walks_min_steps(self.gemm.tile, self.gemm.out))
        return ir.both(ir.equal(asked_for, 0), ir.both(whole, ir.less(depth, most)))

    def emit(self, x: Given) -> None:
        """The loops. All else that rows of tiles are given is known before the first one."""
        m, height = x.m, x.tile_rows
        if self.gemm.one is None:
            panels = ir.ceil_div(m, ir.minimum(x.tile_rows, self._rows_at_once(x.n)))
            # Of equal height, so that none is so low that its loads take longer than its products.
            height = (m + (panels - 1)) // ir.select_size(ir.equal(m, 0), 1, panels)
        more = x.more
        given = x.but(
            walks=walks_of(self.gemm.tile, self.gemm.out, x.walks).rest,
            k=self.packing.depth(x.k),
            cols=x.n,
            b_step=1,
            prefetch_b=ir.select_size(self._b_is_near(x), 0, 1),
            wrap=0,
            mode=x.accumulate * ADD + more * MORE,
            column=0,
            epilogue=ir.select_size(ir.equal(more, 0), x.epilogue, 0),
        )
        for index in ir.each(x.batch):
            a, b, c = (operand.at(index * step) for operand, step in ((x.a, x.bsa), (x.b, x.bsb), (x.c, x.bsc)))
            for i, rows in ir.starts_of_blocks(m, height):
                panel = given.but(
                    a=a.at(i * x.rsa),
                    b=b,
                    c=c.at(i * x.rsc),
                    partial=x.partial.at(i * x.rs_partial),
                    rows=ir.minimum(m - i, height) if rows is None else rows,
                )
                self.row_of_tiles(panel.values)

    def _b_is_near(self, x: Given) -> Value | bool:
        """Whether B stays in L2 while all panels of A pass."""
        return ir.at_least(NEAR_BYTES, x.k * x.n * ir.elem_bytes(self.gemm.b))

    def _rows_at_once(self, n: Size) -> Size:
        """The most rows of a panel of A, where the sums are so short that the stores of a tile count.

        A core takes a store of 512 bits in two cycles, and soon waits with all else where it gets many at a time:
        beside its K loop a 14x32 tile of 32 steps cost 51 to 85 cycles, an 8x32 one 3 to 29, without stores both 0
        (Zen 4). Only where the lower tiles are wider: else what calling them costs is more.
        """
        tile = self.gemm.tile
        if self.gemm.target.vector_bits < 512:
            return tile.mr
        wide = ir.select_size(ir.less(WIDE_VECTORS * tile.lanes, n), SHORT_WIDE_ROWS, SHORT_ROWS)
        return ir.select_size(ir.less(tile.nr, n), wide, tile.mr)
