"""The innermost loop around microkernels: all tiles from left to right against one panel of A, one generated function.

for j in cols by nr                 full tiles
[one tile of the whole vectors that are left]
[one masked tile]                   of half a vector where no more columns are left
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from . import ir
from .arguments import Given
from .epilogue import Landing
from .ir import I64, Ptr, Size
from .microkernel import PREFETCHED_TILES, ROW_PARAMS, Microkernel


@dataclass(frozen=True)
class TileRow:
    """A row of tiles for panels of one height.

    Attributes:
      whole: its microkernels of whole vectors by how many of them a row has, from 1 to a full tile's.
      masked: the one of a partial vector.
      half: the one of at most half a vector, if there is one.
      rest: the columns that are left behind the full tiles of a row, if any are; None: any number of them. If it is
        known, ``whole`` has those microkernels that it takes.
    """

    whole: list[Microkernel]
    masked: Microkernel
    half: Microkernel | None = None
    rest: int | None = None

    @property
    def full(self) -> Microkernel:
        return self.whole[-1]

    @property
    def direct_b(self) -> bool:
        """Whether it reads B where it lies, not from panels."""
        return self.full.direct_b

    @property
    def height(self) -> int:
        """Rows of the panels of A that it is for."""
        return self.full.tile.mr

    def microkernels(self) -> Sequence[Microkernel]:
        halves = [self.half] if self.half else []
        if self.rest is None:
            return [*self.whole, self.masked, *halves]
        active = self.rest % self.full.tile.lanes
        if active == 0:
            return self.whole
        return [*self.whole, *(halves if self.half and active <= self.half.tile.lanes else [self.masked])]

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> str:
        """Adds the function (with the parameters ``ROW_PARAMS``) and its microkernels; returns its name."""
        for kernel in self.microkernels():
            kernel.emit(module, prefix)
        unit = self.full.family.unit
        pointers = {"a": unit, "walks": "int64", "b": self.full.b, "c": self.full.out, "partial": self.full.family.acc}
        name = f"{prefix}_row{self.full.tile.mr}{'_stream' if self.direct_b else ''}"
        params = {p: pointers.get(p, "i64") for p in ROW_PARAMS}

        def body(*args: Ptr | I64) -> None:
            x = Given(dict(zip(ROW_PARAMS, args, strict=True)))
            shape = (self.full.tile.mr, self.full.tile.nr)
            _Row(self, module, prefix, x, Landing(module, epilogue, self.full.narrow_out, shape, x.values)).emit()

        module.function(name, params, body, internal=True)
        return name


@dataclass(frozen=True)
class _Row:
    """The body of the function.

    Attributes:
      x: its arguments.
      landing: where microkernels leave their tiles.
    """

    row: TileRow
    module: ir.Module
    prefix: str
    x: Given
    landing: Landing

    def emit(self) -> None:
        """All tiles from left to right."""
        cols, full = self.x.cols, self.row.full
        nr, lanes = full.tile.nr, full.tile.lanes
        tiles = cols // nr * nr
        vectors = cols // lanes * lanes
        for j in ir.range_(0, tiles, nr):
            self._tile(full, j, j, nr)
        if self.row.rest is not None:
            self._known_rest(self.row.rest, tiles)
            return
        if fewer := self.row.whole[:-1]:
            no_tile: Callable[[], None] = lambda: None  # noqa: E731
            rest = [partial(self._tile, kernel, tiles, tiles, kernel.tile.nr) for kernel in fewer]
            ir.switch((vectors - tiles) // lanes, [no_tile, *rest])
        for _ in ir.when(ir.less(vectors, cols)):
            self._partial_vector(vectors, tiles, cols - vectors)

    def _known_rest(self, rest: int, tiles: Size) -> None:
        """The columns behind the full tiles, of which a row has none or so many."""
        lanes = self.row.full.tile.lanes
        whole = rest // lanes * lanes
        for _ in ir.when(ir.less(tiles, self.x.cols) if rest else False):
            if whole:
                self._tile(self.row.whole[0], tiles, tiles, whole)
            if whole < rest:
                self._partial_vector(tiles + whole, tiles, rest - whole)

    def _partial_vector(self, j: Size, panel: Size, active: Size) -> None:
        """The tile of the columns that are left behind whole vectors."""
        half = self.row.half
        if half is None:
            self._tile(self.row.masked, j, panel, active)
            return
        for fits in ir.branches(ir.at_least(half.tile.lanes, active)):
            self._tile(half if fits else self.row.masked, j, panel, active)

    def _tile(self, kernel: Microkernel, j: Size, panel: Size, active: Size) -> None:
        """The tile at column j, ``active`` columns wide, in the panel of B that begins at column ``panel``."""
        x, tile = self.x, self.row.full.tile
        # Of a B where it lies the first panel of A has the tiles prefetched that come next: those beside this one, or
        # behind the last column those that the row is followed by.
        beside = tile.nr * PREFETCHED_TILES
        wraps = ir.select_size(ir.less(j + beside, x.cols), 0, x.wrap)
        here = x.but(
            b=x.b.at(panel * x.b_step + (j - panel)),
            cols=active,
            prefetch_offset=ir.select_size(ir.equal(x.prefetch_b, 0), 0, wraps + beside),
            **self.landing.at(j),
        )
        self.module.call_by_name(kernel.name(self.prefix), here.values)
        self.landing.finish(j, tile.mr, active)
