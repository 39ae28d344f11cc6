"""Transposing square blocks of vectors in registers."""

from __future__ import annotations

from . import ir
from .ir import Value


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
