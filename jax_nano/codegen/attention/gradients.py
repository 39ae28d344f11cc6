"""Gradients of attention, from the statistics that it leaves behind: what is done for a block of keys and some rows.

With S the scores of a block of keys for some queries, with what is added to them, a row's maximum and log what was
subtracted from its scores and the logarithm of the sum of exponentials of what was left, and its delta the sum of its
results times their cotangents:

    for p in rows by mr
      weights = exp((S - maximum) - log)               S = Q K^T by microkernels
      dscores = weights * (dout V^T - delta)
      dQ += dscores K
    for s in keys by mr                                once all rows have passed
      dV += weights^T dout
    for s in keys by mr
      dK += dscores^T Q

All five products run through the microkernel of the matrix product with the same instructions. Where it takes single
float32 values of A, weights and dscores are its A both ways round, by their strides alone, and queries and cotangents
are its B as they were packed for its A; where it takes several values of K at once they are packed again.

Columns that no row of a panel sees are not computed, nor are rows that see no key of a panel.
The loops over blocks of keys and over rows are csrc/run/attention_gradients.cc.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from .. import ir
from ..arguments import Arguments
from ..ir import I64, Ptr, Size, Value
from ..microkernel import ADD, walks_of
from ..packing import Packing
from ..walks import Walks
from .composition import AttentionComposition
from .gradient_weights import GradientWeights, arguments, entry, row_of
from .products import Products
from .rows import prefetch_elements, store_row

PREFETCHED_ROWS = 4
"""Rows of queries and cotangents that are prefetched before they are packed."""


@dataclass(frozen=True)
class _Call:
    """One call of the generated function.

    Attributes:
      at, x: the address of its arguments, and these, each of them loaded where it is named.
      walks: the table of what products prefetch: nothing.
      count: rows.
      first, last: the columns of the block of keys that one of the rows sees.
      whole: ``last`` rounded up to whole tiles.
    """

    at: Ptr
    x: Arguments
    walks: Walks
    count: Size
    first: Size
    last: Size
    whole: Size


@dataclass(frozen=True)
class _PanelOfRows:
    """Some rows against a block of keys.

    Attributes:
      call: whose rows they are.
      p, count: the first one, and how many there are, up to mr.
      rows: the first one's entry in the table of rows.
      first, last: the columns that one of them sees.
      whole: ``last`` rounded up to whole tiles.
      weights, dscores: their rows.
    """

    call: _Call
    p: Size
    count: Size
    rows: Ptr
    first: Size
    last: Size
    whole: Size
    weights: Ptr
    dscores: Ptr


@dataclass(frozen=True)
class _KeySums:
    """A product over rows: ``sums`` += ``scores``^T ``operand``, by the fields of GradientArgs.

    Attributes:
      scores: the rows of weights or dscores.
      packed, panels: the operand as rows, and as columns.
      sums, pitch, size: a row of sums for each key, elements between rows, and how long they are.
    """

    scores: str
    packed: str
    panels: str
    sums: str
    pitch: str
    size: str


DV = _KeySums("weights", "dout_pack", "dout_panels", "dv", "rs_dv", "width")
DK = _KeySums("dscores", "q_pack", "q_panels", "dk", "rs_dk", "depth")


@dataclass(frozen=True)
class _Transposed:
    """Scores as A of a product over rows: keys are its rows, and ``b`` its other operand.

    Attributes:
      a, per_key, rsa, csa: the first one, elements from one key to the next, and the strides inside of a panel.
      b, rsb, b_step: the operand, elements between its rows, and between its panels for each of their columns.
      rows: that are summed over.
      size, rs_sums: length of a row of sums, and elements between them.
    """

    a: Ptr
    per_key: Size
    rsa: Size
    csa: Size
    b: Ptr
    rsb: Size
    b_step: Size
    rows: Size
    size: Size
    rs_sums: Size


@dataclass(frozen=True)
class Gradients:
    """The generated function.

    Attributes:
      attention: what it is composed of.
      module: where to call the functions that are named below.
      pack: what packs queries and cotangents, and keys and values.
      repack: the same for what was computed, where the instructions take several values of K at once.
      products, weights: what is inside of the loops.
    """

    attention: AttentionComposition
    module: ir.Module
    pack: tuple[str, str]
    repack: tuple[str, str]
    products: Products
    weights: GradientWeights

    @classmethod
    def emit(cls, attention: AttentionComposition, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol_gradients(const GradientArgs*)`` and what is behind it to the module."""
        target, family = attention.target, attention.family
        pack, repack = attention.packing.emit(module, symbol), ("", "")
        if not _is_direct(attention):
            masks = target.masks(4) and target.masks(ir.elem_bytes(family.a_elem))
            computed = Packing(attention.tile, family, "float32", family.a_elem, masks)
            repack = computed.emit(module, f"{symbol}_computed")
        weights = GradientWeights(attention, module, symbol)
        weights.emit()
        products = Products(attention, module, symbol)
        products.emit()
        gradients = cls(attention, module, pack, repack, products, weights)
        module.function(f"{symbol}_gradients", ["int64"], gradients.body, internal=False)

    @property
    def direct(self) -> bool:
        return _is_direct(self.attention)

    def body(self, at: Ptr) -> None:
        """The whole function, given the address of its arguments: one of GradientArgs::step."""
        attention, x = self.attention, arguments(self.attention, at)
        table = walks_of(attention.tile, "float32", at).room()
        walks = walks_of(attention.tile, "float32", table)
        walks.begin(at)
        rooms = {e: ir.alloca(attention.tile.lanes, e) for e in dict.fromkeys((attention.q, attention.kv))}
        steps = (
            partial(self._pack_keys, x),
            partial(self._pack_rows, x),
            partial(self._rows, at, x, walks),
            partial(self._write, x, attention.q, rooms),
            partial(self._write, x, attention.kv, rooms),
        )
        ir.switch(x.step, steps)

    # --- step 0: a block of keys ------------------------------------------------------------------------------

    def _pack_keys(self, x: Arguments) -> None:
        """K^T and V^T for the scores and the cotangents of weights, and K for dQ."""
        pack_b = self.pack[1]
        cols, depth, width = x.cols, x.depth, x.width
        self.module.call(pack_b, [x.k, x.kt_pack, depth, cols, x.csk, x.rsk])
        self.module.call(pack_b, [x.v, x.vt_pack, width, cols, x.csv, x.rsv])
        self.module.call(pack_b, [x.k, x.k_pack, cols, depth, x.rsk, x.csk])

    # --- step 1: some rows ------------------------------------------------------------------------------------

    def _pack_rows(self, x: Arguments) -> None:
        """Queries and cotangents as rows, and where products take several K values at once as columns too."""
        attention, packing, count = self.attention, self.attention.packing, x.count
        pitches = {"depth": packing.a_row(x.depth), "width": packing.a_row(x.width)}
        for i in ir.range_(0, count):
            here = row_of(attention, x.rows, i)
            later = row_of(attention, x.rows, ir.minimum(i + PREFETCHED_ROWS, count - 1))
            for field, size, stride, to in (("q", "depth", "csq", "q_pack"), ("dout", "width", "cso", "dout_pack")):
                prefetch_elements(later.get(field), x.get(size))
                source = here.get(field)
                row = x.get(to).at(i * pitches[size])
                self.module.call(self.pack[0], [source, row, 1, x.get(size), 0, x.get(stride)])
        if not self.direct:
            for source, to, size in (("q_pack", "q_panels", "depth"), ("dout_pack", "dout_panels", "width")):
                elements, panels = x.get(source).as_type(attention.family.a_elem), x.get(to)
                sizes = [count, x.get(size), pitches[size] * attention.family.kr, 1]
                self.module.call(self.repack[1], [elements, panels, *sizes])

    # --- step 2: some rows and a block of keys ----------------------------------------------------------------

    def _rows(self, at: Ptr, x: Arguments, walks: Walks) -> None:
        """The loops over rows and, once all of them have passed, over keys."""
        count = x.count
        first, last = self._visible(x, x.rows, count)
        call = _Call(at, x, walks, count, first, last, ir.round_up(last, self.attention.tile.nr))
        for _ in ir.when(ir.less(first, last)):
            for panel in self._panels_of_rows(call):
                self._clear_unseen(panel)
                for _ in ir.when(ir.less(panel.first, panel.last)):
                    no_walks = walks.rest
                    self._scores(panel, no_walks)
                    self._weigh(panel)
                    self._add_queries(panel, no_walks)
            whole = self._see_all(x)
            for sums in (DV, DK):
                self._add_keys(call, sums, whole)

    def _visible(self, x: Arguments, rows: Ptr, count: Size) -> tuple[Size, Size]:
        """The columns of a block, from a multiple of `unit` on, that one of some rows sees."""
        unit, s0, cols = self.attention.unit, x.s0, x.cols

        def widest(i: I64, lo: I64, hi: I64) -> list[Size]:
            row = row_of(self.attention, rows, i)
            sees = ir.less(row.lo, row.hi)
            return [
                ir.select_size(sees, ir.minimum(lo, row.lo), lo),
                ir.select_size(sees, ir.maximum(hi, row.hi), hi),
            ]

        lo, hi = ir.loop(0, count, 1, [s0 + cols, s0], widest)
        return ir.maximum(lo - s0, 0) // unit * unit, ir.minimum(hi - s0, cols)

    def _panels_of_rows(self, call: _Call) -> Iterator[_PanelOfRows]:
        """The loop over rows, panel by panel."""
        x, mr, nr = call.x, self.attention.tile.mr, self.attention.tile.nr
        for p in ir.range_(0, call.count, mr):
            count = ir.minimum(call.count - p, mr)
            rows = entry(x.rows, p)
            first, last = self._visible(x, rows, count)
            first = ir.minimum(ir.maximum(first, call.first), call.whole)
            whole = ir.maximum(ir.round_up(last, nr), first)
            weights, dscores = (x.get(name).at(p * x.rs_scores) for name in ("weights", "dscores"))
            yield _PanelOfRows(call, p, count, rows, first, last, whole, weights, dscores)

    def _clear_unseen(self, panel: _PanelOfRows) -> None:
        """Zeros for the keys that only other rows see."""
        call, x, tile = panel.call, panel.call.x, self.attention.tile
        zero = ir.zeros(tile.lanes, "float32")
        # A tile of keys beyond the last one: its rows are added to those of keys that others see.
        for begin, end, beyond in ((call.first, panel.first, 0), (panel.whole, call.whole, tile.nr)):
            end_of_all = end + beyond
            for i in ir.range_(0, panel.count):
                for j in ir.range_(begin, end_of_all, tile.lanes):
                    for to in (panel.weights, panel.dscores):
                        to.at(i * x.rs_scores + j).store(zero)

    def _scores(self, panel: _PanelOfRows, walks: Ptr) -> None:
        """Q K^T, and dout V^T, which stands where dscores will be."""
        x, packing = panel.call.x, self.attention.packing
        for a, b, size, to in (
            ("q_pack", "kt_pack", "depth", panel.weights),
            ("dout_pack", "vt_pack", "width", panel.dscores),
        ):
            pitch, height = packing.a_row(x.get(size)), packing.b_panel_rows(x.get(size))
            self.products.panel(
                walks=walks,
                csa=1,
                rsb=self.attention.tile.nr,
                rows=panel.count,
                mode=0,
                a=x.get(a).at(panel.p * pitch),
                rsa=pitch,
                b=x.get(b).at(panel.first * height),
                b_step=height,
                k=packing.depth(x.get(size)),
                c=to.at(panel.first),
                rsc=x.rs_scores,
                cols=panel.whole - panel.first,
            )

    def _weigh(self, panel: _PanelOfRows) -> None:
        """Weights and dscores, in the same places."""
        self.weights.call(
            scores=panel.weights,
            dscores=panel.dscores,
            rows=panel.rows,
            count=panel.count,
            first=panel.first,
            last=panel.whole,
            args=panel.call.at,
        )

    def _add_queries(self, panel: _PanelOfRows, walks: Ptr) -> None:
        """dQ += dscores K."""
        x, packing, nr, kr = panel.call.x, self.attention.packing, self.attention.tile.nr, self.attention.family.kr
        keys = panel.last - panel.first
        if self.direct:
            a, rsa = panel.dscores.at(panel.first), x.rs_scores
        else:
            a, rsa = x.turned, packing.a_row(keys)
            self.module.call(self.repack[0], [panel.dscores.at(panel.first), a, panel.count, keys, x.rs_scores, 1])
        self.products.panel(
            walks=walks,
            csa=1,
            rsb=nr,
            rows=panel.count,
            a=a,
            rsa=rsa,
            b=x.k_pack.at(panel.first // kr * nr),
            b_step=packing.b_panel_rows(x.cols),
            k=packing.depth(keys),
            c=x.dq.at(panel.p * x.rs_dq),
            rsc=x.rs_dq,
            cols=x.depth,
            mode=ADD,
        )

    def _add_keys(self, call: _Call, sums: _KeySums, whole: Value | bool) -> None:
        """The loop over the keys that some row sees: a product over the rows that see keys of a panel, over all of them
        if ``whole``.
        """
        x, packing, family = call.x, self.attention.packing, self.attention.family
        t = self._transposed(call, sums)
        for s in ir.range_(call.first, call.last, self.attention.tile.mr):
            keys = ir.minimum(call.last - s, self.attention.tile.mr)
            all_rows = [0, t.rows]
            some_rows = partial(self._rows_that_see, x, s, keys)
            begin, end = ir.if_(whole, lambda: all_rows, some_rows, like=[t.rows, t.rows])
            for _ in ir.when(ir.less(begin, end)):
                self.products.panel(
                    walks=call.walks.rest,
                    a=t.a.at((s - call.first) * t.per_key + begin // family.kr * t.csa),
                    rsa=t.rsa,
                    csa=t.csa,
                    b=t.b.at(begin // family.kr * t.rsb),
                    rsb=t.rsb,
                    b_step=t.b_step,
                    k=packing.depth(end - begin),
                    c=x.get(sums.sums).at(s * t.rs_sums),
                    rsc=t.rs_sums,
                    rows=keys,
                    cols=t.size,
                    mode=ADD,
                )

    def _transposed(self, call: _Call, sums: _KeySums) -> _Transposed:
        """Operands of such a product: as they are, by other strides, or packed again."""
        x, packing = call.x, self.attention.packing
        rows, pitch, scores = x.count, x.rs_scores, x.get(sums.scores).at(call.first)
        size, rs_sums = x.get(sums.size), x.get(sums.pitch)
        if self.direct:
            return _Transposed(scores, 1, 1, pitch, x.get(sums.packed), packing.a_row(size), 1, rows, size, rs_sums)
        a, b, per_key = x.turned, x.get(sums.panels), packing.a_row(rows)
        rsa, csa = packing.a_strides(1, pitch, rows)
        height = packing.b_panel_rows(rows)
        self.module.call(self.repack[0], [scores, a, call.last - call.first, rows, 1, pitch])
        return _Transposed(a, per_key, rsa, csa, b, self.attention.tile.nr, height, rows, size, rs_sums)

    def _see_all(self, x: Arguments) -> Value | bool:
        """Whether each row sees all keys of the block."""

        def narrowest(i: I64, lo: I64, hi: I64) -> list[Size]:
            row = row_of(self.attention, x.rows, i)
            return [ir.maximum(lo, row.lo), ir.minimum(hi, row.hi)]

        end = x.s0 + x.cols
        lo, hi = ir.loop(0, x.count, 1, [x.s0, end], narrowest)
        return ir.both(ir.equal(lo, x.s0), ir.equal(hi, end))

    def _rows_that_see(self, x: Arguments, s: Size, keys: Size) -> list[Size]:
        """The first of the rows that see one of some keys from column s on, as the instructions take rows at once, and
        that behind the last one.
        """
        family, s = self.attention.family, x.s0 + s
        at_once = family.kr * family.steps_at_once

        def outermost(i: I64, begin: I64, end: I64) -> list[Size]:
            row = row_of(self.attention, x.rows, i)
            seen = ir.both(ir.less(row.lo, s + keys), ir.less(s, row.hi))
            return [ir.select_size(seen, ir.minimum(begin, i), begin), ir.select_size(seen, i + 1, end)]

        begin, end = ir.loop(0, x.count, 1, [x.count, 0], outermost)
        return [begin // at_once * at_once, end]

    # --- steps 3 and 4: results -------------------------------------------------------------------------------

    def _write(self, x: Arguments, elem: str, rooms: dict[str, Ptr]) -> None:
        """Sums as elements of a result."""
        lanes, depth = self.attention.tile.lanes, x.depth
        masks = self.attention.target.masks(ir.elem_bytes(elem))
        room, by = rooms[elem], ir.splat(x.number("scale"), lanes)
        for i in ir.range_(0, x.count):
            sums, out = x.dq.at(i * x.rs_dq), x.out.as_type(elem).at(i * x.rs_out)

            def value(j: Size) -> Value:
                return ir.convert(ir.multiply(sums.at(j).load(lanes), by), "float32", elem)

            store_row(out, depth, value, None if masks else room, lanes)


def _is_direct(attention: AttentionComposition) -> bool:
    """Whether products take single float32 values: rows and columns of A may then change places."""
    return attention.family.unit == "float32" and attention.family.kr == 1
