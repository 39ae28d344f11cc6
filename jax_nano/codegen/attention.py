"""Attention in one pass: softmax(scale * Q K^T + bias, masked) V without the matrix of scores.

    pack the queries                                   a panel of mr of them for each tile
    for s in keys by block
      pack K^T (depth x block), V (block x width)      stay in L2 while all queries pass
      for p in queries by mr                           of the block only the columns that one of them may see
        scores = Q K^T                                 microkernels; stay in L1
        softmax of the block                           maxima, weights 2^(score - maximum), their totals
        sums += weights V                              microkernels
    results = sums / totals

Few queries, as of decoding, read keys and values once and where they lie instead: scores by inner products, sums by
sweeps over rows of values, in chunks, each fetched while the one before it is multiplied.

Both products run through the same microkernel, that of the matrix product with the same instructions. The scores have
the logarithm of e to base 2 multiplied into their scale, so that weights are powers of two. A query's maximum follows
its scores upwards only when they exceed it by more than ``SLACK``: until then weights are above 1, which costs no
accuracy, and its sums need no rescaling. Where it does, sums and totals are multiplied by a power of two and go on.

A key outside [lo, hi) of a query has weight 0 exactly, whatever is in it, a masked one the score MASKED_SCORE. What
becomes of a query does not depend on those that are computed beside it: zeros that a wider panel adds to its sums
change nothing. It depends on ``block`` and on where keys begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from . import ir
from .amx_microkernel import AmxMicrokernel, AmxTileRow
from .inner import InnerMicrokernel, InnerPath
from .ir import I64, Ptr, Size, Value
from .microkernel import ADD, ROW_PARAMS, Microkernel, walks_of
from .nanokernel import Family
from .nanokernel.amx import ROWS as AMX_ROWS
from .nanokernel.amx import AmxDot
from .packing import Packing, void
from .sweep import SweepMicrokernel, SweepPath
from .target import Target
from .tile import Tile
from .walks import LINE, Walk, Walks

ARGS, ROW = names(spec.ATTENTION_ARGS), names(spec.ATTENTION_ROW)

SLACK = 8.0
"""Weights are below 2**SLACK."""

ROWS_AHEAD = 6
"""Rows of queries and of results that are fetched before they are read and written."""

KEYS_AHEAD = 32
"""Keys that are fetched before they are packed."""

VALUES_AT_ONCE, FETCHED_AHEAD = 8, 32
"""Values that few queries take at once, two sweeps of them; and how far ahead keys and values are fetched. So few at a
time that those to come arrive while these are multiplied: prefetches that find no room to wait hold up all else.
"""

LEAST = -3.4028234663852886e38  # float32: where maxima begin
NOTHING = float("-inf")  # the score of a key that does not exist
LEAST_EXPONENT = -127.0  # whose exponent field is zero: that of the number 0
BIAS = 127  # of a float32's exponent
ROUND_TO_INTEGER = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the low bits
LOG2_E = 1.4426950408889634

# 2^r for |r| <= 1/2: 0.95 units in the last place with the roundings of Horner's rule.
EXP2 = (
    *(1.0, 0.6931471824645996, 0.24022644758224487, 0.05550329014658928),
    *(0.009618661366403103, 0.0013399951858446002, 0.00015309931768570095),
)


@dataclass(frozen=True)
class Attention:
    """A generated attention for one pair of dtypes.

    Attributes:
      target: the instruction set.
      q, kv: dtype names of queries and results, and of keys and values.
      family: the nanokernel's instructions.
      tile: the register tile.
    """

    target: Target
    q: str
    kv: str
    family: Family
    tile: Tile

    @property
    def converts(self) -> bool:
        """Whether weights are converted before they are multiplied."""
        return self.family.a_elem != "float32"

    @property
    def unit(self) -> int:
        """Keys that a tile's columns and the instructions' K steps are multiples of."""
        return max(self.tile.nr, self.family.kr * self.family.steps_at_once)

    @property
    def inner(self) -> InnerPath | None:
        """What few queries multiply keys by, where they lie."""
        if isinstance(self.family, AmxDot):
            return None
        return InnerPath(self.target, self.tile.lanes, self.family, self.family.a_elem, self.kv, "float32")

    @property
    def sweep(self) -> SweepPath | None:
        """What few queries multiply values by, where they lie."""
        if isinstance(self.family, AmxDot):
            return None
        return SweepPath(self.target, self.tile.lanes, self.family, self.family.a_elem, self.kv, "float32")

    def microkernels(self) -> Iterator[Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Every microkernel of this attention."""
        if isinstance(self.family, AmxDot):
            for rows in self._tile_rows():
                yield from rows.microkernels()
            return
        yield from self._microkernels()
        # Those that fetch for themselves are not called, and LLVM drops them.
        if self.inner is not None and self.sweep is not None:
            yield from (m for m in self.inner.microkernels() if not m.ahead)
            yield from (m for m in self.sweep.microkernels() if not m.ahead)

    def emit(self, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol(const AttentionArgs*)`` and everything behind it to the module."""
        masks = all(self.target.masks(ir.elem_bytes(x)) for x in (self.q, self.kv))
        packing = Packing(self.tile, self.family, self.q, self.kv, masks)
        softmax = _Softmax(self)
        softmax.emit(module, symbol)
        inner, sweep = (path.emit(module, symbol, None) if path else None for path in (self.inner, self.sweep))
        pack, product = packing.emit(module, symbol), self._product(module, symbol)
        nest = _LoopNest(self, module, packing, pack, softmax, product, inner, sweep)
        module.function(symbol, ["int64"], nest.emit, internal=False)

    def _microkernels(self) -> list[Microkernel]:
        """For all rows of a tile, and for fewer."""
        heights = [self.tile.mr]
        while heights[-1] > 1:
            heights.append(heights[-1] // 2)
        unit = self.family.unit
        return [
            Microkernel(
                tile=Tile(mr, self.tile.nv, self.tile.lanes),
                family=self.family,
                b=unit,
                out="float32",
                main=mr == self.tile.mr,
                masked=False,
                stream=False,
                masks_b=self.target.masks(ir.elem_bytes(unit)),
                masks_c=self.target.masks(4),
            )
            for mr in heights
        ]

    def _tile_rows(self) -> list[AmxTileRow]:
        assert isinstance(self.family, AmxDot)
        return [AmxTileRow(n, self.family, "float32") for n in range(1, self.tile.mr // AMX_ROWS + 1)]

    def _product(self, module: ir.Module, symbol: str) -> Callable[..., None]:
        """What emits the product of a panel of some rows and the panels of B from column 0 to ``cols``.

        It takes the arguments of a row of tiles (``ROW_PARAMS``) by name. C has room for whole tiles.
        """
        nr = self.tile.nr
        if isinstance(self.family, AmxDot):
            rows_of_tiles = [x.emit(module, symbol, None) for x in self._tile_rows()]

            def by_tiles(x: dict[str, Any]) -> None:
                whole = (x["cols"] + (nr - 1)) // nr * nr
                given = {**dict.fromkeys(ROW_PARAMS, 0), **x, "cols": whole, "partial": x["c"]}
                calls = [partial(module.call, name, [given[p] for p in ROW_PARAMS]) for name in rows_of_tiles]
                ir.switch((x["rows"] + (AMX_ROWS - 1)) // AMX_ROWS, calls, first=1)

            return by_tiles
        kernels = self._microkernels()
        emitted = [k.emit(module, symbol) for k in kernels]

        def by_columns(x: dict[str, Any]) -> None:
            def columns(name: str, params: Sequence[str]) -> None:
                def tile(j: Size) -> None:
                    given = {**x, "b": x["b"].at(j * x["b_step"]), "c": x["c"].at(j), "cols": nr}
                    module.call(name, [given[p] for p in params])

                ir.loop(0, x["cols"], nr, [], tile)

            chosen: Callable[[], None] = partial(columns, emitted[0], kernels[0].params)
            for name, kernel in list(zip(emitted, kernels, strict=True))[1:]:
                fewer = partial(columns, name, kernel.params)
                otherwise = chosen
                chosen = partial(_either, ir.less, x["rows"], kernel.tile.mr + 1, fewer, otherwise)
            chosen()

        return by_columns


def _either(
    less: Callable[[Size, Size], Any], a: Size, b: Size, then: Callable[[], None], otherwise: Callable[[], None]
) -> None:
    ir.if_(less(a, b), then, otherwise)


def exp2(x: Value) -> Value:
    """2**x for float32 x <= SLACK, within two ulp of the exact; 0 from -126.5 downwards; a NaN stays one."""
    x = maximum(ir.like(x, LEAST_EXPONENT), x)
    magic = ir.like(x, ROUND_TO_INTEGER + BIAS)
    shifted = ir.add_vectors(x, magic)
    r = ir.subtract(x, ir.subtract(shifted, magic))
    # In pairs of terms, a third shorter than Horner's rule: what limits a core here is how many it has under way.
    square = ir.multiply(r, r)
    y = ir.like(x, EXP2[6])
    for low, high in ((4, 5), (2, 3), (0, 1)):
        y = ir.fma(y, square, ir.fma(r, ir.like(x, EXP2[high]), ir.like(x, EXP2[low])))
    return ir.multiply(y, ir.exponent_of_low_bits(shifted))


def maximum(a: Value, b: Value) -> Value:
    """The greater one; b if one is NaN."""
    return ir.select(ir.compare(a, ">", b), a, b)


class _Arguments:
    """The fields of AttentionArgs, each loaded where it is asked for."""

    def __init__(self, args: Ptr, pointers: dict[str, str]):
        self._args, self._pointers = args, pointers

    def __getitem__(self, name: str) -> Any:
        at = self._args.at(ARGS.index(name))
        if name in self._pointers:
            return Ptr(at.as_type("ptr").load(), self._pointers[name])
        return I64(at.load())

    def scale(self) -> Value:
        """The scale as a scalar float32."""
        return ir.convert(self._args.at(ARGS.index("scale")).as_type("float64").load(), "float64", "float32")


@dataclass(frozen=True)
class _Row:
    """One entry of the table of rows."""

    at: Ptr

    def size(self, name: str) -> I64:
        return I64(self.at.at(ROW.index(name)).load())

    def pointer(self, name: str, elem: str) -> Ptr:
        return Ptr(self.at.at(ROW.index(name)).as_type("ptr").load(), elem)


def _pointers(attention: Attention) -> dict[str, str]:
    unit = attention.family.unit
    return {
        "rows": "int64",
        "k": attention.kv,
        "v": attention.kv,
        "q_pack": unit,
        "k_pack": unit,
        "v_pack": unit,
        "scores": "float32",
        "weights": unit,
        "sums": "float32",
        "maxima": "float32",
        "totals": "float32",
    }


@dataclass(frozen=True)
class _Softmax:
    """The functions between the products, for a tile of queries, and behind them.

    void softmax(scores, weights, rows, maxima, totals, sums, count, first, last, s0, rs_weights, args)
    void finish(row, sums, total, args)

    where columns first <= j < last of the scores, whole vectors, are those of keys s0 + j.
    """

    attention: Attention

    PARAMS = (
        *("scores", "weights", "rows", "maxima", "totals", "sums"),
        *("count", "first", "last", "s0", "rs_weights", "args"),
    )

    def emit(self, module: ir.Module, prefix: str) -> None:
        pointers = {**_pointers(self.attention), "args": "int64"}
        types = [pointers.get(p, "i64") for p in self.PARAMS]
        module.function(self.name(prefix), types, self._body, internal=True)
        module.function(self.finish_name(prefix), ["int64", "float32", "float32", "int64"], self._finish, internal=True)

    @staticmethod
    def name(prefix: str) -> str:
        return f"{prefix}_softmax"

    @staticmethod
    def finish_name(prefix: str) -> str:
        return f"{prefix}_finish"

    @property
    def _lanes(self) -> int:
        return self.attention.tile.lanes

    def _body(self, *args: Any) -> None:
        x: dict[str, Any] = dict(zip(self.PARAMS, args, strict=True))
        given = _Arguments(x["args"], _pointers(self.attention))
        lanes = self._lanes
        scale, rs_scores, general, end = given.scale(), given["rs_scores"], given["general"], given["end"]
        factor, one = ir.splat(scale, lanes), ir.constant_vector(1, lanes, "float32")
        byte_room = ir.alloca(lanes, "int8")

        def row(i: I64) -> None:
            here = _Row(x["rows"].at(i * len(ROW)))
            scores = x["scores"].at(i * rs_scores)
            lo, hi = here.size("lo") - x["s0"], ir.minimum(here.size("hi"), end) - x["s0"]
            inside = ir.both(ir.negate(ir.less(x["first"], lo)), ir.negate(ir.less(hi, x["last"])))
            nothing = ir.constant_vector(NOTHING, lanes, "float32")

            def plain() -> list[Value]:
                def vectors(j: I64, *greatest: Value) -> list[Value]:
                    return [maximum(scores.at(j + o).load(lanes), g) for o, g in zip(starts, greatest, strict=True)]

                starts = range(0, self.attention.tile.nr, lanes)
                each = ir.loop(x["first"], x["last"], self.attention.tile.nr, [nothing] * len(starts), vectors)
                found = each[0]
                for other in each[1:]:
                    found = maximum(other, found)
                return [found]

            def at_edges() -> list[Value]:
                def vector(j: I64, greatest: Value) -> list[Value]:
                    at = scores.at(j)
                    y = ir.select(self._exist(j, lo, hi), at.load(lanes), nothing)
                    ir.keep_order()  # else LLVM makes a masked store of it, which AMD's cores take 20 cycles for
                    at.store(y)
                    return [maximum(y, greatest)]

                return ir.loop(x["first"], x["last"], lanes, [nothing], vector)

            def in_general() -> list[Value]:
                bias, mask = here.pointer("bias", "float32"), here.pointer("mask", "int8")
                has_bias = ir.negate(ir.equal(bias.address, 0))
                has_mask = ir.negate(ir.equal(mask.address, 0))

                def vector(j: I64, greatest: Value) -> list[Value]:
                    at = scores.at(j)
                    y = ir.multiply(at.load(lanes), factor)
                    exist = self._exist(j, lo, hi)

                    def with_bias() -> list[Value]:
                        addend = bias.at(x["s0"] + j).load(lanes, exist)
                        return [ir.fma(addend, ir.like(addend, LOG2_E), y)]

                    (y,) = ir.if_(has_bias, with_bias, lambda: [y], like=[y])

                    def masked(y: Value = y) -> list[Value]:
                        taken = self._mask(mask.at(x["s0"] + j), byte_room, j, lo, hi)
                        return [ir.select(taken, y, ir.like(y, spec.MASKED_SCORE))]

                    (y,) = ir.if_(has_mask, masked, lambda: [y], like=[y])
                    y = ir.select(exist, y, nothing)
                    at.store(y)
                    return [maximum(y, greatest)]

                return ir.loop(x["first"], x["last"], lanes, [nothing], vector)

            (greatest,) = ir.if_(
                ir.equal(general, 0),
                lambda: ir.if_(inside, plain, at_edges, like=[nothing]),
                in_general,
                like=[nothing],
            )
            # Scores of the general case have their scale already.
            (by,) = ir.if_(ir.equal(general, 0), lambda: [factor], lambda: [one], like=[factor])
            top = ir.multiply(_greatest(greatest), ir.extract(by, 0))
            old = x["maxima"].at(i).load()
            rises = ir.compare(top, ">", ir.add_vectors(old, ir.like(old, SLACK)))

            def rescale() -> None:
                shrink = exp2(ir.splat(ir.subtract(old, top), lanes))
                x["maxima"].at(i).store(top)
                total = x["totals"].at(i * lanes)
                total.store(ir.multiply(total.load(lanes), shrink))
                sums = x["sums"].at(i * given["rs_sums"])

                def vector(j: I64) -> None:
                    at = sums.at(j)
                    at.store(ir.multiply(at.load(lanes), shrink))

                ir.loop(0, given["width"], lanes, [], vector)

            ir.if_(rises, rescale)

        def weigh(i: I64) -> None:
            (by,) = ir.if_(ir.equal(general, 0), lambda: [factor], lambda: [one], like=[factor])
            reference = ir.splat(x["maxima"].at(i).load(), lanes)
            self._weigh(x, x["scores"].at(i * rs_scores), i, by, reference)

        # In two loops: no exponential waits for the maximum of its row.
        ir.loop(0, x["count"], 1, [], row)
        ir.loop(0, x["count"], 1, [], weigh)

    def _exist(self, j: Size, lo: Size, hi: Size) -> Value:
        """Which of the columns from j on are in [lo, hi)."""
        return ir.except_lanes(ir.lane_mask(hi - j, self._lanes), ir.lane_mask(lo - j, self._lanes))

    def _mask(self, mask: Ptr, room: Ptr, j: Size, lo: Size, hi: Size) -> Value:
        """Which of the keys from j on the mask's bytes take; those outside [lo, hi) are not read."""
        lanes = self._lanes
        if self.attention.target.masks(1):
            return ir.nonzero(mask.load(lanes, self._exist(j, lo, hi)))

        def some() -> list[Value]:
            room.store(ir.zeros(lanes, "int8"))
            begin = ir.select_size(ir.less(j, lo), lo - j, 0)
            ir.loop(begin, ir.minimum(hi - j, lanes), 1, [], lambda o: room.at(o).store(mask.at(o).load()))
            return [room.load(lanes)]

        whole = ir.both(ir.negate(ir.less(j, lo)), ir.negate(ir.less(hi, j + lanes)))
        (taken,) = ir.if_(whole, lambda: [mask.load(lanes)], some, like=[ir.zeros(lanes, "int8")])
        return ir.nonzero(taken)

    def _weigh(self, x: dict[str, Any], scores: Ptr, i: I64, by: Value, reference: Value) -> None:
        """Weights of a row in the place of its scores, or beside them as the elements that are multiplied."""
        lanes, nr = self._lanes, self.attention.tile.nr
        family = self.attention.family
        count = nr // lanes
        total = x["totals"].at(i * lanes)
        below = ir.minus(reference)

        def vectors(j: I64, *sums: Value, tiles: int) -> list[Value]:
            starts = range(0, tiles * nr, lanes)
            weights = [exp2(ir.fma(scores.at(j + o).load(lanes), by, below)) for o in starts]
            if self.attention.converts:
                to = x["weights"].at(i * x["rs_weights"]).as_type(family.a_elem).at(j)
                column = 0
                for v in family.narrowed(weights, family.a_elem):
                    to.at(column).store(v)
                    column += ir.lanes_of(v)
            else:
                for o, w in zip(starts, weights, strict=True):
                    scores.at(j + o).store(w)
            found = list(sums)
            for n, w in enumerate(weights):
                found[n % count] = ir.add_vectors(found[n % count], w)
            return found

        # Two tiles at a time: constants are loaded half as often, and more exponentials are under way.
        pairs = x["first"] + (x["last"] - x["first"]) // (2 * nr) * (2 * nr)
        sums = [ir.zeros(lanes, "float32")] * count
        sums = ir.loop(x["first"], pairs, 2 * nr, sums, partial(vectors, tiles=2))
        first, *others = ir.loop(pairs, x["last"], nr, sums, partial(vectors, tiles=1))
        for other in others:
            first = ir.add_vectors(first, other)
        total.store(ir.add_vectors(total.load(lanes), first))

    def _finish(self, row: Ptr, sums: Ptr, total: Ptr, args: Ptr) -> None:
        """Writes one result."""
        given = _Arguments(args, _pointers(self.attention))
        lanes, q = self._lanes, self.attention.q
        room = None if self.attention.target.masks(ir.elem_bytes(q)) else ir.alloca(lanes, q)
        whole = ir.tree_sum(total.load(lanes))
        total.store(whole)
        divisor = ir.splat(whole, lanes)
        out, width = _Row(row).pointer("out", q), given["width"]

        def vector(j: I64) -> None:
            v = ir.convert(ir.divide(sums.at(j).load(lanes), divisor), "float32", q)
            active = width - j
            if room is None:
                out.at(j).store(v, ir.lane_mask(active, lanes))
                return

            def some() -> None:
                room.store(v)
                ir.loop(0, active, 1, [], lambda o: out.at(j + o).store(room.at(o).load()))

            ir.if_(ir.less(active, lanes), some, lambda: out.at(j).store(v))

        ir.loop(0, width, lanes, [], vector)


def _greatest(v: Value) -> Value:
    """The greatest of a vector's lanes as a scalar: halves are compared until one lane is left."""
    n = ir.lanes_of(v)
    while n > 1:
        n //= 2
        v = maximum(ir.shuffle(v, v, range(n)), ir.shuffle(v, v, range(n, 2 * n)))
    return ir.extract(v, 0)


def _fetch_elements(row: Ptr, elements: Size, *, write: bool = False, level: int = 1) -> None:
    """Fetches a row of elements that lie side by side."""
    size = elements * ir.elem_bytes(row.elem)
    void(ir.loop(0, size, LINE, [], lambda o: row.as_type("int8").at(o).prefetch(write=write, level=level)))


@dataclass(frozen=True)
class _LoopNest:
    """The generated function itself."""

    attention: Attention
    module: ir.Module
    packing: Packing
    pack: tuple[str, str]
    softmax: _Softmax
    product: Callable[[dict[str, Any]], None]
    inner: Callable[[dict[str, Any]], None] | None
    sweep: Callable[[dict[str, Any]], None] | None

    def emit(self, args: Ptr) -> None:
        x = _Arguments(args, _pointers(self.attention))
        table = walks_of(self.attention.tile, "float32", args)
        room = table.room()
        walks = walks_of(self.attention.tile, "float32", room)
        walks.begin(args)
        ir.if_(ir.negate(ir.equal(x["first"], 0)), lambda: self._begin(x))
        inner = self.attention.inner
        sums = inner.room() if inner else None

        def block(s0: I64) -> None:
            def packed() -> None:
                self._block(x, args, walks, s0)

            def few() -> None:
                self._few(x, args, s0, sums)

            ir.if_(ir.equal(x["few"], 0) if sums else True, packed, few)

        ir.loop(x["begin"], x["end"], x["block"], [], block)
        ir.if_(ir.negate(ir.equal(x["finish"], 0)), lambda: self._finish(x, args))

    def _begin(self, x: _Arguments) -> None:
        """Packs the queries and clears what is summed."""
        lanes = self.attention.tile.lanes
        pitch = self.packing.a_row(x["depth"])
        zero = ir.zeros(lanes, "float32")
        keys = ir.minimum(x["end"] - x["begin"], x["block"])

        def row(i: I64) -> None:
            self._fetch(x, i, "q", x["depth"], write=False)
            # And its share of the first block of keys and values; the others are fetched while one is computed.
            share = (x["begin"] + i * keys // x["count"], x["begin"] + (i + 1) * keys // x["count"])
            for operand, stride, size in (("k", "rsk", "depth"), ("v", "rsv", "width")):
                rows, step = x[operand], x[stride]
                ir.loop(*share, 1, [], lambda s, r=rows, t=step, n=size: _fetch_elements(r.at(s * t), x[n], level=2))
            q = _Row(x["rows"].at(i * len(ROW))).pointer("q", self.attention.q)
            self.module.call(self.pack[0], [q, x["q_pack"].at(i * pitch), 1, x["depth"], 0, x["csq"]])
            x["maxima"].at(i).store(ir.scalar_constant(LEAST, "float32"))
            x["totals"].at(i * lanes).store(zero)
            sums = x["sums"].at(i * x["rs_sums"])
            ir.loop(0, x["rs_sums"], lanes, [], lambda j: sums.at(j).store(zero))

        ir.loop(0, x["count"], 1, [], row)

    def _fetch(self, x: _Arguments, i: I64, field: str, elements: Size, *, write: bool) -> None:
        """Fetches a row of the caller's that comes later: each is elsewhere, where no hardware looks."""
        later = ir.minimum(i + ROWS_AHEAD, x["count"] - 1)
        _fetch_elements(_Row(x["rows"].at(later * len(ROW))).pointer(field, self.attention.q), elements, write=write)

    def _block(self, x: _Arguments, args: Ptr, walks: Walks, s0: Size) -> None:
        mr, nr = self.attention.tile.mr, self.attention.tile.nr
        cols = ir.minimum(x["end"] - s0, x["block"])
        k, v = x["k"].at(s0 * x["rsk"]), x["v"].at(s0 * x["rsv"])
        height = self.packing.b_panel_rows(x["depth"])

        def panel(j: I64) -> None:
            """Packs keys, and fetches later ones and these keys' values, which few queries leave no time for."""
            here = ir.minimum(cols - j, nr)
            later = ir.minimum(x["end"] - (s0 + j + KEYS_AHEAD), nr)
            for rows, stride, size, count in (
                (k.at((j + KEYS_AHEAD) * x["rsk"]), x["rsk"], x["depth"], later),
                (v.at(j * x["rsv"]), x["rsv"], x["width"], here),
            ):
                ir.loop(0, count, 1, [], lambda s, r=rows, t=stride, n=size: _fetch_elements(r.at(s * t), n, level=2))
            source, target = k.at(j * x["rsk"]), x["k_pack"].at(j * height)
            self.module.call(self.pack[1], [source, target, x["depth"], here, x["csk"], x["rsk"]])

        ir.loop(0, cols, nr, [], panel)
        self.module.call(self.pack[1], [v, x["v_pack"], cols, x["width"], x["rsv"], x["csv"]])
        ir.loop(0, x["count"], mr, [], lambda p: self._panel(x, args, walks, s0, cols, p))

    def _few(self, x: _Arguments, args: Ptr, s0: Size, room: Any) -> None:
        """All queries against a block of keys and values where they lie."""
        attention = self.attention
        assert self.inner is not None
        assert self.sweep is not None
        nr, kr, elem = attention.tile.nr, attention.family.kr, attention.family.a_elem
        count, cols = x["count"], ir.minimum(x["end"] - s0, x["block"])
        first, last = self._visible(x, x["rows"], count, s0, cols)

        def in_chunks(
            operand: str, stride: str, size: str, other: str, product: Callable[[Ptr, I64, Size], None]
        ) -> None:
            """``product(where, column, how many)`` for chunks of keys or values; those to come are fetched, behind the
            last ones the first of the ``other`` operand.
            """
            assert attention.inner is not None
            at_once = 2 * attention.inner.tile[1] if operand == "k" else VALUES_AT_ONCE
            base, step = x[operand].at(s0 * x[stride]), x[stride]
            other_step = x[{"k": "rsk", "v": "rsv"}[other]]
            # Values of this block, but keys of the next one.
            next_base = x[other].at((s0 + (first if other == "v" else x["block"])) * other_step)
            next_count = last - first if other == "v" else ir.maximum(x["end"] - (s0 + x["block"]), 0)

            def chunk(j: I64) -> None:
                here = ir.minimum(last - j, at_once)
                later = j + FETCHED_AHEAD
                rest = ir.minimum(last - later, at_once)
                ir.loop(0, rest, 1, [], lambda s: _fetch_elements(base.at((later + s) * step), x[size], level=2))
                beyond = ir.maximum(later - last, 0)
                following = ir.minimum(next_count - beyond, at_once)
                following = ir.select_size(ir.less(last, later + 1), following, 0)
                ir.loop(
                    0,
                    following,
                    1,
                    [],
                    lambda s: _fetch_elements(next_base.at((beyond + s) * other_step), x[size], level=2),
                )
                product(base.at(j * step), j, here)

            ir.loop(first, last, at_once, [], chunk)

        def score(keys: Ptr, j: I64, here: Size) -> None:
            assert self.inner is not None
            pitch = self.packing.a_row(x["depth"])
            self.inner(
                {
                    **dict.fromkeys(("pack_a", "pack_b", "epilogue"), 0),
                    "a": x["q_pack"].as_type(elem),
                    "rsa": pitch * kr,
                    "csa": 1,
                    "a_pack": x["q_pack"],
                    "b": keys,
                    "rsb": 1,
                    "csb": x["rsk"],
                    "b_pack": x["k_pack"],
                    "c": x["scores"].at(j),
                    "rsc": x["rs_scores"],
                    "sums": room,
                    "m": count,
                    "n": here,
                    "k": x["depth"],
                    "prefetch": 0,
                }
            )

        def add(values: Ptr, j: I64, here: Size) -> None:
            assert self.sweep is not None
            weights = x["weights"].as_type(elem).at(j)
            self.sweep(
                {
                    "a": weights,
                    "rsa": self.packing.a_row(x["block"]) * kr,
                    "csa": 1,
                    "b": values,
                    "rsb": x["rsv"],
                    "c": x["sums"],
                    "rsc": x["rs_sums"],
                    "m": count,
                    "n": x["width"],
                    "k": here,
                    "accumulate": 1,
                    "more": 0,
                    "prefetch": 0,
                    "epilogue": 0,
                }
            )

        def visible() -> None:
            in_chunks("k", "rsk", "depth", "v", score)
            whole = (last + (nr - 1)) // nr * nr
            given = {
                **{n: x[n] for n in ("scores", "weights", "rows", "maxima", "totals", "sums", "count")},
                "first": first,
                "last": whole,
                "s0": s0,
                "rs_weights": self.packing.a_row(x["block"]),
                "args": args,
            }
            self.module.call(self.softmax.name(self._symbol), [given[n] for n in _Softmax.PARAMS])
            in_chunks("v", "rsv", "width", "k", add)

        ir.if_(ir.less(first, last), visible)

    def _visible(self, x: _Arguments, rows: Ptr, count: Size, s0: Size, cols: Size) -> tuple[Size, Size]:
        """The columns of a block, from a multiple of `unit` on, that one of some queries sees."""
        unit = self.attention.unit

        def widest(i: I64, lo: I64, hi: I64) -> list[Size]:
            row = _Row(rows.at(i * len(ROW)))
            return [ir.minimum(lo, row.size("lo")), ir.maximum(hi, row.size("hi"))]

        lo, hi = ir.loop(0, count, 1, [s0 + cols, s0], widest)
        return ir.maximum(lo - s0, 0) // unit * unit, ir.minimum(hi - s0, cols)

    def _following(self, x: _Arguments, s0: Size, p: Size) -> list[Walk]:
        """Of the next block of keys and values a share, to fetch while the tile of queries at p passes: rows that lie
        far apart, each tile of sums the elements beneath it.
        """
        tile = self.attention.tile
        size = ir.elem_bytes(self.attention.kv)
        begin = s0 + x["block"]
        rows = ir.maximum(ir.minimum(x["end"] - begin, x["block"]), 0)
        first, last = ((p + o) * rows // x["count"] for o in (0, tile.mr))
        walks = []
        for operand, stride in (("k", x["rsk"]), ("v", x["rsv"])):
            start = x[operand].at((begin + first) * stride).as_type("int8")
            walks.append(Walk(start, stride * size, ir.minimum(last, rows) - first, tile.nr * size))
        return walks

    def _panel(self, x: _Arguments, args: Ptr, walks: Walks, s0: Size, cols: Size, p: I64) -> None:
        attention, packing = self.attention, self.packing
        nr = attention.tile.nr
        count = ir.minimum(x["count"] - p, attention.tile.mr)
        rows = x["rows"].at(p * len(ROW))

        first, last = self._visible(x, rows, count, s0, cols)

        def visible() -> None:
            whole = (last + (nr - 1)) // nr * nr
            rs_weights = packing.a_row(x["block"])
            k_height, v_height = packing.b_panel_rows(x["depth"]), packing.b_panel_rows(cols)
            first_step = first // attention.family.kr
            scores = x["scores"]
            shared: dict[str, Any] = {"walks": walks.rest, "csa": 1, "rsb": nr, "rows": count}
            pitch = packing.a_row(x["depth"])
            self.product(
                {
                    **shared,
                    "a": x["q_pack"].at(p * pitch),
                    "rsa": pitch,
                    "b": x["k_pack"].at(first * k_height),
                    "b_step": k_height,
                    "k": packing.depth(x["depth"]),
                    "c": scores.at(first),
                    "rsc": x["rs_scores"],
                    "cols": whole - first,
                    "mode": 0,
                }
            )
            given = {
                "scores": scores,
                "weights": x["weights"],
                "rows": rows,
                "maxima": x["maxima"].at(p),
                "totals": x["totals"].at(p * attention.tile.lanes),
                "sums": x["sums"].at(p * x["rs_sums"]),
                "count": count,
                "first": first,
                "last": whole,
                "s0": s0,
                "rs_weights": rs_weights,
                "args": args,
            }
            self.module.call(self.softmax.name(self._symbol), [given[n] for n in _Softmax.PARAMS])
            walking = walks.rest
            if not isinstance(attention.family, AmxDot):
                further = ir.both(ir.less(s0 + x["block"], x["end"]), ir.equal(count, attention.tile.mr))
                ir.if_(further, lambda: walks.put(self._following(x, s0, p), False))
                walking = ir.select_ptr(further, walks.table, walks.rest)
            self.product(
                {
                    **shared,
                    "walks": walking,
                    "a": x["weights"].at(first_step),
                    "rsa": rs_weights,
                    "b": x["v_pack"].at(first_step * nr),
                    "b_step": v_height,
                    "k": packing.depth(last - first),
                    "c": x["sums"].at(p * x["rs_sums"]),
                    "rsc": x["rs_sums"],
                    "cols": x["width"],
                    "mode": ADD,
                }
            )

        ir.if_(ir.less(first, last), visible)

    def _finish(self, x: _Arguments, args: Ptr) -> None:
        lanes = self.attention.tile.lanes

        def row(i: I64) -> None:
            self._fetch(x, i, "out", x["width"], write=True)
            sums, total = x["sums"].at(i * x["rs_sums"]), x["totals"].at(i * lanes)
            self.module.call(self.softmax.finish_name(self._symbol), [x["rows"].at(i * len(ROW)), sums, total, args])

        void(ir.loop(0, x["count"], 1, [], row))

    @property
    def _symbol(self) -> str:
        return self.pack[0].removesuffix("_pack_a")
