"""Which dtype comes out, which values, and who computes: as lax, whatever goes in."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.lax import DotAlgorithm, DotAlgorithmPreset
from programs import ops, outcome

import jax_nano
from jax_nano import _native

DTYPES = [
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "int4", "uint4",
    "bfloat16", "float16", "float32", "complex64", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


def operand(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(rng.integers(-3 if not dtype.startswith(("u", "b")) else 0, 3, shape), dtype)


@pytest.mark.parametrize("lhs", DTYPES)
def test_promotion_is_jnps(lhs: str, rng: np.random.Generator) -> None:
    for rhs in DTYPES:
        a, b = operand(rng, (3, 4), lhs), operand(rng, (4, 5), rhs)
        assert type_of(jax_nano.matmul, a, b) == type_of(jnp.matmul, a, b), (lhs, rhs)


@pytest.mark.parametrize("lhs", DTYPES)
def test_values_are_jnps(lhs: str, rng: np.random.Generator) -> None:
    for rhs in {lhs, "float32", "int8"}:
        a, b = operand(rng, (3, 4), lhs), operand(rng, (4, 5), rhs)
        (got, our_error), (want, error) = outcome(jax_nano.matmul, a, b), outcome(jnp.matmul, a, b)
        assert (our_error and our_error[0]) == (error and error[0])  # XLA's own texts name its instructions
        if error is None:
            np.testing.assert_array_equal(got, want, err_msg=f"{lhs} x {rhs}")


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128", "uint64"])
def test_x64(dtype: str, rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        for other in (dtype, "float32", "int32"):
            a, b = operand(rng, (3, 4), dtype), operand(rng, (4, 5), other)
            got, want = jax_nano.matmul(a, b), jnp.matmul(a, b)
            assert got.aval == want.aval
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_weak_types() -> None:
    weak = jnp.broadcast_to(jnp.asarray(2.0), (3, 3))
    weak_int = jnp.broadcast_to(jnp.asarray(2), (3, 3))
    assert weak.weak_type
    arrays = [weak, weak_int, jnp.ones((3, 3), jnp.bfloat16), jnp.ones((3, 3), jnp.int8), jnp.ones((3, 3))]
    for name in ("matmul", "dot", "inner", "vdot", "tensordot"):
        for a, b in itertools.product(arrays, arrays):
            ours, theirs = (type_of(getattr(m, name), a, b) for m in (jax_nano, jnp))
            assert ours == theirs, (name, a, b)
    matmul = {"dimension_numbers": (((1,), (0,)), ((), ()))}
    for a, b in itertools.product(arrays, arrays):
        ours, theirs = (type_of(partial(m.dot_general, **matmul), a, b) for m in (jax_nano, jax.lax))
        assert ours == theirs


def type_of(fun: Any, *args: jax.Array) -> Any:
    out, error = outcome(jax.eval_shape, fun, *args)
    return error or (out.shape, out.dtype, out.weak_type)


def test_gradients_have_the_types_of_their_operands(rng: np.random.Generator) -> None:
    weak = jnp.broadcast_to(jnp.asarray(2.0), (3, 3))
    for a, b in itertools.product((weak, jnp.ones((3, 3), jnp.bfloat16), jnp.ones((3, 3), jnp.float16)), repeat=2):
        ours, theirs = (
            jax.eval_shape(jax.grad(lambda a, b, m=m: m.matmul(a, b).astype(jnp.float32).sum(), (0, 1)), a, b)
            for m in (jax_nano, jnp)
        )
        assert [(x.dtype, x.weak_type) for x in ours] == [(x.dtype, x.weak_type) for x in theirs]


@pytest.mark.parametrize("preset", list(DotAlgorithmPreset), ids=lambda p: p.name)
def test_dot_algorithm_presets(preset: DotAlgorithmPreset, rng: np.random.Generator) -> None:
    a, b = operand(rng, (16, 16), "float32"), operand(rng, (16, 16), "float32")
    ours, theirs = (jax.jit(partial(m.matmul, precision=preset)) for m in (jax_nano, jnp))
    (got, our_error), (want, error) = outcome(ours, a, b), outcome(theirs, a, b)
    assert our_error == error
    if error is None:
        np.testing.assert_array_equal(got, want)
        assert not ops(ours, a, b)["product"]


def test_dot_algorithm(rng: np.random.Generator) -> None:
    a = operand(rng, (16, 16), "float32")
    algorithm = DotAlgorithm(np.float32, np.float32, np.float32)
    for precision in (algorithm, "F32_F32_F32", "TF32_TF32_F32"):
        ours, theirs = (jax.jit(partial(m.matmul, precision=precision)) for m in (jax_nano, jnp))
        try:
            theirs.lower(a, a)
        except ValueError as error:
            with pytest.raises(ValueError, match="not supported by dot_general on CPU"):
                ours.lower(a, a)
            del error


def test_default_matmul_precision(rng: np.random.Generator) -> None:
    a = operand(rng, (16, 16), "float32")

    def precision(matmul: Any) -> Any:
        return jax.make_jaxpr(matmul)(a, a).eqns[0].params["precision"]

    for default in ("highest", "bfloat16", "F32_F32_F32", "BF16_BF16_F32"):
        with jax.default_matmul_precision(default):
            assert precision(jax_nano.matmul) == precision(jnp.matmul) is not None
            np.testing.assert_array_equal(jax_nano.matmul(a, a), jnp.matmul(a, a))
            grad = jax.make_jaxpr(jax.grad(lambda a: jax_nano.matmul(a, a).sum()))(a)
            products = [e for e in grad.eqns if e.primitive is jax_nano.dot_general_p]
            assert {e.params["precision"] for e in products} == {precision(jnp.matmul)}


def test_who_computes(rng: np.random.Generator) -> None:
    """Kernels compute what they support, XLA the rest, and operands of different dtypes are converted."""
    f32 = operand(rng, (16, 16), "float32")
    assert ops(jax_nano.matmul, f32, f32)["product"] == 1
    for dtype in ("bool", "int32", "complex64"):
        x = operand(rng, (16, 16), dtype)
        want = int(_native.supports(x.dtype.name, x.dtype.name, x.dtype.name))
        assert ops(jax_nano.matmul, x, x)["product"] == want
    mixed = ops(jax_nano.matmul, f32, operand(rng, (16, 16), "bfloat16"))
    assert mixed["product"] == 1
    assert mixed["dot"] == 0


def test_special_values(rng: np.random.Generator) -> None:
    a = reference.random(rng, (9, 33))
    b = reference.random(rng, (33, 17))
    a[2, 5], a[3, 0], b[1, 4], b[32, 16] = np.nan, np.inf, -np.inf, np.nan
    a[4], b[:, 7] = 0, np.inf
    reference.expected("mk,kn->mn", a, b).check(jax_nano.matmul(a, b))
    reference.expected("km,kn->mn", a.T.copy(), b).check(jax_nano.einsum("km,kn->mn", a.T.copy(), b))
