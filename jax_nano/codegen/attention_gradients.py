"""Gradients of attention, from the logarithms that it leaves behind: what is done for a block of keys and some rows.

With S the scores of a block of keys for some queries, in base 2 and with what is added to them, a row's lse the
logarithm of its sum of exponentials, and its delta the sum of its results times their cotangents:

    weights = 2^(S - lse)                              S = Q K^T by microkernels, a panel of mr queries at a time
    dscores = weights * (dout V^T - delta)
    dQ += dscores K                                    for the same panel
    dV += weights^T dout                               a panel of mr keys at a time, once all queries have passed
    dK += dscores^T Q

All five products run through the microkernel of the matrix product with the same instructions. Where it takes single
float32 values of A, weights and dscores are its A both ways round, by their strides alone, and queries and cotangents
are its B as they were packed for its A; where it takes several values of K at once they are packed again.

Weights of keys outside [lo, hi) of a row, and of those that a mask excludes, are 0 exactly, and so are their dscores.
Columns that no row of a panel sees are not computed, nor are rows that see no key of a panel.
The loops over blocks of keys and over rows are csrc/run/attention_gradients.cc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from . import ir
from .attention import LOG2_E, Arguments, Attention, Row, exist, exp2, fetch_elements, store_row, taken
from .ir import I64, Ptr, Size, Value
from .microkernel import ADD, walks_of
from .packing import Packing, void
from .walks import Walks

ARGS, ROW = names(spec.GRADIENT_ARGS), names(spec.GRADIENT_ROW)

KEYS, PACK, ROWS, WRITE_QUERIES, WRITE_KEYS = range(5)
"""GradientArgs::step."""

ROWS_AHEAD = 4
"""Rows of queries and cotangents that are fetched before they are packed."""


@dataclass(frozen=True)
class Gradients:
    """The generated gradients of an attention."""

    attention: Attention

    @property
    def direct(self) -> bool:
        """Whether products take single float32 values: rows and columns of A may then change places."""
        return self.attention.family.unit == "float32" and self.attention.family.kr == 1

    def emit(self, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol_gradients(const GradientArgs*)`` and what is behind it to the module."""
        attention = self.attention
        target, family = attention.target, attention.family
        masks = all(target.masks(ir.elem_bytes(x)) for x in (attention.q, attention.kv))
        given = Packing(attention.tile, family, attention.q, attention.kv, masks)
        pack = given.emit(module, symbol)
        turn = ("", "")
        if not self.direct:
            masks = target.masks(4) and target.masks(ir.elem_bytes(family.a_elem))
            computed = Packing(attention.tile, family, "float32", family.a_elem, masks)
            turn = computed.emit(module, f"{symbol}_computed")
        weights = _Weights(attention)
        weights.emit(module, symbol)
        nest = _Nest(self, module, symbol, given, pack, turn, attention.product(module, symbol), weights)
        module.function(f"{symbol}_gradients", ["int64"], nest.emit, internal=False)


def _pointers(attention: Attention) -> dict[str, str]:
    unit = attention.family.unit
    packs = ("q_pack", "dout_pack", "q_panels", "dout_panels", "kt_pack", "vt_pack", "k_pack", "turned")
    floats = ("weights", "dscores", "dq", "dk", "dv")
    return {
        "rows": "int64",
        "k": attention.kv,
        "v": attention.kv,
        "out": attention.q,
        **dict.fromkeys(packs, unit),
        **dict.fromkeys(floats, "float32"),
    }


@dataclass(frozen=True)
class _Weights:
    """void weights(scores, dscores, rows, count, first, last, args)

    turns scores into weights and the cotangents of weights into those of scores, for ``count`` rows and the columns
    first <= j < last, whole tiles.
    """

    attention: Attention

    PARAMS = ("scores", "dscores", "rows", "count", "first", "last", "args")

    def emit(self, module: ir.Module, prefix: str) -> None:
        pointers = {"scores": "float32", "dscores": "float32", "rows": "int64", "args": "int64"}
        module.function(self.name(prefix), [pointers.get(p, "i64") for p in self.PARAMS], self._body, internal=True)

    @staticmethod
    def name(prefix: str) -> str:
        return f"{prefix}_gradient_weights"

    def _body(self, *args: Any) -> None:
        x: dict[str, Any] = dict(zip(self.PARAMS, args, strict=True))
        given = Arguments(x["args"], _pointers(self.attention), ARGS)
        lanes, nr = self.attention.tile.lanes, self.attention.tile.nr
        factor = ir.splat(given.scale(), lanes)
        s0, pitch, general = given["s0"], given["rs_scores"], given["general"]
        byte_room = ir.alloca(lanes, "int8")

        def row(i: I64) -> None:
            here = Row(x["rows"].at(i * len(ROW)), ROW)
            scores, dscores = x["scores"].at(i * pitch), x["dscores"].at(i * pitch)
            lo, hi = here.size("lo") - s0, here.size("hi") - s0
            inside = ir.both(ir.negate(ir.less(x["first"], lo)), ir.negate(ir.less(hi, x["last"])))
            below = ir.minus(ir.splat(here.number("lse"), lanes))
            delta = ir.splat(here.number("delta"), lanes)
            zero = ir.zeros(lanes, "float32")

            def both_of(j: Size, score: Value) -> tuple[Value, Value]:
                """A vector of weights and one of dscores, from scores that have all but their factor."""
                weights = exp2(score)
                return weights, ir.multiply(weights, ir.subtract(dscores.at(j).load(lanes), delta))

            def put(j: Size, weights: Value, cotangents: Value) -> None:
                scores.at(j).store(weights)
                dscores.at(j).store(cotangents)

            def plain() -> None:
                def vectors(j: I64, tiles: int) -> None:
                    starts = range(0, tiles * nr, lanes)
                    found = [both_of(j + o, ir.fma(scores.at(j + o).load(lanes), factor, below)) for o in starts]
                    for o, pair in zip(starts, found, strict=True):
                        put(j + o, *pair)

                pairs = x["first"] + (x["last"] - x["first"]) // (2 * nr) * (2 * nr)
                ir.loop(x["first"], pairs, 2 * nr, [], partial(vectors, tiles=2))
                ir.loop(pairs, x["last"], nr, [], partial(vectors, tiles=1))

            def at_edges() -> None:
                def vector(j: I64) -> None:
                    weights, cotangents = both_of(j, ir.fma(scores.at(j).load(lanes), factor, below))
                    present = exist(j, lo, hi, lanes)
                    weights, cotangents = (ir.select(present, v, zero) for v in (weights, cotangents))
                    ir.keep_order()  # else LLVM makes masked stores of them, which AMD's cores take 20 cycles for
                    put(j, weights, cotangents)

                ir.loop(x["first"], x["last"], lanes, [], vector)

            def in_general() -> None:
                bias, mask = here.pointer("bias", "float32"), here.pointer("mask", "int8")
                dbias, uniform = here.pointer("dbias", "float32"), here.number("uniform")
                has_bias, has_mask, has_dbias = (ir.negate(ir.equal(p.address, 0)) for p in (bias, mask, dbias))
                is_uniform = ir.compare(uniform, ">", ir.like(uniform, 0))

                def vector(j: I64) -> None:
                    present = exist(j, lo, hi, lanes)
                    y = ir.fma(scores.at(j).load(lanes), factor, below)

                    def with_bias() -> list[Value]:
                        # Minus infinity must stay, also beside a score of infinity: as it was added before.
                        addend = bias.at(s0 + j).load(lanes, present)
                        scaled = ir.multiply(scores.at(j).load(lanes), factor)
                        return [ir.add_vectors(ir.fma(addend, ir.like(addend, LOG2_E), scaled), below)]

                    (y,) = ir.if_(has_bias, with_bias, lambda: [y], like=[y])
                    weights, cotangents = both_of(j, y)

                    def masked(w: Value = weights, d: Value = cotangents) -> list[Value]:
                        allowed = taken(self.attention.target, mask.at(s0 + j), byte_room, (j, lo, hi), lanes)
                        return [ir.select(allowed, v, zero) for v in (w, d)]

                    weights, cotangents = ir.if_(
                        has_mask, masked, lambda: [weights, cotangents], like=[weights, cotangents]
                    )
                    alike = lambda: [ir.splat(uniform, lanes), zero]  # noqa: E731
                    weights, cotangents = ir.if_(
                        is_uniform, alike, lambda: [weights, cotangents], like=[weights, cotangents]
                    )
                    weights, cotangents = (ir.select(present, v, zero) for v in (weights, cotangents))
                    ir.keep_order()
                    put(j, weights, cotangents)

                    def to_bias() -> None:
                        at = dbias.at(s0 + j)
                        at.store(ir.add_vectors(at.load(lanes, present), cotangents), present)

                    ir.if_(has_dbias, to_bias)

                ir.loop(x["first"], x["last"], lanes, [], vector)

            ir.if_(ir.equal(general, 0), lambda: void(ir.if_(inside, plain, at_edges)), in_general)

        ir.loop(0, x["count"], 1, [], row)


@dataclass(frozen=True)
class _Nest:
    """The generated function itself."""

    gradients: Gradients
    module: ir.Module
    symbol: str
    packing: Packing
    pack: tuple[str, str]
    turn: tuple[str, str]
    product: Callable[[dict[str, Any]], None]
    weights: _Weights

    @property
    def _attention(self) -> Attention:
        return self.gradients.attention

    def emit(self, args: Ptr) -> None:
        x = Arguments(args, _pointers(self._attention), ARGS)
        table = walks_of(self._attention.tile, "float32", args).room()
        walks = walks_of(self._attention.tile, "float32", table)
        walks.begin(args)
        rooms = {e: ir.alloca(self._attention.tile.lanes, e) for e in {self._attention.q, self._attention.kv}}
        steps = (
            lambda: self._keys(x),
            lambda: self._pack_rows(x),
            lambda: self._rows(x, args, walks),
            lambda: self._write(x, self._attention.q, rooms),
            lambda: self._write(x, self._attention.kv, rooms),
        )
        ir.switch(x["step"], steps)

    # --- a block of keys --------------------------------------------------------------------------------------

    def _keys(self, x: Arguments) -> None:
        pack_b = self.pack[1]
        cols, depth, width = x["cols"], x["depth"], x["width"]
        self.module.call(pack_b, [x["k"], x["kt_pack"], depth, cols, x["csk"], x["rsk"]])
        self.module.call(pack_b, [x["v"], x["vt_pack"], width, cols, x["csv"], x["rsv"]])
        self.module.call(pack_b, [x["k"], x["k_pack"], cols, depth, x["rsk"], x["csk"]])

    # --- some rows --------------------------------------------------------------------------------------------

    def _rows(self, x: Arguments, args: Ptr, walks: Walks) -> None:
        mr, nr = self._attention.tile.mr, self._attention.tile.nr
        count = x["count"]
        first, last = self._visible(x, x["rows"], count)
        whole = (last + (nr - 1)) // nr * nr

        def panel(p: I64) -> None:
            here = ir.minimum(count - p, mr)
            self._panel(x, args, walks, p, here, (first, whole))

        def visible() -> None:
            ir.loop(0, count, mr, [], panel)
            self._columns(x, walks, first, last)

        ir.if_(ir.less(first, last), visible)

    def _pack_rows(self, x: Arguments) -> None:
        count, family = x["count"], self._attention.family
        pitches = {"depth": self.packing.a_row(x["depth"]), "width": self.packing.a_row(x["width"])}

        def row(i: I64) -> None:
            here = Row(x["rows"].at(i * len(ROW)), ROW)
            later = Row(x["rows"].at(ir.minimum(i + ROWS_AHEAD, count - 1) * len(ROW)), ROW)
            for field, size, stride, to in (("q", "depth", "csq", "q_pack"), ("dout", "width", "cso", "dout_pack")):
                fetch_elements(later.pointer(field, self._attention.q), x[size])
                source = here.pointer(field, self._attention.q)
                self.module.call(self.pack[0], [source, x[to].at(i * pitches[size]), 1, x[size], 0, x[stride]])

        ir.loop(0, count, 1, [], row)
        if not self.gradients.direct:
            for source, to, size in (("q_pack", "q_panels", "depth"), ("dout_pack", "dout_panels", "width")):
                elements = x[source].as_type(family.a_elem)
                self.module.call(self.turn[1], [elements, x[to], count, x[size], pitches[size] * family.kr, 1])

    def _visible(self, x: Arguments, rows: Ptr, count: Size) -> tuple[Size, Size]:
        """The columns of a block, from a multiple of `unit` on, that one of some rows sees."""
        unit, s0, cols = self._attention.unit, x["s0"], x["cols"]

        def widest(i: I64, lo: I64, hi: I64) -> list[Size]:
            row = Row(rows.at(i * len(ROW)), ROW)
            sees = ir.less(row.size("lo"), row.size("hi"))
            return [
                ir.select_size(sees, ir.minimum(lo, row.size("lo")), lo),
                ir.select_size(sees, ir.maximum(hi, row.size("hi")), hi),
            ]

        lo, hi = ir.loop(0, count, 1, [s0 + cols, s0], widest)
        return ir.maximum(lo - s0, 0) // unit * unit, ir.minimum(hi - s0, cols)

    def _panel(self, x: Arguments, args: Ptr, walks: Walks, p: Size, count: Size, columns: tuple[Size, Size]) -> None:
        """Weights and dscores of some queries, zeros where only other rows see keys, and their part of dQ."""
        attention, packing = self._attention, self.packing
        nr, lanes, kr = attention.tile.nr, attention.tile.lanes, attention.family.kr
        rows = x["rows"].at(p * len(ROW))
        first, last = self._visible(x, rows, count)
        first = ir.minimum(ir.maximum(first, columns[0]), columns[1])
        whole = ir.maximum((last + (nr - 1)) // nr * nr, first)
        weights, dscores = (x[name].at(p * x["rs_scores"]) for name in ("weights", "dscores"))
        zero = ir.zeros(lanes, "float32")

        def blank(begin: Size, end: Size) -> None:
            def row(i: I64) -> None:
                def vector(j: I64) -> None:
                    for to in (weights, dscores):
                        to.at(i * x["rs_scores"] + j).store(zero)

                ir.loop(begin, end, lanes, [], vector)

            ir.loop(0, count, 1, [], row)

        blank(columns[0], first)
        # A tile of keys beyond the last one: its rows are added to those of keys that others see.
        blank(whole, columns[1] + nr)

        def visible() -> None:
            shared: dict[str, Any] = {"walks": walks.rest, "csa": 1, "rsb": nr, "rows": count, "mode": 0}
            for a, b, size, to in (("q_pack", "kt_pack", "depth", weights), ("dout_pack", "vt_pack", "width", dscores)):
                pitch, height = packing.a_row(x[size]), packing.b_panel_rows(x[size])
                self.product(
                    {
                        **shared,
                        "a": x[a].at(p * pitch),
                        "rsa": pitch,
                        "b": x[b].at(first * height),
                        "b_step": height,
                        "k": packing.depth(x[size]),
                        "c": to.at(first),
                        "rsc": x["rs_scores"],
                        "cols": whole - first,
                    }
                )
            given = {"scores": weights, "dscores": dscores, "rows": rows, "count": count}
            given |= {"first": first, "last": whole, "args": args}
            self.module.call(self.weights.name(self.symbol), [given[n] for n in _Weights.PARAMS])
            keys = last - first
            if self.gradients.direct:
                a, rsa = dscores.at(first), x["rs_scores"]
            else:
                a, rsa = x["turned"], packing.a_row(keys)
                self.module.call(self.turn[0], [dscores.at(first), a, count, keys, x["rs_scores"], 1])
            self.product(
                {
                    **shared,
                    "a": a,
                    "rsa": rsa,
                    "b": x["k_pack"].at(first // kr * nr),
                    "b_step": packing.b_panel_rows(x["cols"]),
                    "k": packing.depth(keys),
                    "c": x["dq"].at(p * x["rs_dq"]),
                    "rsc": x["rs_dq"],
                    "cols": x["depth"],
                    "mode": ADD,
                }
            )

        ir.if_(ir.less(first, last), visible)

    def _columns(self, x: Arguments, walks: Walks, first: Size, last: Size) -> None:
        """dV and dK of the keys first <= s < last."""
        whole = self._see_all(x)
        self._key_sums(x, walks, (first, last), whole, "weights", "dout", "dv")
        self._key_sums(x, walks, (first, last), whole, "dscores", "q", "dk")

    def _key_sums(
        self,
        x: Arguments,
        walks: Walks,
        columns: tuple[Size, Size],
        whole: Value | bool,
        what: str,
        operand: str,
        sums: str,
    ) -> None:
        """``sums`` += ``what``^T ``operand``, of rows that see keys; of all of them if ``whole``."""
        packing, family = self.packing, self._attention.family
        mr, nr, kr = self._attention.tile.mr, self._attention.tile.nr, family.kr
        at_once = kr * family.steps_at_once  # rows that the instructions take at once
        first, last = columns
        count, pitch, source = x["count"], x["rs_scores"], x[what].at(first)
        size, rs_sums = x["width" if sums == "dv" else "depth"], x[f"rs_{sums}"]
        turned: Ptr = source if self.gradients.direct else x["turned"]
        b: Ptr = x[f"{operand}_pack" if self.gradients.direct else f"{operand}_panels"]
        step: Size = 1 if self.gradients.direct else packing.a_row(count)
        rsa, csa = (1, pitch) if self.gradients.direct else packing.a_strides(1, pitch, count)
        rsb, b_step = (packing.a_row(size), 1) if self.gradients.direct else (nr, packing.b_panel_rows(count))
        if not self.gradients.direct:
            self.module.call(self.turn[0], [source, turned, last - first, count, 1, pitch])

        def panel(s: I64) -> None:
            keys = ir.minimum(last - s, mr)

            def some_rows() -> tuple[Size, Size]:
                begin, end = self._rows_that_see(x, x["s0"] + s, keys)
                return begin // at_once * at_once, end

            begin, end = ir.if_(whole, lambda: (0, count), some_rows, like=[count, count])

            def product() -> None:
                self.product(
                    {
                        "walks": walks.rest,
                        "a": turned.at((s - first) * step + begin // kr * csa),
                        "rsa": rsa,
                        "csa": csa,
                        "b": b.at(begin // kr * rsb),
                        "rsb": rsb,
                        "b_step": b_step,
                        "k": packing.depth(end - begin),
                        "c": x[sums].at(s * rs_sums),
                        "rsc": rs_sums,
                        "rows": keys,
                        "cols": size,
                        "mode": ADD,
                    }
                )

            ir.if_(ir.less(begin, end), product)

        ir.loop(first, last, mr, [], panel)

    def _see_all(self, x: Arguments) -> Value | bool:
        """Whether each row sees all keys of the block."""

        def narrowest(i: I64, lo: I64, hi: I64) -> list[Size]:
            row = Row(x["rows"].at(i * len(ROW)), ROW)
            return [ir.maximum(lo, row.size("lo")), ir.minimum(hi, row.size("hi"))]

        end = x["s0"] + x["cols"]
        lo, hi = ir.loop(0, x["count"], 1, [x["s0"], end], narrowest)
        return ir.both(ir.equal(lo, x["s0"]), ir.equal(hi, end))

    def _rows_that_see(self, x: Arguments, s: Size, keys: Size) -> tuple[Size, Size]:
        """The first of the rows that see one of some keys from s on, and that behind the last one."""

        def sees(i: Size) -> Value | bool:
            row = Row(x["rows"].at(i * len(ROW)), ROW)
            return ir.both(ir.less(row.size("lo"), s + keys), ir.less(s, row.size("hi")))

        def outermost(i: I64, begin: I64, end: I64) -> list[Size]:
            seen = sees(i)
            return [ir.select_size(seen, ir.minimum(begin, i), begin), ir.select_size(seen, i + 1, end)]

        begin, end = ir.loop(0, x["count"], 1, [x["count"], 0], outermost)
        return begin, end

    # --- results ----------------------------------------------------------------------------------------------

    def _write(self, x: Arguments, elem: str, rooms: dict[str, Ptr]) -> None:
        """Sums as elements of a result."""
        lanes, depth = self._attention.tile.lanes, x["depth"]
        masks = self._attention.target.masks(ir.elem_bytes(elem))
        room, by = rooms[elem], ir.splat(x.scale(), lanes)

        def row(i: I64) -> None:
            sums, out = x["dq"].at(i * x["rs_dq"]), x["out"].as_type(elem).at(i * x["rs_out"])

            def value(j: Size) -> Value:
                return ir.convert(ir.multiply(sums.at(j).load(lanes), by), "float32", elem)

            store_row(out, depth, value, None if masks else room, lanes)

        ir.loop(0, x["count"], 1, [], row)
