"""What is done to scores between the two products of an attention, and to its sums behind them.

    void softmax(scores, weights, rows, maxima, totals, sums, count, first, last, s0, rs_weights, args)

turns the scores of ``count`` rows into weights. Columns first <= j < last of the scores, whole vectors, are those of
keys s0 + j.

    void finish(row, sums, total, args)

writes one result.

A query's maximum follows its scores upwards only when they exceed it by more than ``SLACK``: until then weights are
above 1, which costs no accuracy, and its sums need no rescaling. Where it does, sums and totals are multiplied by a
power of two and go on. A key outside [lo, hi) of a query has weight 0 exactly, whatever is in it, a masked one the
score ``AttentionArgs::masked``.

Where nothing is added to scores they are multiplied by scale * log2(e) and their maximum subtracted in one step. With a
bias or a mask scores are those of jax.nn, rounded where it rounds them, and less their maximum multiplied by log2(e):
a bias may be so large (-1e9, or the least float32) that roundings elsewhere would decide weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import ir
from ..arguments import Arguments, Given
from ..ir import I64, Ptr, Size, Value
from .composition import AttentionComposition
from .exponential import LOG2_E, SLACK, exp2, greatest, maximum
from .rows import exist, store_row, taken

NOTHING = float("-inf")  # the score of a key that does not exist

PARAMS = {
    **dict.fromkeys(("scores", "weights", "rows", "maxima", "totals", "sums"), "float32"),
    **dict.fromkeys(("count", "first", "last", "s0", "rs_weights"), "i64"),
    **dict.fromkeys(("rows", "args"), "int64"),
}


@dataclass(frozen=True)
class Softmax:
    """Both functions.

    Attributes:
      attention: what it is composed of.
      module, prefix: where they are, and what their names begin with.
    """

    attention: AttentionComposition
    module: ir.Module
    prefix: str

    def emit(self) -> None:
        """Adds them."""
        params = {**PARAMS, "weights": self.attention.family.unit}
        self.module.function(f"{self.prefix}_softmax", params, self._weights, internal=True)
        params = {"row": "int64", "sums": "float32", "total": "float32", "args": "int64"}
        self.module.function(f"{self.prefix}_finish", params, self._finish, internal=True)

    def weights(self, **given: Any) -> None:
        """Calls the first one; its arguments by name."""
        self.module.call_by_name(f"{self.prefix}_softmax", given)

    def finish(self, row: Ptr, sums: Ptr, total: Ptr, args: Ptr) -> None:
        """Calls the second one."""
        self.module.call(f"{self.prefix}_finish", [row, sums, total, args])

    def _weights(self, *values: Any) -> None:
        x, lanes = Given(dict(zip(PARAMS, values, strict=True))), self.attention.tile.lanes
        args = self.attention.arguments(x.args)
        scale = args.number("scale")
        rs_scores, general, end = args.rs_scores, args.general, args.end
        tile = _Tile(
            attention=self.attention,
            x=x,
            args=args,
            rs_scores=rs_scores,
            general=general,
            end=end,
            factor=ir.splat(scale, lanes),
            masked=ir.splat(args.number("masked"), lanes),
            one=ir.constant_vector(1, lanes, "float32"),
            byte_room=ir.alloca(lanes, "int8"),
        )
        # In two loops: no exponential waits for the maximum of its row.
        for i in ir.range_(0, x.count):
            tile.follow_maximum(i)
        for i in ir.range_(0, x.count):
            tile.weigh(i)

    def _finish(self, row: Ptr, sums: Ptr, total: Ptr, at: Ptr) -> None:
        attention, args = self.attention, self.attention.arguments(at)
        lanes, q = attention.tile.lanes, attention.q
        room = None if attention.target.masks(ir.elem_bytes(q)) else ir.alloca(lanes, q)
        whole = ir.tree_sum(total.load(lanes))
        total.store(whole)
        divisor = ir.splat(whole, lanes)
        out, width = attention.row(row, 0).out, args.width

        def value(j: Size) -> Value:
            return ir.convert(ir.divide(sums.at(j).load(lanes), divisor), "float32", q)

        store_row(out, width, value, room, lanes)


@dataclass(frozen=True)
class _Row:
    """One row of scores: its entry in the table of rows, and the columns lo <= j < hi whose keys exist for it."""

    entry: Arguments
    scores: Ptr
    lo: Size
    hi: Size


@dataclass(frozen=True)
class _Tile:
    """The rows of one call.

    Attributes:
      attention: what it is composed of.
      x: the function's arguments.
      args: those of the attention.
      rs_scores, general, end: three of them.
      factor, masked: the scale, and the score of a masked key, in every lane.
      one: 1 in every lane.
      byte_room: room for a vector of a mask's bytes.
    """

    attention: AttentionComposition
    x: Given
    args: Arguments
    rs_scores: Size
    general: Size
    end: Size
    factor: Value
    masked: Value
    one: Value
    byte_room: Ptr

    @property
    def _lanes(self) -> int:
        return self.attention.tile.lanes

    def follow_maximum(self, i: I64) -> None:
        """Finishes the scores of a row, and rescales its sums if one is far above its maximum."""
        x = self.x
        entry, scores = self.attention.row(x.rows, i), x.scores.at(i * self.rs_scores)
        row = _Row(entry, scores, entry.lo - x.s0, ir.minimum(entry.hi, self.end) - x.s0)
        inside = ir.both(ir.at_least(x.first, row.lo), ir.at_least(row.hi, x.last))
        nothing = ir.constant_vector(NOTHING, self._lanes, "float32")
        (found,) = ir.if_(
            self._plain,
            lambda: ir.if_(
                inside,
                partial(self._greatest_of_all, row, nothing),
                partial(self._greatest_at_edges, row, nothing),
                like=[nothing],
            ),
            partial(self._greatest_in_general, row, nothing),
            like=[nothing],
        )
        factor = self._remaining_factor()
        top = ir.multiply(greatest(found), ir.extract(factor, 0))
        old = x.maxima.at(i).load()
        units = partial(ir.like, old)
        (slack,) = ir.if_(self._plain, lambda: [units(SLACK)], lambda: [units(SLACK / LOG2_E)], like=[old])
        rises = ir.compare(top, ">", ir.add_vectors(old, slack))
        ir.if_(rises, partial(self._rescale, i, old, top))

    @property
    def _plain(self) -> Value | bool:
        return ir.equal(self.general, 0)

    def _remaining_factor(self) -> Value:
        """What scores are still to be multiplied by: those of the general case have their scale already."""
        (by,) = ir.if_(self._plain, lambda: [self.factor], lambda: [self.one], like=[self.factor])
        return by

    def _greatest_of_all(self, row: _Row, nothing: Value) -> list[Value]:
        """The greatest scores, lane by lane, where all keys exist."""
        lanes, nr = self._lanes, self.attention.tile.nr
        starts = range(0, nr, lanes)

        def vectors(j: I64, *so_far: Value) -> list[Value]:
            return [maximum(row.scores.at(j + o).load(lanes), g) for o, g in zip(starts, so_far, strict=True)]

        found, *others = ir.loop(self.x.first, self.x.last, nr, [nothing] * len(starts), vectors)
        for other in others:
            found = maximum(other, found)
        return [found]

    def _greatest_at_edges(self, row: _Row, nothing: Value) -> list[Value]:
        """The same where some keys do not exist; their scores become minus infinity."""

        def vector(j: I64, so_far: Value) -> list[Value]:
            at = row.scores.at(j)
            y = ir.select(exist(j, row.lo, row.hi, self._lanes), at.load(self._lanes), nothing)
            ir.keep_order()  # else LLVM makes a masked store of it, which AMD's cores take 20 cycles for
            at.store(y)
            return [maximum(y, so_far)]

        return ir.loop(self.x.first, self.x.last, self._lanes, [nothing], vector)

    def _greatest_in_general(self, row: _Row, nothing: Value) -> list[Value]:
        """The same with all that may be added to scores, which get their scale here."""
        s0, lanes, target = self.x.s0, self._lanes, self.attention.target
        bias, mask = row.entry.bias, row.entry.mask
        has_bias, has_mask = ir.is_set(bias.address), ir.is_set(mask.address)

        def vector(j: I64, so_far: Value) -> list[Value]:
            at = row.scores.at(j)
            y = ir.multiply(at.load(lanes), self.factor)
            present = exist(j, row.lo, row.hi, lanes)

            def with_bias() -> list[Value]:
                return [ir.add_vectors(y, bias.at(s0 + j).load(lanes, present))]

            (z,) = ir.if_(has_bias, with_bias, lambda: [y], like=[y])

            def masked() -> list[Value]:
                allowed = taken(target, mask.at(s0 + j), self.byte_room, (j, row.lo, row.hi), lanes)
                return [ir.select(allowed, z, self.masked)]

            (z,) = ir.if_(has_mask, masked, lambda: [z], like=[z])
            z = ir.select(present, z, nothing)
            at.store(z)
            return [maximum(z, so_far)]

        return ir.loop(self.x.first, self.x.last, lanes, [nothing], vector)

    def _rescale(self, i: I64, old: Value, top: Value) -> None:
        """A new maximum: what was summed so far becomes smaller by a power of two."""
        x, lanes = self.x, self._lanes
        less = ir.subtract(old, top)
        (less,) = ir.if_(self._plain, lambda: [less], lambda: [ir.multiply(less, ir.like(less, LOG2_E))], like=[less])
        shrink = exp2(ir.splat(less, lanes))
        x.maxima.at(i).store(top)
        total = x.totals.at(i * lanes)
        total.store(ir.multiply(total.load(lanes), shrink))
        sums = x.sums.at(i * self.args.rs_sums)
        for j in ir.range_(0, self.args.width, lanes):
            at = sums.at(j)
            at.store(ir.multiply(at.load(lanes), shrink))

    def weigh(self, i: I64) -> None:
        """Weights of a row in the place of its scores, or beside them as the elements that are multiplied."""
        x, lanes = self.x, self._lanes
        reference = ir.splat(x.maxima.at(i).load(), lanes)
        below, to_base_2 = ir.minus(reference), ir.like(reference, LOG2_E)

        def in_base_2(score: Value) -> Value:
            return ir.fma(score, self.factor, below)

        def finished(score: Value) -> Value:
            return ir.multiply(ir.subtract(score, reference), to_base_2)

        zero = ir.zeros(lanes, "float32")
        plain, general = (partial(self._weigh_row, i, exponent) for exponent in (in_base_2, finished))
        (found,) = ir.if_(self._plain, plain, general, like=[zero])
        total = x.totals.at(i * lanes)
        total.store(ir.add_vectors(total.load(lanes), found))

    def _weigh_row(self, i: I64, exponent: Callable[[Value], Value]) -> list[Value]:
        """The same of a row, with this exponent of scores to base 2; the sum of its weights, lane by lane."""
        x, lanes, nr = self.x, self._lanes, self.attention.tile.nr
        scores = x.scores.at(i * self.rs_scores)
        count = nr // lanes

        def vectors(j: I64, *sums: Value, tiles: int) -> list[Value]:
            starts = range(0, tiles * nr, lanes)
            weights = [exp2(exponent(scores.at(j + o).load(lanes))) for o in starts]
            if self.attention.converts:
                self._store_converted(i, j, weights)
            else:
                for o, w in zip(starts, weights, strict=True):
                    scores.at(j + o).store(w)
            found = list(sums)
            for n, w in enumerate(weights):
                found[n % count] = ir.add_vectors(found[n % count], w)
            return found

        # Two tiles at a time: constants are loaded half as often, and more exponentials are under way.
        pairs = x.first + (x.last - x.first) // (2 * nr) * (2 * nr)
        sums = [ir.zeros(lanes, "float32")] * count
        sums = ir.loop(x.first, pairs, 2 * nr, sums, partial(vectors, tiles=2))
        first, *others = ir.loop(pairs, x.last, nr, sums, partial(vectors, tiles=1))
        for other in others:
            first = ir.add_vectors(first, other)
        return [first]

    def _store_converted(self, i: I64, j: I64, weights: Sequence[Value]) -> None:
        """Weights from column j on as the elements that are multiplied."""
        family = self.attention.family
        to = self.x.weights.at(i * self.x.rs_weights).as_type(family.a_elem).at(j)
        column = 0
        for v in family.narrowed(weights, family.a_elem):
            to.at(column).store(v)
            column += ir.lanes_of(v)
