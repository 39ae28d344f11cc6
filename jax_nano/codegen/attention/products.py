"""A panel of some rows against the panels of B from column 0 on, through the matrix product's microkernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import ir
from ..microkernel import ROW_PARAMS, Microkernel
from ..nanokernel.amx import ROWS as AMX_ROWS
from .composition import AttentionComposition


@dataclass(frozen=True)
class Products:
    """Both products of an attention, and all of its gradients.

    Attributes:
      attention: what it is composed of.
      module, prefix: where microkernels are, and what their names begin with.
    """

    attention: AttentionComposition
    module: ir.Module
    prefix: str

    def emit(self) -> None:
        """Adds the microkernels."""
        for rows in self.attention.amx_rows():
            rows.emit(self.module, self.prefix, None)
        for micro in self.attention.tile_microkernels():
            micro.emit(self.module, self.prefix)

    def panel(self, **x: Any) -> None:
        """One panel of A. Takes the arguments of a row of tiles (``ROW_PARAMS``); C has room for whole tiles."""
        if rows := self.attention.amx_rows():
            whole = ir.round_up(x["cols"], self.attention.tile.nr)
            given = {**dict.fromkeys(ROW_PARAMS, 0), **x, "cols": whole, "partial": x["c"]}
            calls = [partial(self.module.call_by_name, row.name(self.prefix), given) for row in rows]
            ir.switch(ir.ceil_div(x["rows"], AMX_ROWS), calls, first=1)
        else:
            self._by_height(self.attention.tile_microkernels()[::-1], x)

    def _by_height(self, kernels: Sequence[Microkernel], x: dict[str, Any]) -> None:
        """By the first microkernel that has enough rows, of those that are given by height."""
        lowest, *higher = kernels
        if not higher:
            self._columns(lowest, x)
            return
        for enough in ir.branches(ir.less(x["rows"], lowest.tile.mr + 1)):
            if enough:
                self._columns(lowest, x)
            else:
                self._by_height(higher, x)

    def _columns(self, kernel: Microkernel, x: dict[str, Any]) -> None:
        """All tiles from left to right."""
        nr = self.attention.tile.nr
        for j in ir.range_(0, x["cols"], nr):
            here = {**x, "b": x["b"].at(j * x["b_step"]), "c": x["c"].at(j), "cols": nr}
            self.module.call_by_name(kernel.name(self.prefix), here)
