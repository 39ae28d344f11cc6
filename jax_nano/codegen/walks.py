"""What a row of tiles fetches into the caches meanwhile, one line for every few K steps.

A walk is ``count`` addresses, ``step`` bytes apart, that begin ``per_tile`` bytes further on in each tile of the row.
A row's walks stand in a table in memory, one behind the other; the main microkernel prefetches along them, in this
order, until its K loop ends. Spread like this they never take all of a core's few outstanding misses from the loop's
own loads, which a burst of them does for as long as memory takes to answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import ir
from .ir import I64, Ptr, Size

LINE = 64  # bytes
A_WALKS = 4  # along A's next panel where it lies
B_WALKS = 2  # along B's next block
OTHER_WALKS = A_WALKS + 1 + B_WALKS  # beside those along C; 1 along A's next packed panel
_FIELDS = 4
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Walk:
    """Where the first tile's addresses begin, and the sizes in bytes that lead to the others."""

    start: Ptr
    step: Size
    count: Size
    per_tile: Size


@dataclass(frozen=True)
class Walks:
    """A table of ``size`` walks and, behind them, one that stands still for the rest of a K loop."""

    size: int
    table: Ptr

    @staticmethod
    def room(size: int) -> Ptr:
        """Memory on the stack for a table. Only at the top of a function."""
        return ir.alloca((size + 1) * _FIELDS, "int64")

    def begin(self, rest: Ptr) -> None:
        """Fills in the rest, which stays at one address."""
        self._put(self.size, Walk(rest, 0, _ENDLESS, 0))

    def put(self, walks: Sequence[Walk]) -> None:
        """Fills in the walks."""
        if len(walks) > self.size:
            raise ValueError(f"{len(walks)} walks for a table of {self.size}")
        nothing = Walk(walks[0].start, 0, 0, 0)
        for i, walk in enumerate([*walks, *[nothing] * (self.size - len(walks))]):
            self._put(i, walk)

    def _put(self, i: int, walk: Walk) -> None:
        entry = self.table.at(i * _FIELDS)
        entry.as_type("ptr").store(walk.start.value)
        for field, value in enumerate((walk.step, walk.count, walk.per_tile), 1):
            entry.at(field).store(ir.as_value(value))

    def go(self, turns: Size, skip: Any, state: Sequence[Any], body: Callable[..., Sequence[Any]]) -> list[Any]:
        """Runs ``state = body(*state)`` for ``turns`` turns with a prefetch each; returns the last state and moves the
        walks on to the next tile. With ``skip`` nothing is fetched.
        """

        def one(i: Size, left: I64, *state: Any) -> list[Any]:
            entry = self.table.at(i * _FIELDS)
            start = Ptr(entry.as_type("ptr").load(), "int8")
            step, most, per_tile = (I64(entry.at(field).load()) for field in (1, 2, 3))
            entry.as_type("ptr").store(start.at(per_tile).value)
            count = ir.minimum(most, left)

            def turn(_index: I64, here: Ptr, *state: Any) -> list[Any]:
                here.prefetch()
                return [here.at(step), *body(*state)]

            _, *after = ir.loop(0 - count, 0, 1, [start, *state], turn)
            return [left - count, *after]

        first = ir.select_size(skip, self.size, 0)
        _, *after = ir.loop(first, self.size + 1, 1, [turns, *state], one)
        return after
