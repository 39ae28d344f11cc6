"""What is done between the products of an attention's gradients.

    void weights(scores, dscores, rows, count, first, last, args)

turns scores into weights and the cotangents of weights into those of scores, for ``count`` rows and the columns
first <= j < last, whole tiles. Weights of keys outside [lo, hi) of a row are 0 exactly; so are their dscores, and those
of keys that a mask excludes.

Scores are rounded as in the forward half (``softmax``), and what was subtracted from them there is subtracted before
the logarithm of the sum of exponentials, which may be lost beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from .. import ir
from ..arguments import Arguments, Given
from ..ir import I64, Ptr, Size, Value
from .composition import AttentionComposition
from .exponential import LOG2_E, exp2
from .rows import exist, taken

ARGS, ROW = names(spec.GRADIENT_ARGS), names(spec.GRADIENT_ROW)

PARAMS = {
    **dict.fromkeys(("scores", "dscores"), "float32"),
    "rows": "int64",
    **dict.fromkeys(("count", "first", "last"), "i64"),
    "args": "int64",
}


def arguments(attention: AttentionComposition, at: Ptr) -> Arguments:
    """``GradientArgs`` at this address."""
    packs = ("q_pack", "dout_pack", "q_panels", "dout_panels", "kt_pack", "vt_pack", "k_pack", "turned")
    floats = ("weights", "dscores", "dq", "dk", "dv")
    pointers = {
        "rows": "int64",
        "k": attention.kv,
        "v": attention.kv,
        "out": attention.q,
        **dict.fromkeys(packs, attention.family.unit),
        **dict.fromkeys(floats, "float32"),
    }
    return Arguments(at, ARGS, pointers)


def entry(rows: Ptr, i: Size) -> Ptr:
    """The address of the entry i of a table of ``GradientRow``."""
    return rows.at(i * len(ROW))


def row_of(attention: AttentionComposition, rows: Ptr, i: Size) -> Arguments:
    """That entry."""
    floats = dict.fromkeys(("bias", "dbias"), "float32")
    return Arguments(entry(rows, i), ROW, {"q": attention.q, "dout": attention.q, "mask": "int8", **floats})


@dataclass(frozen=True)
class GradientWeights:
    """The function.

    Attributes:
      attention: what it is composed of.
      module, prefix: where it is, and what its name begins with.
    """

    attention: AttentionComposition
    module: ir.Module
    prefix: str

    def emit(self) -> None:
        """Adds it."""
        self.module.function(f"{self.prefix}_gradient_weights", PARAMS, self._body, internal=True)

    def call(self, **given: Any) -> None:
        """Calls it; its arguments by name."""
        self.module.call_by_name(f"{self.prefix}_gradient_weights", given)

    def _body(self, *values: Any) -> None:
        x, lanes = Given(dict(zip(PARAMS, values, strict=True))), self.attention.tile.lanes
        args = arguments(self.attention, x.args)
        factor, factor2, masked = (ir.splat(args.number(x), lanes) for x in ("scale", "scale2", "masked"))
        s0, pitch, general = args.s0, args.rs_scores, args.general
        byte_room = ir.alloca(lanes, "int8")
        for i in ir.range_(0, x.count):
            row = row_of(self.attention, x.rows, i)
            scores, dscores = x.scores.at(i * pitch), x.dscores.at(i * pitch)
            lo, hi = row.lo - s0, row.hi - s0
            inside = ir.both(ir.at_least(x.first, lo), ir.at_least(hi, x.last))
            here = _Row(
                attention=self.attention,
                x=x,
                entry=row,
                s0=s0,
                factor=factor,
                factor2=factor2,
                masked=masked,
                byte_room=byte_room,
                scores=scores,
                dscores=dscores,
                lo=lo,
                hi=hi,
                below=ir.minus(ir.splat(row.number("maximum"), lanes)),
                log=ir.splat(row.number("log"), lanes),
                delta=ir.splat(row.number("delta"), lanes),
                zero=ir.zeros(lanes, "float32"),
            )
            has_mask = ir.is_set(row.mask.address)
            for plain in ir.branches(ir.both(ir.equal(general, 0), ir.negate(has_mask))):
                if plain:
                    ir.if_(inside, here.all_exist, here.at_edges)
                else:
                    here.in_general()


@dataclass(frozen=True)
class _Row:
    """One row of scores.

    Attributes:
      attention: what it is composed of.
      x: the function's arguments.
      entry: of the table of rows.
      s0: the key of column 0.
      factor, factor2: what scores are multiplied by, and that for a base of 2.
      masked: the score of a masked key.
      byte_room: room for a vector of a mask's bytes.
      scores, dscores: the row.
      lo, hi: the columns lo <= j < hi whose keys exist for it.
      below: minus what is subtracted from its scores, in every lane.
      log: the logarithm of its sum of exponentials, likewise.
      delta: in every lane.
      zero: a vector of them.
    """

    attention: AttentionComposition
    x: Given
    entry: Arguments
    s0: Size
    factor: Value
    factor2: Value
    masked: Value
    byte_room: Ptr
    scores: Ptr
    dscores: Ptr
    lo: Size
    hi: Size
    below: Value
    log: Value
    delta: Value
    zero: Value

    @property
    def _lanes(self) -> int:
        return self.attention.tile.lanes

    def all_exist(self) -> None:
        """Where all keys exist: two tiles at a time, so that constants are loaded half as often."""
        x, nr = self.x, self.attention.tile.nr
        pairs = x.first + (x.last - x.first) // (2 * nr) * (2 * nr)
        for begin, end, step in ((x.first, pairs, 2 * nr), (pairs, x.last, nr)):
            for j in ir.range_(begin, end, step):
                starts = range(0, step, self._lanes)
                found = [self._both(j + o, self._exponent(j + o)) for o in starts]
                for o, (weights, cotangents) in zip(starts, found, strict=True):
                    self._put(j + o, weights, cotangents)

    def at_edges(self) -> None:
        """Where some keys do not exist."""
        for j in ir.range_(self.x.first, self.x.last, self._lanes):
            weights, cotangents = self._both(j, self._exponent(j))
            present = exist(j, self.lo, self.hi, self._lanes)
            weights, cotangents = (ir.select(present, v, self.zero) for v in (weights, cotangents))
            ir.keep_order()  # else LLVM makes masked stores of them, which AMD's cores take 20 cycles for
            self._put(j, weights, cotangents)

    def in_general(self) -> None:
        """With all that may be added to scores, and cotangents of the bias."""
        entry, s0, lanes, target = self.entry, self.s0, self._lanes, self.attention.target
        bias, mask, dbias = entry.bias, entry.mask, entry.dbias
        has_bias, has_mask, has_dbias = (ir.is_set(p.address) for p in (bias, mask, dbias))
        to_base_2 = ir.like(self.log, LOG2_E)
        for j in ir.range_(self.x.first, self.x.last, lanes):
            present = exist(j, self.lo, self.hi, lanes)
            y = ir.multiply(self.scores.at(j).load(lanes), self.factor)
            (y,) = ir.if_(has_bias, partial(self._with_bias, bias, j, present, y), lambda: [y], like=[y])
            every = ir.splat_bool(True, lanes)

            def allowed_keys(j: I64 = j) -> list[Value]:
                return [taken(target, mask.at(s0 + j), self.byte_room, (j, self.lo, self.hi), lanes)]

            (allowed,) = ir.if_(has_mask, allowed_keys, lambda: [every], like=[every])
            y = ir.add_vectors(ir.select(allowed, y, self.masked), self.below)
            weights, cotangents = self._both(j, ir.fma(y, to_base_2, ir.minus(self.log)))
            weights, cotangents = (ir.select(present, v, self.zero) for v in (weights, cotangents))
            cotangents = ir.select(allowed, cotangents, self.zero)
            ir.keep_order()
            self._put(j, weights, cotangents)
            for _ in ir.when(has_dbias):
                at = dbias.at(s0 + j)
                at.store(ir.add_vectors(at.load(lanes, present), cotangents), present)

    def _with_bias(self, bias: Ptr, j: I64, present: Value, scores: Value) -> list[Value]:
        """Scores from column j on with the bias."""
        return [ir.add_vectors(scores, bias.at(self.s0 + j).load(self._lanes, present))]

    def _exponent(self, j: Size) -> Value:
        """The logarithm to base 2 of weights from column j on, where nothing is added to scores."""
        score = self.scores.at(j).load(self._lanes)
        return ir.subtract(ir.fma(score, self.factor2, self.below), self.log)

    def _both(self, j: Size, exponent: Value) -> tuple[Value, Value]:
        """A vector of weights and one of dscores, from the logarithms of weights to base 2."""
        weights = exp2(exponent)
        return weights, ir.multiply(weights, ir.subtract(self.dscores.at(j).load(self._lanes), self.delta))

    def _put(self, j: Size, weights: Value, cotangents: Value) -> None:
        self.scores.at(j).store(weights)
        self.dscores.at(j).store(cotangents)
