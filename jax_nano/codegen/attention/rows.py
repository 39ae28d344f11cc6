"""Rows as the caller has them: which keys exist for one and which a mask takes, fetching them, and storing results."""

from __future__ import annotations

from collections.abc import Callable

from .. import ir
from ..ir import Ptr, Size, Value
from ..target import Target
from ..walks import LINE


def exist(j: Size, lo: Size, hi: Size, lanes: int) -> Value:
    """Which of the columns from j on are in [lo, hi)."""
    return ir.except_lanes(ir.lane_mask(hi - j, lanes), ir.lane_mask(lo - j, lanes))


def taken(target: Target, mask: Ptr, room: Ptr, place: tuple[Size, Size, Size], lanes: int) -> Value:
    """Which of the keys from j on the mask's bytes take, with ``place`` = (j, lo, hi): those outside [lo, hi) are not
    read. ``room`` is that of a vector of bytes.
    """
    j, lo, hi = place
    if target.masks(1):
        return ir.nonzero(mask.load(lanes, exist(j, lo, hi, lanes)))

    def some() -> list[Value]:
        room.store(ir.zeros(lanes, "int8"))
        begin = ir.select_size(ir.less(j, lo), lo - j, 0)
        for o in ir.range_(begin, ir.minimum(hi - j, lanes)):
            room.at(o).store(mask.at(o).load())
        return [room.load(lanes)]

    whole = ir.both(ir.at_least(j, lo), ir.at_least(hi, j + lanes))
    (bytes_here,) = ir.if_(whole, lambda: [mask.load(lanes)], some, like=[ir.zeros(lanes, "int8")])
    return ir.nonzero(bytes_here)


def prefetch_elements(row: Ptr, elements: Size, *, write: bool = False, level: int = 1) -> None:
    """Prefetches a row of elements that lie side by side."""
    size = elements * ir.elem_bytes(row.elem)
    for o in ir.range_(0, size, LINE):
        row.as_type("int8").at(o).prefetch(write=write, level=level)


def store_row(out: Ptr, elements: Size, value: Callable[[Size], Value], room: Ptr | None, lanes: int) -> None:
    """Stores ``value(j)``, vectors of the elements from j on. ``room``: a vector's, where the target masks no stores.

    Only the last vector may be partial: AMD's cores take 20 cycles for a masked store.
    """
    whole = elements // lanes * lanes
    for j in ir.range_(0, whole, lanes):
        out.at(j).store(value(j))
    rest = elements - whole

    def partial_vector() -> None:
        v = value(whole)
        if room is None:
            out.at(whole).store(v, ir.lane_mask(rest, lanes))
            return
        room.store(v)
        for o in ir.range_(0, rest):
            out.at(whole + o).store(room.at(o).load())

    ir.if_(ir.less(0, rest), partial_vector)
