"""Attention in programs as they are: which forms become one call, which stay, and what both give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_programs import (
    FORMS,
    FRAMEWORKS,
    B,
    Case,
    H,
    N,
    Program,
    S,
    T,
    added_padding,
    attend,
    check_close,
    einsums,
    in_float64,
    run,
)
from jax import Array, lax
from programs import dots_of, ops

import jax_nano
from jax_nano._core import record
from jax_nano._dispatch import decision


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_becomes_one_call(rng: np.random.Generator, form: str, dtype: Any) -> None:
    fun, arguments, detail = FORMS[form]
    args = arguments(Case(rng, dtype))
    got, told = run(fun, *args)
    assert [(x.detail, x.declined) for x in told] == [(detail, None)]
    if dtype == jnp.float32 or form not in ("scan", "block", "decoding"):  # which round between attentions
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(in_float64(fun, *args)), strict=True):
            check_close(x, y, dtype)
    plain = jax.jit(lambda *x: fun(*x))(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        assert x.dtype == y.dtype
        # XLA rounds more often to a narrow dtype.
        if dtype == jnp.float32:
            check_close(x, y, dtype)
        else:
            np.testing.assert_allclose(*(np.asarray(z, np.float64) for z in (x, y)), rtol=0, atol=0.1)


@pytest.mark.usefixtures("accelerated")
def test_no_product_is_left(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    counted = ops(lambda *x: attend(*x, is_causal=True), c.q, c.k, c.v)
    assert (counted["attention"], counted["product"], counted["dot"]) == (1, 0, 0)
    assert dots_of(jax.jit(lambda *x: attend(*x)).lower(c.q, c.k, c.v).compile().as_text()) == 0


def test_float16(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float16)
    got, told = run(einsums, c.q, c.k, c.v)
    assert [x.declined for x in told] == [None]
    check_close(got, in_float64(einsums, c.q, c.k, c.v), jnp.float16)


def dropout(q: Array, k: Array, v: Array, keep: Array) -> Array:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(keep, weights / 0.9, 0), v)


def with_weights(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), weights


def with_scores(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v), scores


def over_queries(q: Array, k: Array, v: Array) -> Array:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-2)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def capped(q: Array, k: Array, v: Array) -> Array:
    return einsums(q, k, v, lambda scores: 5 * jnp.tanh(scores / 5))


def high_mask(q: Array, k: Array, v: Array, mask: Array) -> Array:
    weights = jnp.exp(jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k), -2.0))
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def two_masks(q: Array, k: Array, v: Array, mask: Array, masks: Array) -> Array:
    return einsums(q, k, v, lambda scores: jnp.where(masks, jnp.where(mask, scores, -1e4), -1e9))


def biased_mask(q: Array, k: Array, v: Array, mask: Array, bias: Array) -> Array:
    return einsums(q, k, v, lambda scores: jnp.where(mask, scores, -1e4) + bias)


def bias_and_infinity(q: Array, k: Array, v: Array, mask: Array, bias: Array) -> Array:
    return einsums(q, k, v, lambda scores: jnp.where(mask, scores + bias, -jnp.inf))


def loss(q: Array, k: Array, v: Array) -> Array:
    return jnp.sum(jnp.sin(attend(q, k, v)))


NEAR_MISSES: dict[str, tuple[Program, Callable[[Case], tuple[Any, ...]], str]] = {
    "dropout": (dropout, lambda c: (c.q, c.k, c.v, c.masks), "between softmax and the second product"),
    "weights returned": (with_weights, lambda c: (c.q, c.k, c.v), "something else"),
    "scores returned": (with_scores, lambda c: (c.q, c.k, c.v), "something else"),
    "another axis": (over_queries, lambda c: (c.q, c.k, c.v), "not divided by their sum over the keys"),
    "capped": (capped, lambda c: (c.q, c.k, c.v), "tanh"),
    "a mask that scores may be below": (high_mask, lambda c: (c.q / 4, c.k, c.v, c.mask), "may be less than"),
    "two masks": (two_masks, lambda c: (c.q, c.k, c.v, c.mask, c.masks), "different numbers"),
    "a biased mask": (biased_mask, lambda c: (c.q, c.k, c.v, c.mask, c.bias), "a bias is added"),
    "bias and infinity": (bias_and_infinity, lambda c: (c.q, c.k, c.v, c.mask, c.bias), "a bias is added"),
}


def test_queries_that_an_added_mask_excludes_from_all_keys(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    seen = c.seen.at[0].set(False)
    got, told = run(added_padding, c.q, c.k, c.v, seen)
    assert [(x.detail, x.declined) for x in told] == [("mask", None)]
    check_close(got, jax.jit(lambda *x: added_padding(*x))(c.q, c.k, c.v, seen), jnp.float32)
    check_close(got[0], jnp.broadcast_to(c.v[0].mean(0), got[0].shape), jnp.float32)


@pytest.mark.parametrize("excluded", [-1e9, -np.inf])
def test_masks_added_to_each_other(rng: np.random.Generator, excluded: float) -> None:
    c = Case(rng, jnp.float32)

    def program(q: Array, k: Array, v: Array, seen: Array, masks: Array) -> Array:
        first, second = (jnp.where(x, 0.0, excluded) for x in (seen[:, None, None, :], masks))
        return einsums(q, k, v, lambda s: s + first + second)

    args = c.q, c.k, c.v, c.seen, c.masks.at[:, :, 0].set(False)
    got, _ = run(program, *args)
    check_close(got, jax.jit(lambda *x: program(*x))(*args), jnp.float32)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_not_attention_stays(rng: np.random.Generator, name: str) -> None:
    fun, arguments, reason = NEAR_MISSES[name]
    args = arguments(Case(rng, jnp.float32))
    got, told = run(fun, *args)
    assert [x.declined is not None and reason in x.declined for x in told] == [True], told
    assert sum(count for _, count in record.products()) >= 2
    expected = jax.jit(lambda *x: fun(*x))(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        check_close(x, y, jnp.float32)


def test_two_layers_of_dense_products_are_not_reported(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    _, told = run(lambda x, a, b: jax.nn.silu(x @ a) @ b, c.x[0], *c.weights[:2])
    assert told == []


def test_masked_infinities_do_not_leak(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    k, v = (x.at[:, 5:].set(jnp.nan) for x in (c.k, c.v))
    fun = FORMS["lengths"][0]
    lengths = jnp.full(B, 5, jnp.int32)
    got, told = run(fun, c.q, k, c.v, lengths)
    assert [x.declined for x in told] == [None]
    check_close(got, in_float64(fun, c.q, c.k, c.v, lengths), jnp.float32)
    del v


def test_lengths_out_of_range(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    fun = FORMS["lengths"][0]
    lengths = jnp.asarray([-3, 2**31 - 1], jnp.int32)
    got, _ = run(fun, c.q, c.k, c.v, lengths)
    check_close(got, in_float64(fun, c.q, c.k, c.v, lengths), jnp.float32)


def test_a_donated_query_is_not_overwritten_while_it_is_read(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    k, v = c.k[:, :T], c.v[:, :T]
    expected = in_float64(attend, c.q, k, v)
    with jax_nano.accelerate():
        got = jax.jit(lambda *x: attend(*x), donate_argnums=0)(jnp.array(c.q), k, v)
    check_close(got, expected, jnp.float32)


def test_the_gate_leaves_few_scores_to_xla(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    q, k, v = (jnp.asarray(rng.standard_normal((1, 4, 1, 8)), jnp.float32) for _ in range(3))
    _, told = run(attend, q, k, v)
    assert [x.declined for x in told] == ["XLA is as fast with so few scores"]


def test_the_report_names_it(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    run(lambda *x: attend(*x, is_causal=True), c.q, c.k, c.v)
    text = str(jax_nano.report())
    assert "1 attention run in one pass" in text
    arrays = "float32[2,24,4,16] x float32[2,40,4,16] x float32[2,40,4,16] -> float32[2,24,4,16], causal"
    assert f"attention  {arrays}" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", FRAMEWORKS)
def test_frameworks(rng: np.random.Generator, make: Any, dtype: Any) -> None:
    fun, args = make(jnp.asarray(rng.standard_normal((B, T, N * H)), jnp.float32), dtype)
    got, told = run(fun, *args)
    assert [(x.detail, x.declined) for x in told] == [("causal", None)]
    expected = np.asarray(jax.jit(lambda *x: fun(*x))(*args), np.float64)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


FILLS = {
    "added to what a condition excludes": (
        lambda s, keep, c, b: jnp.where(keep, s, c) + b,
        "a bias is added to scores",
    ),
    "as low as one of two fills": (
        lambda s, keep, c, b: jnp.where(keep, jnp.where(keep[::-1, ::-1].T, s + b, 0.5 * c), c),
        "a bias may be as low as",
    ),
    "before the fill": (lambda s, keep, c, b: jnp.where(keep, s + b, c), None),
    "without a maximum": (lambda s, keep, c, b: jnp.where(keep, s + b, c), "a bias may be as low as"),
}


@pytest.mark.parametrize("fill", [-1e9, -1e10, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("name", FILLS)
def test_a_bias_as_low_as_the_fill(
    name: str, fill: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding in a causal attention: the first queries see padded keys alone, which weigh what excluded ones weigh."""
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=False))
    scores, reason = FILLS[name]
    b, t, n, h = 2, 8, 2, 16
    q, k, v = (jnp.asarray(rng.standard_normal((b, t, n, h)), np.float32) for _ in range(3))
    padding = np.zeros((b, 1, 1, t), np.float32)
    padding[0, ..., :2] = -1e9
    keep = np.tril(np.ones((t, t), bool))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        s = scores(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.25, keep, fill, bias)
        if name == "without a maximum":
            weights = jnp.exp(s)
            weights /= weights.sum(-1, keepdims=True)
        else:
            weights = jax.nn.softmax(s, -1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    want = jax.jit(attend)(q, k, v, padding)
    jax_nano.clear_report()
    with jax_nano.accelerate():
        got = jax.jit(lambda *x: attend(*x))(q, k, v, padding)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    (found,) = [x for x in jax_nano.report() if x.kind == "attention"]
    assert (found.reason is None) if reason is None else (reason in str(found.reason))


_MOST = 2**31 - 1

WRAPPING: dict[str, Callable[[Array, Array, Array], Array]] = {
    "keys": lambda q, k, n: k + _MOST > q,
    "queries": lambda q, k, n: q + (_MOST - 3) >= k,
    "length and more": lambda q, k, n: k < n + 1,
    "length and less": lambda q, k, n: k < n - 1,
    "difference": lambda q, k, n: k - n < 0,
    "difference the other way": lambda q, k, n: n - k > 2,
    "key and more": lambda q, k, n: k + 1 <= n,
    "no sum": lambda q, k, n: k <= n,
}


@pytest.mark.parametrize("lengths", [(_MOST, 5), (-_MOST - 1, 5)])
@pytest.mark.parametrize("name", WRAPPING)
def test_sums_of_positions_that_wrap_around(name: str, lengths: tuple[int, int], rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)

    def program(q: Array, k: Array, v: Array, n: Array) -> Array:
        rows, columns = (lax.broadcasted_iota(jnp.int32, (B, 1, T, S), i) for i in (2, 3))
        seen = WRAPPING[name](rows, columns, n[:, None, None, None])
        return einsums(q, k, v, lambda s: jnp.where(seen, s, -1e9))

    args = c.q, c.k, c.v, jnp.asarray(lengths, jnp.int32)
    got, told = run(program, *args)
    assert [x.declined for x in told] == [None]
    check_close(got, jax.jit(lambda *x: program(*x))(*args), jnp.float32)
