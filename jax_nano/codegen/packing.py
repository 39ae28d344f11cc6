"""Packing: copies a block of an operand into panels of units, in the order in which a microkernel reads them.

A unit is ``kr`` packed K values side by side (``nanokernel``). A's panels are mr rows high. A microkernel takes A's
strides as arguments, so a panel keeps the order of its source and packing is a copy: rows stay contiguous when K was
(strides in units: steps, 1), columns when M was (1, mr). B's panels are nr columns wide, ``[steps][nr]``; a B that is
contiguous along K is transposed in registers on the way.

Where an operand ends, K is filled up with zeros to whole units, and missing columns of B with copies or zeros that no
microkernel stores; those of vectors that none reads (``fills``) are left as they are. Nothing is read outside the
operand. Whole vectors are stored, so a panel may be overrun by less than ``kPackSlackBytes``; the overrun is always
overwritten by what is packed next, or lies in the slack.

A family whose products stand for several (``parts``) gets one panel per part, one behind the other along K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from . import ir
from .ir import Ptr, Size, Value
from .nanokernel import Corrected, Family
from .tile import Tile
from .transpose import transpose
from .walks import LINE

PACKED_STEPS = 8  # steps of a panel of B that are copied, and prefetched, before those of the next panel

Prepare = Callable[[Value, str, int], Value]
_Part = tuple[Callable[[Size, Size], Ptr], Callable[[Value], Value]]
"""Of a part of B: where the unit of (column, step) goes, and what is stored of an element."""


@dataclass(frozen=True)
class Packing:
    """The packing functions of one kernel.

    Attributes:
      tile: the register tile whose panels are made; its lanes are those of a vector of units.
      family: the nanokernel that reads them.
      a, b: dtype names of the elements in the caller's buffers.
      masks: whether the target loads masked vectors of a's and b's elements; else edges go element by element.
      fills: whether the last panel of B is filled up to nr columns. If not, up to a whole vector.
      halves: whether microkernels read half a vector where no more columns of B are left (``tile_row``): then no more
        is filled, and a block of no more columns has rows of half a vector.
    """

    tile: Tile
    family: Family
    a: str
    b: str
    masks: bool
    fills: bool = True
    halves: bool = False

    # --- sizes, in units --------------------------------------------------------------------------------------

    def steps(self, k: Size) -> Size:
        """K steps for ``k`` values of one part."""
        at_once = self.family.steps_at_once
        values = self.family.kr * at_once
        return (k + (values - 1)) // values * at_once

    def depth(self, k: Size) -> Size:
        """K steps of a whole panel: of all parts."""
        return self.steps(k) * len(self.family.parts)

    def b_panel_rows(self, k: Size) -> Size:
        """Rows of nr units that a panel of B takes: its steps, and the corrections in front of them."""
        return self.depth(k) + int(self.family.column_sums)

    def b_row(self, cols: Size) -> Size:
        """Units between the rows of a panel of B, in a block of so many columns: nr, or half a vector."""
        half = self.tile.lanes // 2
        return ir.select_size(ir.at_least(half, cols), half, self.tile.nr) if self.halves else self.tile.nr

    def a_row(self, k: Size) -> Size:
        """Units that a row of a packed panel of A takes: an odd number of cache lines, so that no two share L1 sets."""
        line = LINE // ir.elem_bytes(self.family.unit)
        return ((self.depth(k) + (line - 1)) // line | 1) * line

    def a_strides(self, rsa: Size, csa: Size, k: Size) -> tuple[Size, Size]:
        """(row, step) strides inside a packed panel of A, from the strides of its source."""
        if self.family.steps_at_once > 1:
            return self.a_row(k), 1
        k_major = self._is_k_major(rsa, csa)
        return ir.select_size(k_major, 1, self.a_row(k)), ir.select_size(k_major, self.tile.mr, 1)

    @staticmethod
    def _is_k_major(rsa: Size, csa: Size) -> Value | bool:
        return ir.both(ir.equal(rsa, 1), ir.negate(ir.equal(csa, 1)))

    def emit(self, module: ir.Module, prefix: str, *, a: bool = True, b: bool = True) -> tuple[str, str]:
        """Adds both functions, or those of them that are wanted, and returns the names of

        ``pack_a(a, panels, rows, k, rsa, csa)`` and ``pack_b(b, panels, k, cols, rsb, csb)``.
        """
        names = f"{prefix}_pack_a", f"{prefix}_pack_b"
        sizes = ["i64"] * 4
        if a:
            module.function(names[0], [self.a, self.family.unit, *sizes], self._pack_a, internal=True)
        if b:
            module.function(names[1], [self.b, self.family.unit, *sizes], self._pack_b, internal=True)
        return names

    # --- A ----------------------------------------------------------------------------------------------------

    def _pack_a(self, a: Ptr, panels: Ptr, rows: Size, k: Size, rsa: Size, csa: Size) -> None:
        """Packs ``rows`` rows, panel behind panel, row behind row, part behind part: the order in which they lie, so
        that what one overruns is written again by the next.
        """
        steps, pitch, mr = self.steps(k), self.a_row(k), self.tile.mr
        parts = [(steps * number, self._a_value(wanted)) for number, (wanted, _) in enumerate(self.family.parts)]

        def panel_of_columns(p: Size) -> None:
            for skipped, value in parts:
                if self.family.steps_at_once > 1:
                    first = panels.at(p * pitch + skipped)
                    self._transpose_a(a.at(p), first, ir.minimum(rows - p, mr), k, csa, value)
                    continue
                self._columns_of_a(
                    a.at(p), panels.at(p * pitch + skipped * mr), ir.minimum(rows - p, mr), k, csa, value
                )

        def row(i: Size) -> None:
            for skipped, value in parts:
                self._row(a.at(i * rsa), panels.at(i * pitch + skipped), k, value, next_row=rsa)

        def scattered() -> None:
            for skipped, value in parts:
                first = panels.at(skipped)
                self._elements((rows, lambda i: a.at(i * rsa)), (k, csa), lambda i, s: first.at(i * pitch + s), value)

        for columns_contiguous in ir.branches(self._is_k_major(rsa, csa)):
            if columns_contiguous:
                for p in ir.range_(0, rows, mr):
                    panel_of_columns(p)
                continue
            for rows_contiguous in ir.branches(ir.equal(csa, 1)):
                if rows_contiguous:
                    for i in ir.range_(0, rows):
                        row(i)
                else:
                    scattered()

    def _a_value(self, part: int) -> Callable[[Value], Value]:
        return lambda v: self.family.prepare_a(v, self.a, part)

    def _b_value(self, part: int) -> Callable[[Value], Value]:
        return lambda v: self.family.prepare_b(v, self.b, part)

    def _columns_of_a(
        self, a: Ptr, target: Ptr, here: Size, k: Size, csa: Size, value: Callable[[Value], Value]
    ) -> None:
        """One panel from columns that are contiguous along M."""
        lanes, mr = self.tile.lanes, self.tile.mr

        if not self.masks:
            self._elements((here, lambda i: a.at(i)), (k, csa), lambda i, s: target.at(s * mr + i), value)
            return
        for s, present in self._k_steps(k):
            source = a.at(s * self.family.kr * csa)
            for o in range(0, mr, lanes):
                mask = ir.lane_mask(here - o, lanes)
                rows = [source.at(o + r * csa).load(lanes, mask) for r in range(present)]
                target.at(s * mr + o).store(self._units(rows, value))

    def _transpose_a(
        self, a: Ptr, target: Ptr, here: Size, k: Size, csa: Size, value: Callable[[Value], Value]
    ) -> None:
        """The same into rows, up to the last step that is filled up with zeros."""
        lanes, kr, pitch = self.tile.lanes, self.family.kr, self.a_row(k)

        def units(step: Size, o: int) -> Value:
            """A step of the rows from ``o`` on."""
            first = step * kr
            present = [ir.select_size(ir.less(first + r, k), here - o, 0) for r in range(kr)]
            masks = [ir.lane_mask(p, lanes) for p in present]
            rows = [a.at(o + (first + r) * csa).load(lanes, mask) for r, mask in enumerate(masks)]
            return self._units(rows, value)

        for s in ir.range_(0, self.steps(k), lanes):
            for o in range(0, self.tile.mr, lanes):
                for i, row in enumerate(transpose([units(s + t, o) for t in range(lanes)], self.family.unit)):
                    target.at((o + i) * pitch + s).store(row)

    # --- B ----------------------------------------------------------------------------------------------------

    def _pack_b(self, b: Ptr, panels: Ptr, k: Size, cols: Size, rsb: Size, csb: Size) -> None:
        """Packs ``cols`` columns, panel behind panel.

        Rows of half a vector are stored whole where rows are copied: each over the end of the one before.
        """
        nr = self.tile.nr
        height = self.b_panel_rows(k) * nr

        row = self.b_row(cols)

        def part(number: int, wanted: int) -> _Part:
            first = panels.at((self.steps(k) * number + int(self.family.column_sums)) * nr)
            return lambda j, s: first.at(j // nr * height + j % nr + s * row), self._b_value(wanted)

        parts = [part(number, wanted) for number, (_, wanted) in enumerate(self.family.parts)]

        def copied() -> None:
            for at, value in parts:
                self._copy_b_rows(b, at, k, cols, rsb, value)

        def scattered() -> None:
            for at, value in parts:
                self._scattered_b(b, at, 0, k, cols, (rsb, csb), value)

        def transposed() -> None:
            self._transpose_b(b, parts, k, cols, csb)

        for rows_contiguous in ir.branches(ir.equal(csb, 1)):
            if rows_contiguous:
                copied()
            else:
                ir.if_(ir.equal(rsb, 1), transposed, scattered)
        if self.family.column_sums:
            for p in ir.range_(0, self._round_up(cols), nr):
                self._sum_columns(panels.at(p // nr * height), k)

    def _round_up(self, cols: Size) -> Size:
        """Columns of B that are filled in."""
        unit = self.tile.nr if self.fills else self.tile.lanes // 2 if self.halves else self.tile.lanes
        return ir.round_up(cols, unit)

    def _copy_b_rows(
        self, b: Ptr, at: Callable[[Size, Size], Ptr], k: Size, cols: Size, rsb: Size, value: Callable[[Value], Value]
    ) -> None:
        nr, lanes, kr = self.tile.nr, self.tile.lanes, self.family.kr
        whole = cols // nr * nr

        def to_panel(p: Size, s: Size, present: int, masks: Sequence[Value | None]) -> None:
            source, target = b.at(s * kr * rsb), at(p, s)
            for o, mask in zip(range(0, nr, lanes), masks, strict=False):
                rows = [source.at(p + o + r * rsb) for r in range(present)]
                for row in rows:
                    row.at(PACKED_STEPS * kr * rsb).prefetch()
                target.at(o).store(self._units([row.load(lanes, mask) for row in rows], value))

        def steps(begin: Size, end: Size, present: int) -> None:
            """Some steps of all panels."""
            for p in ir.range_(0, whole, nr):
                for s in ir.range_(begin, end):
                    to_panel(p, s, present, [None] * self.tile.nv)
            if self.masks:
                edge = [ir.lane_mask(cols - whole - o, lanes) for o in range(0, nr, lanes)]
                vectors = ir.ceil_div(cols - whole, lanes)
                for count in [self.tile.nv] if self.fills else range(1, self.tile.nv + 1):
                    for _ in ir.when(ir.less(0, vectors) if self.fills else ir.equal(vectors, count)):
                        for s in ir.range_(begin, end):
                            to_panel(whole, s, present, edge[:count])

        full = k // kr
        for s in ir.range_(0, full, PACKED_STEPS):
            steps(s, ir.minimum(s + PACKED_STEPS, full), kr)
        for present in range(1, kr):
            ir.if_(ir.equal(k % kr, present), partial(steps, full, full + 1, present))
        if self.family.steps_at_once > 1:
            for s in ir.range_(ir.ceil_div(k, kr), self.steps(k)):
                zero = ir.zeros(lanes, self.family.unit)
                for j in ir.range_(0, self._round_up(cols), lanes):
                    at(j, s).store(zero)
        if not self.masks:
            self._scattered_b(b, at, whole, k, cols, (rsb, 1), value)

    def _transpose_b(self, b: Ptr, parts: Sequence[_Part], k: Size, cols: Size, csb: Size) -> None:
        row, kr = self.b_row(cols), self.family.kr
        last = cols - 1

        def strip_of_part(j: Size, columns: Sequence[Ptr], target: Ptr, value: Callable[[Value], Value]) -> None:
            lanes = len(columns)

            def block(s: Size, mask: Value | None) -> None:
                elements = [value(c.at(s * kr).load(lanes * kr, mask)) for c in columns]
                vectors = [ir.bitcast(v, lanes, self.family.unit) for v in elements]
                for o, units in enumerate(transpose(vectors, self.family.unit)):
                    target.at((s + o) * row).store(units)

            def tail(s: Size, rest: Size) -> None:
                if self.masks:
                    block(s, ir.lane_mask(rest, lanes * kr))
                    return
                self._elements(
                    (lanes, lambda o: b.at(ir.minimum(j + o, last) * csb + s * kr)),
                    (rest, 1),
                    lambda o, step: target.at((s + step) * row + o),
                    value,
                )

            whole = k // (lanes * kr) * lanes
            rest = k - whole * kr
            for s in ir.range_(0, whole, lanes):
                block(s, None)
            ir.if_(ir.negate(ir.equal(rest, 0)), lambda: tail(whole, rest))

        # Strips in the order of the panels and parts in that of their rows: what one overruns, the next part, strip
        # or panel writes again.
        half = self.tile.lanes // 2
        for j in ir.range_(0, self._round_up(cols), self.tile.lanes):
            for is_half in ir.branches(ir.at_least(half, cols - j) if self.halves else False):
                # Columns beyond the edge repeat the last one.
                lanes = half if is_half else self.tile.lanes
                columns = [b.at(ir.minimum(j + o, last) * csb) for o in range(lanes)]
                for at, value in parts:
                    strip_of_part(j, columns, at(j, 0), value)

    def _scattered_b(
        self,
        b: Ptr,
        at: Callable[[Size, Size], Ptr],
        first: Size,
        k: Size,
        cols: Size,
        strides: tuple[Size, Size],
        value: Callable[[Value], Value],
    ) -> None:
        """Columns ``first`` to the end of the last panel, element by element; those beyond the edge repeat the last."""
        rsb, csb = strides
        last = cols - 1
        self._elements(
            (self._round_up(cols) - first, lambda o: b.at(ir.minimum(first + o, last) * csb)),
            (k, rsb),
            lambda o, s: at(first + o, s),
            value,
        )

    def _sum_columns(self, panel: Ptr, k: Size) -> None:
        """Fills the first row of a packed panel with its corrections."""
        nr, lanes = self.tile.nr, self.tile.lanes
        family = cast(Corrected, self.family)
        starts = range(0, nr, lanes)

        def step(s: Size, *sums: Value) -> list[Value]:
            return [
                family.correction(panel.at((s + 1) * nr + o).load(lanes), x) for o, x in zip(starts, sums, strict=True)
            ]

        zero = ir.zeros(lanes, self.family.acc)
        for o, total in zip(starts, ir.loop(0, self.depth(k), 1, [zero] * len(starts), step), strict=True):
            panel.at(o).store(total)

    # --- pieces -----------------------------------------------------------------------------------------------

    def _bits(self, v: Value) -> Value:
        """Prepared elements as a vector of units."""
        return ir.bitcast(v, self.tile.lanes, self.family.unit)

    def _units(self, rows: Sequence[Value], value: Callable[[Value], Value]) -> Value:
        """A vector of units from up to ``kr`` rows of K; missing rows are zeros."""
        kr, lanes = self.family.kr, self.tile.lanes
        prepared = [value(r) for r in rows]
        prepared += [ir.zeros_like(prepared[0])] * (kr - len(prepared))
        while len(prepared) > 1:  # interleave neighbours: 4 rows of bytes -> 2 rows of byte pairs -> 1 row of quads
            n = ir.lanes_of(prepared[0])
            order = [x for i in range(n) for x in (i, n + i)]
            half = len(prepared) // 2
            prepared = [ir.shuffle(prepared[i], prepared[i + half], order) for i in range(half)]
        return ir.bitcast(prepared[0], lanes, self.family.unit)

    def _k_steps(self, k: Size) -> Iterator[tuple[Size, int]]:
        """The loop over K steps: (step, rows present). The last one may have fewer than ``kr`` rows."""
        kr = self.family.kr
        whole = k // kr
        for s in ir.range_(0, whole):
            yield s, kr
        for present in range(1, kr):
            for _ in ir.when(ir.equal(k % kr, present)):
                yield whole, present

    def _row(self, source: Ptr, target: Ptr, k: Size, value: Callable[[Value], Value], next_row: Size) -> None:
        """Copies ``k`` contiguous elements, and prefetches those ``next_row`` further on: no hardware guesses them."""
        kr, lanes = self.family.kr, self.tile.lanes
        chunk = lanes * kr
        whole = k // chunk * chunk

        for k0 in ir.range_(0, whole, chunk):
            source.at(k0 + next_row).prefetch()
            target.at(k0 // kr).store(self._bits(value(source.at(k0).load(chunk))))
        rest = k - whole

        def tail() -> None:
            if self.masks:
                elements = source.at(whole).load(chunk, ir.lane_mask(rest, chunk))
                target.at(whole // kr).store(self._bits(value(elements)))
            else:
                here = target.at(whole // kr)
                self._elements((1, lambda _: source.at(whole)), (rest, 1), lambda _, s: here.at(s), value)

        ir.if_(ir.negate(ir.equal(rest, 0)), tail)

    def _elements(
        self,
        lines: tuple[Size, Callable[[Size], Ptr]],
        depth: tuple[Size, Size],
        unit_at: Callable[[Size, Size], Ptr],
        value: Callable[[Value], Value],
    ) -> None:
        """Any order, element by element: ``lines`` of K values (count, address of each one's first element),
        ``depth`` K values with their stride, and where the unit of (line, step) goes.
        """
        count, line = lines
        k, stride = depth
        kr = self.family.kr
        elem = self.family.a_elem if kr > 1 else self.family.unit

        for i in ir.range_(0, count):
            source = line(i)
            for s in ir.range_(0, self.steps(k)):
                unit = unit_at(i, s).as_type(elem)
                for r in range(kr):
                    here = s * kr + r
                    if r == 0 and self.family.steps_at_once == 1:
                        unit.store(value(source.at(here * stride).load()))
                        continue
                    (x,) = ir.if_(
                        ir.less(here, k),
                        lambda: [value(source.at(here * stride).load())],
                        lambda: [ir.zero_of(elem)],
                        like=[ir.zero_of(elem)],
                    )
                    unit.at(r).store(x)
