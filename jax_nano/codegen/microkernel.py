"""Microkernels: the K loop around a nanokernel, from the first accumulator to the stored tile of C.

A microkernel reads ``mr`` rows of A and ``nr`` columns of B wherever they are (packed or in the caller's buffers:
only strides differ) and writes one tile of C. Its generated signature is

    void name(a, b, walks, rsa, csa, rsb, k, [prefetch_offset,] c, rsc, cols, mode, partial, rs_partial)

with strides in elements of what the pointers point to, ``k`` in K steps, and ``cols`` the columns of C that exist
(only masked microkernels look at it: they neither read B nor touch C beyond it). Accumulators start from zero (or
from the corrections in front of a panel of B), and what C held is added at the end, so that no K loop waits for C; it
is prefetched instead: by the main microkernel along the first of its ``walks``, if there are any, else at the start.

``mode`` is a sum of ADD (the tile continues an earlier sum over K) and MORE (the sum over K goes on after this
call). Where C is narrower than the accumulators, unfinished sums live in ``partial`` and C is written once, rounded
once; where it is not, they live in C itself and the two last arguments do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import ir
from .ir import I64, Ptr, Size, Value
from .nanokernel import Family, step
from .tile import Tile
from .walks import LINE, OTHER_WALKS, Walks

ADD, MORE = 1, 2  # bits of ``mode``

ROW_PARAMS = (
    *("a", "b", "walks", "rsa", "csa", "rsb", "k"),
    *("c", "rsc", "rows", "cols", "b_step", "mode", "partial", "rs_partial"),
    *("column", "epilogue"),
    *("prefetch_b", "wrap"),
)
"""What a row of tiles from left to right against one panel of A is called with (``macrokernel``)."""

MAIN_UNROLL = 4
ROWS_LAST, ROWS_LAST_FROM = 2, 32
"""So many K steps come row by row at the end (``by_rows``), from so many in all on. 28 stores of 512 bits take a core
56 cycles: a row of two vectors is finished every four."""
AHEAD_STEPS = 512  # K steps from which on the next rows of A are prefetched, where they are (``ahead``)
PRODUCTS_A_LINE = 28  # 28 cycles on Zen 4 (512 bits), 14 on others
A_ROWS_PER_POINTER = 7  # x86 reaches p + i * s for i = 0..6 from one pointer and the registers s, 3s and 5s
PREFETCHED_TILES = 2  # of a B where it lies, along its rows: from the next one on


def lines_of_a_row(tile: Tile, out: str) -> int:
    """Cache lines that a row of a tile of C takes, if it begins with one."""
    return -(-tile.nr * ir.elem_bytes(out) // LINE)


def lines_a_turn(tile: Tile) -> int:
    """Lines that the main microkernel may prefetch in a turn, so many products apart that no load waits for them."""
    return max(1, tile.accumulators * MAIN_UNROLL // PRODUCTS_A_LINE)


def walks_of(tile: Tile, out: str, table: Ptr) -> Walks:
    """What a main microkernel finds in its table: the lines of its own tile of C, and what the macrokernel adds."""
    return Walks(lines_of_a_row(tile, out) + OTHER_WALKS, table, lines_a_turn(tile))


def walks_min_steps(tile: Tile, out: str) -> int:
    """K steps in which the main microkernel, with its most lines a turn, gets through the walks along C and as many
    other lines: walks that end before are not worth their table.
    """
    return 2 * tile.mr * lines_of_a_row(tile, out) * MAIN_UNROLL // lines_a_turn(tile)


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
      family: the instructions of its nanokernel.
      b: dtype name of what it reads of B: the family's unit (panels), or elements to be widened (the caller's buffer).
      out: dtype name of C.
      main: this is the one that does nearly all the work: unrolled, and prefetching what comes next.
      masked: its one vector a row is partial.
      direct_b: B is read where it lies, and its rows are prefetched, ``prefetch_offset`` elements further on.
      masks_b, masks_c: whether the target loads and stores masked vectors of B's and of C's elements; else a masked
        microkernel gets by without.
      ahead: over long sums it prefetches the rows of A that lie behind its own.
      by_rows: it is the main one, and computes its last K steps row by row, so that rows are stored while others are
        computed: stores of 512 bits, all at the end, keep the next tile waiting
        (docs/experiments/0102-stores-under-products.md).
    """

    tile: Tile
    family: Family
    b: str
    out: str
    main: bool
    masked: bool
    direct_b: bool
    masks_b: bool
    masks_c: bool
    ahead: bool = False
    by_rows: bool = False

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold unfinished sums."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    @property
    def unroll(self) -> int:
        """K steps per iteration of the main loop."""
        return MAIN_UNROLL if self.family.unrolls else 1

    @property
    def params(self) -> tuple[str, ...]:
        # What the K loop does not need comes last: it arrives on the stack and leaves the registers to the loop.
        loop = ("a", "b", "walks", "rsa", "csa", "rsb", "k", *(("prefetch_offset",) if self.direct_b else ()))
        tile = ("c", "rsc", "cols", "mode")
        return (*loop, *tile, "partial", "rs_partial") if self.narrow_out else (*loop, *tile)

    def name(self, prefix: str) -> str:
        kind = ("_stream" if self.direct_b else "") + ("_masked" if self.masked else "")
        return f"{prefix}_{self.tile.mr}x{self.tile.nr}{kind}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        unit = self.family.unit
        pointers = {"a": unit, "walks": "int64", "b": self.b, "c": self.out, "partial": self.family.acc}
        name = self.name(prefix)
        module.function(name, {p: pointers.get(p, "i64") for p in self.params}, self._body, internal=True)
        return name

    def _body(self, *args: Ptr | I64) -> None:
        given: dict[str, Any] = dict(zip(self.params, args, strict=True))
        tile = self.tile
        a, b, rsa, csa, rsb, k = (given[x] for x in ("a", "b", "rsa", "csa", "rsb", "k"))
        walks = walks_of(tile, self.out, given["walks"])
        still = walks.are_none if self.main else True
        ir.if_(still, lambda: self._prefetch_c(given))
        load_b = self._b_loader(given["cols"])
        store = self._destination(given)

        bases = [a.at(i * rsa) for i in range(0, tile.mr, A_ROWS_PER_POINTER)]
        a_row = RowOffsets(rsa * ir.elem_bytes(self.family.unit))
        row = [ir.zeros(tile.lanes, self.family.acc)] * tile.nv
        if self.family.column_sums:
            row = [b.at(j * tile.lanes).load(tile.lanes) for j in range(tile.nv)]
            b = b.at(rsb)

        def k_step(*carried: Any) -> list[Any]:
            pointers: Sequence[Ptr] = carried[: len(bases)]
            b_row: Ptr = carried[len(bases)]
            acc: Sequence[Value] = carried[len(bases) + 1 :]
            if self.direct_b:
                next_row = b_row.at(given["prefetch_offset"])
                for o in range(0, tile.nr, LINE // ir.elem_bytes(self.b)):
                    next_row.at(o).prefetch(level=2)
            new = step(
                tile,
                self.family,
                lambda i: self._load_a(a_row.of(pointers[i // A_ROWS_PER_POINTER], i % A_ROWS_PER_POINTER)),
                lambda j: load_b(b_row.at(j * tile.lanes)),
                acc,
            )
            return [*(p.at(csa) for p in pointers), b_row.at(rsb), *new]

        def k_steps(*carried: Any) -> list[Any]:
            for _ in range(self.unroll):
                carried = tuple(k_step(*carried))
                # Else LLVM starts products of the next step early and spills them, for a latency that the tile hides.
                ir.keep_order()
            return list(carried)

        state: list[Value | Ptr] = [*bases, b, *(row * tile.mr)]
        ends_by_rows = ir.at_least(k, ROWS_LAST_FROM) if self.by_rows else False
        rest = k = k - ir.select_size(ends_by_rows, self.unroll, 0)
        if self.main:
            rest = k % self.unroll
            state = walks.go(k // self.unroll, still, state, k_steps)
        elif self.ahead:
            at_once = LINE // ir.elem_bytes(self.family.unit)
            next_panel = rsa * tile.mr

            def line_of_steps(_: I64, *carried: Any) -> list[Any]:
                """The steps of a cache line of each row, with one of a row of the next panel prefetched in each."""
                for i in range(at_once):
                    if i < tile.mr:
                        row = a_row.of(carried[i // A_ROWS_PER_POINTER], i % A_ROWS_PER_POINTER)
                        row.at(next_panel).prefetch(level=2)
                    carried = tuple(k_step(*carried))
                    ir.keep_order()
                return list(carried)

            turns = ir.select_size(ir.at_least(k, AHEAD_STEPS), k // at_once, 0)
            state = ir.loop(0 - turns, 0, 1, state, line_of_steps)
            rest = k - turns * at_once
        out = ir.loop(0 - rest, 0, 1, state, lambda _, *carried: k_step(*carried))
        for by_rows in ir.branches(ends_by_rows):
            if not by_rows:
                store(out[len(bases) + 1 :])
                continue
            last = out
            for _ in range(self.unroll - ROWS_LAST):
                last = k_step(*last)
                ir.keep_order()
            self._end_by_rows(given, a_row, last[: len(bases)], last[len(bases)], last[len(bases) + 1 :])

    def _end_by_rows(
        self, given: dict[str, Any], a_row: RowOffsets, pointers: Sequence[Ptr], b: Ptr, acc: Sequence[Value]
    ) -> None:
        """The last K steps, all of a row before the next one's, and its stores right behind them."""
        tile, load_b = self.tile, self._b_loader(given["cols"])
        steps, columns = range(ROWS_LAST), range(tile.nv)
        held = [[load_b(b.at(given["rsb"] * s).at(j * tile.lanes)) for j in columns] for s in steps]

        def rows(leave: Callable[[int, Sequence[Value]], None]) -> None:
            for i in range(tile.mr):
                sums = list(acc[i * tile.nv : (i + 1) * tile.nv])
                for s in steps:
                    a = a_row.of(pointers[i // A_ROWS_PER_POINTER].at(given["csa"] * s), i % A_ROWS_PER_POINTER)
                    for j in columns:
                        # A load for each product, which is an operand of it: no register is left.
                        sums[j] = self.family.product(self._load_a(a), held[s][j], sums[j])
                        ir.keep_order()
                leave(i, sums)
                ir.keep_order()

        ir.keep_order()
        self._for_each_mode(given, rows)

    def _load_a(self, p: Ptr) -> Value:
        # A unit that lies in the caller's buffer is no better aligned than its elements.
        return ir.splat(p.load(alignment=ir.elem_bytes(self.family.a_elem)), self.tile.lanes)

    def _b_loader(self, cols: Size) -> Callable[[Ptr], Value]:
        """What loads a vector of B's row."""
        lanes = self.tile.lanes
        if not self.direct_b:
            return lambda p: p.load(lanes)  # panels are filled up
        if not self.masked:
            return lambda p: self.family.prepare_b(p.load(lanes), self.b, 0)
        if self.masks_b:
            mask = ir.lane_mask(cols, lanes)
            return lambda p: self.family.prepare_b(p.load(lanes, mask), self.b, 0)
        # Elements of two bytes where only those of four can be masked: pairs, and the last one for itself.
        pairs, before_last = ir.lane_mask(cols // 2, lanes // 2), ir.lane_mask(cols - 1, lanes, "int16")

        def load(p: Ptr) -> Value:
            by_pairs = ir.bitcast(p.as_type("int32").load(lanes // 2, pairs), lanes, "int16")
            last = ir.splat(p.at(cols - 1).as_type("int16").load(), lanes)
            both = ir.select(before_last, by_pairs, last)
            return self.family.prepare_b(ir.bitcast(both, lanes, ir.type_of(self.b)), self.b, 0)

        return load

    # --- the tile of C ----------------------------------------------------------------------------------------

    def _prefetch_c(self, given: dict[str, Any]) -> None:
        for i in range(self.tile.mr):
            row = given["c"].at(i * given["rsc"]).as_type("int8")
            for line in range(lines_of_a_row(self.tile, self.out)):
                row.at(line * LINE).prefetch(write=True)

    def _for_each_mode(self, given: dict[str, Any], emit: Callable[..., None]) -> None:
        """Emits what comes next for each mode, given what leaves a row of sums, not masked, in its tile of C."""
        tile, mode = self.tile, given["mode"]

        rows = [given["c"].at(i * given["rsc"]) for i in range(tile.mr)]
        old = [given["partial"].at(i * given["rs_partial"]) for i in range(tile.mr)] if self.narrow_out else rows

        def finished(i: int, sums: Sequence[Value]) -> None:
            column = 0
            for v in self.family.narrowed(sums, self.out):
                rows[i].at(column).store(v)
                column += ir.lanes_of(v)

        def unfinished(i: int, sums: Sequence[Value]) -> None:
            for j, v in enumerate(sums):
                old[i].at(j * tile.lanes).store(v)

        def added(leave: Callable[..., None], i: int, sums: Sequence[Value]) -> None:
            before = (old[i].at(j * tile.lanes).load(tile.lanes) for j in range(tile.nv))
            leave(i, [ir.add_vectors(x, v) for x, v in zip(before, sums, strict=True)])

        def either(leave: Callable[..., None]) -> None:
            ir.if_(ir.equal(mode % MORE, 0), partial(emit, leave), partial(emit, partial(added, leave)))

        if self.narrow_out:
            ir.if_(ir.equal(mode // MORE, 0), partial(either, finished), partial(either, unfinished))
        else:
            either(finished)

    def _destination(self, given: dict[str, Any]) -> Callable[[Sequence[Value]], None]:
        """What stores the accumulators."""
        tile = self.tile
        rows = [given["c"].at(i * given["rsc"]) for i in range(tile.mr)]
        mask = ir.lane_mask(given["cols"], tile.lanes) if self.masked and self.masks_c else None
        scratch = ir.alloca(tile.lanes, self.out) if self.masked and not self.masks_c else None
        partials = [given["partial"].at(i * given["rs_partial"]) for i in range(tile.mr)] if self.narrow_out else rows
        partial_mask = None if self.narrow_out else mask  # `partial` has room for whole tiles

        def each(values: Sequence[Value], put: Callable[[int, int, Value], None]) -> None:
            for n, value in enumerate(values):
                put(*divmod(n, tile.nv), value)

        def unfinished(values: Sequence[Value]) -> None:
            each(values, lambda i, j, v: partials[i].at(j * tile.lanes).store(v, partial_mask))

        def finished(values: Sequence[Value]) -> None:
            for i, row in enumerate(rows):
                column = 0
                for v in self.family.narrowed(values[i * tile.nv : (i + 1) * tile.nv], self.out):
                    put(row.at(column), v)
                    column += ir.lanes_of(v)

        def put(at: Ptr, v: Value) -> None:
            if scratch is None:
                at.store(v, mask)
                return
            scratch.store(v)
            for lane in ir.range_(0, given["cols"]):
                at.at(lane).store(scratch.at(lane).load())

        def added(values: Sequence[Value]) -> list[Value]:
            def old(n: int) -> Value:
                i, j = divmod(n, tile.nv)
                return partials[i].at(j * tile.lanes).load(tile.lanes, partial_mask)

            return [ir.add_vectors(old(n), v) for n, v in enumerate(values)]

        def store(values: Sequence[Value]) -> None:
            mode = given["mode"]

            def leave(values: Sequence[Value]) -> None:
                if self.narrow_out:
                    ir.if_(ir.equal(mode // MORE, 0), lambda: finished(values), lambda: unfinished(values))
                else:
                    finished(values)

            ir.if_(ir.equal(mode % MORE, 0), lambda: leave(values), lambda: leave(added(values)))

        return store
