"""No copies: what XLA compiles holds our calls, and nothing that moves an operand or a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from programs import copies, ops

import jax_nano
from jax_nano._core import jax_compat

SCORES, VALUES = "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.asarray(reference.random(rng, shape)) for shape in shapes]


def gradients(fun: Callable[..., Any], count: int = 2) -> Callable[..., Any]:
    """The gradients of a function with a cotangent that is not constant."""
    return jax.grad(lambda *args: jnp.sin(fun(*args)).sum(), tuple(range(count)))


PROGRAMS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "a @ b": (jax_nano.matmul, [(9, 17), (17, 25)]),
    "a.T @ b": (lambda a, b: jax_nano.matmul(a.T, b), [(17, 9), (17, 25)]),
    "a @ b.T": (lambda a, b: jax_nano.matmul(a, b.T), [(9, 17), (25, 17)]),
    "a.T @ b.T": (lambda a, b: jax_nano.matmul(a.T, b.T), [(17, 9), (25, 17)]),
    "a.T.T @ b": (lambda a, b: jax_nano.matmul(a.T.T, b), [(9, 17), (17, 25)]),
    "matrix vector": (jax_nano.matmul, [(9, 17), (17,)]),
    "vector matrix": (jax_nano.matmul, [(17,), (17, 25)]),
    "vector vector": (jax_nano.matmul, [(17,), (17,)]),
    "matrices": (jax_nano.matmul, [(5, 9, 17), (5, 17, 25)]),
    "matrices.mT": (lambda a, b: jax_nano.matmul(a.mT, b), [(5, 17, 9), (5, 17, 25)]),
    "stack @ b": (jax_nano.matmul, [(5, 9, 17), (17, 25)]),
    "a @ stack": (jax_nano.matmul, [(9, 17), (5, 17, 25)]),
    "broadcast batches": (jax_nano.matmul, [(5, 1, 9, 17), (1, 7, 17, 25)]),
    "batch of one": (jax_nano.matmul, [(1, 9, 17), (5, 17, 25)]),
    "scores": (partial(jax_nano.einsum, SCORES), [(2, 16, 3, 8), (2, 24, 3, 8)]),
    "values": (partial(jax_nano.einsum, VALUES), [(2, 3, 16, 24), (2, 24, 3, 8)]),
    "scores by jnp": (
        partial(jnp.einsum, SCORES, _dot_general=jax_nano.dot_general),
        [(2, 16, 3, 8), (2, 24, 3, 8)],
    ),
    "two contracting": (partial(jax_nano.einsum, "abi,abj->ij"), [(4, 5, 9), (4, 5, 11)]),
    "contracting apart": (partial(jax_nano.einsum, "aibc,ajb->ijc"), [(4, 9, 5, 6), (4, 11, 5)]),
    "several free": (partial(jax_nano.einsum, "abk,kcd->abcd"), [(4, 5, 9), (9, 6, 7)]),
    "result reversed": (partial(jax_nano.einsum, "ik,kj->ji"), [(9, 17), (17, 25)]),
    "tensordot": (partial(jax_nano.tensordot, axes=((0, 2), (2, 1))), [(4, 5, 6), (7, 6, 4)]),
    "inner": (jax_nano.inner, [(9, 17), (25, 17)]),
    "vmap both": (jax.vmap(jax_nano.matmul), [(5, 9, 17), (5, 17, 25)]),
    "vmap lhs": (jax.vmap(jax_nano.matmul, (0, None)), [(5, 9, 17), (17, 25)]),
    "vmap rhs": (jax.vmap(jax_nano.matmul, (None, 0)), [(9, 17), (5, 17, 25)]),
    "vmap inner axes": (jax.vmap(jax_nano.matmul, (2, 1)), [(9, 17, 5), (17, 5, 25)]),
    "vmap last axis": (jax.vmap(jax_nano.matmul, (None, 2)), [(9, 17), (17, 25, 5)]),
    "vmap vmap": (
        jax.vmap(jax.vmap(jax_nano.matmul, (None, 0)), (0, None)),
        [(3, 9, 17), (5, 17, 25)],
    ),
    "vmap matrix vector": (jax.vmap(jax_nano.matmul, (None, 0)), [(9, 17), (5, 17)]),
    "matvec": (jax_nano.matvec, [(5, 9, 17), (17,)]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_call_and_no_copies(name: str, rng: np.random.Generator) -> None:
    fun, shapes = PROGRAMS[name]
    found = ops(fun, *arrays(rng, *shapes))
    assert found["product"] == 1
    assert not copies(found), found
    assert not found["dot"]


# The calls of a gradient read every operand and cotangent where it is, and store in the layout of what the
# caller has, transposed or not. What is left: the transpose of a result with a batch dimension last is ours, and
# XLA copies a gradient to which a broadcast dimension returns. Both are of results, once each.
RESULTS_MOVED = {"broadcast batches": 1, "vmap inner axes": 1}


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - {"vector vector", "scores by jnp"}))
def test_gradients_without_copies(name: str, rng: np.random.Generator) -> None:
    fun, shapes = PROGRAMS[name]
    found = ops(gradients(fun), *arrays(rng, *shapes))
    assert found["product"] == 3
    assert max(found["transpose"], found["copy"]) <= RESULTS_MOVED.get(name, 0), found
    assert name in RESULTS_MOVED or not copies(found), found
    assert not found["dot"]


def test_second_derivatives_without_copies(rng: np.random.Generator) -> None:
    def twice(a: jax.Array, b: jax.Array) -> jax.Array:
        return gradients(jax_nano.matmul)(a, b)[0]

    found = ops(gradients(twice), *arrays(rng, (9, 17), (17, 25)))
    assert found["product"] >= 5
    assert not copies(found), found


def test_transposes_of_computed_operands_are_folded(rng: np.random.Generator) -> None:
    found = ops(lambda a, b: jax_nano.matmul(jnp.exp(a).T, jnp.tanh(b)), *arrays(rng, (17, 9), (17, 25)))
    assert found["product"] == 1
    assert not copies(found), found


def test_a_whole_attention_layer(rng: np.random.Generator) -> None:
    """Projections, scores, values, and their gradients."""

    def attention(x: jax.Array, wqkv: jax.Array, wo: jax.Array) -> jax.Array:
        q, k, v = (jax_nano.einsum("bsm,mhd->bshd", x, w) for w in wqkv)
        p = jax.nn.softmax(jax_nano.einsum(SCORES, q, k))
        return jax_nano.einsum("bshd,hdm->bsm", jax_nano.einsum(VALUES, p, v), wo)

    args = arrays(rng, (2, 16, 24), (3, 24, 3, 8), (3, 8, 24))
    forward = ops(attention, *args)
    assert forward["product"] == 6
    assert not forward["transpose"]
    backward = ops(gradients(attention, 3), *args)
    assert backward["product"] == 18
    assert not backward["transpose"]
    assert not backward["dot"]


def test_a_batch_dimension_last_costs_one_transpose(rng: np.random.Generator) -> None:
    """Kernels store rows of C, so this one result is not stored in place. Operands still are."""
    a, b = arrays(rng, (5, 9, 17), (5, 17, 25))
    found = ops(partial(jax_nano.einsum, "bij,bjk->ikb"), a, b)
    assert found["product"] == 1
    assert found["fusion"] <= 1
    want = reference.expected("bij,bjk->ikb", np.asarray(a), np.asarray(b))
    want.check(jax_nano.einsum("bij,bjk->ikb", a, b))


@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint])
def test_transposes_meet_an_equation_that_was_traced_before(
    around: Callable[..., Any], rng: np.random.Generator
) -> None:
    inner = jax.jit(jax_nano.matmul, inline=jax_compat.INLINE)
    found = ops(around(lambda a, b: inner(a.T, b.T)), *arrays(rng, (17, 9), (25, 17)))
    assert found["product"] == 1
    assert not copies(found), found
    assert not found["dot"]


def test_folding_stops_at_a_jit(rng: np.random.Generator) -> None:
    """Still right where the transpose is not in sight."""
    a, b = arrays(rng, (17, 9), (17, 25))
    inner = jax.jit(lambda a, b: jax_nano.matmul(a, b))
    got = jax.jit(lambda a, b: inner(a.T, b))(a, b)
    reference.expected("km,kn->mn", np.asarray(a), np.asarray(b)).check(got)


def test_in_a_loop_nothing_is_copied_per_step(rng: np.random.Generator) -> None:
    a, b = arrays(rng, (16, 16), (16, 16))

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax_nano.matmul(x.T, b), None

    found = ops(lambda a: jax.lax.scan(body, a, None, length=3)[0], a)
    assert found["product"] == 1
    assert not found["transpose"]
