"""What a row of tiles has prefetched meanwhile, a few lines in every turn of the main K loop.

A walk is ``count`` addresses, ``step`` bytes apart, that begin ``per_tile`` bytes further on in each tile of the row.
A row's walks stand in a table in memory, one behind the other; the main microkernel prefetches along them, in this
order, until its K loop ends. Spread like this they never take all of a core's few outstanding misses from the loop's
own loads, which a burst of them does for as long as memory takes to answer. The macrokernel sets the pace: one line a
turn where K is long, ``lines`` where it is too short for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import ir
from .ir import I64, Ptr, Size, Value

LINE = 64  # bytes
A_WALKS = 4  # along A's next panel where it lies
B_WALKS = 2  # along B's next block
OTHER_WALKS = A_WALKS + 1 + B_WALKS  # beside those along C; 1 along A's next packed panel
_FIELDS, _TURNS = 5, 3
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
    """A table of ``size`` walks and, behind them, one that stands still for the rest of a K loop.

    An entry is the address in the first line, bytes between two lines of a turn (0: they are one), bytes to the next
    turn from where the last pair of lines began, turns, and bytes to the next tile.
    """

    size: int
    table: Ptr
    lines: int  # addresses in each turn

    def room(self) -> Ptr:
        """Memory on the stack for a table. Only at the top of a function."""
        return ir.alloca((self.size + 1) * _FIELDS, "int64")

    def begin(self, rest: Ptr) -> None:
        """Fills in the rest, which stays at one address."""
        self._put(self.size, rest, (0, 0, _ENDLESS, 0))

    def put(self, walks: Sequence[Walk], many_lines: Value | bool) -> None:
        """Fills in the walks: ``lines`` lines a turn if ``many_lines``, else one."""
        if len(walks) > self.size:
            raise ValueError(f"{len(walks)} walks for a table of {self.size}")
        nothing = Walk(walks[0].start, 0, 0, 0)
        for i, walk in enumerate([*walks, *[nothing] * (self.size - len(walks))]):
            between = ir.select_size(many_lines, walk.step, 0)
            further = ir.select_size(many_lines, walk.step * (self.lines - self._before_last_pair), walk.step)
            turns = ir.select_size(many_lines, (walk.count + (self.lines - 1)) // self.lines, walk.count)
            self._put(i, walk.start, (between, further, turns, walk.per_tile))

    @property
    def _before_last_pair(self) -> int:
        return (self.lines - 1) // 2 * 2

    def _put(self, i: int, start: Ptr, sizes: Sequence[Size]) -> None:
        entry = self.table.at(i * _FIELDS)
        entry.as_type("ptr").store(start.value)
        for field, value in enumerate(sizes, 1):
            entry.at(field).store(ir.as_value(value))

    @property
    def rest(self) -> Ptr:
        """The table of a row that prefetches nothing: its only walk stands still."""
        return self.table.at(self.size * _FIELDS)

    @property
    def are_none(self) -> Value | bool:
        """Whether ``table`` is another's ``rest``."""
        return ir.negate(ir.less(I64(self.table.at(_TURNS).load()), _ENDLESS))

    def go(self, turns: Size, none: Any, state: Sequence[Any], body: Callable[..., Sequence[Any]]) -> list[Any]:
        """Runs ``state = body(*state)`` for ``turns`` turns with their prefetches; returns the last state and moves the
        walks on to the next tile. ``none`` says whether there are any.
        """

        def one(i: Size, left: I64, *state: Any) -> list[Any]:
            entry = self.table.at(i * _FIELDS)
            start = Ptr(entry.as_type("ptr").load(), "int8")
            between, further, most, per_tile = (I64(entry.at(field).load()) for field in range(1, _FIELDS))
            entry.as_type("ptr").store(start.at(per_tile).value)
            count = ir.minimum(most, left)

            def turn(_index: I64, here: Ptr, *state: Any) -> list[Any]:
                here.prefetch()
                for line in range(1, self.lines):
                    # In pairs: a multiple of `between` other than 2 would take a register from the loop.
                    if line % 2:
                        here.at(between).prefetch()
                    else:
                        here = here.at(between * 2)
                        here.prefetch()
                return [here.at(further), *body(*state)]

            _, *after = ir.loop(0 - count, 0, 1, [start, *state], turn)
            return [left - count, *after]

        entries = ir.select_size(none, 1, self.size + 1)
        _, *after = ir.loop(0, entries, 1, [turns, *state], one)
        return after
