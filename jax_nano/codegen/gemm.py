"""What a generated matrix product consists of: its microkernels, its paths, and the function around all of them."""

from __future__ import annotations

from collections.abc import Iterator

from . import ir
from .amx_microkernel import AmxMicrokernel, AmxTileRow
from .composition import Composition
from .epilogue import Epilogue
from .inner import InnerPath
from .inner_microkernel import InnerMicrokernel
from .macrokernel import Macrokernel
from .microkernel import ROWS_LAST, Microkernel
from .nanokernel.amx import ROWS, AmxDot
from .packing import Packing
from .sweep import SweepPath, family_of
from .sweep_microkernel import SweepMicrokernel
from .tile import Tile, direct_tile
from .tile_row import TileRow

LATENCY = 4
"""Cycles from a multiply-add to the next one into the same accumulator, and rows of 512 bits that a core computes in
them if it runs such instructions in two halves."""


class Gemm(Composition):
    """A generated matrix product for one signature."""

    @property
    def inner(self) -> InnerPath | None:
        """The inner-product path, where the nanokernel can take both operands as they lie along K."""
        if not self.direct_both or not self._takes("inner"):
            return None
        return InnerPath(self.target, self.tile.lanes, self.family, self.a, self.b, self.out)

    @property
    def sweep(self) -> SweepPath | None:
        """The path for few rows of A and a row-major B, where the nanokernel can take both as they lie."""
        if not self.direct_both or not self._takes("sweep"):
            return None
        return SweepPath(self.target, self.tile.lanes, family_of(self.family), self.a, self.b, self.out)

    @property
    def epilogue(self) -> Epilogue | None:
        """What it can do to finished sums."""
        masks = self.target.masks(1)
        return Epilogue(self.out, self.family.acc, self.tile.lanes, masks) if self.family.acc == "float32" else None

    def microkernels(self) -> Iterator[Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Every microkernel of this product."""
        for rows in self._tile_rows():
            yield from rows.microkernels()
        for path in (self.inner, self.sweep):
            if path is not None:
                yield from path.microkernels()

    def emit(self, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol(const GemmArgs*)`` and everything behind it to the module."""
        masks = all(self.target.masks(ir.elem_bytes(x)) for x in (self.a, self.b))
        fills = isinstance(self.family, AmxDot)
        packing = Packing(self.tile, self.family, self.a, self.b, masks, fills, self._halves)
        pack_a, pack_b = packing.emit(module, symbol, a=self._takes("pack_a"), b=self._takes("pack_b"))
        epilogue = self.epilogue.emit(module, symbol) if self.epilogue and self._takes("epilogue") else None
        rows_of_tiles: dict[bool, dict[int, str]] = {direct_b: {} for direct_b in (False, True)}
        for rows in self._tile_rows():
            rows_of_tiles[rows.direct_b][rows.height] = rows.emit(module, symbol, epilogue)
        paths = {"inner": self.inner, "sweep": self.sweep}
        macrokernel = Macrokernel(
            gemm=self,
            module=module,
            packing=packing,
            pack_a=pack_a,
            pack_b=pack_b,
            packed_rows=rows_of_tiles[False],
            direct_rows=rows_of_tiles[True],
            paths={field: path.emit(module, symbol, epilogue) for field, path in paths.items() if path is not None},
            inner=self.inner,
        )
        macrokernel.emit(symbol)

    @property
    def direct_vectors(self) -> list[int]:
        """Vectors in a row of tiles of 1, 2 ... mr rows against a B where it lies; none if it is always packed."""
        if not self.direct_b or isinstance(self.family, AmxDot):
            return []
        return [self._direct_tile(rows).nv for rows in range(1, self.tile.mr + 1)]

    def _takes(self, field: str) -> bool:
        """Whether a call may have this field of GemmArgs set."""
        return self.one is None or dict(self.one.fields).get(field, 1) != 0

    def _direct_tile(self, rows: int) -> Tile:
        if self.one is not None:
            return Tile(rows, self.tile.nv, self.tile.lanes)
        return direct_tile(self.tile, rows, self.target, self.family.temporaries)

    def _tile_rows(self) -> Iterator[TileRow | AmxTileRow]:
        """For each number of rows 1..mr, or of rows of tiles, against packed panels of B and B where it lies."""
        if isinstance(self.family, AmxDot):
            for tiles in range(1, self.tile.mr // ROWS + 1):
                yield AmxTileRow(tiles, self.family, self.out)
            return
        heights, rest = list(range(1, self.tile.mr + 1)), None
        ways = [False, True] if self.direct_b else [False]
        if self.one is not None:
            heights, rest = self.one.heights(self.tile.mr), self.one.n % self.tile.nr
            by_tiles = not (self.one.small or self._takes("inner") or self._takes("sweep"))
            ways = [not self._takes("pack_b")] if by_tiles else []
        for direct_b in ways:
            for m in heights:
                tile = self._direct_tile(m) if direct_b else Tile(m, self.tile.nv, self.tile.lanes)
                vectors = range(1, tile.nv + 1) if rest is None else sorted({rest // tile.lanes, tile.nv} - {0})
                whole = [self._micro(Tile(m, nv, tile.lanes), direct_b) for nv in vectors]
                masked = self._micro(Tile(m, 1, tile.lanes), direct_b, masked=True)
                half = None
                # Lower tiles take no less time, as what they wait for is a product to add the next one to; but where
                # there are halves, packing fills no more.
                if self._halves and (m > LATENCY or not direct_b):
                    # With half a vector of columns A is read about as fast as memory gives it.
                    ahead = self.a == self.b == self.family.unit and m in (self.tile.mr, self.tile.mr // 2)
                    half = self._micro(Tile(m, 1, tile.lanes // 2), direct_b, masked=True, ahead=ahead)
                yield TileRow(whole, masked, half, rest)

    @property
    def _halves(self) -> bool:
        """Whether there are microkernels for half a vector of columns: a core that runs 512-bit instructions in two
        halves then computes one only. Not where A is converted while it is packed: that takes such a product's time.
        """
        return self.target.vector_bits == 512 and self.direct_a

    def _micro(self, tile: Tile, direct_b: bool, *, masked: bool = False, ahead: bool = False) -> Microkernel:
        b = self.b if direct_b else self.family.unit
        main = tile.mr == self.tile.mr and tile.nv == self.tile.nv
        fits = tile.accumulators + ROWS_LAST * tile.nv <= self.target.vector_registers
        sums_floats = self.family.acc in ("float32", "float64") and fits
        # A tile of one vector, which kernels for given products may have, is also the size of the masked ones.
        on_avx512 = self.target.vector_bits == 512
        return Microkernel(
            tile=tile,
            family=self.family,
            b=b,
            out=self.out,
            main=main,
            masked=masked,
            direct_b=direct_b,
            masks_b=self.target.masks(ir.elem_bytes(b)),
            masks_c=self.target.masks(ir.elem_bytes(self.out)),
            ahead=ahead,
            # Where A is converted while it is packed, that counts more.
            by_rows=main and not masked and sums_floats and self.direct_a and self.a == self.b and on_avx512,
        )
