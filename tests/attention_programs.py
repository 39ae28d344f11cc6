"""Attention as programs write it, and what becomes of it in an accelerated program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import jax_nano
from jax_nano._core import record

B, T, S, N, H = 2, 24, 40, 4, 16

Program = Callable[..., Any]
attend = jax.nn.dot_product_attention


def einsums(q: Array, k: Array, v: Array, change: Callable[[Array], Array] = lambda s: s) -> Array:
    scores = change(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


def matmuls(q: Array, k: Array, v: Array, excluded: float = -1e9) -> Array:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = jnp.matmul(q, k.swapaxes(-1, -2)) * 0.25
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, excluded)
    return (jax.nn.softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3)


def divided_later(q: Array, k: Array, v: Array) -> Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    sums = weights.sum(-1).transpose(0, 2, 1)[..., None]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v) / sums


def no_maximum(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.exp(scores if mask is None else jnp.where(mask, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def repeated_heads(q: Array, k: Array, v: Array) -> Array:
    return einsums(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))


def scanned(q: Array, k: Array, v: Array) -> Array:
    return lax.scan(lambda x, _: (attend(x, k, v), None), q, None, length=3)[0]


def added_mask(q: Array, k: Array, v: Array, seen: Array) -> Array:
    bias = (1 - seen[:, None, None, :].astype(q.dtype)) * -1e9
    return einsums(q, k, v, lambda scores: scores + bias)


def masked_by(mask: Callable[[], Any]) -> Program:
    """Scores that a mask which reads no argument excludes."""
    return lambda q, k, v: einsums(q, k, v, lambda s: jnp.where(mask(), s, jnp.finfo(s.dtype).min))


def adds(mask: Callable[[], Any], excluded: float | None = None) -> Program:
    """The same as a number that is added."""

    def change(s: Array) -> Array:
        number = jnp.finfo(s.dtype).min if excluded is None else excluded
        return s + jnp.where(mask(), 0, number).astype(s.dtype)

    return lambda q, k, v: einsums(q, k, v, change)


def causal_of_floats() -> Array:
    """As flax's make_causal_mask makes it."""
    rows, columns = (lax.broadcasted_iota(jnp.int32, (1, 1, T, S), i) for i in (2, 3))
    return (rows >= columns).astype(jnp.float32)


def padded(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Causal and padded, as flax's combine_masks and make_attention_mask put it."""
    pairs = jnp.multiply(jnp.ones((B, 1, T, 1)), seen[:, None, None, :].astype(jnp.float32))
    mask = jnp.logical_and(causal_of_floats(), pairs).astype(jnp.float32)
    return einsums(q, k, v, lambda s: jnp.where(mask, s, jnp.finfo(s.dtype).min))


def added_padding(q: Array, k: Array, v: Array, seen: Array, bias: Array | None = None) -> Array:
    def change(s: Array) -> Array:
        excluded = jnp.where(seen[:, None, None, :], 0, jnp.finfo(s.dtype).min).astype(s.dtype)
        return s + excluded if bias is None else s + bias + excluded

    return einsums(q, k, v, change)


def cached(x: Array, keys: Array, values: Array, at: Array) -> tuple[Array, Array, Array]:
    """Decoding: one position is written, and all up to it are read."""
    row = x[:, :1].reshape(B, 1, N, H)
    start = jnp.zeros_like(at)
    keys, values = (lax.dynamic_update_slice(y, row, (start, at, start, start)) for y in (keys, values))
    seen = jnp.arange(S) <= at
    out = einsums(row, keys, values, lambda s: jnp.where(seen, s, jnp.finfo(s.dtype).min))
    return out, keys, values


def decoded(x: Array, keys: Array, values: Array) -> Array:
    """Some positions one after the other, the cache carried by a loop."""

    def step(state: tuple[Array, Array, Array], at: Array) -> tuple[tuple[Array, Array, Array], Array]:
        y, keys, values = state
        out, keys, values = cached(y, keys, values, at)
        return (0.5 * y + out.reshape(B, 1, N * H), keys, values), out

    return lax.scan(step, (x[:, :1], keys, values), jnp.arange(3))[1]


def block(x: Array, *weights: Array) -> Array:
    q, k, v = ((x @ w).reshape(*x.shape[:2], N, H) for w in weights[:3])
    return attend(q, k, v, is_causal=True).reshape(x.shape) @ weights[3]


class Case:
    """Arguments of the forms, of a dtype."""

    def __init__(self, rng: np.random.Generator, dtype: Any) -> None:
        self.dtype = dtype
        self.q, self.k, self.v = (self.normal(B, x, N, H, rng=rng) for x in (T, S, S))
        self.k2, self.v2 = (self.normal(B, S, 2, H, rng=rng) for _ in range(2))
        self.bias = self.normal(1, N, T, S, rng=rng)
        self.mask = jnp.asarray(rng.random((1, 1, T, S)) < 0.5).at[:, :, 3].set(False)
        self.masks = jnp.asarray(rng.random((B, N, T, S)) < 0.5)
        self.seen = jnp.asarray(rng.random((B, S)) < 0.6).at[1].set(True)
        self.lengths = jnp.asarray([5, S], jnp.int32)
        self.x = self.normal(B, T, N * H, rng=rng)
        self.weights = [self.normal(N * H, N * H, rng=rng) / 8 for _ in range(4)]

    def normal(self, *shape: int, rng: np.random.Generator) -> Array:
        return jnp.asarray(rng.standard_normal(shape), self.dtype)


FORMS: dict[str, tuple[Program, Callable[[Case], tuple[Any, ...]], str]] = {
    "jax.nn": (attend, lambda c: (c.q, c.k, c.v), ""),
    "scale": (lambda *x: attend(*x, scale=0.3), lambda c: (c.q, c.k, c.v), ""),
    "causal": (lambda *x: attend(*x, is_causal=True), lambda c: (c.q, c.k, c.v), "causal"),
    "window": (lambda *x: attend(*x, local_window_size=(7, 3)), lambda c: (c.q, c.k, c.v), "window"),
    "bias": (lambda *x: attend(*x[:3], bias=x[3]), lambda c: (c.q, c.k, c.v, c.bias), "bias"),
    "mask": (lambda *x: attend(*x[:3], mask=x[3]), lambda c: (c.q, c.k, c.v, c.mask), "mask"),
    "masks and causal": (
        lambda *x: attend(*x[:3], mask=x[3], is_causal=True),
        lambda c: (c.q, c.k, c.v, c.masks),
        "causal, mask",
    ),
    "bias and mask": (
        lambda *x: attend(*x[:3], bias=x[3], mask=x[4]),
        lambda c: (c.q, c.k, c.v, c.bias, c.mask),
        "bias, mask",
    ),
    "computed mask": (
        lambda q, k, v, seen: attend(q, k, v, mask=seen[:, None, None, :], is_causal=True),
        lambda c: (c.q, c.k, c.v, c.seen),
        "causal, mask",
    ),
    "lengths": (
        lambda *x: attend(*x[:3], key_value_seq_lengths=x[3]),
        lambda c: (c.q, c.k, c.v, c.lengths),
        "lengths",
    ),
    "lengths of queries": (
        lambda *x: attend(*x[:3], query_seq_lengths=x[3], key_value_seq_lengths=x[3]),
        lambda c: (c.q, c.k, c.v, c.lengths),
        "mask, lengths",
    ),
    "one query": (
        lambda *x: attend(*x[:3], key_value_seq_lengths=x[3]),
        lambda c: (c.q[:, :1], c.k, c.v, c.lengths),
        "lengths",
    ),
    "grouped": (attend, lambda c: (c.q, c.k2, c.v2), ""),
    "grouped, causal": (lambda *x: attend(*x, is_causal=True), lambda c: (c.q, c.k2, c.v2), "causal"),
    "one head for all": (attend, lambda c: (c.q, c.k2[:, :, :1], c.v2[:, :, :1]), ""),
    "repeated heads": (repeated_heads, lambda c: (c.q, c.k2, c.v2), ""),
    "einsums": (einsums, lambda c: (c.q, c.k, c.v), ""),
    "matmuls": (matmuls, lambda c: (c.q, c.k, c.v), "causal"),
    "minus infinity": (lambda *x: matmuls(*x, excluded=-np.inf), lambda c: (c.q, c.k, c.v), "causal"),
    "-1e4": (
        lambda q, k, v, mask: einsums(q, k, v, lambda scores: jnp.where(mask, scores, -1e4)),
        lambda c: (c.q, c.k, c.v, c.mask),
        "mask",
    ),
    "-60 beside low scores": (
        lambda q, k, v, mask, bias: einsums(q, k, v, lambda s: jnp.where(mask, s + lax.stop_gradient(bias), -60.0)),
        lambda c: (c.q, c.k, c.v, c.mask, c.bias.at[..., 5:9, :].add(-60)),
        "bias, mask",
    ),
    "-1e4, causal": (lambda *x: matmuls(*x, excluded=-1e4), lambda c: (c.q, c.k, c.v), "causal"),
    "-2, causal": (lambda *x: matmuls(*x, excluded=-2.0), lambda c: (c.q, c.k, c.v), "mask"),
    "NaN rows": (
        lambda q, k, v, mask: einsums(q, k, v, lambda scores: jnp.where(mask, scores, -jnp.inf)),
        lambda c: (c.q, c.k, c.v, c.mask),
        "mask",
    ),
    "mask of floats": (masked_by(lambda: causal_of_floats() > 0), lambda c: (c.q, c.k, c.v), "causal"),
    "constant mask": (masked_by(lambda: jnp.asarray(np.tri(T, S, dtype=bool))), lambda c: (c.q, c.k, c.v), "causal"),
    "constant mask of floats": (
        masked_by(lambda: jnp.asarray(np.tri(T, S, dtype=np.float32)) != 0),
        lambda c: (c.q, c.k, c.v),
        "causal",
    ),
    "constant window": (
        masked_by(lambda: jnp.asarray(np.tri(T, S, 2, dtype=bool) ^ np.tri(T, S, -5, dtype=bool))),
        lambda c: (c.q, c.k, c.v),
        "window",
    ),
    "constant of no window": (
        masked_by(lambda: jnp.asarray(np.arange(T * S).reshape(T, S) % 7 < 4)),
        lambda c: (c.q, c.k, c.v),
        "mask",
    ),
    "causal and padded": (padded, lambda c: (c.q, c.k, c.v, c.seen), "causal, mask"),
    "added causal mask": (adds(causal_of_floats), lambda c: (c.q, c.k, c.v), "causal"),
    "added 1e9": (adds(lambda: jnp.tri(T, S, dtype=bool), -1e9), lambda c: (c.q, c.k, c.v), "causal"),
    "added padding": (added_padding, lambda c: (c.q, c.k, c.v, c.seen), "mask"),
    "added padding and bias": (added_padding, lambda c: (c.q, c.k, c.v, c.seen, c.bias), "bias"),
    "cache": (cached, lambda c: (c.x, c.k, c.v, jnp.int32(5)), "lengths"),
    "decoding": (decoded, lambda c: (c.x, c.k, c.v), "lengths"),
    "added mask": (added_mask, lambda c: (c.q, c.k, c.v, c.seen), "bias"),
    "divided later": (divided_later, lambda c: (c.q / 4, c.k, c.v), ""),
    "no maximum": (no_maximum, lambda c: (c.q, c.k, c.v), ""),
    "no maximum, NaN rows": (no_maximum, lambda c: (c.q, c.k, c.v, c.mask), "mask"),
    "matrices": (
        lambda q, k, v: jax.nn.softmax(q @ k.T / 4) @ v,
        lambda c: (c.q[0, :, 0], c.k[0, :, 0], c.v[0, :, 0]),
        "",
    ),
    "vmap": (
        jax.vmap(lambda q, k, v: jax.nn.softmax(q @ k.T / 4) @ v),
        lambda c: (c.q[:, :, 0], c.k[:, :, 0], c.v[:, :, 0]),
        "",
    ),
    "vmap of batches": (
        jax.vmap(attend),
        lambda c: (jnp.stack([c.q, c.q + 1]), jnp.stack([c.k, c.k]), jnp.stack([c.v, -c.v])),
        "",
    ),
    "scan": (scanned, lambda c: (c.q, c.k, c.v), ""),
    "block": (block, lambda c: (c.x, *c.weights), "causal"),
}


def run(fun: Program, *args: Any) -> tuple[Any, list[record.Attention]]:
    """The accelerated result, and what the report says of attentions."""
    record.clear()
    with jax_nano.accelerate():
        got = jax.jit(lambda *x: fun(*x))(*args)
    return got, [x for x, count in record.attentions() for _ in range(count)]


def in_float64(fun: Program, *args: Any) -> Any:
    with jax.enable_x64(True):
        wide = [x if x.dtype in (jnp.bool_, jnp.int32) else jnp.asarray(np.asarray(x, np.float64)) for x in args]
        return jax.jit(lambda *x: fun(*x))(*wide)


def bound(dtype: Any, expected: np.ndarray) -> float:
    """Of errors: sums of up to some hundred terms in float32; weights and result are rounded once to a narrow dtype."""
    eps = float(jnp.finfo(dtype).eps)
    return (2 * eps if dtype != jnp.float32 else 64 * eps) * max(1.0, float(np.nanmax(np.abs(expected))))


def check_close(got: Any, expected: Any, dtype: Any) -> None:
    expected = np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(np.asarray(got, np.float64)), np.isnan(expected))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=bound(dtype, expected))


# --- frameworks ---------------------------------------------------------------------------------------------------


def linen(x: Array, dtype: Any) -> tuple[Program, tuple[Any, ...]]:
    flax_linen = pytest.importorskip("flax.linen")
    layer = flax_linen.MultiHeadDotProductAttention(num_heads=N, dtype=dtype, deterministic=True)
    params = layer.init(jax.random.key(0), x)
    return lambda x, p: layer.apply(p, x, mask=flax_linen.make_causal_mask(x[..., 0])), (x, params)


def nnx(x: Array, dtype: Any) -> tuple[Program, tuple[Any, ...]]:
    flax_nnx = pytest.importorskip("flax.nnx")
    layer = flax_nnx.MultiHeadAttention(
        num_heads=N, in_features=x.shape[-1], decode=False, dtype=dtype, deterministic=True, rngs=flax_nnx.Rngs(0)
    )
    graph, state = flax_nnx.split(layer)
    return lambda x, s: flax_nnx.merge(graph, s)(x, mask=flax_nnx.make_causal_mask(x[..., 0])), (x, state)


def equinox(x: Array, dtype: Any) -> tuple[Program, tuple[Any, ...]]:
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.MultiheadAttention(N, x.shape[-1], key=jax.random.key(0), dtype=dtype)
    arrays, rest = eqx.partition(layer, eqx.is_array)
    mask = np.tril(np.ones((T, T), bool))

    def program(x: Array, arrays: Any) -> Array:
        attend = eqx.combine(arrays, rest)
        return jax.vmap(lambda y: attend(y, y, y, mask=jnp.asarray(mask)))(x.astype(dtype))

    return program, (x, arrays)


def haiku(x: Array, dtype: Any) -> tuple[Program, tuple[Any, ...]]:
    hk = pytest.importorskip("haiku")

    def layer(x: Array) -> Array:
        make = hk.MultiHeadAttention(N, H, w_init=hk.initializers.VarianceScaling())
        return make(x, x, x, mask=jnp.tril(jnp.ones((1, 1, T, T))))

    transformed = hk.without_apply_rng(hk.transform(layer))
    params = transformed.init(jax.random.key(0), x.astype(dtype))
    return lambda x, p: transformed.apply(p, x.astype(dtype)), (x, params)


FRAMEWORKS = [linen, nnx, equinox, haiku]
