"""Microkernels: the K loop around a nanokernel, from zero accumulators to the stored tile of C.

A microkernel reads ``mr`` rows of A and ``nr`` columns of B wherever they are (packed or in the caller's
buffers: only strides differ) and writes one tile of C. Its generated signature is

    void name(a, b, c, rsa, csa, rsb, rsc, k, cols, accumulate)

with strides in elements, ``k`` in steps of the family's ``kr``, and ``cols`` the columns of C that exist (only
masked microkernels look at it: they neither read B nor touch C beyond it). Accumulators start from zero and C
is added at the end, so that no K loop waits for C; it is prefetched at the start instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import ir
from .ir import I64, Ptr, Size, Value
from .nanokernel import Family, step
from .tile import Tile

A_ROWS_PER_POINTER = 3  # x86 addresses p, p + s and p + 2 * s from one pointer register


@dataclass(frozen=True)
class Microkernel:
    """What distinguishes one microkernel from another.

    Attributes:
      tile: rows and vectors of its register tile.
      masked: the last vector of each row may be partial, and any vector may be absent.
      family: the instructions of its nanokernel.
      a, b: dtype names of the elements in memory; converted to the family's on the way into registers.
      out: dtype name of C.
      fixed: strides that are constants of this microkernel, by name; the others are arguments.
    """

    tile: Tile
    masked: bool
    family: Family
    a: str
    b: str
    out: str
    fixed: dict[str, int] = field(default_factory=dict)

    PARAMS = ("rsa", "csa", "rsb", "rsc", "k", "cols", "accumulate")

    def name(self, prefix: str) -> str:
        return f"{prefix}_{self.tile.mr}x{self.tile.nr}{'_masked' if self.masked else ''}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        name = self.name(prefix)
        module.function(name, [self.a, self.b, self.out, *["i64"] * len(self.PARAMS)], self._body, internal=True)
        return name

    def _body(self, a: Ptr, b: Ptr, c: Ptr, *args: I64) -> None:
        given: dict[str, Size] = dict(zip(self.PARAMS, args, strict=True))
        given.update(self.fixed)
        tile, kr = self.tile, self.family.kr
        rsa, csa, rsb, rsc = given["rsa"], given["csa"], given["rsb"], given["rsc"]
        masks = self._masks(given["cols"])
        rows = [c.at(i * rsc) for i in range(tile.mr)]
        for row in rows:
            for line in range(0, tile.nr * ir.elem_bytes(self.out), 64):
                row.at(line // ir.elem_bytes(self.out)).prefetch(write=True)

        bases = [a.at(i * rsa) for i in range(0, tile.mr, A_ROWS_PER_POINTER)]
        zero = ir.zeros(tile.lanes, self.family.acc)

        def k_step(_: I64, *carried: Value | Ptr) -> Sequence[Value | Ptr]:
            *pointers, b_row = carried[: len(bases) + 1]
            acc = carried[len(bases) + 1 :]
            new = step(
                tile,
                self.family,
                lambda i: self._load_a(pointers[i // A_ROWS_PER_POINTER].at(i % A_ROWS_PER_POINTER * rsa)),
                lambda j: self._load_b(b_row.at(j * tile.lanes * kr), masks[j]),
                acc,
            )
            return [*(p.at(csa * kr) for p in pointers), b_row.at(rsb * kr), *new]

        out = ir.loop(0, given["k"], 1, [*bases, b, *[zero] * tile.accumulators], k_step)
        self._store(rows, out[len(bases) + 1 :], masks, given["accumulate"])

    def _masks(self, cols: Size) -> list[Value | None]:
        if not self.masked:
            return [None] * self.tile.nv
        lanes = self.tile.lanes
        return [ir.lane_mask(cols - j * lanes, lanes) for j in range(self.tile.nv)]

    def _load_a(self, p: Ptr) -> Value:
        scalar = ir.convert(p.load(), self.a, self.family.a_panel)
        return ir.splat(scalar, self.tile.lanes)

    def _load_b(self, p: Ptr, mask: Value | None) -> Value:
        return ir.convert(p.load(self.tile.lanes, mask), self.b, self.family.b_panel)

    def _store(self, rows: list[Ptr], acc: Sequence[Value], masks: list[Value | None], accumulate: Size) -> None:
        nv, lanes = self.tile.nv, self.tile.lanes

        def write(add_c: bool) -> None:
            for i, row in enumerate(rows):
                for j in range(nv):
                    p, value = row.at(j * lanes), acc[i * nv + j]
                    if add_c:
                        old = ir.convert(p.load(lanes, masks[j]), self.out, self.family.acc)
                        value = ir.add_vectors(old, value)
                    p.store(ir.convert(value, self.family.acc, self.out), masks[j])

        assert isinstance(accumulate, I64)
        ir.if_(accumulate.ne(0), lambda: write(True), lambda: write(False))
