"""What a generated attention is composed of: dtypes, instructions, register tile, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from jax_nano._core import spec
from jax_nano._core.spec import names

from .. import ir
from ..amx_microkernel import AmxTileRow
from ..arguments import Arguments
from ..inner import InnerPath
from ..ir import I64, Ptr, Size
from ..microkernel import Microkernel
from ..nanokernel import Family
from ..nanokernel.amx import ROWS as AMX_ROWS
from ..nanokernel.amx import AmxDot
from ..packing import Packing
from ..sweep import SweepPath
from ..target import Target
from ..tile import Tile

ARGS, ROW = names(spec.ATTENTION_ARGS), names(spec.ATTENTION_ROW)


@dataclass(frozen=True)
class AttentionComposition:
    """The choices that all parts of an attention share.

    Attributes:
      target: the instruction set.
      q, kv: dtype names of queries and results, and of keys and values.
      family: the nanokernel's instructions.
      tile: the register tile.
    """

    target: Target
    q: str
    kv: str
    family: Family
    tile: Tile

    @property
    def converts(self) -> bool:
        """Whether weights are converted before they are multiplied."""
        return self.family.a_elem != "float32"

    @property
    def unit(self) -> int:
        """Keys that a tile's columns and the instructions' K steps are multiples of."""
        return max(self.tile.nr, self.family.kr * self.family.steps_at_once)

    @property
    def inner(self) -> InnerPath | None:
        """What few queries multiply keys by, where they lie."""
        if isinstance(self.family, AmxDot):
            return None
        return InnerPath(self.target, self.tile.lanes, self.family, self.family.a_elem, self.kv, "float32")

    @property
    def sweep(self) -> SweepPath | None:
        """What few queries multiply values by, where they lie."""
        if isinstance(self.family, AmxDot):
            return None
        return SweepPath(self.target, self.tile.lanes, self.family, self.family.a_elem, self.kv, "float32")

    @property
    def packing(self) -> Packing:
        """That of queries as A, and of keys and values as B."""
        masks = all(self.target.masks(ir.elem_bytes(x)) for x in (self.q, self.kv))
        return Packing(self.tile, self.family, self.q, self.kv, masks)

    def tile_microkernels(self) -> list[Microkernel]:
        """For all rows of a tile, and for fewer: half as many each time. None of tiles of AMX."""
        if isinstance(self.family, AmxDot):
            return []
        heights = [self.tile.mr]
        while heights[-1] > 1:
            heights.append(heights[-1] // 2)
        unit = self.family.unit
        return [
            Microkernel(
                tile=Tile(mr, self.tile.nv, self.tile.lanes),
                family=self.family,
                b=unit,
                out="float32",
                main=mr == self.tile.mr,
                masked=False,
                direct_b=False,
                masks_b=self.target.masks(ir.elem_bytes(unit)),
                masks_c=self.target.masks(4),
            )
            for mr in heights
        ]

    def amx_rows(self) -> list[AmxTileRow]:
        """Rows of tiles of AMX, by how many tiles high they are; none of vectors."""
        if not isinstance(self.family, AmxDot):
            return []
        return [AmxTileRow(n, self.family, "float32") for n in range(1, self.tile.mr // AMX_ROWS + 1)]

    def arguments(self, at: Ptr) -> Arguments:
        """``AttentionArgs`` at this address."""
        unit = self.family.unit
        pointers = {
            "rows": "int64",
            "k": self.kv,
            "v": self.kv,
            "q_pack": unit,
            "k_pack": unit,
            "v_pack": unit,
            "scores": "float32",
            "weights": unit,
            "sums": "float32",
            "maxima": "float32",
            "totals": "float32",
        }
        return Arguments(at, ARGS, pointers)

    def entry(self, rows: Ptr, i: Size) -> Ptr:
        """The address of the entry i of a table of ``AttentionRow``."""
        return rows.at(i * len(ROW))

    def row(self, rows: Ptr, i: Size) -> Arguments:
        """That entry."""
        return Arguments(self.entry(rows, i), ROW, {"q": self.q, "out": self.q, "bias": "float32", "mask": "int8"})

    def visible(self, rows: Ptr, count: Size, s0: Size, cols: Size) -> tuple[Size, Size]:
        """The columns of a block of keys, from a multiple of ``unit`` on, that one of some queries sees."""

        def widest(i: I64, lo: I64, hi: I64) -> list[Size]:
            row = self.row(rows, i)
            return [ir.minimum(lo, row.lo), ir.maximum(hi, row.hi)]

        lo, hi = ir.loop(0, count, 1, [s0 + cols, s0], widest)
        return ir.maximum(lo - s0, 0) // self.unit * self.unit, ir.minimum(hi - s0, cols)
