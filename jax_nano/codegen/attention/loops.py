"""The loops of an attention around its two products.

    pack the queries                                   a panel of mr of them for each tile
    for s0 in keys by block
      pack K^T (depth x block), V (block x width)      stay in L2 while all queries pass
      for p in queries by mr                           of the block only the columns that one of them may see
        scores = Q K^T                                 microkernels; stay in L1
        softmax of the block                           maxima, weights 2^(score - maximum), their totals
        sums += weights V                              microkernels
    results = sums / totals

Few queries, as of decoding, read keys and values once and where they lie instead (``few``).

What becomes of a query does not depend on those that are computed beside it: zeros that a wider panel adds to its sums
change nothing. It depends on ``block`` and on where keys begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from .. import ir
from ..arguments import Arguments
from ..ir import I64, Ptr, Size
from ..microkernel import ADD, walks_of
from ..nanokernel.amx import AmxDot
from ..walks import Walk, Walks
from .composition import AttentionComposition
from .few import FewQueries
from .products import Products
from .rows import prefetch_elements
from .softmax import Softmax

PREFETCHED_ROWS = 6
"""Rows of queries and of results that are prefetched before they are read and written."""

PREFETCHED_KEYS = 32
"""Keys that are prefetched before they are packed."""

LEAST = -3.4028234663852886e38  # float32: where maxima begin


@dataclass(frozen=True)
class Call:
    """One call of the generated function.

    Attributes:
      at, x: the address of its arguments, and these, each of them loaded where it is named.
      walks: the table of what products prefetch.
      room: for a tile of sums of inner products; none where few queries have no loops of their own.
    """

    at: Ptr
    x: Arguments
    walks: Walks
    room: Ptr | None


@dataclass(frozen=True)
class BlockOfKeys:
    """Keys and values s0 <= s < s0 + cols, which stay in L2."""

    call: Call
    s0: Size
    cols: Size


@dataclass(frozen=True)
class TileOfQueries:
    """A panel of queries that meets a block of keys.

    Attributes:
      keys: the block.
      p, count: the first query, and how many there are, up to mr.
      rows: the first one's entry in the table of rows.
      first, last: the columns of the block that one of them sees; ``first`` is a multiple of ``unit``.
      whole: ``last`` rounded up to whole tiles.
      first_step: the K step of the second product at ``first``.
      rs_weights: units between rows of weights.
      k_height, v_height: rows of packed panels of keys and of values.
      scores: of the panel.
    """

    keys: BlockOfKeys
    p: I64
    count: Size
    rows: Ptr
    first: Size
    last: Size
    whole: Size
    first_step: Size
    rs_weights: Size
    k_height: Size
    v_height: Size
    scores: Ptr


@dataclass(frozen=True)
class Loops:
    """The generated function.

    Attributes:
      attention: what it is composed of.
      module: where to call the functions that are named below.
      pack: what packs queries, and keys and values.
      softmax, products, few: what is inside of the loops.
    """

    attention: AttentionComposition
    module: ir.Module
    pack: tuple[str, str]
    softmax: Softmax
    products: Products
    few: FewQueries | None

    def emit(self, at: Ptr) -> None:
        """The whole function, given the address of its arguments."""
        x, tile = self.attention.arguments(at), self.attention.tile
        table = walks_of(tile, "float32", at).room()
        walks = walks_of(tile, "float32", table)
        walks.begin(at)
        ir.if_(ir.is_set(x.first), partial(self._begin, x))
        inner = self.attention.inner
        call = Call(at, x, walks, inner.room() if inner else None)
        for s0 in ir.range_(x.begin, x.end, x.block):
            if self.few is None:
                self._packed(call, s0)
                continue
            for many in ir.branches(ir.equal(x.few, 0)):
                if many:
                    self._packed(call, s0)
                else:
                    self.few.emit_block(at, x, s0, call.room)
        ir.if_(ir.is_set(x.finish), partial(self._finish, call))

    def _packed(self, call: Call, s0: I64) -> None:
        """A block of keys and values, packed, and inside of it the loop over queries."""
        for keys in self._block_of_keys(call, s0):
            for queries in self._tiles_of_queries(keys):
                self._scores(queries)
                self._softmax(queries)
                self._add_values(queries)

    def _begin(self, x: Arguments) -> None:
        """Packs the queries and clears what is summed."""
        attention, lanes = self.attention, self.attention.tile.lanes
        pitch = attention.packing.a_row(x.depth)
        zero = ir.zeros(lanes, "float32")
        keys = ir.minimum(x.end - x.begin, x.block)
        for i in ir.range_(0, x.count):
            self._prefetch_row(x, i, "q", x.depth, write=False)
            # And its share of the first block of keys and values; the others are prefetched while one is computed.
            share = (x.begin + i * keys // x.count, x.begin + (i + 1) * keys // x.count)
            for operand, stride, size in (("k", "rsk", "depth"), ("v", "rsv", "width")):
                rows, step = x.get(operand), x.get(stride)
                for s in ir.range_(*share):
                    prefetch_elements(rows.at(s * step), x.get(size), level=2)
            q = attention.row(x.rows, i).q
            self.module.call(self.pack[0], [q, x.q_pack.at(i * pitch), 1, x.depth, 0, x.csq])
            x.maxima.at(i).store(ir.scalar_constant(LEAST, "float32"))
            x.totals.at(i * lanes).store(zero)
            sums = x.sums.at(i * x.rs_sums)
            for j in ir.range_(0, x.rs_sums, lanes):
                sums.at(j).store(zero)

    def _prefetch_row(self, x: Arguments, i: I64, field: str, elements: Size, *, write: bool) -> None:
        """Prefetches a row of the caller's that comes later: each is elsewhere, where no hardware looks."""
        later = ir.minimum(i + PREFETCHED_ROWS, x.count - 1)
        prefetch_elements(self.attention.row(x.rows, later).get(field), elements, write=write)

    def _block_of_keys(self, call: Call, s0: I64) -> Iterator[BlockOfKeys]:
        """No loop: packs a block of keys and values."""
        x, nr, packing = call.x, self.attention.tile.nr, self.attention.packing
        cols = ir.minimum(x.end - s0, x.block)
        k, v = x.k.at(s0 * x.rsk), x.v.at(s0 * x.rsv)
        height = packing.b_panel_rows(x.depth)
        for j in ir.range_(0, cols, nr):
            here = ir.minimum(cols - j, nr)
            self._prefetch_keys(x, s0, j, here, (k, v))
            source, target = k.at(j * x.rsk), x.k_pack.at(j * height)
            self.module.call(self.pack[1], [source, target, x.depth, here, x.csk, x.rsk])
        self.module.call(self.pack[1], [v, x.v_pack, cols, x.width, x.rsv, x.csv])
        yield BlockOfKeys(call, s0, cols)

    def _prefetch_keys(self, x: Arguments, s0: Size, j: I64, here: Size, block: tuple[Ptr, Ptr]) -> None:
        """Prefetches keys that are packed later, and the values of those at j, which few queries leave no time for."""
        k, v = block
        later = ir.minimum(x.end - (s0 + j + PREFETCHED_KEYS), self.attention.tile.nr)
        for rows, stride, size, count in (
            (k.at((j + PREFETCHED_KEYS) * x.rsk), x.rsk, x.depth, later),
            (v.at(j * x.rsv), x.rsv, x.width, here),
        ):
            for s in ir.range_(0, count):
                prefetch_elements(rows.at(s * stride), size, level=2)

    def _tiles_of_queries(self, keys: BlockOfKeys) -> Iterator[TileOfQueries]:
        """The loop over queries, panel by panel, of those that see a key of the block."""
        x, packing = keys.call.x, self.attention.packing
        mr, nr = self.attention.tile.mr, self.attention.tile.nr
        for p in ir.range_(0, x.count, mr):
            count = ir.minimum(x.count - p, mr)
            rows = self.attention.entry(x.rows, p)
            first, last = self.attention.visible(rows, count, keys.s0, keys.cols)
            for _ in ir.when(ir.less(first, last)):
                yield TileOfQueries(
                    keys=keys,
                    p=p,
                    count=count,
                    rows=rows,
                    first=first,
                    last=last,
                    whole=ir.round_up(last, nr),
                    rs_weights=packing.a_row(x.block),
                    k_height=packing.b_panel_rows(x.depth),
                    v_height=packing.b_panel_rows(keys.cols),
                    first_step=first // self.attention.family.kr,
                    scores=x.scores,
                )

    def _scores(self, queries: TileOfQueries) -> None:
        """scores = Q K^T, of whole tiles of columns."""
        keys, x, packing = queries.keys, queries.keys.call.x, self.attention.packing
        walks, pitch = keys.call.walks.rest, packing.a_row(x.depth)
        self.products.panel(
            walks=walks,
            csa=1,
            rsb=self.attention.tile.nr,
            rows=queries.count,
            a=x.q_pack.at(queries.p * pitch),
            rsa=pitch,
            b=x.k_pack.at(queries.first * queries.k_height),
            b_step=queries.k_height,
            k=packing.depth(x.depth),
            c=queries.scores.at(queries.first),
            rsc=x.rs_scores,
            cols=queries.whole - queries.first,
            mode=0,
        )

    def _softmax(self, queries: TileOfQueries) -> None:
        """Weights of the scores, and what is summed so far rescaled to them."""
        x, p = queries.keys.call.x, queries.p
        self.softmax.weights(
            scores=queries.scores,
            weights=x.weights,
            rows=queries.rows,
            maxima=x.maxima.at(p),
            totals=x.totals.at(p * self.attention.tile.lanes),
            sums=x.sums.at(p * x.rs_sums),
            count=queries.count,
            first=queries.first,
            last=queries.whole,
            s0=queries.keys.s0,
            rs_weights=queries.rs_weights,
            args=queries.keys.call.at,
        )

    def _add_values(self, queries: TileOfQueries) -> None:
        """sums += weights V, while a share of the next block is prefetched."""
        keys, x, attention = queries.keys, queries.keys.call.x, self.attention
        walks, nr = keys.call.walks, attention.tile.nr
        walking = walks.rest
        if not isinstance(attention.family, AmxDot):
            further = ir.both(ir.less(keys.s0 + x.block, x.end), ir.equal(queries.count, attention.tile.mr))
            ir.if_(further, lambda: walks.put(self._walks_along_next_block(keys, queries.p), False))
            walking = ir.select_ptr(further, walks.table, walks.rest)
        self.products.panel(
            csa=1,
            rsb=nr,
            rows=queries.count,
            walks=walking,
            a=x.weights.at(queries.first_step),
            rsa=queries.rs_weights,
            b=x.v_pack.at(queries.first_step * nr),
            b_step=queries.v_height,
            k=attention.packing.depth(queries.last - queries.first),
            c=x.sums.at(queries.p * x.rs_sums),
            rsc=x.rs_sums,
            cols=x.width,
            mode=ADD,
        )

    def _walks_along_next_block(self, keys: BlockOfKeys, p: Size) -> list[Walk]:
        """Of the next block of keys and values a share, to prefetch while the tile of queries at p passes: rows that
        lie far apart, each tile of sums the elements beneath it.
        """
        x, tile, size = keys.call.x, self.attention.tile, ir.elem_bytes(self.attention.kv)
        begin = keys.s0 + x.block
        rows = ir.maximum(ir.minimum(x.end - begin, x.block), 0)
        first, last = ((p + o) * rows // x.count for o in (0, tile.mr))
        walks = []
        for operand, stride in (("k", x.rsk), ("v", x.rsv)):
            start = x.get(operand).at((begin + first) * stride).as_type("int8")
            walks.append(Walk(start, stride * size, ir.minimum(last, rows) - first, tile.nr * size))
        return walks

    def _finish(self, call: Call) -> None:
        """Writes all results."""
        x, lanes = call.x, self.attention.tile.lanes
        for i in ir.range_(0, x.count):
            self._prefetch_row(x, i, "out", x.width, write=True)
            sums, total = x.sums.at(i * x.rs_sums), x.totals.at(i * lanes)
            self.softmax.finish(self.attention.entry(x.rows, i), sums, total, call.at)
