"""The macrokernel: a whole matrix product, cache-blocked, from generated microkernels and packing.

    for each product of the batch
      for ic in m by mc                   blocks of rows
        for pc in k by kc                 blocks of A: partial sums over K are added in this order
          for jc in n by nc               blocks of columns
            [pack B(kc x nc)]             stays in L2 while A's panels pass
            for i in mc by tile_rows      panels of A, each of which stays in L1
              [pack A(panel x kc)]        the first time
              for jr in nc by nr          a row of tiles, a function of its own (``tile_row``): microkernels, which
                                          prefetch what comes next: their tile of C, A's next panel, and for each panel
                                          of A a share of B's next block; of a B that is not packed the first panel
                                          prefetches the tiles that come next

Sizes, strides, blocking and whether an operand is packed are fields of ``GemmArgs`` (``csrc/plan/kernel_abi.h``).
An element of C depends on K and kc alone, so any split of m and n over threads gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from . import ir
from .arguments import Arguments, Given
from .blocks import BlockOfA, BlockOfB, BlockOfColumns, BlockOfRows, OperandB, PanelOfA
from .composition import Composition, OneProduct
from .inner import InnerPath
from .ir import Ptr, Size
from .microkernel import ADD, MORE, walks_min_steps, walks_of
from .nanokernel.amx import AmxDot
from .packing import Packing
from .prefetch_plan import PrefetchPlan
from .small import Small, serves
from .small_one import SmallOne
from .unblocked import Unblocked

GEMM_ARGS = names(spec.GEMM_ARGS)

LONG_PANEL_STEPS = 256
"""In so many K steps the main microkernel gets through all that is to be prefetched with a line in one of four."""

Path = Callable[[Given], None]
"""Emits one product by another path than the blocked one."""


@dataclass(frozen=True)
class Macrokernel:
    """The loops of a generated matrix product, and its paths beside the blocked one.

    Attributes:
      gemm: what it is composed of.
      module: where to call the functions that are named below.
      packing, pack_a, pack_b: the layout of packed operands, and what packs them.
      packed_rows, direct_rows: rows of tiles against panels of B, and against a B where it lies, by the height of a
        panel of A.
      paths: the other paths by the fields of GemmArgs that ask for them.
      inner: the inner-product path, for the room that it wants on the stack.
    """

    gemm: Composition
    module: ir.Module
    packing: Packing
    pack_a: str
    pack_b: str
    packed_rows: Mapping[int, str]
    direct_rows: Mapping[int, str]
    paths: Mapping[str, Path]
    inner: InnerPath | None

    def emit(self, symbol: str) -> None:
        """Adds the whole generated function, which is given the address of its arguments."""
        if self.gemm.one is not None:
            self.module.function(symbol, ["int64"], partial(self._one_product, self.gemm.one), internal=False)
            return
        if not serves(self.gemm):
            self.module.function(symbol, ["int64"], self._larger, internal=False)
            return
        small = Small(self.gemm, self.gemm.tile.lanes)
        for part, emit in small.parts.items():
            self.module.function(f"{symbol}_{part}", ["int64"], partial(self._on_fields, emit), internal=True)
        self.module.function(f"{symbol}_larger", ["int64"], self._larger, internal=True)

        def choose(at: Ptr) -> None:
            # Functions of their own, so that what the larger ones need on the stack is no part of a small call.
            x = self._fields(at)
            for is_small in ir.branches(small.applies(x)):
                for part in small.part_of(x) if is_small else ["larger"]:
                    self.module.call(f"{symbol}_{part}", [at])

        self.module.function(symbol, ["int64"], choose, internal=False)

    def _one_product(self, one: OneProduct, at: Ptr) -> None:
        """The only product, by the path that is known to be its."""
        if one.small:
            SmallOne.of(self.gemm, one).emit(self._fields(at), one)
            return
        x = self._with_room(at)
        unblocked = Unblocked(self.gemm, self.packing, partial(self._call_row_of_tiles, self.direct_rows))
        # Of a part of it too.
        if self.gemm.direct_a and self.gemm.direct_b and unblocked.applies(x.but(m=one.m, n=one.n)) is True:
            unblocked.emit(x)
        else:
            self._products(x)

    def _on_fields(self, emit: Path, at: Ptr) -> None:
        emit(self._fields(at))

    def _larger(self, at: Ptr) -> None:
        """All but small products."""
        x = self._with_room(at)
        if not (self.gemm.direct_a and self.gemm.direct_b):
            self._products(x)
            return
        rows = partial(self._call_row_of_tiles, self.direct_rows)
        unblocked = Unblocked(self.gemm, self.packing, rows)
        ir.if_(unblocked.applies(x), partial(unblocked.emit, x), partial(self._products, x))

    def _fields(self, at: Ptr) -> Given:
        """The fields of GemmArgs."""
        gemm, unit = self.gemm, self.gemm.family.unit
        pointers = {"a": gemm.a, "b": gemm.b, "c": gemm.out, "a_pack": unit, "b_pack": unit, "partial": gemm.family.acc}
        known = {} if gemm.one is None else dict(gemm.one.fields)
        return Arguments(at, GEMM_ARGS, pointers).loaded().but(**known)

    def _with_room(self, at: Ptr) -> Given:
        """These, the table of ``walks`` and the inner-product path's room for ``sums``."""
        gemm = self.gemm
        table = walks_of(gemm.tile, gemm.out, at).room()
        walks_of(gemm.tile, gemm.out, table).begin(at)
        return self._fields(at).but(walks=table, sums=self.inner.room() if self.inner is not None else None)

    def _products(self, x: Given) -> None:
        """The loop over the batch: each product by the path that its schedule asks for."""
        for index in ir.each(x.batch):
            operands = {p: x.values[p].at(index * x.values[s]) for p, s in (("a", "bsa"), ("b", "bsb"), ("c", "bsc"))}
            more = ir.less(index + 1, x.batch)
            to_next = {f"next_{p}": ir.select_size(more, x.values[s], 0) for p, s in (("a", "bsa"), ("b", "bsb"))}
            product = x.but(**operands, **to_next)
            chosen: Callable[[], Any] = partial(self._blocked, product)
            for flag, path in self.paths.items():
                chosen = partial(ir.if_, ir.equal(x.values[flag], 0), chosen, partial(path, product))
            chosen()

    def _blocked(self, product: Given) -> None:
        """The five loops, from the outside. Each hands on where it stands; the fifth is in the row of tiles."""
        for rows in self._blocks_of_m(product):
            for block in self._blocks_of_k(rows):
                for columns in self._blocks_of_n(block):
                    for b in self._block_of_b(columns):
                        for panel in self._panels_of_a(b):
                            self._row_of_tiles(panel)

    def _blocks_of_m(self, x: Given) -> Iterator[BlockOfRows]:
        """Loop 1: blocks of rows of A and C."""
        for ic, rows in ir.blocks(x.m, x.mc):
            yield BlockOfRows(x, ic, rows)

    def _blocks_of_k(self, given: BlockOfRows) -> Iterator[BlockOfA]:
        """Loop 2: blocks of A. The first one begins the sums, the last one finishes them."""
        x, ic, rows = given.x, given.ic, given.rows
        # k == 0 still runs one block of depth 0, which stores zeros.
        end = x.k + ir.select_size(ir.equal(x.k, 0), 1, 0)
        for pc, depth in ir.blocks(x.k, x.kc, end):
            adds = ir.select_size(ir.equal(x.accumulate | pc, 0), 0, ADD)
            goes_on = ir.select_size(ir.less(pc + depth, x.k), MORE, x.more * MORE)
            yield BlockOfA(
                x=x,
                ic=ic,
                rows=rows,
                pc=pc,
                depth=depth,
                is_last_of_m=ir.at_least(ic + rows, x.m),
                is_last_of_k=ir.at_least(pc + depth, x.k),
                mode=adds + goes_on,
                epilogue=ir.select_size(ir.equal(goes_on, 0), x.epilogue, 0),
                a=x.a.at(ic * x.rsa + pc * x.csa),
                packed_strides=self.packing.a_strides(x.rsa, x.csa, depth),
            )

    def _blocks_of_n(self, block: BlockOfA) -> Iterator[BlockOfColumns]:
        """Loop 3: blocks of columns of B and C."""
        x = block.x
        for jc, cols in ir.blocks(x.n, x.nc):
            yield BlockOfColumns(block, jc, cols, x.b.at(block.pc * x.rsb + jc * x.csb))

    def _block_of_b(self, columns: BlockOfColumns) -> Iterator[OperandB]:
        """No loop: B's block is packed, or read where it lies. What is inside is generated for both."""
        if not self.gemm.direct_b:
            yield self._packed_b(columns)
            return
        for direct in ir.branches(ir.equal(columns.block.x.pack_b, 0)):
            yield self._direct_b(columns) if direct else self._packed_b(columns)

    def _packed_b(self, columns: BlockOfColumns) -> OperandB:
        """Packs a block of B."""
        block, x = columns.block, columns.block.x
        self.module.call(self.pack_b, [columns.b, x.b_pack, block.depth, columns.cols, x.rsb, x.csb])
        height = self.packing.b_panel_rows(block.depth)
        next_block = self._next_of_b(columns, packed=True)
        row_step = self.packing.b_row(columns.cols)
        return OperandB(columns, self.packed_rows, x.b_pack, row_step, height, 0, next_block)

    def _direct_b(self, columns: BlockOfColumns) -> OperandB:
        """A block of B where it lies."""
        block, x = columns.block, columns.block.x
        next_block = self._next_of_b(columns, packed=False)
        # Behind the last column comes the first one of the next kc rows.
        ends = ir.at_least(columns.jc + columns.cols, x.n)
        goes_on = ir.both(ends, ir.negate(block.is_last_of_k))
        wrap = ir.select_size(goes_on, x.kc * x.rsb - x.n, 0)
        return OperandB(columns, self.direct_rows, columns.b, x.rsb, 1, wrap, next_block)

    def _next_of_b(self, columns: BlockOfColumns, *, packed: bool) -> BlockOfB:
        """The block of B to prefetch meanwhile: the one beside these columns, or the first of the next kc rows, or the
        first of the next product. B where it lies is prefetched by its own microkernels, so only for the next product.
        """
        block, x, jc = columns.block, columns.block.x, columns.jc
        beside = ir.less(jc + x.nc, x.n)
        pc = block.pc + ir.select_size(beside, 0, x.kc)
        inside = ir.less(pc, x.k)
        here = pc * x.rsb + ir.select_size(beside, (jc + x.nc) * x.csb, 0)
        next_b = ir.select_size(block.is_last_of_m, x.next_b, 0)
        depth_of_next = ir.select_size(ir.equal(next_b, 0), 0, ir.minimum(x.k, x.kc))
        return BlockOfB(
            x.b.at(ir.select_size(inside, here, next_b)),
            ir.select_size(inside, ir.minimum(x.k - pc, x.kc) if packed else 0, depth_of_next),
        )

    def _panels_of_a(self, b: OperandB) -> Iterator[PanelOfA]:
        """Loop 4: panels of A against a block of B, packed when they meet the first one."""
        columns, block, x = b.columns, b.columns.block, b.columns.block.x
        steps, row_pitch = self.packing.depth(block.depth), self.packing.a_row(block.depth)
        walking = ir.both(
            ir.at_least(steps, walks_min_steps(self.gemm.tile, self.gemm.out)),
            ir.at_least(columns.cols, self.gemm.tile.nr),
        )
        walks = ir.select_ptr(walking, x.walks, walks_of(self.gemm.tile, self.gemm.out, x.walks).rest)
        for i, rows in ir.blocks(block.rows, x.tile_rows):
            a, rsa, csa = self._panel_of_a(columns, i, rows, row_pitch)
            panel = PanelOfA(b, i, rows, a, rsa, csa, steps, walks)
            if not isinstance(self.gemm.family, AmxDot):
                whole = ir.both(walking, ir.equal(rows, self.gemm.tile.mr))
                ir.if_(whole, partial(self._plan_prefetches, panel, row_pitch))
            yield panel

    def _panel_of_a(self, columns: BlockOfColumns, i: Size, rows: Size, row_pitch: Size) -> Sequence[Any]:
        """A panel, and units between its rows and between its steps: packed, or where it lies."""
        block, x, kr = columns.block, columns.block.x, self.gemm.family.kr
        source, room = block.a.at(i * x.rsa), x.a_pack.at(i * row_pitch)
        direct = [Ptr(source.value, self.gemm.family.unit), x.rsa // kr, x.csa if kr == 1 else 1]

        def pack() -> None:
            self.module.call(self.pack_a, [source, room, rows, block.depth, x.rsa, x.csa])

        def packed() -> list[Ptr | Size]:
            ir.if_(ir.equal(columns.jc, 0), pack)
            return [room, *block.packed_strides]

        if not self.gemm.direct_a:
            return packed()
        return ir.if_(ir.equal(x.pack_a, 0), lambda: direct, packed, like=direct)

    def _plan_prefetches(self, panel: PanelOfA, row_pitch: Size) -> None:
        """Fills in the table of what the row of tiles of a panel of mr rows prefetches."""
        columns, block = panel.operand.columns, panel.operand.columns.block
        x = block.x
        plan = PrefetchPlan(self.gemm, x, block, columns.jc, columns.cols, row_pitch)
        walks = [
            *plan.along_c(block.ic + panel.i),
            *plan.along_a(panel.i + x.tile_rows),
            *plan.along_b(panel.operand.next_block, panel.i, panel.i + panel.rows, block.rows),
            plan.along_packed_a(panel.i + x.tile_rows),
        ]
        walks_of(self.gemm.tile, self.gemm.out, x.walks).put(walks, ir.less(panel.steps, LONG_PANEL_STEPS))

    def _row_of_tiles(self, panel: PanelOfA) -> None:
        """Calls the fifth loop: a panel of A against a block of B, all tiles from left to right."""
        b, columns, block = panel.operand, panel.operand.columns, panel.operand.columns.block
        x, c_row = block.x, block.ic + panel.i
        given = {
            "a": panel.a,
            "b": b.b,
            "walks": panel.walks,
            "rsa": panel.rsa,
            "csa": panel.csa,
            "rsb": b.row_step,
            "k": panel.steps,
            "c": x.c.at(c_row * x.rsc + columns.jc),
            "rsc": x.rsc,
            "rows": panel.rows,
            "cols": columns.cols,
            "b_step": b.panel_step,
            "prefetch_b": ir.select_size(ir.equal(panel.i, 0), 1, 0),
            "wrap": b.wrap,
            "mode": block.mode,
            "partial": x.partial.at(c_row * x.rs_partial + columns.jc),
            "rs_partial": x.rs_partial,
            "column": columns.jc,
            "epilogue": block.epilogue,
        }
        self._call_row_of_tiles(b.tile_rows, given)

    def _call_row_of_tiles(self, tile_rows: Mapping[int, str], given: Mapping[str, Any]) -> None:
        """Calls the one for as many rows as there are."""
        calls = {height: partial(self.module.call_by_name, name, given) for height, name in tile_rows.items()}
        if self.gemm.one is not None:
            rows, (least, *more) = given["rows"], calls
            lower = ir.equal(rows, least) if more else True
            ir.if_(lower, calls[least], calls[more[0]] if more else None)
            return
        each = self.gemm.tile.mr // len(calls)  # rows that one of them stands for: 1, or those of a tile
        ir.switch(ir.ceil_div(given["rows"], each), list(calls.values()), first=1)
