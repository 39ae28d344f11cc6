"""Which dtype comes out, which values, and who computes: as lax, whatever goes in."""

from __future__ import annotations

import itertools
import re
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
from jax_nano._core import native
from jax_nano._dispatch import decision

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


BYTES = list(itertools.product(("int8", "uint8"), repeat=2))
NUMBERS = (((1,), (0,)), ((), ()))


def kernels_here(*names: str) -> bool:
    return native.supports(*names)


@pytest.mark.parametrize(("lhs", "rhs"), BYTES)
def test_products_of_bytes(lhs: str, rhs: str, rng: np.random.Generator) -> None:
    """All signs and all results that lax knows, on the whole range; sums that wrap around and that do not."""
    a, b = (reference.random(rng, shape, dtype) for shape, dtype in (((9, 300), lhs), ((300, 17), rhs)))
    a[0], b[:, 0] = np.iinfo(lhs).min, np.iinfo(rhs).min
    a[1], b[:, 1] = np.iinfo(lhs).max, np.iinfo(rhs).max
    exact = a.astype(np.int64) @ b.astype(np.int64)
    for preferred in (None, "int8", "uint8", "int16", "uint16", "int32", "uint32", "float32"):
        ours, theirs = (
            jax.jit(partial(m.dot_general, dimension_numbers=NUMBERS, preferred_element_type=preferred))
            for m in (jax_nano, jax.lax)
        )
        assert type_of(ours, a, b) == type_of(theirs, a, b)
        got = ours(a, b)
        np.testing.assert_array_equal(got, exact.astype(got.dtype), err_msg=str(preferred))
        found = ops(ours, a, b)
        assert (found["product"], found["dot"]) == (1, 0) or not kernels_here(lhs, rhs, "int32")
    np.testing.assert_array_equal(jax_nano.matmul(a, b), jnp.matmul(a, b))
    vmapped = jax.vmap(jax_nano.matmul, (0, None))(a.reshape(3, 3, 300), b)
    np.testing.assert_array_equal(vmapped.reshape(9, 17), jnp.matmul(a, b))


def test_bytes_beside_wider_operands(rng: np.random.Generator) -> None:
    a = reference.random(rng, (9, 33), np.int8)
    for other in ("bfloat16", "float16", "float32", "int16", "int32"):
        b = operand(rng, (33, 17), other)
        for args in ((a, b), (b.T, a.T)):
            got, want = jax_nano.matmul(*args), jnp.matmul(*args)
            assert got.aval == want.aval
            np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0.01, atol=4)


MIXED = [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16"), ("float16", "float32")]


@pytest.mark.parametrize(("lhs", "rhs"), MIXED)
def test_mixed_operands_are_read_as_they_are(lhs: str, rhs: str, rng: np.random.Generator) -> None:
    a, b = (jnp.asarray(reference.random(rng, shape), t) for shape, t in (((9, 33), lhs), ((33, 17), rhs)))
    if not kernels_here(lhs, rhs, "float32"):
        pytest.skip("no kernels for mixed floats on this CPU")
    found = ops(jax_nano.matmul, a, b)
    assert found["product"] == 1
    assert not found["convert"] + found["fusion"], found
    reference.expected("mk,kn->mn", np.asarray(a), np.asarray(b)).check(jax_nano.matmul(a, b))
    ours, theirs = (jax.grad(lambda a, b, m=m: jnp.sin(m.matmul(a, b)).sum(), (0, 1))(a, b) for m in (jax_nano, jnp))
    for x, y in zip(ours, theirs, strict=True):
        assert x.aval == y.aval
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype: str, rng: np.random.Generator) -> None:
    """One rounding, of a float32 sum; derivatives as well."""
    a, b = (jnp.asarray(reference.random(rng, shape), dtype) for shape in ((9, 33), (33, 17)))
    for preferred in (None, jnp.float32):
        matmul = partial(jax_nano.matmul, preferred_element_type=preferred)
        want = reference.expected("mk,kn->mn", np.asarray(a), np.asarray(b), out=preferred or a.dtype)
        want.check(matmul(a, b))
        found = ops(matmul, a, b)
        assert not found["convert"] + found["fusion"], found
    da, db = jax.vjp(jax_nano.matmul, a, b)[1](jnp.ones((9, 17), dtype))
    ones = np.ones((9, 17), a.dtype)
    reference.expected("mn,kn->mk", ones, np.asarray(b), out=a.dtype).check(da)
    reference.expected("mk,mn->kn", np.asarray(a), ones, out=a.dtype).check(db)


PRESETS = DotAlgorithmPreset
ROUNDING = ("BF16_BF16_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6")
ON_KERNELS = {PRESETS.DEFAULT, PRESETS.F32_F32_F32, PRESETS.F64_F64_F64, *(PRESETS[name] for name in ROUNDING)}
needs_rounding_kernels = pytest.mark.skipif(
    not all(native.supports(*("float32",) * 3, name) for name in ROUNDING), reason="no kernels on this CPU"
)


@needs_rounding_kernels
@pytest.mark.parametrize("preset", list(DotAlgorithmPreset), ids=lambda p: p.name)
def test_dot_algorithm_presets(preset: DotAlgorithmPreset, rng: np.random.Generator) -> None:
    a, b = operand(rng, (16, 16), "float32"), operand(rng, (16, 16), "float32")
    ours, theirs = (jax.jit(partial(m.matmul, precision=preset)) for m in (jax_nano, jnp))
    (got, our_error), (want, error) = outcome(ours, a, b), outcome(theirs, a, b)
    assert our_error == error
    if error is None:
        np.testing.assert_array_equal(got, want)
        assert ops(ours, a, b)["product"] == (preset in ON_KERNELS)


@needs_rounding_kernels
@pytest.mark.parametrize(("lhs", "rhs"), [*itertools.product(("float32", "bfloat16", "float16", "int8"), repeat=2)])
def test_types_under_algorithms(lhs: str, rhs: str, rng: np.random.Generator) -> None:
    a, b = operand(rng, (9, 16), lhs), operand(rng, (16, 17), rhs)
    for preset, preferred in itertools.product(("DEFAULT", "F32_F32_F32", *ROUNDING), (None, "float32", "bfloat16")):
        options = {"dimension_numbers": NUMBERS, "precision": preset, "preferred_element_type": preferred}
        ours, theirs = (partial(m.dot_general, **options) for m in (jax_nano, jax.lax))
        assert type_of(ours, a, b) == type_of(theirs, a, b)
        got = np.asarray(jax.jit(ours)(a, b), np.float32)
        np.testing.assert_array_equal(got, np.asarray(a, np.float32) @ np.asarray(b, np.float32), err_msg=str(options))


def rounded(x: Any) -> np.ndarray:
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float32)


@needs_rounding_kernels
def test_algorithms_round_operands_as_named(rng: np.random.Generator) -> None:
    """One, two and three terms of bfloat16 hold 8, 16 and 24 bits."""
    eye = np.eye(16, dtype=np.float32)
    x = np.full((16, 16), 1 + 2.0**-9 + 2.0**-18, np.float32)
    terms = dict(zip(ROUNDING, (1, 1 + 2.0**-9, 1 + 2.0**-9 + 2.0**-18), strict=True))
    for name, value in terms.items():
        for args in ((x, eye), (eye, x)):
            np.testing.assert_array_equal(jax_nano.matmul(*args, precision=name), np.full_like(x, value))

    a, b = reference.random(rng, (33, 200)), reference.random(rng, (200, 47))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    scale = np.abs(a).astype(np.float64) @ np.abs(b)
    error = [np.max(np.abs(jax_nano.matmul(a, b, precision=name) - exact) / scale) for name in ROUNDING]
    assert 2.0**-14 < error[0] < 2.0**-8
    assert error[1] < 2.0**-15
    assert error[2] < 2.0**-20
    reference.expected("mk,kn->mn", rounded(a), rounded(b)).check(jax_nano.matmul(a, b, precision=ROUNDING[0]))


@needs_rounding_kernels
@pytest.mark.parametrize("name", ROUNDING)
def test_algorithms_are_kept_by_transformations(name: str, rng: np.random.Generator) -> None:
    a, b, g = (reference.random(rng, shape) for shape in ((6, 33), (33, 17), (6, 17)))
    matmul = partial(jax_nano.matmul, precision=name)
    want = matmul(a, b)
    with jax.default_matmul_precision(name):
        np.testing.assert_array_equal(jax_nano.matmul(a, b), want)
    stacked = jax.vmap(matmul, (0, None))(jnp.stack([a, -a]), b)
    np.testing.assert_array_equal(stacked, jnp.stack([want, -want]))
    da, db = jax.jit(lambda a, b: jax.vjp(matmul, a, b)[1](g))(a, b)
    np.testing.assert_array_equal(da, matmul(g, b.T))
    np.testing.assert_array_equal(db, matmul(a.T, g))
    lowered = jax.jit(jax.grad(lambda a, b: jnp.sin(matmul(a, b)).sum(), (0, 1))).lower(a, b).as_text()
    assert len(re.findall(rf'algorithm(?:=| = "){name}\b', lowered)) == 3
    halves = jax.jit(matmul).lower(*(jnp.asarray(x, jnp.bfloat16) for x in (a, b))).as_text()
    assert "algorithm=default" in halves


@needs_rounding_kernels
def test_the_gate_leaves_algorithms_to_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA would compute them in plain float32."""
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        x = jnp.ones((3, 3), dtype)
        assert not ops(lambda x: jax_nano.matmul(x, x), x)["product"]
    x = jnp.full((1, 1), 1 + 2.0**-9, jnp.float32)
    assert jax_nano.matmul(x, x, precision="BF16_BF16_F32") == 1
    monkeypatch.undo()


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
    """Kernels compute what they support, XLA the rest."""
    f32 = operand(rng, (16, 16), "float32")
    assert ops(jax_nano.matmul, f32, f32)["product"] == 1
    for dtype in ("bool", "int32", "complex64"):
        x = operand(rng, (16, 16), dtype)
        want = int(native.supports(x.dtype.name, x.dtype.name, x.dtype.name))
        assert ops(jax_nano.matmul, x, x)["product"] == want
    # bfloat16 x float16 -> float32: one operand is converted, the other is read as it is.
    mixed = ops(jax_nano.matmul, *(operand(rng, (16, 16), dtype) for dtype in ("bfloat16", "float16")))
    assert mixed["product"] == 1
    assert mixed["dot"] == 0


def test_special_values(rng: np.random.Generator) -> None:
    a = reference.random(rng, (9, 33))
    b = reference.random(rng, (33, 17))
    a[2, 5], a[3, 0], b[1, 4], b[32, 16] = np.nan, np.inf, -np.inf, np.nan
    a[4], b[:, 7] = 0, np.inf
    reference.expected("mk,kn->mn", a, b).check(jax_nano.matmul(a, b))
    reference.expected("km,kn->mn", a.T.copy(), b).check(jax_nano.einsum("km,kn->mn", a.T.copy(), b))
