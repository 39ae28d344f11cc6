"""Microkernels of tile registers: the K loop over tiles, for all tiles from left to right against one panel of A.

A function that uses tiles configures them where it begins and gives them back where it ends, and a call inside would
take them away; LLVM sees to it. So the loop over the columns is inside the function: one ``ldtilecfg`` for a whole row
of tiles. All tiles have the same shape. Panels are filled up to whole tiles, and C is written from a copy on the
stack, of which only what exists is taken: nothing outside is read or written.

    void name(a, b, rsa, b_step, k, c, rsc, rows, cols, mode, partial, rs_partial)

with the arguments of ``macrokernel``'s rows of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import ir
from .epilogue import Landing
from .ir import I64, Ptr, Size
from .microkernel import MORE, ROW_PARAMS
from .nanokernel import amx, step
from .nanokernel.amx import AmxDot
from .tile import Tile

TILE_REGISTERS = 8


@dataclass(frozen=True)
class AmxMicrokernel:
    """One block of C in tile registers, and the loop over all such blocks in a row.

    Attributes:
      tile: the block, counted in tiles: 2 x 2 of them load four tiles for four products.
      panel_columns: columns of a panel of B.
      family: the instruction.
      out: dtype name of C.
    """

    tile: Tile
    panel_columns: int
    family: AmxDot
    out: str

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold unfinished sums."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    @property
    def loads(self) -> int:
        """Tiles that a step loads."""
        return self.tile.mr + self.tile.nv

    PARAMS = (
        *("a", "b", "rsa", "b_step", "k"),
        *("c", "rsc", "rows", "cols", "mode", "partial", "rs_partial"),
    )

    def name(self, prefix: str) -> str:
        return f"{prefix}_{self.tile.mr * amx.ROWS}x{self.tile.nr}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module and returns its name."""
        module.function(self.name(prefix), _types(self.PARAMS, self.family, self.out), self._body, internal=True)
        return self.name(prefix)

    def _body(self, *args: Ptr | I64) -> None:
        given: dict[str, Any] = dict(zip(self.PARAMS, args, strict=True))
        tile, rsa = self.tile, given["rsa"]
        sums = ir.alloca(tile.mr * amx.ROWS * tile.nr, self.family.acc)

        for j in ir.range_(0, given["cols"], self.panel_columns):
            self._prefetch(given, j)
            bases = [given["a"].at(i * amx.ROWS * rsa) for i in range(tile.mr)]
            zeros = [amx.zero() for _ in range(tile.accumulators)]

            def k_step(_: I64, b: Ptr, *carried: Any) -> list[Any]:
                a = carried[: tile.mr]
                new = step(
                    tile,
                    self.family,
                    lambda i: amx.load(a[i], rsa),
                    lambda v: amx.load(b.at(v * amx.UNITS), self.panel_columns),
                    carried[tile.mr :],
                )
                return [b.at(amx.UNITS * self.panel_columns), *(p.at(amx.UNITS) for p in a), *new]

            b = given["b"].at(j * given["b_step"])
            _, *out = ir.loop(0, given["k"], amx.UNITS, [b, *bases, *zeros], k_step)
            for n, value in enumerate(out[tile.mr :]):
                i, v = divmod(n, tile.nv)
                amx.store(value, sums.at(i * amx.ROWS * tile.nr + v * amx.UNITS), tile.nr)
            self._store(given, j, sums)

    def _prefetch(self, given: dict[str, Any], j: Size) -> None:
        """Fetches the block of C while the products are computed."""
        elements = 64 // ir.elem_bytes(self.out)

        for i in ir.range_(0, given["rows"]):
            for o in range(0, self.tile.nr, elements):
                given["c"].at(i * given["rsc"] + j + o).prefetch(write=True)

    def _store(self, given: dict[str, Any], j: Size, sums: Ptr) -> None:
        """Adds what C or ``partial`` held, if the sum goes on, and stores the part of the block that exists."""
        tile, mode = self.tile, given["mode"]
        masks = [ir.lane_mask(given["cols"] - j - o, amx.UNITS) for o in range(0, tile.nr, amx.UNITS)]

        def c_at(i: Size) -> Ptr:
            return given["c"].at(i * given["rsc"] + j)

        def partial_at(i: Size) -> Ptr:
            return given["partial"].at(i * given["rs_partial"] + j) if self.narrow_out else c_at(i)

        def rows(*, adds: bool, more: bool) -> None:
            for i in ir.range_(0, given["rows"]):
                for v, mask in enumerate(masks):
                    o = v * amx.UNITS
                    value = sums.at(i * tile.nr + o).load(amx.UNITS)
                    if adds:
                        value = ir.add_vectors(partial_at(i).at(o).load(amx.UNITS, mask), value)
                    if more:
                        partial_at(i).at(o).store(value, mask)
                    else:
                        (element,) = self.family.narrowed([value], self.out)
                        c_at(i).at(o).store(element, mask)

        def finish(*, adds: bool) -> None:
            if self.narrow_out:
                finished = ir.equal(mode // MORE, 0)
                ir.if_(finished, lambda: rows(adds=adds, more=False), lambda: rows(adds=adds, more=True))
            else:
                rows(adds=adds, more=False)

        ir.if_(ir.equal(mode % MORE, 0), lambda: finish(adds=False), lambda: finish(adds=True))


@dataclass(frozen=True)
class AmxTileRow:
    """All blocks from left to right against one panel of A: blocks of two tiles' width, one of one if that will do."""

    rows: int  # of tiles
    family: AmxDot
    out: str
    direct_b: bool = False

    @property
    def height(self) -> int:
        """Rows of the panels of A that it is for, in tiles."""
        return self.rows

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold unfinished sums."""
        return self.microkernels()[0].narrow_out

    def microkernels(self) -> Sequence[AmxMicrokernel]:
        """That of two tiles' width, and that of one."""
        tiles = [Tile(self.rows, nv, amx.UNITS) for nv in (2, 1)]
        return [AmxMicrokernel(t, 2 * amx.UNITS, self.family, self.out) for t in tiles]

    def name(self, prefix: str) -> str:
        return f"{prefix}_row{self.rows * amx.ROWS}"

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> str:
        """Adds the function (with the parameters ``ROW_PARAMS``) and its microkernels; returns its name."""
        wide, single = (m.emit(module, prefix) for m in self.microkernels())
        name = self.name(prefix)

        def body(*args: Ptr | I64) -> None:
            x: dict[str, Any] = dict(zip(ROW_PARAMS, args, strict=True))
            cols, nr = x["cols"], 2 * amx.UNITS
            one = amx.UNITS
            landing = Landing(module, epilogue, self.narrow_out, (self.rows * amx.ROWS, nr), x)
            # What finishes a block is a call, which takes the tiles' configuration away: block after block then.
            at_once = cols if epilogue is None else ir.select_size(ir.equal(x["epilogue"], 0), cols, nr)

            def blocks(first: Size, end: Size, kernel: str) -> None:
                for j in ir.range_(first, end, at_once):
                    here_cols = ir.minimum(end - j, at_once)
                    here = {**x, "b": x["b"].at(j * x["b_step"]), "cols": here_cols, **landing.at(j)}
                    module.call_by_name(kernel, here)
                    landing.finish(j, x["rows"], here_cols)

            # The last block needs one tile's width only if no more than that is left.
            tiles = (cols + (one - 1)) // one
            whole = tiles // 2 * nr
            in_wide = ir.minimum(whole, cols)
            ir.if_(ir.less(0, in_wide), lambda: blocks(0, in_wide, wide))
            ir.if_(ir.less(in_wide, cols), lambda: blocks(in_wide, cols, single))

        module.function(name, _types(ROW_PARAMS, self.family, self.out), body, internal=True)
        return name


def _types(params: Sequence[str], family: AmxDot, out: str) -> dict[str, str]:
    """Parameter types of a generated function by the parameters' names."""
    pointers = {"a": family.unit, "walks": "int64", "b": family.unit, "c": out, "partial": family.acc}
    return {p: pointers.get(p, "i64") for p in params}


def block_tile() -> Tile:
    """The block of C that an AMX kernel keeps in tile registers, as a register tile of vectors.

    2 x 2 tiles: four accumulators, B's two held, A's two through one register, 7 of 8. A larger block does not fit and
    a smaller one loads more tiles than it multiplies.
    """
    tiles = Tile(2, 2, amx.UNITS)
    if tiles.registers > TILE_REGISTERS:
        raise ValueError(f"{tiles.registers} tiles needed, AMX has {TILE_REGISTERS}")
    return Tile(tiles.mr * amx.ROWS, tiles.nv, amx.UNITS)
