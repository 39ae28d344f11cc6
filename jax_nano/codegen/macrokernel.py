"""The macrokernel: a whole matrix product, cache-blocked, from generated micro-kernels and packing.

    for each product of the batch
      for ic in m by mc
        for pc in k by kc                 partial sums over K are added in this order, whatever the split over m, n
          for jc in n by nc
            [pack B(kc x nc)]             stays in L2 while A's panels pass
            for ir in mc by mr            one panel of A stays in L1
              [pack A(mr x kc)]           the first time; the next panel is prefetched meanwhile
              for jr in nc by nr          microkernel

Sizes, strides, blocking and whether an operand is packed are fields of ``GemmArgs`` (``csrc/kernel_abi.h``).
An element of C depends on K and kc alone, so any split of m and n over threads gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import ir
from .ir import I64, Ptr, Size
from .microkernel import Microkernel
from .nanokernel import Family
from .packing import Packing
from .tile import Tile

GEMM_ARGS = (
    *("a", "b", "c", "a_pack", "b_pack"),
    *("m", "n", "k"),
    *("rsa", "csa", "rsb", "csb", "rsc"),
    *("batch", "bsa", "bsb", "bsc"),
    *("accumulate", "pack_a", "pack_b"),
    *("mc", "kc", "nc"),
)
"""The fields of GemmArgs in the order of csrc/kernel_abi.h; each has 8 bytes."""


@dataclass(frozen=True)
class Gemm:
    """A generated matrix product for one signature: the dtype names of A, B and C, a family and its tile."""

    a: str
    b: str
    out: str
    family: Family
    tile: Tile

    def emit(self, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol(const GemmArgs*)`` and everything behind it to the module."""
        packing = Packing(self.tile, self.a, self.b, self.family.a_panel, self.family.b_panel, self.tile.lanes)
        pack_a, pack_b = packing.emit(module, symbol)
        tile_rows = self._emit_tile_rows(module, symbol)
        module.function(
            symbol,
            ["int64"],  # GemmArgs, read field by field
            lambda args: self._body(module, args, pack_a, pack_b, tile_rows),
            internal=False,
        )

    def microkernels(self) -> Iterator[Microkernel]:
        """Every microkernel of this product: each number of rows, full, and masked for each number of vectors."""
        for m in range(1, self.tile.mr + 1):
            yield self._micro(m, self.tile.nv, masked=False)
            for nv in range(1, self.tile.nv + 1):
                yield self._micro(m, nv, masked=True)

    # --- one row of tiles -------------------------------------------------------------------------------------

    TILE_ROW = ("rsa", "csa", "rsb", "rsc", "rs_ahead", "ahead_step", "k", "cols", "b_step", "accumulate")

    def _emit_tile_rows(self, module: ir.Module, symbol: str) -> list[str]:
        """One function for each number of rows 1..mr: all tiles from left to right against one panel of A."""
        names = []
        for m in range(1, self.tile.mr + 1):
            full = self._micro(m, self.tile.nv, masked=False).emit(module, symbol)
            edges = [self._micro(m, nv, masked=True).emit(module, symbol) for nv in range(1, self.tile.nv + 1)]
            name = f"{symbol}_row{m}"

            def body(
                a: Ptr, b: Ptr, c: Ptr, ahead: Ptr, *args: I64, full: str = full, edges: list[str] = edges
            ) -> None:
                rsa, csa, rsb, rsc, rs_ahead, ahead_step, k, cols, b_step, accumulate = args
                nr = self.tile.nr
                whole = cols // nr * nr

                def tile_at(j: Size, kernel: str, active: Size) -> None:
                    # The tile in column t of this row fetches row t of A's next panel.
                    next_row = ahead.at(j // nr * rs_ahead)
                    sources = (a, b.at(j * b_step), next_row, rsa, csa, rsb, ahead_step)
                    module.call(kernel, [*sources, k, c.at(j), rsc, active, accumulate])

                ir.loop(0, whole, nr, [], lambda j: tile_at(j, full, nr))
                rest = cols - whole

                def edge(nv: int) -> None:
                    if nv == self.tile.nv:
                        tile_at(whole, edges[nv - 1], rest)
                    else:
                        ir.if_(
                            rest.lt(nv * self.tile.lanes + 1),
                            lambda: tile_at(whole, edges[nv - 1], rest),
                            lambda: edge(nv + 1),
                        )

                ir.if_(rest.ne(0), lambda: edge(1))

            params = [self.a, self.b, self.out, self.a, *["i64"] * len(self.TILE_ROW)]
            module.function(name, params, body, internal=True)
            names.append(name)
        return names

    def _micro(self, m: int, nv: int, *, masked: bool) -> Microkernel:
        tile = Tile(m, nv, self.tile.lanes, self.tile.kr)
        main = m == self.tile.mr and not masked
        return Microkernel(tile, main, masked, self.family, self.a, self.b, self.out)

    # --- the loop nest ----------------------------------------------------------------------------------------

    def _body(self, module: ir.Module, args: Ptr, pack_a: str, pack_b: str, tile_rows: list[str]) -> None:
        def number(name: str) -> I64:
            return I64(args.at(GEMM_ARGS.index(name)).load())

        def address(name: str, elem: str) -> Ptr:
            return Ptr(args.at(GEMM_ARGS.index(name)).as_type("ptr").load(), elem)

        a, b, c = address("a", self.a), address("b", self.b), address("c", self.out)
        a_pack, b_pack = address("a_pack", self.family.a_panel), address("b_pack", self.family.b_panel)
        m, n, k = number("m"), number("n"), number("k")
        rsa, csa, rsb, csb, rsc = (number(x) for x in ("rsa", "csa", "rsb", "csb", "rsc"))
        mc, kc, nc = number("mc"), number("kc"), number("nc")
        accumulate = number("accumulate")
        packs_a, packs_b = number("pack_a").ne(0), number("pack_b").ne(0)
        mr, nr = self.tile.mr, self.tile.nr

        def product(index: Size) -> None:
            a0, b0, c0 = (p.at(index * number(s)) for p, s in ((a, "bsa"), (b, "bsb"), (c, "bsc")))

            def block_m(ic: Size) -> None:
                rows = ir.minimum(m - ic, mc)

                def block_k(pc: Size) -> None:
                    depth = ir.minimum(k - pc, kc)
                    a_source = a0.at(ic * rsa + pc * csa)
                    adds = accumulate | pc
                    inside = Packing.a_strides(rsa, csa, depth, mr)
                    packed = [Ptr(a_pack.value, self.a), *inside, depth]
                    here_or_packed = ir.if_(
                        packs_a, lambda: packed, lambda: [a_source, rsa, csa, rsa], like=[a, rsa, csa, rsa]
                    )

                    def block_n(jc: Size) -> None:
                        cols = ir.minimum(n - jc, nc)
                        b_source = b0.at(pc * rsb + jc * csb)

                        def packed_b() -> list[object]:
                            module.call(pack_b, [b_source, b_pack, depth, cols, rsb, csb])
                            return [Ptr(b_pack.value, self.b), nr, depth]

                        b_block, b_rs, b_step = ir.if_(
                            packs_b, packed_b, lambda: [b_source, rsb, 1], like=[b, rsb, rsb]
                        )

                        def panel(ir_: Size) -> None:
                            here = ir.minimum(rows - ir_, mr)
                            assert isinstance(here, I64)
                            first = ir.both(packs_a, ir.equal(jc, 0))
                            a_here = a_source.at(ir_ * rsa)
                            ir.if_(
                                first,
                                lambda: module.call(pack_a, [a_here, a_pack.at(ir_ * depth), here, depth, rsa, csa]),
                            )
                            a_block, a_rs, a_cs, a_step = here_or_packed
                            # What the next panel will be read from: its source if it is yet to be packed.
                            ahead, rs_ahead, ahead_step = ir.if_(
                                first,
                                lambda: [a_here.at(mr * rsa), rsa, csa],
                                lambda: [a_block.at((ir_ + mr) * a_step), a_rs, a_cs],
                                like=[a, rsa, csa],
                            )

                            def call(name: str) -> None:
                                strides = (a_rs, a_cs, b_rs, rsc, rs_ahead, ahead_step)
                                c_here = c0.at((ic + ir_) * rsc + jc)
                                a_panel = a_block.at(ir_ * a_step)
                                module.call(
                                    name, [a_panel, b_block, c_here, ahead, *strides, depth, cols, b_step, adds]
                                )

                            ir.switch(here, [lambda name=name: call(name) for name in tile_rows], first=1)

                        ir.loop(0, rows, mr, [], panel)

                    ir.loop(0, n, nc, [], block_n)

                # k == 0 still runs one block of depth 0, which stores zeros.
                ir.loop(0, k + ir.select_size(ir.equal(k, 0), 1, 0), kc, [], block_k)

            ir.loop(0, m, mc, [], block_m)

        ir.loop(0, number("batch"), 1, [], product)
