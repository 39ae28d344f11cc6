"""The sweep path: few rows of A against a large row-major B, which is read once, where it lies, from end to end.

A sweep (``sweep_microkernel``) goes through the columns of a few rows of B that lie side by side, which the hardware
prefetches as that many streams, and adds their products to sums in memory; A's elements for these rows are held in
registers meanwhile. Where B lies in memory, not in a cache, it also prefetches the rows that come next. Nothing is
packed.

    for i in m by ROWS
      for jc in n by as many columns as L1 holds sums of
        for kk in k by steps              one sweep: steps * kr rows of B
          for j in columns by vectors     in the microkernel
    [round the sums]                      where C is narrower than they are, or apply the epilogue

A sum is taken in the order of k from its beginning to its end, one rounding a product, whatever the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from . import ir
from .arguments import Given
from .ir import I64, Ptr, Size
from .microkernel import ADD
from .nanokernel import Family
from .nanokernel.int8_dot import Int8Vnni, Int8Widened
from .sweep_microkernel import SweepMicrokernel
from .target import Target

ROWS = 4  # of A at once: with more of them products, not memory, are the limit
# Steps side by side, each a row of B or an interleaved pair. Of 8 rows that share their sets in L1, float32 reads
# 77 GB/s from L3, of 4 of them 87; of 8 pairs bfloat16 reads more than of 4 (Zen 4).
STEPS = 4
PREFETCHED_DEPTH = 8  # rows of B where the next ones are prefetched from memory: 30 GB/s; 4 rows: 27
SUMS_BYTES = 16 << 10  # what is added to stays in half of L1
FINISHED_VECTORS = 8  # of a row that one call of the epilogue takes


def family_of(family: Family) -> Family:
    """The instructions of a sweep. Bytes are widened: vpdpbusd would need the sums over B's columns, which nobody has
    taken.
    """
    return Int8Widened(family.bits, vnni=True) if isinstance(family, Int8Vnni) else family


@dataclass(frozen=True)
class SweepPath:
    """All sweep microkernels of a kernel, and the loops around them."""

    target: Target
    lanes: int
    family: Family
    a: str
    b: str
    out: str

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold unfinished sums."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    def depth(self, rows: int, most: int) -> int:
        """Values of K that a sweep takes of at most this many: as many as the registers hold of A."""
        kr = self.family.kr
        steps = most // kr
        while steps > 1 and steps * rows > self._room(rows):
            steps //= 2
        return steps * kr

    @property
    def rows(self) -> int:
        """Rows of A at once."""
        return max(rows for rows in range(1, ROWS + 1) if rows <= self._room(rows))

    def _room(self, rows: int) -> int:
        """Registers for units of A beside the sums and B's rows, twice where they are interleaved."""
        kr = self.family.kr
        return self.target.vector_registers - (rows + (2 if kr > 1 else 1)) * kr - self.family.temporaries

    def microkernels(self) -> list[SweepMicrokernel]:
        return [m for rows in range(1, self.rows + 1) for m in self.of_rows(rows)]

    def of_rows(self, rows: int) -> list[SweepMicrokernel]:
        """Those for so many rows in the order in which they go through K: the first one if B lies in memory."""
        kr = self.family.kr
        masks_b = self.target.masks(ir.elem_bytes(self.b))
        micro = partial(
            SweepMicrokernel, rows, lanes=self.lanes, family=self.family, a=self.a, b=self.b, masks_b=masks_b
        )
        depths = dict.fromkeys((self.depth(rows, STEPS * kr), *range(kr, 0, -1)))
        return [micro(self.depth(rows, PREFETCHED_DEPTH), prefetches=True), *(micro(depth) for depth in depths)]

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> Callable[[Given], None]:
        """Adds the microkernels and returns what emits the loops for one product, given the fields of GemmArgs."""
        acc = self.family.acc
        for m in self.microkernels():
            m.emit(module, prefix)
        clear, finish, apply = (f"{prefix}_sweep_{what}" for what in ("clear", "round", "epilogue"))
        module.function(clear, [acc, "i64"], self._clear, internal=True)
        if self.narrow_out:
            module.function(finish, [acc, self.out, "i64"], self._round, internal=True)
        if epilogue:
            parameters = [self.out, "i64", acc, "i64", "i64", "i64", "i64"]
            module.function(apply, parameters, partial(self._apply, module, epilogue), internal=True)
        return _Loops(self, module, prefix, clear, finish, apply if epilogue else None).emit

    def _clear(self, sums: Ptr, cols: I64) -> None:
        lanes = self.lanes
        zero, mask = ir.zeros(lanes, self.family.acc), ir.lane_mask(cols % lanes, lanes)
        whole = cols // lanes * lanes
        for j in ir.range_(0, whole, lanes):
            sums.at(j).store(zero)
        sums.at(whole).store(zero, mask)

    def _round(self, sums: Ptr, c: Ptr, cols: I64) -> None:
        """A row of C from its sums, rounded once."""
        lanes, acc = self.lanes, self.family.acc
        whole = cols // lanes * lanes

        for begin, end, step in ((0, whole, lanes), (whole, cols, 1)):
            for j in ir.range_(begin, end, step):
                to = c.at(j)
                to.store(ir.convert(sums.at(j).load(None if step == 1 else lanes), acc, self.out))

    def _apply(
        self, module: ir.Module, epilogue: str, c: Ptr, rsc: I64, sums: Ptr, rs_sums: I64, m: I64, n: I64, given: I64
    ) -> None:
        """The epilogue on all of C.

        It reads whole vectors of sums, which C has none of at the end of its rows: sums that lie in C are the old ones,
        of which it reads what exists, and are added to -0.0, which changes nothing.
        """
        width = FINISHED_VECTORS * self.lanes
        nothing = ir.alloca(width, self.family.acc)
        for o in range(0, width, self.lanes):
            nothing.at(o).store(ir.constant_vector(-0.0, self.lanes, self.family.acc))
        for j in ir.range_(0, n, width):
            arguments = {
                "sums": sums.at(j) if self.narrow_out else nothing,
                "ld": rs_sums if self.narrow_out else 0,
                "rows": m,
                "cols": ir.minimum(n - j, width),
                "c": c.at(j),
                "rsc": rsc,
                "old": sums.at(j),
                "rs_old": rs_sums,
                "mode": 0 if self.narrow_out else ADD,
                "column": j,
                "epilogue": given,
            }
            module.call_by_name(epilogue, arguments)


@dataclass(frozen=True)
class _Block:
    """Some rows of A and C, as many columns as L1 holds sums of.

    Attributes:
      i, rows: where they begin, and how many there are: each number of rows has microkernels of its own.
      jc, cols: the columns.
    """

    i: I64
    rows: int
    jc: I64
    cols: Size


@dataclass(frozen=True)
class _Sweep:
    """Some values of K for a block: by which microkernel, and the first of them."""

    micro: SweepMicrokernel
    kk: I64


@dataclass(frozen=True)
class _Loops:
    """The loops of one product.

    Attributes:
      path: whose they are.
      module, prefix: where microkernels are, and what their names begin with.
      clear, finish, apply: the functions that begin a row of sums, round it to C, and apply the epilogue, if any can.
    """

    path: SweepPath
    module: ir.Module
    prefix: str
    clear: str
    finish: str
    apply: str | None

    def emit(self, x: Given) -> None:
        """The whole product."""
        sums, rs_sums = (x.partial, x.rs_partial) if self.path.narrow_out else (x.c, x.rsc)
        x = x.but(sums=sums, rs_sums=rs_sums)
        ir.if_(ir.equal(x.accumulate, 0), partial(self._clear, x))
        for i in ir.range_(0, x.m, self.path.rows):
            by_rows = [partial(self._rows, x, i, rows) for rows in range(1, self.path.rows + 1)]
            ir.switch(ir.minimum(x.m - i, self.path.rows), by_rows, first=1)
        ir.if_(ir.equal(x.more, 0), partial(self._finish, x))

    def _rows(self, x: Given, i: I64, rows: int) -> None:
        """The loops for ``rows`` rows from i on: over columns, over K, and over columns again in the microkernel."""
        for block in self._blocks_of_columns(x, i, rows):
            for sweep in self._sweeps(x, block):
                self._sweep(x, block, sweep)

    def _blocks_of_columns(self, x: Given, i: I64, rows: int) -> Iterator[_Block]:
        """As many columns as L1 holds sums of."""
        width = SUMS_BYTES // ir.elem_bytes(self.path.family.acc) // rows
        for jc in ir.range_(0, x.n, width):
            yield _Block(i, rows, jc, ir.minimum(x.n - jc, width))

    def _sweeps(self, x: Given, block: _Block) -> Iterator[_Sweep]:
        """All of K: a loop for each depth of a sweep, and fewer values of K left after each."""
        done: Size = 0
        for micro in self.path.of_rows(block.rows):
            end = done + (x.k - done) // micro.depth * micro.depth
            if micro.prefetches:
                end = ir.select_size(ir.equal(x.prefetch, 0), 0, end)
            for kk in ir.range_(done, end, micro.depth):
                yield _Sweep(micro, kk)
            done = end

    def _sweep(self, x: Given, block: _Block, sweep: _Sweep) -> None:
        """One call of a microkernel."""
        given = x.but(
            a=x.a.at(block.i * x.rsa + sweep.kk * x.csa),
            b=x.b.at(sweep.kk * x.rsb + block.jc),
            sums=x.sums.at(block.i * x.rs_sums + block.jc),
            cols=block.cols,
        )
        self.module.call_by_name(sweep.micro.name(self.prefix), given.values)

    def _clear(self, x: Given) -> None:
        """Sums begin with zero."""
        for i in ir.range_(0, x.m):
            self.module.call(self.clear, [x.sums.at(i * x.rs_sums), x.n])

    def _finish(self, x: Given) -> None:
        """C from finished sums, where it is not the sums."""
        if self.apply is None:
            self._round(x)
            return
        for plain in ir.branches(ir.equal(x.epilogue, 0)):
            if plain:
                self._round(x)
            else:
                self.module.call(self.apply, [x.c, x.rsc, x.sums, x.rs_sums, x.m, x.n, x.epilogue])

    def _round(self, x: Given) -> None:
        """C from sums that it is too narrow for."""
        for i in ir.range_(0, x.m) if self.path.narrow_out else ():
            self.module.call(self.finish, [x.sums.at(i * x.rs_sums), x.c.at(i * x.rsc), x.n])
