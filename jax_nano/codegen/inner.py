"""The inner-product path: both operands contiguous along K, and few rows or columns.

There a microkernel (``inner_microkernel``) holds accumulators that are vectors along K and reads every operand once
where it lies: a matrix-vector product with a row-major matrix or the scores of one query against a cache of keys run at
the speed of memory. The smaller operand may lie in any way: it is then copied to the workspace, along K.

    [copy A or B along K]
    [vectors that lie in memory against a single one: as many at a time as memory wants]
    [all of few columns by tall tiles]
    for j in n by cols                      the longer side outside: its vectors are read once
      for i in m by rows                    (or the other way round)
        microkernel: all of k

Sums are taken lane by lane, then over the lanes as a tree, whatever the split over m and n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import ir
from .arguments import Given
from .inner_microkernel import InnerMicrokernel
from .ir import I64, Ptr, Size
from .nanokernel import Family
from .target import Target

# Rows and columns of the tile. 16 accumulators hide the latency of two pipes; with operands they take 24 registers.
TILE, TILE_OF_16_REGISTERS = (4, 4), (3, 3)
SHIFTED_TILE_OF_16_REGISTERS = (3, 2)  # with a sum and a constant more for each column's correction
# Rows by columns of tiles for all columns of a B of few, with 32 registers: A is then read once, and B, which is read
# again for each tile, not more often than need be. Zen 4, A in memory, GB/s of A: 2 columns 28 to 33, by 4x4 tiles 23;
# 4 columns 23, and 26 if the next rows are prefetched, 19; 6 columns 18, 28, 12. In L2 prefetching costs a tenth, of 5
# and more columns less.
TALL_TILES = ((12, 2), (8, 3), (6, 4), (4, 5), (4, 6))
ALWAYS_PREFETCHED_COLUMNS = 5
PREFETCHED_BYTES = 512 << 10  # of the next rows, at most: they are to stay in L2
# Vectors that lie in memory (Zen 4, one row): long ones as so many streams, the next ones prefetched, 33 GB/s,
# one after the other 24; short ones one after the other, as they lie, 29 to 32 GB/s, four side by side 11 to 18.
LONG_AT_ONCE, LONG_AT_ONCE_OF_16_REGISTERS = 8, 4
SHORT_BYTES = 4096
COPIED_AT_ONCE = 256  # elements along K
SHORT_DISTANCE = 16  # from a short vector to the one that is prefetched


@dataclass(frozen=True)
class InnerPath:
    """All inner-product microkernels of a kernel, and the loops around them."""

    target: Target
    lanes: int
    family: Family
    a: str
    b: str
    out: str

    @property
    def tile(self) -> tuple[int, int]:
        if self.target.vector_registers >= 32:
            return TILE
        return SHIFTED_TILE_OF_16_REGISTERS if self.family.column_sums else TILE_OF_16_REGISTERS

    def microkernels(self) -> list[InnerMicrokernel]:
        rows, cols = self.tile
        tiles = [self._micro(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1)]
        return [*tiles, *self.tall(), *self.from_memory()]

    def tall(self) -> list[InnerMicrokernel]:
        """For all columns of a B of 2, 3 ... columns at once, then those of them that differ where A lies in memory.

        There are none where A or B is converted on the way.
        """
        if self.target.vector_registers < 32 or not self.a == self.b == self.family.unit:
            return []
        tiles = [(r, c, c >= ALWAYS_PREFETCHED_COLUMNS) for r, c in TALL_TILES]
        tiles += [(r, c, True) for r, c, prefetches in tiles if not prefetches]
        return [self._micro(r, c, "a" if prefetches else "", r) for r, c, prefetches in tiles]

    def from_memory(self) -> list[InnerMicrokernel]:
        """For vectors in memory against a single one: long columns, long rows, short columns, short rows."""
        long = self.long_at_once
        return [
            self._micro(1, long, "b", long),
            self._micro(long, 1, "a", long),
            self._micro(1, 1, "b", SHORT_DISTANCE),
            self._micro(1, 1, "a", SHORT_DISTANCE),
        ]

    @property
    def long_at_once(self) -> int:
        """Long vectors in memory that are read side by side."""
        return LONG_AT_ONCE if self.target.vector_registers >= 32 else LONG_AT_ONCE_OF_16_REGISTERS

    def _micro(self, rows: int, cols: int, prefetches: str = "", distance: int = 0) -> InnerMicrokernel:
        masks = all(self.target.masks(ir.elem_bytes(x)) for x in (self.a, self.b))
        return InnerMicrokernel(
            rows, cols, self.lanes, self.family, self.a, self.b, self.out, masks, prefetches, distance
        )

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold sums as they are."""
        return self._micro(1, 1).narrow_out

    def room(self) -> Ptr:
        """Room for a tile of sums, in rows of whole vectors. Only at the top of a function."""
        return ir.alloca(max(m.rows for m in self.microkernels()) * self.lanes, self.family.acc)

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> Callable[[Given], None]:
        """Adds the microkernels and returns what emits the loops for one product.

        That wants the fields of GemmArgs, and room for a tile of sums as ``sums``.
        """
        names = [k.emit(module, prefix) for k in self.microkernels()]
        copies = {"a": f"{prefix}_a_along_k", "b": f"{prefix}_b_along_k"}
        for name, elem in ((copies["a"], self.a), (copies["b"], self.b)):
            module.function(name, [elem, elem, *["i64"] * 4], _copy_along_k, internal=True)
        tall = len(self.tall())
        first = len(names) - 4 - tall
        return _Loops(self, module, names[:first], names[first : first + tall], names[-4:], copies, epilogue).emit


@dataclass(frozen=True)
class _Order:
    """Which side is outside, the longer one.

    Attributes:
      columns_outside: columns of B; else rows of A.
      outer, inner: how many vectors there are of the longer and of the shorter side.
      outer_at_once, inner_at_once: how many of them a microkernel takes.
      long, short: the microkernels of vectors that lie in memory.
    """

    columns_outside: bool
    outer: Size
    inner: Size
    outer_at_once: int
    inner_at_once: int
    long: str
    short: str


@dataclass(frozen=True)
class _Tile:
    """Rows i .. i + rows and columns j .. j + cols of C."""

    i: Size
    j: Size
    rows: Size
    cols: Size

    @classmethod
    def of(cls, order: _Order, outer: tuple[Size, Size], inner: tuple[Size, Size]) -> _Tile:
        """The tile of some outer and some inner vectors: (first, how many)."""
        (j, cols), (i, rows) = (outer, inner) if order.columns_outside else (inner, outer)
        return cls(i, j, rows, cols)


@dataclass(frozen=True)
class _Loops:
    """The loops of one product.

    Attributes:
      path: whose they are.
      module: where to call the functions that are named below.
      tiles: microkernels of 1 .. rows by 1 .. cols vectors.
      tall: those of all of few columns, in the order of ``InnerPath.tall``.
      from_memory: those of vectors in memory, in the order of ``InnerPath.from_memory``.
      copies: what copies A and B along K.
      epilogue: what finishes sums, if anything can.
    """

    path: InnerPath
    module: ir.Module
    tiles: list[str]
    tall: list[str]
    from_memory: list[str]
    copies: dict[str, str]
    epilogue: str | None

    def emit(self, x: Given) -> None:
        """The whole product."""
        x = x.but(**self._along_k(x, "a", x.m, "rsa", "csa"), **self._along_k(x, "b", x.n, "csb", "rsb"))
        x = x.but(
            finishes=ir.is_set(x.epilogue) if self.epilogue else False,
            in_memory=ir.is_set(x.prefetch),
            are_short=ir.less(x.k * ir.elem_bytes(self.path.b), SHORT_BYTES),
        )
        rows, cols = self.path.tile
        long_columns, long_rows, short_columns, short_rows = self.from_memory
        for columns_outside in ir.branches(ir.less(x.m, x.n)):
            if columns_outside:
                order = _Order(True, x.n, x.m, cols, rows, long_columns, short_columns)
            else:
                order = _Order(False, x.m, x.n, rows, cols, long_rows, short_rows)
            for outer in self._longer_side(x, order):
                for inner in self._shorter_side(order):
                    self._tile(x, _Tile.of(order, outer, inner))

    def _along_k(self, x: Given, operand: str, size: Size, stride: str, along: str) -> dict[str, Any]:
        """The operand and the stride between its vectors along K, copied first if it is to be."""
        source: Ptr = x.values[operand]
        copy = Ptr(x.values[f"{operand}_pack"].value, source.elem)

        def copied() -> list[Any]:
            self.module.call(self.copies[operand], [source, copy, size, x.k, x.values[stride], x.values[along]])
            return [copy, x.k]

        there = [source, x.values[stride]]
        pointer, step = ir.if_(ir.equal(x.values[f"pack_{operand}"], 0), lambda: there, copied, like=there)
        return {operand: pointer, stride: step}

    def _longer_side(self, x: Given, order: _Order) -> Iterator[tuple[Size, Size]]:
        """The outer loop: some vectors of the longer side at a time, (first, how many). Those that lie in memory, of
        which a single one is on the other side, it computes by itself.
        """
        alone = ir.both(x.in_memory, ir.equal(order.inner, 1))
        others: Callable[[], list[Size]] = lambda: [0]  # noqa: E731
        if self.tall and not order.columns_outside:
            others = partial(self._tall_tiles, x, order)
        (done,) = ir.if_(alone, partial(self._vectors_in_memory, x, order), others, like=[0])
        step = ir.select_size(ir.both(x.in_memory, x.are_short), 1, order.outer_at_once)
        for first in ir.range_(done, order.outer, step):
            yield first, ir.minimum(order.outer - first, step)

    def _shorter_side(self, order: _Order) -> Iterator[tuple[Size, Size]]:
        """The inner loop: its vectors stay in L1."""
        for first in ir.range_(0, order.inner, order.inner_at_once):
            yield first, ir.minimum(order.inner - first, order.inner_at_once)

    def _vectors_in_memory(self, x: Given, order: _Order) -> list[Size]:
        """Vectors against a single one, long ones by as many as are read side by side; returns how many are done."""
        at_once = self.path.long_at_once
        whole = ir.select_size(x.are_short, order.outer, order.outer // at_once * at_once)
        for short in ir.branches(x.are_short):
            kernel, count, end = (order.short, 1, order.outer) if short else (order.long, at_once, whole)
            for first in ir.range_(0, end, count):
                self._run(x, _Tile.of(order, (first, count), (0, 1)), [kernel], 0)
        return [whole]

    def _tall_tiles(self, x: Given, order: _Order) -> list[Size]:
        """Rows against all columns at once, if there are tiles for these; returns how many are done."""
        every, names = self.path.tall(), self.tall
        kernels, ahead = (
            every[: len(TALL_TILES)],
            dict(zip(names[len(TALL_TILES) :], every[len(TALL_TILES) :], strict=True)),
        )
        fewest, most = kernels[0].cols, kernels[-1].cols
        fits = ir.both(ir.at_least(order.inner, fewest), ir.at_least(most, order.inner))
        which = order.inner - fewest

        def rows_of(kernel: InnerMicrokernel) -> Size:
            return order.outer // kernel.rows * kernel.rows

        def by(kernel: InnerMicrokernel, name: str) -> None:
            others = [n for n, k in ahead.items() if k.cols == kernel.cols]
            next_rows = x.k * kernel.rows * ir.elem_bytes(self.path.a)
            prefetched = ir.both(x.in_memory, ir.at_least(PREFETCHED_BYTES, next_rows))
            for first in ir.range_(0, rows_of(kernel), kernel.rows):
                tile = _Tile.of(order, (first, kernel.rows), (0, kernel.cols))
                self._run(x, tile, [name, *others], ir.select_size(prefetched, 1, 0))

        for _ in ir.when(fits):
            ir.switch(which, [partial(by, kernel, name) for kernel, name in zip(kernels, names, strict=False)])
        done: Size = 0
        for i, kernel in enumerate(kernels):
            done = ir.select_size(ir.both(fits, ir.equal(which, i)), rows_of(kernel), done)
        return [done]

    def _tile(self, x: Given, tile: _Tile) -> None:
        """A tile by the microkernel of its size."""
        which = (tile.rows - 1) * self.path.tile[1] + (tile.cols - 1)
        self._run(x, tile, self.tiles, which)

    def _run(self, x: Given, tile: _Tile, kernels: Sequence[str], which: Size) -> None:
        """A tile by one of some microkernels, and what finishes its sums."""
        c = x.c.at(tile.i * x.rsc + tile.j)
        to, stride, sums = self._destination(x, c)
        given = x.but(a=x.a.at(tile.i * x.rsa), b=x.b.at(tile.j * x.csb), c=to, rsc=stride, sums=sums)
        calls = [partial(self.module.call_by_name, name, given.values) for name in kernels]
        if len(calls) == 1:
            calls[0]()
        else:
            ir.switch(which, calls)
        if self.epilogue:
            arguments = {
                "sums": x.sums,
                "ld": self.path.lanes,
                "rows": tile.rows,
                "cols": tile.cols,
                "c": c,
                "rsc": x.rsc,
                "old": x.sums,
                "rs_old": 0,
                "mode": 0,
                "column": tile.j,
                "epilogue": x.epilogue,
            }
            ir.if_(x.finishes, partial(self.module.call_by_name, self.epilogue, arguments))

    def _destination(self, x: Given, c: Ptr) -> Sequence[Any]:
        """Where a microkernel leaves its sums, the stride of their rows, and their address if not rounded to C's dtype:
        in C, or where the epilogue reads them.
        """

        def for_epilogue() -> list[Any]:
            if self.path.narrow_out:
                return [c, x.rsc, x.sums.address]
            return [x.sums, self.path.lanes, 0]

        return ir.if_(x.finishes, for_epilogue, lambda: [c, x.rsc, 0], like=[x.c, 0, 0])


def _copy_along_k(source: Ptr, target: Ptr, vectors: I64, k: I64, stride: I64, along: I64) -> None:
    """Vectors of k elements that are ``along`` apart, one dense vector after the other, some of each at a time: these
    share cache lines, and a loop over the few vectors inside would end every few elements, unforeseen.
    """
    for first in ir.range_(0, k, COPIED_AT_ONCE):
        end = ir.minimum(k, first + COPIED_AT_ONCE)
        for j in ir.range_(0, vectors):
            for kk in ir.range_(first, end):
                target.at(j * k + kk).store(source.at(kk * along + j * stride).load())
