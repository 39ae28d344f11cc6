"""Packing: copies a block of an operand into panels, in the order in which a microkernel reads it.

A's panels are mr rows high. A microkernel takes A's strides as arguments, so a panel keeps the order of its
source, and packing is a plain copy: rows stay contiguous when K was (strides k, 1), columns when M was (1, mr).
B's panels are nr columns wide, ``[k][nr]``; a B that is contiguous along K is transposed in registers on the
way. Columns beyond the edge of B are filled with copies or zeros that no microkernel stores. Nothing is read
outside the operand. Whole vectors are stored, so a panel may be overrun by less than ``kPackSlackBytes``; the
overrun is always overwritten by what is packed next, or lies in the slack.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import ir
from .ir import I64, Ptr, Size, Value
from .tile import Tile


PREFETCH_ROWS = 4  # rows of a strided operand to fetch ahead while it is packed


def copy_row(source: Ptr, target: Ptr, count: Size, lanes: int, *, panel: str, ahead: Size) -> None:
    """Copies ``count`` contiguous elements, converting them; may store up to ``lanes`` elements too many.

    The elements ``ahead`` of those copied are prefetched: the next row, which the hardware cannot guess.
    """
    whole = (count // lanes) * lanes if isinstance(count, I64) else count // lanes * lanes

    def vector(offset: I64) -> None:
        source.at(offset + ahead).prefetch()
        target.at(offset).store(ir.convert(source.at(offset).load(lanes), source.elem, panel))

    ir.loop(0, whole, lanes, [], vector)
    rest = count - whole

    def tail() -> None:
        mask = ir.lane_mask(rest, lanes)
        target.at(whole).store(ir.convert(source.at(whole).load(lanes, mask), source.elem, panel))

    ir.if_(rest.ne(0) if isinstance(rest, I64) else rest != 0, tail)


def transpose(rows: list[Value], elem: str) -> list[Value]:
    """Transposes n vectors of n lanes with shuffles that are single x86 instructions.

    Rounds of unpacking work inside 128-bit lanes, on as many rows as a lane has elements; further rounds exchange
    whole 128-bit lanes. ``elem`` has 4 or 8 bytes.
    """
    n, width = len(rows), 16 // ir.elem_bytes(elem)  # elements in a 128-bit lane
    v = list(rows)

    def inside(a: Value, b: Value, *picks: int) -> Value:
        """A shuffle that does the same in each 128-bit lane; picks >= width come from b."""
        return ir.shuffle(a, b, [q + (p if p < width else n + p - width) for q in range(0, n, width) for p in picks])

    for g in range(0, n, width):
        if width == 2:
            r0, r1 = v[g : g + 2]
            v[g : g + 2] = [inside(r0, r1, 0, 2), inside(r0, r1, 1, 3)]
        else:
            r0, r1, r2, r3 = v[g : g + 4]
            l01, h01 = inside(r0, r1, 0, 4, 1, 5), inside(r0, r1, 2, 6, 3, 7)
            l23, h23 = inside(r2, r3, 0, 4, 1, 5), inside(r2, r3, 2, 6, 3, 7)
            v[g : g + 4] = [
                inside(l01, l23, 0, 1, 4, 5),
                inside(l01, l23, 2, 3, 6, 7),
                inside(h01, h23, 0, 1, 4, 5),
                inside(h01, h23, 2, 3, 6, 7),
            ]
    # Lane q of v[width * g + c] now holds column width * q + c of the rows of group g.
    columns = [_transpose_lanes([v[g + c] for g in range(0, n, width)], width) for c in range(width)]
    return [columns[i % width][i // width] for i in range(n)]


def _transpose_lanes(v: list[Value], width: int) -> list[Value]:
    """Transposes the 128-bit lanes (``width`` elements each) of 1, 2 or 4 vectors of as many lanes."""

    def pick(a: Value, b: Value, *lanes: int) -> Value:
        return ir.shuffle(a, b, [width * q + o for q in lanes for o in range(width)])

    if len(v) == 1:
        return v
    if len(v) == 2:
        return [pick(v[0], v[1], 0, 2), pick(v[0], v[1], 1, 3)]
    even, odd = (0, 2, 4, 6), (1, 3, 5, 7)
    evens = pick(v[0], v[1], *even), pick(v[2], v[3], *even)
    odds = pick(v[0], v[1], *odd), pick(v[2], v[3], *odd)
    return [pick(*evens, *even), pick(*odds, *even), pick(*evens, *odd), pick(*odds, *odd)]


@dataclass(frozen=True)
class Packing:
    """The packing functions of one operand pair for one-K-a-step nanokernels.

    Attributes:
      tile: the register tile whose panels are made.
      a, b: dtype names in the caller's buffers.
      a_panel, b_panel: dtype names in the panels.
      a_lanes, b_lanes: vector lanes of the panels' element types.
    """

    tile: Tile
    a: str
    b: str
    a_panel: str
    b_panel: str
    lanes: int

    def emit(self, module: ir.Module, prefix: str) -> tuple[str, str]:
        """Adds both functions and returns the names of

        ``pack_a(a, panels, rows, k, rsa, csa)`` and ``pack_b(b, panels, k, cols, rsb, csb)``.
        """
        names = f"{prefix}_pack_a", f"{prefix}_pack_b"
        sizes = ["i64"] * 4
        module.function(names[0], [self.a, self.a_panel, *sizes], self._pack_a, internal=True)
        module.function(names[1], [self.b, self.b_panel, *sizes], self._pack_b, internal=True)
        return names

    # --- A ----------------------------------------------------------------------------------------------------

    @staticmethod
    def a_strides(rsa: Size, csa: Size, k: Size, mr: int) -> tuple[Size, Size]:
        """(row, column) stride inside a packed panel of A, from the strides of its source."""
        k_major = Packing._is_k_major(rsa, csa)
        return ir.select_size(k_major, 1, k), ir.select_size(k_major, mr, 1)

    @staticmethod
    def _is_k_major(rsa: Size, csa: Size) -> Value | bool:
        return ir.both(ir.equal(rsa, 1), ir.negate(ir.equal(csa, 1)))

    def _pack_a(self, a: Ptr, panels: Ptr, rows: Size, k: Size, rsa: Size, csa: Size) -> None:
        mr = self.tile.mr

        def columns() -> None:
            def panel(p: Size) -> None:
                here = ir.minimum(rows - p, mr)
                parts = range(0, mr, self.lanes)
                masks = [ir.lane_mask(here - o, self.lanes) for o in parts]

                def column(kk: Size) -> None:
                    source, target = a.at(p + kk * csa), panels.at(p * k + kk * mr)
                    for o, mask in zip(parts, masks, strict=True):
                        value = source.at(o).load(self.lanes, mask)
                        target.at(o).store(ir.convert(value, self.a, self.a_panel))

                ir.loop(0, k, 1, [], column)

            ir.loop(0, rows, mr, [], panel)

        def contiguous_rows() -> None:
            def row(i: Size) -> None:
                copy_row(a.at(i * rsa), panels.at(i * k), k, self.lanes, panel=self.a_panel, ahead=rsa)

            ir.loop(0, rows, 1, [], row)

        def scattered() -> None:
            def row(i: Size) -> None:
                def element(kk: Size) -> None:
                    value = a.at(i * rsa + kk * csa).load()
                    panels.at(i * k + kk).store(ir.convert(value, self.a, self.a_panel))

                ir.loop(0, k, 1, [], element)

            ir.loop(0, rows, 1, [], row)

        ir.if_(
            self._is_k_major(rsa, csa),
            columns,
            lambda: void(ir.if_(ir.equal(csa, 1), contiguous_rows, scattered)),
        )

    # --- B ----------------------------------------------------------------------------------------------------

    def _pack_b(self, b: Ptr, panels: Ptr, k: Size, cols: Size, rsb: Size, csb: Size) -> None:
        ir.if_(
            ir.equal(csb, 1),
            lambda: self._copy_b_rows(b, panels, k, cols, rsb),
            lambda: void(
                ir.if_(
                    ir.equal(rsb, 1),
                    lambda: self._transpose_b(b, panels, k, cols, csb),
                    lambda: self._gather_b(b, panels, k, cols, rsb, csb),
                )
            ),
        )

    def _copy_b_rows(self, b: Ptr, panels: Ptr, k: Size, cols: Size, rsb: Size) -> None:
        nr, lanes = self.tile.nr, self.lanes

        whole = cols // nr * nr
        edge = [ir.lane_mask(cols - whole - o, lanes) for o in range(0, nr, lanes)]

        def copy(source: Ptr, target: Ptr, masks: list[Value | None]) -> None:
            for o, mask in zip(range(0, nr, lanes), masks, strict=True):
                source.at(o + PREFETCH_ROWS * rsb).prefetch()
                target.at(o).store(ir.convert(source.at(o).load(lanes, mask), self.b, self.b_panel))

        def row(kk: Size) -> None:
            """A row goes to all panels at once, so that it is read from end to end."""
            source, target = b.at(kk * rsb), panels.at(kk * nr)
            ir.loop(0, whole, nr, [], lambda p: copy(source.at(p), target.at(p * k), [None] * self.tile.nv))
            ir.if_(
                ir.negate(ir.equal(whole, cols)),
                lambda: copy(source.at(whole), target.at(whole * k), list(edge)),
            )

        ir.loop(0, k, 1, [], row)

    def _transpose_b(self, b: Ptr, panels: Ptr, k: Size, cols: Size, csb: Size) -> None:
        nr, lanes = self.tile.nr, self.lanes
        last = cols - 1

        def strip(j: Size) -> None:
            """Columns j .. j + lanes of B; those beyond the edge repeat the last one."""
            columns = [b.at(ir.minimum(j + o, last) * csb) for o in range(lanes)]
            target = panels.at(j // nr * nr * k + j % nr)

            def block(kk: Size, mask: Value | None) -> None:
                vectors = [ir.convert(c.at(kk).load(lanes, mask), self.b, self.b_panel) for c in columns]
                for o, row in enumerate(transpose(vectors, self.b_panel)):
                    target.at((kk + o) * nr).store(row)

            whole = k // lanes * lanes
            ir.loop(0, whole, lanes, [], lambda kk: block(kk, None))
            ir.if_(ir.negate(ir.equal(whole, k)), lambda: block(whole, ir.lane_mask(k - whole, lanes)))

        # Strips in the order of the panels: what a strip overruns, the next one of its panel or the next panel
        # writes again.
        ir.loop(0, (cols + (nr - 1)) // nr * nr, lanes, [], strip)

    def _gather_b(self, b: Ptr, panels: Ptr, k: Size, cols: Size, rsb: Size, csb: Size) -> None:
        nr = self.tile.nr
        last = cols - 1

        def column(j: Size) -> None:
            source, target = b.at(ir.minimum(j, last) * csb), panels.at(j // nr * nr * k + j % nr)

            def element(kk: Size) -> None:
                target.at(kk * nr).store(ir.convert(source.at(kk * rsb).load(), self.b, self.b_panel))

            ir.loop(0, k, 1, [], element)

        ir.loop(0, (cols + (nr - 1)) // nr * nr, 1, [], column)


def void(_: object) -> None:
    """Drops the (empty) results of a nested ``if_``."""
