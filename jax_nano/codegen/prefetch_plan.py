"""What the main microkernel prefetches while a row of tiles is computed, as walks (``walks``): its own tiles of C, the
panel of A that comes next, a share of B's next block, and the room for A's next packed panel.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import ir
from .arguments import Given
from .blocks import BlockOfA, BlockOfB
from .composition import Composition
from .ir import Ptr, Size
from .microkernel import lines_of_a_row
from .walks import A_WALKS, LINE, Walk


@dataclass(frozen=True)
class PrefetchPlan:
    """The walks of one row of tiles.

    Attributes:
      gemm: what the kernel is composed of.
      x: the product: the fields of GemmArgs, with its own operands, and elements from these to the next product's.
      block: the block of A that the row's panel is of.
      jc, cols: the block of columns that the row goes through.
      row_pitch: units between rows of a packed panel of A.
    """

    gemm: Composition
    x: Given
    block: BlockOfA
    jc: Size
    cols: Size
    row_pitch: Size

    def along_c(self, row: Size) -> list[Walk]:
        """Down the lines of each tile itself, of which the first row is this one of the product."""
        tile, x = self.gemm.tile, self.x
        c = x.c.at(row * x.rsc + self.jc).as_type("int8")
        size = ir.elem_bytes(self.gemm.out)
        lines = range(lines_of_a_row(tile, self.gemm.out))
        return [Walk(c.at(i * LINE), x.rsc * size, tile.mr, tile.nr * size) for i in lines]

    def along_a(self, row: Size) -> list[Walk]:
        """Along the panel of A that begins at this row of the block, a share in each tile: down its rows, or along its
        steps where these lie one behind the other. After the last panel of a product the first one of the next, after
        that of another block the first one again.
        """
        x, block, mr, rsa, csa = self.x, self.block, self.gemm.tile.mr, self.x.rsa, self.x.csa
        size, tiles = ir.elem_bytes(self.gemm.a), self.cols // self.gemm.tile.nr
        further = ir.less(row, block.rows)
        finished = ir.both(ir.both(block.is_last_of_m, block.is_last_of_k), ir.at_least(self.jc + self.cols, x.n))
        leaves = ir.both(ir.negate(further), finished)
        source = ir.select_ptr(leaves, x.a.at(x.next_a), block.a.at(ir.select_size(further, row, 0) * rsa)).as_type(
            "int8"
        )
        by_steps = ir.equal(rsa, 1)
        lies_packed = ir.both(ir.is_set(x.pack_a), ir.is_set(self.jc))
        lies_packed = ir.both(lies_packed, ir.negate(leaves))
        steps = ir.ceil_div(block.depth, tiles)
        lines = ir.ceil_div(ir.ceil_div(block.depth * size, LINE), tiles)
        walks = []
        for i in range(A_WALKS):
            # Steps may begin and end in two lines.
            count = ir.select_size(by_steps, steps if i < 2 else 0, ir.select_size(ir.less(i, lines), mr, 0))
            offset = ir.select_size(by_steps, (mr - 1) * size, LINE) if i == 1 else i * LINE
            step = ir.select_size(by_steps, csa, rsa) * size
            per_tile = ir.select_size(by_steps, steps * csa * size, lines * LINE)
            walks.append(Walk(source.at(offset), step, ir.select_size(lies_packed, 0, count), per_tile))
        return walks

    def along_packed_a(self, row: Size) -> Walk:
        """Along the room in the packed block of the panel of A that begins at this row, if it is still to be filled."""
        tiles = self.cols // self.gemm.tile.nr
        panel_bytes = self.gemm.tile.mr * self.row_pitch * ir.elem_bytes(self.gemm.family.unit)
        lines = (panel_bytes + (tiles * LINE - 1)) // (tiles * LINE)
        row = ir.select_size(ir.less(row, self.block.rows), row, 0)
        room = self.x.a_pack.at(row * self.row_pitch).as_type("int8")
        return Walk(room, LINE, ir.select_size(ir.equal(self.x.pack_a, 0), 0, lines), lines * LINE)

    def along_b(self, block: BlockOfB, begin: Size, end: Size, rows: Size) -> list[Walk]:
        """Along B's next block, each tile the columns beneath it: the rows begin .. end of ``rows`` of A bring their
        share of its K rows, or, where columns are contiguous, of their lines, first lines first.
        """
        nr, rsb, csb = self.gemm.tile.nr, self.x.rsb, self.x.csb
        size = ir.elem_bytes(self.gemm.b)
        contiguous = ir.equal(csb, 1)
        transposed = ir.both(ir.equal(rsb, 1), ir.negate(contiguous))
        lines = ir.ceil_div(block.depth * size, LINE) * nr
        units = ir.select_size(contiguous, block.depth, ir.select_size(transposed, lines, 0))
        first, last = (i * units // rows for i in (begin, end))
        count = last - first
        per_tile = nr * csb * size
        b = block.start.as_type("int8")
        down = b.at(first * rsb * size)
        step = csb * size
        across = b.at(first // nr * LINE)
        until_edge = ir.minimum(count, nr - first % nr)

        def either(by_rows: tuple[Ptr, Size], by_columns: tuple[Ptr, Size]) -> Walk:
            start = ir.select_ptr(contiguous, by_rows[0], by_columns[0])
            walked = ir.select_size(contiguous, by_rows[1], by_columns[1])
            return Walk(start, ir.select_size(contiguous, rsb * size, step), walked, per_tile)

        return [
            either((down, count), (across.at(first % nr * step), until_edge)),
            either((down.at(LINE), count if nr * size > LINE else 0), (across.at(LINE), count - until_edge)),
        ]
