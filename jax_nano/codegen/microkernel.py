"""Microkernels: the K loop around a nanokernel, from zero accumulators to the stored tile of C.

A microkernel reads ``mr`` rows of A and ``nr`` columns of B wherever they are (packed or in the caller's
buffers: only strides differ) and writes one tile of C. Its generated signature is

    void name(a, b, ahead, rsa, csa, rsb, ahead_step, k, c, rsc, cols, accumulate)

with strides in elements, ``k`` in steps of the family's ``kr``, and ``cols`` the columns of C that exist (only
masked microkernels look at it: they neither read B nor touch C beyond it). Accumulators start from zero and C
is added at the end, so that no K loop waits for C; it is prefetched at the start instead. The main microkernel
also walks ``ahead`` by ``ahead_step`` elements a K step and prefetches what it points to: A's next panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import ir
from .ir import I64, Ptr, Size, Value
from .nanokernel import Family, step
from .tile import Tile

MAIN_UNROLL = 4  # K steps between two prefetches of the next panel, whose lines hold 16 f32 values of K
A_ROWS_PER_POINTER = 7  # x86 reaches p + i * s for i = 0..6 from one pointer and the registers s, 3s and 5s


class RowOffsets:
    """Addresses of rows from a pointer to the first, by x86's scaled indices, without a register for each row."""

    def __init__(self, stride_bytes: Size):
        self._odd = {1: stride_bytes, 3: stride_bytes * 3, 5: stride_bytes * 5}

    def of(self, first: Ptr, i: int) -> Ptr:
        """Row ``i`` < A_ROWS_PER_POINTER."""
        if i == 0:
            return first
        scale = i & -i
        return first.at_scaled(self._odd[i // scale], scale)


@dataclass(frozen=True)
class Microkernel:
    """What distinguishes one microkernel from another.

    Attributes:
      tile: rows and vectors of its register tile.
      main: this is the one that does nearly all the work: unrolled, and prefetching what comes next.
      masked: the last vector of each row may be partial, and any vector may be absent.
      family: the instructions of its nanokernel.
      a, b: dtype names of the elements in memory; converted to the family's on the way into registers.
      out: dtype name of C.
      fixed: strides that are constants of this microkernel, by name; the others are arguments.
    """

    tile: Tile
    main: bool
    masked: bool
    family: Family
    a: str
    b: str
    out: str
    fixed: dict[str, int] = field(default_factory=dict)

    # What the K loop does not need comes last: it arrives on the stack and leaves the registers to the loop.
    PARAMS = ("a", "b", "ahead", "rsa", "csa", "rsb", "ahead_step", "k", "c", "rsc", "cols", "accumulate")

    def name(self, prefix: str) -> str:
        return f"{prefix}_{self.tile.mr}x{self.tile.nr}{'_masked' if self.masked else ''}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        name = self.name(prefix)
        pointers = {"a": self.a, "b": self.b, "c": self.out, "ahead": self.a}
        params = [pointers.get(p, "i64") for p in self.PARAMS]
        module.function(name, params, self._body, internal=True)
        return name

    def _body(self, *args: Ptr | I64) -> None:
        given: dict[str, Any] = {**dict(zip(self.PARAMS, args, strict=True)), **self.fixed}
        a, b, c, ahead = given["a"], given["b"], given["c"], given["ahead"]
        tile, kr = self.tile, self.family.kr
        rsa, csa, rsb, rsc = given["rsa"], given["csa"], given["rsb"], given["rsc"]
        masks = self._masks(given["cols"])
        rows = [c.at(i * rsc) for i in range(tile.mr)]
        for row in rows:
            for line in range(0, tile.nr * ir.elem_bytes(self.out), 64):
                row.at(line // ir.elem_bytes(self.out)).prefetch(write=True)

        bases = [a.at(i * rsa) for i in range(0, tile.mr, A_ROWS_PER_POINTER)]
        a_row = RowOffsets(rsa * ir.elem_bytes(self.a))
        zero = ir.zeros(tile.lanes, self.family.acc)

        def k_step(*carried: Value | Ptr) -> list[Value | Ptr]:
            *pointers, b_row = carried[: len(bases) + 1]
            acc = carried[len(bases) + 1 :]
            new = step(
                tile,
                self.family,
                lambda i: self._load_a(a_row.of(pointers[i // A_ROWS_PER_POINTER], i % A_ROWS_PER_POINTER)),
                lambda j: self._load_b(b_row.at(j * tile.lanes * kr), masks[j]),
                acc,
            )
            return [*(p.at(csa * kr) for p in pointers), b_row.at(rsb * kr), *new]

        def k_steps(_: I64, ahead: Ptr, *carried: Value | Ptr) -> list[Value | Ptr]:
            """Several steps, and one prefetch of what comes next."""
            ahead.prefetch()
            now = list(carried)
            for _ in range(MAIN_UNROLL):
                now = k_step(*now)
            return [ahead.at(given["ahead_step"] * (MAIN_UNROLL * kr)), *now]

        state: list[Value | Ptr] = [*bases, b, *[zero] * tile.accumulators]
        k = rest = given["k"]
        # Both counters run up to zero, which needs no register for a limit.
        if self.main:
            rest = k % MAIN_UNROLL
            _, *state = ir.loop(0 - k // MAIN_UNROLL, 0, 1, [ahead, *state], k_steps)
        out = ir.loop(0 - rest, 0, 1, state, lambda _, *carried: k_step(*carried))
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

        ir.if_(ir.negate(ir.equal(accumulate, 0)), lambda: write(True), lambda: write(False))
