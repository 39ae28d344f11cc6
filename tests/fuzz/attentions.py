"""Random attention: two products with softmax between, in forms that one pass computes and in forms that are near.

What makes a form is drawn piece by piece: the order of dimensions, where the scale stands, masks of positions, lengths
and arrays with any excluded value, bias, the dtype of softmax and how it is written, and what else a program does with
scores and weights: reads them, drops some, writes keys into a cache before, writes the result into an array after.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from .drawing import FLOATS, MAX_COUNT, Scope
from .program import Value
from .updates import Updates

# Dimensions of q, k, v, scores and result.
_ORDERS: Final = (
    ("bqhd", "bkhd", "bkhe", "bhqk", "bqhe"),
    ("bhqd", "bhkd", "bhke", "bhqk", "bhqe"),
    ("bqhd", "bhkd", "bkhe", "bqhk", "bhqe"),
    ("bqhgd", "bkhd", "bkhe", "bhgqk", "bqhge"),
    ("bhgqd", "bhkd", "bhke", "bhgqk", "bhgqe"),
    ("bqhgd", "bkd", "bke", "bhgqk", "bqhge"),
    ("bqd", "bkd", "bke", "bqk", "bqe"),
    ("hqd", "hkd", "hke", "hqk", "qhe"),
    ("qd", "kd", "ke", "qk", "qe"),
    ("qd", "dk", "ek", "kq", "eq"),
)
_EXCLUDED: Final = ("-1e9", "-jnp.inf", "-1e30", "jnp.finfo({s}.dtype).min", "-1e4", "-3.0", "-1e9")
_FEW: Final = 24
"""Batches times heads, at most."""


class _Form(NamedTuple):
    """What an attention is drawn with."""

    sizes: dict[str, int]
    scores: str  # its dimensions

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[x] for x in letters)

    def spread(self, name: str, letters: str) -> str:
        """An array with some dimensions of scores, in their order, as one of them all."""
        return f"{name}[{', '.join(':' if x in letters else 'None' for x in self.scores)}]"


class Attentions(Updates):
    def attend(self, scope: Scope) -> None:
        """An attention, and what may happen before and after."""
        if self.chance(0.3) and self.dtype != "float16":  # which jax.nn does not lower on CPUs in JAX 0.10
            self._library(scope)
            return
        q, k, v, scores, out = _ORDERS[self.rng.integers(len(_ORDERS))]
        form = _Form(self._sizes(), scores)
        if max(math.prod(form.shape(x)) for x in (q, k, v, scores, out)) > MAX_COUNT:
            return
        before = [self._operand(scope, form.shape(x), i) for i, x in enumerate((q, k, v))]
        x, y, z = before
        if self.chance(0.2):  # a part of it is written first
            y = self.updated(scope, y)
            if self.chance(0.6):
                z = self.updated(scope, z)
        d = form.sizes["d"]
        size = x.size * y.size * math.sqrt(d)
        scale = d**-0.5 if self.chance(0.7) else 0.5 / max(size, 0.5)
        where = self.choose(("q", "k", "s", "divided"))
        if where in "qk":
            one = x if where == "q" else y
            one = self.emit(scope, f"{{0}} * {scale:.4g}", [one], one.shape, one.dtype, one.size * scale)
            x, y = (one, y) if where == "q" else (x, one)
        s = self._contracted(scope, f"{q},{k}->{scores}", x, y, form.shape(scores), size)
        if where == "s":
            s = self.emit(scope, f"{{0}} * {scale:.4g}", [s], s.shape, s.dtype, size * scale)
        elif where == "divided":
            s = self.emit(scope, f"{{0}} / {1 / scale:.4g}", [s], s.shape, s.dtype, size * scale)
        raw = s
        for _ in range(int(self.rng.choice([0, 1, 2], p=[0.35, 0.5, 0.15]))):
            s = (self._masked, self._masked, self._biased)[self.rng.integers(3)](scope, form, s)
        if self.chance(0.05):
            s = self.emit(scope, "4 * jnp.tanh({0} / 4)", [s], s.shape, s.dtype, 2)
        o, p = self._weighed(scope, form, f"{scores},{v}->{out}", s, z, form.shape(out))
        self._after(scope, before, raw, p, o)

    def _sizes(self) -> dict[str, int]:
        sizes = {x: max(1, min(self.dim(), most)) for x, most in zip("bqhgkde", (3, 40, 4, 3, 70, 64, 64), strict=True)}
        if self.chance(0.3):
            sizes["q"] = sizes["k"]
        if self.chance(0.7):
            sizes["e"] = sizes["d"]
        if self.chance(0.1):
            sizes["q"] = 1
        while sizes["b"] * sizes["h"] * sizes["g"] > _FEW:
            sizes["h"] = max(1, sizes["h"] // 2)
        return sizes

    def _operand(self, scope: Scope, shape: tuple[int, ...], number: int) -> Value:
        """An array, or a product in front of it, as layers have one."""
        if len(shape) < 3 or self.chance(0.7):
            return self.need(scope, shape, self.dtype, reuse=0.5)
        width = math.prod(shape[2:])
        rows = self.need(scope, (*shape[:2], 8), self.dtype)
        w = self.need(scope, (8, width), self.dtype, 8**-0.5, reuse=0.1)
        y = self.emit(scope, "{0} @ {1}", [rows, w], (*shape[:2], width), self.dtype, rows.size)
        return self.emit(scope, f"{{0}}.reshape({shape})", [y], shape, self.dtype, y.size)

    def _contracted(self, scope: Scope, labels: str, x: Value, y: Value, shape: tuple[int, ...], size: float) -> Value:
        preferred, dtype = self.result(self.dtype)
        operands, (left, right) = [x, y], labels.partition("->")[0].split(",")
        if self.chance(0.15):
            operands, labels = [y, x], f"{right},{left}->{labels.partition('->')[2]}"
        return self.emit(scope, f'jnp.einsum("{labels}", {{0}}, {{1}}{preferred})', operands, shape, dtype, size)

    # --- masks and bias --------------------------------------------------------------------------------------------

    def _masked(self, scope: Scope, form: _Form, s: Value) -> Value:
        condition, operands = self._condition(scope, form)
        excluded = self.choose(_EXCLUDED).replace("{s}", "{0}")
        how = self.rng.random()
        if how < 0.7:
            text = f"jnp.where({condition}, {{0}}, {excluded})"
        elif how < 0.85:
            text = f"jnp.where(~({condition}), {excluded}, {{0}})"
        else:
            text = f"{{0}} + (1 - ({condition}).astype({{0}}.dtype)) * -1e4"
        return self.emit(scope, text, [s, *operands], s.shape, s.dtype, s.size)

    def _condition(self, scope: Scope, form: _Form) -> tuple[str, list[Value]]:
        """An expression of bool whose operands begin with {1}, and those."""
        nq, nk = form.sizes["q"], form.sizes["k"]
        rows, columns = form.spread(f"jnp.arange({nq})", "q"), form.spread(f"jnp.arange({nk})", "k")
        shift = int(self.rng.integers(0, 4)) if self.chance(0.4) else 0
        if self.chance(0.3):
            shift += nk - nq
        kind = self.rng.integers(8)
        if kind <= 1:
            return f"{rows} + {shift} >= {columns}", []
        if kind == 2:
            tril = f"jnp.tril(jnp.ones(({nq}, {nk}), bool), {shift})"
            tril = tril if form.scores.index("q") < form.scores.index("k") else f"{tril}.T"
            return form.spread(tril, "qk"), []
        if kind == 3:
            return f"({rows} + {shift} >= {columns}) & ({rows} - {columns} < {int(self.rng.integers(1, 9))})", []
        if kind == 4 and "b" in form.scores:
            lengths = self._places(form.sizes["b"], nk + 1)
            return f"{columns} < {form.spread('{1}', 'b')}", [lengths]
        if kind == 5:
            return f"{columns} <= {{1}} + {rows}", [self.index(scope, nk)]
        if kind == 6:
            return f"{columns} < {{1}}", [self.index(scope, nk + 1)]
        letters = "".join(x for x in form.scores if x == "k" or self.chance(0.6))
        seen = self.need(scope, form.shape(letters), "int8", reuse=0.3)
        return f"({form.spread('{1}', letters)} > {int(self.rng.integers(-100, 40))})", [seen]

    def _biased(self, scope: Scope, form: _Form, s: Value) -> Value:
        letters = "".join(x for x in form.scores if x == "k" or self.chance(0.6))
        b = self.need(scope, form.shape(letters), s.dtype if self.chance(0.7) else self.dtype)
        sign = self.choose("++-")
        text = f"({{0}} {sign} {form.spread('{1}', letters)}).astype({{0}}.dtype)"
        return self.emit(scope, text, [s, b], s.shape, s.dtype, s.size + b.size)

    # --- softmax and the second product ----------------------------------------------------------------------------

    def _weighed(
        self, scope: Scope, form: _Form, labels: str, s: Value, z: Value, shape: tuple[int, ...]
    ) -> tuple[Value, Value]:
        """The result and the weights."""
        axis = form.scores.index("k") - len(form.scores)
        if self.chance(0.03) and form.sizes["q"] == form.sizes["k"]:
            axis = form.scores.index("q") - len(form.scores)
        if s.dtype in FLOATS[1:] and self.chance(0.5):
            s = self.emit(scope, "{0}.astype(jnp.float32)", [s], s.shape, "float32", s.size)
        total: Value | None = None
        written = self.rng.random()
        if written < 0.6:
            p = self.emit(scope, f"jax.nn.softmax({{0}}, {axis})", [s], s.shape, s.dtype, 0.3)
        else:
            exponent = "{0}" if written > 0.95 and s.size < 5 else f"{{0}} - jnp.max({{0}}, {axis}, keepdims=True)"
            p = self.emit(scope, f"jnp.exp({exponent})", [s], s.shape, s.dtype, 1)
            if written < 0.85:
                p = self.emit(scope, f"{{0}} / jnp.sum({{0}}, {axis}, keepdims=True)", [p], p.shape, p.dtype, 0.3)
            else:
                kept = tuple(n for i, n in enumerate(s.shape) if i != axis + len(s.shape))
                total = self.emit(scope, f"jnp.sum({{0}}, {axis})", [p], kept, p.dtype, 5)
        if self.chance(0.06):
            keep = self.need(scope, p.shape, "int8")
            p = self.emit(scope, "jnp.where({1} > -100, {0} / 0.9, 0)", [p, keep], p.shape, p.dtype, 0.3)
        if p.dtype != self.dtype and self.chance(0.8):
            p = self.emit(scope, f"{{0}}.astype(jnp.{self.dtype})", [p], p.shape, self.dtype, 0.3)
        dtype = self.dtype if p.dtype == self.dtype else "float32"
        o = self.emit(scope, f'jnp.einsum("{labels}", {{0}}, {{1}})', [p, z], shape, dtype, z.size)
        if total is not None:
            kept_letters = form.scores.replace("k", "")
            result = labels.partition("->")[2]
            order = "".join(x for x in result if x in kept_letters)
            moved = f'jnp.einsum("{kept_letters}->{order}", {{1}})' if order != kept_letters else "{1}"
            place = ", ".join(":" if x in order else "None" for x in result)
            o = self.emit(scope, f"({{0}} / {moved}[{place}]).astype({{0}}.dtype)", [o, total], shape, dtype, z.size)
        return o, p

    def _after(self, scope: Scope, before: list[Value], s: Value, p: Value, o: Value) -> None:
        if self.chance(0.08):
            other = p if self.chance(0.6) else s
            self.emit(scope, "{0} * 2", [other], other.shape, other.dtype, 2 * other.size)
        if self.chance(0.15):  # an operand is updated after it was read
            self.updated(scope, before[self.rng.integers(3)])
        if self.chance(0.3) and o.ndim >= 3:
            shape = (*o.shape[:-2], o.shape[-2] * o.shape[-1])
            o = self.emit(scope, f"{{0}}.reshape({shape})", [o], shape, o.dtype, o.size)
        if self.chance(0.2):
            order = tuple(int(i) for i in self.rng.permutation(o.ndim))
            o = self.emit(scope, f"jnp.transpose({{0}}, {order})", [o], [o.shape[i] for i in order], o.dtype, o.size)
        if self.chance(0.15):
            o = self.emit(scope, "{0} + {1}", [o, self.need(scope, o.shape, o.dtype)], o.shape, o.dtype, o.size + 1)
        if self.chance(0.12):  # the result goes into a part of an array
            larger = (o.shape[0] + 2, *o.shape[1:])
            a, i = self.need(scope, larger, o.dtype), self.index(scope, 3)
            places = ", ".join(["{2}"] + ["jnp.int32(0)"] * (o.ndim - 1))
            text = f"lax.dynamic_update_slice({{0}}, {{1}}, ({places},))"
            self.emit(scope, text, [a, o, i], larger, o.dtype, max(a.size, o.size))

    # --- jax.nn ----------------------------------------------------------------------------------------------------

    def _library(self, scope: Scope) -> None:
        """jax.nn.dot_product_attention with any of its options."""
        sizes = self._sizes()
        b, t, h, g, n, d = (sizes[x] for x in "bqhgkd")
        if b * h * g * t * n > MAX_COUNT:
            return
        batch = (b,) if self.chance(0.85) else ()
        q = self._operand(scope, (*batch, t, h * g, d), 0)
        k, v = (self._operand(scope, (*batch, n, h, d), i) for i in (1, 2))
        operands, options = [q, k, v], []
        scores = (*((b,) if batch and self.chance(0.5) else (1,)), *((h * g,) if self.chance(0.5) else (1,)), t, n)
        if self.chance(0.25):
            operands.append(self.need(scope, scores, self.dtype))
            options.append(f"bias={{{len(operands) - 1}}}")
        if self.chance(0.25):
            operands.append(self.need(scope, scores, "int8"))
            options.append(f"mask={{{len(operands) - 1}}} > -60")
        if self.chance(0.4):
            options.append("is_causal=True")
        if self.chance(0.15):
            options.append(f"scale={self.choose(('0.3', '1.0', '0.05'))}")
        if batch and self.chance(0.25):
            operands.append(self._places(b, n + 1))
            options.append(f"key_value_seq_lengths={{{len(operands) - 1}}}")
            if self.chance(0.3):
                operands.append(self._places(b, t + 1))
                options.append(f"query_seq_lengths={{{len(operands) - 1}}}")
        if self.chance(0.15):
            options.append(f"local_window_size=({int(self.rng.integers(0, 9))}, {int(self.rng.integers(0, 5))})")
        text = f"jax.nn.dot_product_attention({', '.join(['{0}', '{1}', '{2}', *options])})"
        o = self.emit(scope, text, operands, q.shape, self.dtype, v.size)
        if self.chance(0.6):
            shape = (*batch, t, h * g * d)
            o = self.emit(scope, f"{{0}}.reshape({shape})", [o], shape, self.dtype, o.size)
            if self.chance(0.5):
                w = self.need(scope, (h * g * d, 8), self.dtype, 0.2)
                self.emit(scope, "{0} @ {1}", [o, w], (*batch, t, 8), self.dtype, o.size)
