"""Few queries, as of decoding: keys and values are read once, where they lie.

    scores = Q K^T          by inner products, keys in chunks
    softmax of the block
    sums += weights V       by sweeps over rows of values, in chunks

Each chunk is prefetched while those before it are multiplied, behind the last keys the first values, and behind the
last values the next block's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import ir
from ..arguments import Arguments, Given
from ..ir import I64, Ptr, Size
from .composition import AttentionComposition
from .rows import prefetch_elements
from .softmax import Softmax

VALUES_AT_ONCE, PREFETCH_DISTANCE = 8, 32
"""Values that few queries take at once, two sweeps of them; and how many keys and values lie between those that are
multiplied and those that are prefetched. So few at a time that those to come arrive while these are multiplied:
prefetches that find no room to wait hold up all else.
"""


@dataclass(frozen=True)
class _Block:
    """All queries of a call and a block of keys and values.

    Attributes:
      at, x: the address of the function's arguments, and these, each of them loaded where it is named.
      s0: the first key.
      room: for a tile of sums of inner products.
      count: queries.
      first, last: the keys of the block that one of them sees.
    """

    at: Ptr
    x: Arguments
    s0: Size
    room: Ptr | None
    count: Size
    first: Size
    last: Size


@dataclass(frozen=True)
class _Rows:
    """Keys or values of a block.

    Attributes:
      base, step: the first row, and elements between rows.
      size: the field that says how long they are.
      at_once: how many are multiplied at once.
      next_base, next_step, next_count: what is read after the last of them.
    """

    base: Ptr
    step: Size
    size: str
    at_once: int
    next_base: Ptr
    next_step: Size
    next_count: Size


@dataclass(frozen=True)
class _Chunk:
    """``count`` rows from column j of the block on."""

    rows: Ptr
    j: I64
    count: Size


@dataclass(frozen=True)
class FewQueries:
    """What a block takes.

    Attributes:
      attention: what it is composed of.
      softmax: what is done between the products.
      inner, sweep: what emits an inner product and a sweep.
      keys_at_once: keys of two inner products.
    """

    attention: AttentionComposition
    softmax: Softmax
    inner: Callable[[Given], None]
    sweep: Callable[[Given], None]
    keys_at_once: int

    @classmethod
    def emit(
        cls, attention: AttentionComposition, module: ir.Module, prefix: str, softmax: Softmax
    ) -> FewQueries | None:
        """Adds the microkernels; none for instructions that take packed operands only."""
        inner, sweep = attention.inner, attention.sweep
        if inner is None or sweep is None:
            return None
        products = inner.emit(module, prefix, None)
        return cls(attention, softmax, products, sweep.emit(module, prefix, None), 2 * inner.tile[1])

    def emit_block(self, at: Ptr, x: Arguments, s0: I64, room: Ptr | None) -> None:
        """A block of keys and values from s0 on."""
        count, cols = x.count, ir.minimum(x.end - s0, x.block)
        first, last = self.attention.visible(x.rows, count, s0, cols)
        block = _Block(at, x, s0, room, count, first, last)
        for _ in ir.when(ir.less(first, last)):
            for chunk in self._chunks(block, self._keys(block)):
                self._score(block, chunk)
            self._softmax(block)
            for chunk in self._chunks(block, self._values(block)):
                self._add(block, chunk)

    def _keys(self, block: _Block) -> _Rows:
        """The keys of a block, and after them its values."""
        x, s0 = block.x, block.s0
        base, step, next_step = x.k.at(s0 * x.rsk), x.rsk, x.rsv
        next_base = x.v.at((s0 + block.first) * next_step)
        return _Rows(base, step, "depth", self.keys_at_once, next_base, next_step, block.last - block.first)

    def _values(self, block: _Block) -> _Rows:
        """The values of a block, and after them the next block's keys."""
        x, s0 = block.x, block.s0
        base, step, next_step = x.v.at(s0 * x.rsv), x.rsv, x.rsk
        next_base = x.k.at((s0 + x.block) * next_step)
        next_count = ir.maximum(x.end - (s0 + x.block), 0)
        return _Rows(base, step, "width", VALUES_AT_ONCE, next_base, next_step, next_count)

    def _chunks(self, block: _Block, rows: _Rows) -> Iterator[_Chunk]:
        """The loop over some rows at a time, which prefetches those to come."""
        x, last, at_once = block.x, block.last, rows.at_once
        for j in ir.range_(block.first, last, at_once):
            here = ir.minimum(last - j, at_once)
            later = j + PREFETCH_DISTANCE
            rest = ir.minimum(last - later, at_once)
            for s in ir.range_(0, rest):
                prefetch_elements(rows.base.at((later + s) * rows.step), x.get(rows.size), level=2)
            beyond = ir.maximum(later - last, 0)
            following = ir.minimum(rows.next_count - beyond, at_once)
            following = ir.select_size(ir.less(last, later + 1), following, 0)
            for s in ir.range_(0, following):
                prefetch_elements(rows.next_base.at((beyond + s) * rows.next_step), x.get(rows.size), level=2)
            yield _Chunk(rows.base.at(j * rows.step), j, here)

    def _score(self, block: _Block, keys: _Chunk) -> None:
        """Scores of a chunk of keys."""
        x, family = block.x, self.attention.family
        pitch = self.attention.packing.a_row(x.depth)
        self.inner(
            Given(
                {
                    **dict.fromkeys(("pack_a", "pack_b", "epilogue"), 0),
                    "a": x.q_pack.as_type(family.a_elem),
                    "rsa": pitch * family.kr,
                    "csa": 1,
                    "a_pack": x.q_pack,
                    "b": keys.rows,
                    "rsb": 1,
                    "csb": x.rsk,
                    "b_pack": x.k_pack,
                    "c": x.scores.at(keys.j),
                    "rsc": x.rs_scores,
                    "sums": block.room,
                    "m": block.count,
                    "n": keys.count,
                    "k": x.depth,
                    "prefetch": 0,
                }
            )
        )

    def _softmax(self, block: _Block) -> None:
        """Weights of the block's scores."""
        x = block.x
        whole = ir.round_up(block.last, self.attention.tile.nr)
        self.softmax.weights(
            scores=x.scores,
            weights=x.weights,
            rows=x.rows,
            maxima=x.maxima,
            totals=x.totals,
            sums=x.sums,
            count=x.count,
            first=block.first,
            last=whole,
            s0=block.s0,
            rs_weights=self.attention.packing.a_row(x.block),
            args=block.at,
        )

    def _add(self, block: _Block, values: _Chunk) -> None:
        """Adds a chunk of weighted values to the sums."""
        x, family = block.x, self.attention.family
        weights = x.weights.as_type(family.a_elem).at(values.j)
        self.sweep(
            Given(
                {
                    "a": weights,
                    "rsa": self.attention.packing.a_row(x.block) * family.kr,
                    "csa": 1,
                    "b": values.rows,
                    "rsb": x.rsv,
                    "c": x.sums,
                    "rsc": x.rs_sums,
                    "m": block.count,
                    "n": x.width,
                    "k": values.count,
                    "accumulate": 1,
                    "more": 0,
                    "prefetch": 0,
                    "epilogue": 0,
                }
            )
        )
