"""Training with attention in programs as they are: which gradients become one call, which stay, and what both give."""

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
    T,
    attend,
    einsums,
    in_float64,
    run,
)
from jax import Array, lax
from programs import dots_of, ops

import jax_nano
from jax_nano._core import record

Args = tuple[Any, ...]


def is_float(x: Any) -> bool:
    return all(jnp.issubdtype(y.dtype, jnp.floating) for y in jax.tree.leaves(x))


def training(fun: Program, args: Args, wanted: tuple[int, ...] | None = None) -> Program:
    """A function of the same arguments that gives its loss, and the gradients of this by all floats among them."""
    wanted = wanted or tuple(i for i, x in enumerate(args) if is_float(x))

    def loss(*args: Any) -> Array:
        total = jnp.zeros((), jnp.float32)
        for out in jax.tree.leaves(fun(*args)):
            weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
            total = total + jnp.sum((jnp.sin(out) * weights).astype(jnp.float32))
        return total

    return jax.value_and_grad(loss, wanted)


def check(got: Any, expected: Any, dtype: Any, factor: float = 1) -> None:
    """Of gradients: relative to the largest number in each, unless it is all noise beside another one."""
    tolerance, beside = (2e-5 * factor, 0.05) if dtype == jnp.float32 else (0.04 * factor, 0.2)
    wanted = [np.asarray(x, np.float64) for x in jax.tree.leaves(expected)]
    overall = max(1e-3, *(np.max(np.abs(np.nan_to_num(x)), initial=0) for x in wanted))
    for x, y in zip(jax.tree.leaves(got), wanted, strict=True):
        found = np.asarray(x, np.float64)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(y))
        largest = max(np.max(np.abs(np.nan_to_num(y)), initial=0), beside * overall)
        np.testing.assert_allclose(found, y, rtol=0, atol=tolerance * largest)


ELSEWHERE = "something else than its gradients reads its scores or weights"
STAYS = {
    "bias": ELSEWHERE,  # its own gradient is made of the scores' cotangents
    "bias and mask": ELSEWHERE,
    "added padding and bias": ELSEWHERE,
    "one query": ELSEWHERE,  # XLA makes loops of products of vectors
}
NOT_REPORTED = ("divided later",)
DETAILS = {"added padding": "bias"}  # as a mask, it would not say which queries see no key


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"scan", "decoding", "cache"}))
def test_forms(rng: np.random.Generator, form: str) -> None:
    fun, arguments, detail = FORMS[form]
    args = arguments(Case(rng, jnp.float32))
    step = training(fun, args)
    got, told = run(step, *args)
    check(got[1], in_float64(step, *args)[1], jnp.float32)
    if form in NOT_REPORTED:
        assert told == []
    elif form in STAYS:
        assert [x.declined for x in told] == [STAYS[form]]
    else:
        detail = DETAILS.get(form, detail)
        assert [(x.declined, x.detail) for x in told] == [(None, ", ".join(filter(None, (detail, "gradients"))))]


@pytest.mark.parametrize("form", ["jax.nn", "causal", "mask", "grouped, causal", "lengths", "matmuls"])
def test_bfloat16(rng: np.random.Generator, form: str) -> None:
    fun, arguments, _ = FORMS[form]
    args = arguments(Case(rng, jnp.bfloat16))
    step = training(fun, args)
    got, told = run(step, *args)
    assert [x.declined for x in told] == [None]
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.float32, *(x.dtype for x in args if is_float(x))]
    wide = [x.astype(jnp.float32) if is_float(x) else x for x in args]
    check(got[1], in_float64(step, *wide)[1], jnp.bfloat16)


@pytest.mark.usefixtures("accelerated")
def test_no_matrix_of_scores_is_left(rng: np.random.Generator) -> None:
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 2, 16)), jnp.float32) for _ in range(3))
    step = jax.jit(training(lambda *x: attend(*x, is_causal=True), (q, k, v)))
    text = step.lower(q, k, v).compile().as_text()
    assert dots_of(text) == 0
    assert "64,64]" not in text
    assert text.count('custom_call_target="jax_nano_attention"') == 1
    assert text.count('custom_call_target="jax_nano_attention_gradients"') == 1
    assert ops(step, q, k, v)["product"] == 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_some_gradients(rng: np.random.Generator, wanted: tuple[int, ...]) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v
    step = training(attend, args, wanted)
    got, told = run(step, *args)
    assert [(x.declined, x.detail) for x in told] == [(None, "gradients")]
    check(got[1], in_float64(step, *args)[1], jnp.float32)


def test_only_the_values_gradient_stays(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v
    step = training(attend, args, (2,))
    got, told = run(step, *args)
    assert [x.declined is not None for x in told] == [True]
    check(got[1], in_float64(step, *args)[1], jnp.float32)


def test_gradients_without_a_result_are_reported(rng: np.random.Generator) -> None:
    """A loss that is linear in the result needs none of it."""
    c = Case(rng, jnp.float32)
    got, told = run(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2)), c.q, c.k, c.v)
    assert [x.declined for x in told] == ["only its gradients are computed, not its result"]
    check(got, in_float64(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2)), c.q, c.k, c.v), jnp.float32)


def test_a_cross_entropy_is_no_attention(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)

    def loss(x: Array, a: Array, b: Array) -> Array:
        return -jax.nn.log_softmax(jnp.tanh(x @ a) @ b)[..., 3].mean() + jax.nn.softmax(x @ b, axis=-1).max()

    _, told = run(jax.grad(loss, (0, 1, 2)), c.x[0], *c.weights[:2])
    assert told == []


def remat(q: Array, k: Array, v: Array) -> Array:
    return jax.checkpoint(lambda *x: attend(*x, is_causal=True))(q, k, v)


def twice_with_shared_keys(q: Array, k: Array, v: Array) -> Array:
    return attend(q, k, v) + attend(q * 2, k, v * q[:, :1, :, :].mean())


def one_after_the_other(q: Array, k: Array, v: Array) -> Array:
    return attend(attend(q, k, v), k, v)


def self_attention(q: Array, k: Array, v: Array) -> Array:
    del k, v
    return einsums(q, q, q)


def in_a_scan(q: Array, k: Array, v: Array) -> Array:
    body = jax.checkpoint(lambda x, w: (jnp.sin(attend(jnp.einsum("btnh,hg->btng", x, w), k, v)), None))
    return lax.scan(body, q, jnp.stack([k[0, :H, 0], v[0, :H, 0]]))[0]


def branches(q: Array, k: Array, v: Array) -> Array:
    return lax.cond(q[0, 0, 0, 0] > 0, lambda *x: attend(*x), lambda *x: attend(*x, is_causal=True), q, k, v)


PROGRAMS: dict[str, tuple[Program, int]] = {
    "remat": (remat, 1),
    "shared keys": (twice_with_shared_keys, 2),
    "one after the other": (one_after_the_other, 2),
    "self-attention": (self_attention, 1),
    "vmap": (jax.vmap(lambda q, k, v: attend(q, k, v, is_causal=True)), 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(rng: np.random.Generator, name: str) -> None:
    fun, count = PROGRAMS[name]
    c = Case(rng, jnp.float32)
    step = training(fun, (c.q, c.k, c.v), (0,) if name == "self-attention" else None)
    got, told = run(step, c.q, c.k, c.v)
    check(got[1], in_float64(step, c.q, c.k, c.v)[1], jnp.float32)
    assert [(x.declined, "gradients" in x.detail) for x in told] == [(None, True)] * count


def dropped(q: Array, k: Array, v: Array, kept: Array) -> Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
    weights = jnp.where(kept, jax.nn.softmax(scores) / 0.9, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def weights_too(q: Array, k: Array, v: Array, kept: Array) -> tuple[Array, Array]:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), weights[:, :1]


def entropy(q: Array, k: Array, v: Array, kept: Array) -> tuple[Array, Array]:
    """Whose gradient changes the cotangents of weights."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), jnp.sum(weights * weights, -1)


def other_gradient(q: Array, k: Array, v: Array, kept: Array) -> Array:
    """Scores whose gradient is not that of softmax."""

    @jax.custom_jvp
    def twice(s: Array) -> Array:
        return s * 1.0

    twice.defjvp(lambda s, t: (s[0], 2.0 * t[0] + jnp.where(kept, t[0], 0)))
    scores = twice(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def other_mask(q: Array, k: Array, v: Array, kept: Array) -> Array:
    """Where the backward half has zeros is not where the forward half has its mask."""

    @jax.custom_jvp
    def masked(s: Array) -> Array:
        return jnp.where(kept, s, -1e9)

    masked.defjvp(lambda s, t: (masked(s[0]), jnp.where(~kept, t[0], 0)))
    scores = masked(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def stopped_total(q: Array, k: Array, v: Array, kept: Array) -> Array:
    e = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    return jnp.einsum("bhqk,bkhd->bqhd", e / lax.stop_gradient(e.sum(-1, keepdims=True)), v)


NEAR_MISSES: dict[str, Program] = {
    "dropout": dropped,
    "weights returned": weights_too,
    "entropy": entropy,
    "another gradient": other_gradient,
    "another mask": other_mask,
    "a constant sum": stopped_total,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_gradient_of_attention_stays(rng: np.random.Generator, name: str) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v, c.masks
    step = training(NEAR_MISSES[name], args)
    got, told = run(step, *args)
    assert [x.declined is not None for x in told] == [True], told
    check(got[1], in_float64(step, *args)[1], jnp.float32)


@pytest.mark.parametrize("fun", [in_a_scan, branches])
def test_loops_and_branches(rng: np.random.Generator, fun: Program) -> None:
    c = Case(rng, jnp.float32)
    step = training(fun, (c.q, c.k, c.v))
    got, _ = run(step, c.q, c.k, c.v)
    check(got[1], in_float64(step, c.q, c.k, c.v)[1], jnp.float32)


def test_second_order(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v
    first = training(attend, args)
    step = jax.grad(lambda *x: sum(jnp.sum(jnp.sin(y)) for y in first(*x)[1]), (0, 1, 2))
    got, _ = run(step, *args)
    check(got, in_float64(step, *args), jnp.float32, factor=4)


def test_a_step_that_donates_what_it_updates(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v
    step = training(lambda *x: attend(*x, is_causal=True), args)

    def update(*args: Array) -> tuple[Array, ...]:
        return tuple(x - 0.1 * y for x, y in zip(args, step(*args)[1], strict=True))

    expected = in_float64(update, *args)
    with jax_nano.accelerate():
        got = jax.jit(update, donate_argnums=(0, 1, 2))(*map(jnp.array, args))
    check(got, expected, jnp.float32)


def test_a_loop_of_steps(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v
    step = training(lambda *x: attend(*x, is_causal=True), args)

    def steps(*args: Array) -> Any:
        def body(_: int, state: Any) -> Any:
            return tuple(x - 0.1 * y for x, y in zip(state, step(*state)[1], strict=True))

        return lax.fori_loop(0, 3, body, args)

    got, told = run(steps, *args)
    check(got, in_float64(steps, *args), jnp.float32, factor=4)
    assert [(x.declined, x.detail) for x in told] == [(None, "causal, gradients")]


def test_the_gradient_of_a_bias_stays(rng: np.random.Generator) -> None:
    c = Case(rng, jnp.float32)
    args = c.q, c.k, c.v, c.bias
    step = training(lambda *x: attend(*x[:3], bias=x[3]), args)
    got, told = run(step, *args)
    assert [x.declined is not None for x in told] == [True]
    check(got[1], in_float64(step, *args)[1], jnp.float32)


@pytest.mark.parametrize("make", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_frameworks(rng: np.random.Generator, make: Callable[..., Any], dtype: Any) -> None:
    fun, args = make(jnp.asarray(rng.standard_normal((B, T, N * H)), jnp.float32), dtype)
    step = training(fun, args)
    got, told = run(step, *args)
    assert [(x.detail, x.declined) for x in told] == [("causal, gradients", None)]
    assert len(record.attentions()) == 1
    check(got[1], jax.jit(lambda *x: step(*x))(*args)[1], dtype)
