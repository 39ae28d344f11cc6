"""Products with quantised weights in programs as they are: which become calls, which stay, and what both give.

Each program is written once for JAX and NumPy: NumPy's float64 says what it means, without the roundings on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array, lax
from programs import dots_of, ops

import jax_nano
from jax_nano._core import record
from jax_nano._dispatch import decision

K, N, GROUP = 96, 64, 32

Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    jax_nano.clear_report()
    yield
    jax_nano.clear_report()


def weights_of(dtype: str, rng: np.random.Generator, shape: tuple[int, ...] = (K, N)) -> np.ndarray:
    if dtype.startswith("float8"):
        return rng.normal(size=shape).astype(getattr(ml_dtypes, dtype))
    low, high = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16)}[dtype]
    numbers = rng.integers(low, high, shape)
    return numbers.astype(getattr(ml_dtypes, dtype) if dtype in ("int4", "uint4") else dtype)


def after(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return (x @ q.astype(d)) * s.astype(d)


def column(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ (q.astype(d) * s.astype(d))


def column_first(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ (s.astype(d)[None, :] * q.astype(d))


def divided(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ (q.astype(d) / s.astype(d))


def grouped(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    w = q.astype(d).reshape(K // GROUP, GROUP, N) * s.astype(d)[:, None]
    return x @ w.reshape(K, N)


def repeated(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ (q.astype(d) * xp.repeat(s.astype(d), GROUP, 0))


def twice_scaled(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    w = q.astype(d).reshape(K // GROUP, GROUP, N) * s.astype(d)[:, None]
    return x @ (w.reshape(K, N) * (s.astype(d)[0] + 1))


def with_zero(xp: Any, x: Any, q: Any, s: Any, z: Any, d: Any) -> Any:
    w = q.astype(d).reshape(K // GROUP, GROUP, N) - z.astype(d)[:, None]
    return x @ (w * s.astype(d)[:, None]).reshape(K, N)


def integer_zero(xp: Any, x: Any, q: Any, s: Any, z: Any, d: Any) -> Any:
    w = q.astype(np.int32).reshape(K // GROUP, GROUP, N) - z.astype(np.int32)[:, None]
    return x @ (w.astype(d) * s.astype(d)[:, None]).reshape(K, N)


def constant_zero(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ ((q.astype(d) - d(8)) * s.astype(d))


def unscaled(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ q.astype(d)


def along_k(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return x @ (q.astype(d) * s.astype(d)[:, None]).T


def from_the_left(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return (q.astype(d) * s.astype(d)[:, None]) @ x.T


def heads(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    w = q.astype(d).reshape(K, 4, N // 4) * s.astype(d).reshape(4, N // 4)
    return xp.einsum("bk,khd->bhd", x, w)


def of_heads(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    w = q.astype(d).reshape(3, GROUP, N) * s.astype(d)[:, None]
    return xp.einsum("bhd,hdn->bn", x.reshape(-1, 3, GROUP), w)


def biased(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
    return xp.maximum((x @ q.astype(d)) * s.astype(d) + s.astype(d), d(0))


COLUMN, GROUPS = (N,), (K // GROUP, N)

CALLS: dict[str, tuple[Program, tuple[int, ...]]] = {
    "after": (after, COLUMN),
    "column": (column, COLUMN),
    "column_first": (column_first, COLUMN),
    "divided": (divided, COLUMN),
    "grouped": (grouped, GROUPS),
    "repeated": (repeated, GROUPS),
    "twice_scaled": (twice_scaled, GROUPS),
    "with_zero": (with_zero, GROUPS),
    "integer_zero": (integer_zero, GROUPS),
    "constant_zero": (constant_zero, COLUMN),
    "unscaled": (unscaled, COLUMN),
    "along_k": (along_k, COLUMN),
    "from_the_left": (from_the_left, COLUMN),
    "heads": (heads, COLUMN),
    "of_heads": (of_heads, GROUPS),
    "biased": (biased, COLUMN),
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def arguments(form: str, weights: str, m: int, dtype: str, rng: np.random.Generator) -> list[np.ndarray]:
    _, shape = CALLS[form]
    x = rng.normal(size=(m, K)).astype(DTYPES[dtype])
    scale = (rng.uniform(0.5, 1.5, shape) / 64).astype(np.float32)
    if form == "divided":
        scale = (1 / scale).astype(np.float32)
    q = weights_of(weights, rng, (N, K) if form in ("along_k", "from_the_left") else (K, N))
    found = [x, q, scale]
    if form in ("with_zero", "integer_zero"):
        found.append(weights_of(weights, rng, shape))
    return found


def expected(form: Program, values: list[np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What a program means, and how far from it a result may be.

    Scales are rounded to the program's dtype, as it says; the matrix and the result once.
    """
    x, q, s, *z = values
    s = s.astype(DTYPES[dtype])
    wide = form(np, x.astype(np.float64), q, s.astype(np.float64), *z, d=np.float64)
    size = form(np, abs(x.astype(np.float64)), abs(q.astype(np.float64)), abs(s.astype(np.float64)), *(
        -abs(y.astype(np.float64)) for y in z), d=np.float64)  # fmt: skip
    unit = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    return wide, unit * (2 * abs(wide) + abs(size)) + K * 2**-24 * abs(size)


def check(form: Program, values: list[np.ndarray], dtype: str, count: int = 1) -> None:
    d = DTYPES[dtype]

    def program(*v: Array) -> Array:
        return form(jnp, *v, d=d)

    arrays = [jnp.asarray(v) for v in values]
    with jax_nano.accelerate():
        compiled = jax.jit(program).lower(*arrays).compile()
        assert compiled.as_text().count('custom_call_target="jax_nano_quantized"') == count, jax_nano.report()
        out = np.asarray(compiled(*arrays)).astype(np.float64)
    wide, bound = expected(form, values, dtype)
    assert out.shape == wide.shape
    assert (abs(out - wide) <= bound).all(), float((abs(out - wide) / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("form", CALLS)
def test_forms(form: str, m: int, dtype: str, rng: np.random.Generator) -> None:
    check(CALLS[form][0], arguments(form, "int8", m, dtype, rng), dtype)


@pytest.mark.parametrize("weights", ["uint8", "int4", "uint4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("form", ["after", "grouped", "with_zero", "constant_zero", "heads"])
def test_dtypes_of_weights(form: str, weights: str, rng: np.random.Generator) -> None:
    count = 0 if weights.startswith("float8") and "zero" in form else 1
    check(CALLS[form][0], arguments(form, weights, 2, "bfloat16", rng), "bfloat16", count)


@pytest.mark.parametrize("m", [17, 40])
def test_many_rows(m: int, rng: np.random.Generator) -> None:
    check(grouped, arguments("grouped", "int4", m, "float32", rng), "float32")


def test_rows_of_three_dimensions(rng: np.random.Generator) -> None:
    def form(xp: Any, x: Any, q: Any, s: Any, d: Any) -> Any:
        return grouped(xp, x.reshape(2, 3, K), q, s, d)

    values = arguments("grouped", "int8", 6, "bfloat16", rng)
    check(form, values, "bfloat16")


def test_report_names_weights_scales_and_epilogue(rng: np.random.Generator) -> None:
    check(biased, arguments("biased", "int8", 3, "bfloat16", rng), "bfloat16")
    (product, count), *_ = record.products()
    assert count == 1
    assert product.epilogue == "bias, relu"
    line = record.line(product)
    assert "bfloat16[3,96] x int8[96,64] -> bfloat16[3,64], then bias, relu" in line
    assert "quantized_i8, scales of columns" in line
    jax_nano.clear_report()
    check(with_zero, arguments("with_zero", "int4", 3, "bfloat16", rng), "bfloat16")
    assert "int4[96,64] -> bfloat16[3,64]: " in jax_nano.report()
    assert "quantized_i4, scales of 3 groups of 32, zero points" in jax_nano.report()


def test_a_scale_of_columns_and_an_epilogue_are_part_of_the_call(rng: np.random.Generator) -> None:
    values = [jnp.asarray(v) for v in arguments("biased", "int8", 3, "float32", rng)]
    with jax_nano.accelerate():
        found = ops(lambda *v: biased(jnp, *v, d=jnp.float32), *values)
    assert found["quantized"] == 1
    assert found["fusion"] == 0


# --- what stays ---------------------------------------------------------------------------------------------------


def returned_too(x: Array, q: Array, s: Array) -> Any:
    w = q.astype(x.dtype) * s.astype(x.dtype)
    return x @ w, w


def summed_too(x: Array, q: Array, s: Array) -> Any:
    w = q.astype(x.dtype) * s.astype(x.dtype)
    return x @ w, w.sum(0)


def scale_along_k(x: Array, q: Array, s: Array) -> Any:
    return x @ (q.astype(x.dtype) * jnp.resize(s, K).astype(x.dtype)[:, None])


def scale_of_elements(x: Array, q: Array, s: Array) -> Any:
    return x @ (q.astype(x.dtype) * jnp.outer(jnp.resize(s, K), s).astype(x.dtype))


def strange_groups(x: Array, q: Array, s: Array) -> Any:
    """Of 8, and interleaved ones."""
    scales = jnp.arange(1.0, 13)[:, None] * s
    fine = q.astype(x.dtype).reshape(12, 8, N) * scales[:, None].astype(x.dtype)
    mixed = q.astype(x.dtype).reshape(GROUP, 3, N) * scales[:3].astype(x.dtype)
    return x @ fine.reshape(K, N), x @ mixed.reshape(K, N)


def zero_after_scale(x: Array, q: Array, s: Array) -> Any:
    return x @ (q.astype(x.dtype) * s.astype(x.dtype) - s.astype(x.dtype))


def zero_of_floats(x: Array, q: Array, s: Array) -> Any:
    return x @ ((q.astype(x.dtype) - 100 * s.astype(x.dtype)) * s.astype(x.dtype))


def half_a_zero(x: Array, q: Array, s: Array) -> Any:
    return x @ ((q.astype(x.dtype) - x.dtype.type(7.5)) * s.astype(x.dtype))


def wrapped_zero(x: Array, q: Array, s: Array) -> Any:
    """In int8, in which the difference wraps around."""
    return x @ ((q - q[:1]).astype(x.dtype) * s.astype(x.dtype))


def wrapped_weights(x: Array, q: Array, s: Array) -> Any:
    return x @ ((q.astype(jnp.int32) * 3).astype(jnp.int8).astype(x.dtype) * s.astype(x.dtype))


def rounded_weights(x: Array, q: Array, s: Array) -> Any:
    w = (q.astype(jnp.float32) * s).astype(jnp.bfloat16)
    return x @ w.astype(x.dtype)


def clipped(x: Array, q: Array, s: Array) -> Any:
    return x @ jnp.maximum(q.astype(x.dtype) * s.astype(x.dtype), 0)


def of_itself(x: Array, q: Array, s: Array) -> Any:
    w = q[:N].astype(x.dtype) * s.astype(x.dtype)
    return w @ w


STAY: dict[str, tuple[Program, str]] = {
    "returned too": (returned_too, "something else reads the dequantised weights"),
    "summed too": (summed_too, "something else reads the dequantised weights"),
    "scale along K": (scale_along_k, "groups of 1"),
    "scale of elements": (scale_of_elements, ""),
    "strange groups": (strange_groups, "groups of"),
    "zero after scale": (zero_after_scale, "after they are scaled"),
    "zero of floats": (zero_of_floats, "no integers of 8 bits"),
    "half a zero": (half_a_zero, "no integers of 8 bits"),
    "wrapped zero": (wrapped_zero, ""),
    "wrapped weights": (wrapped_weights, ""),
    "rounded weights": (rounded_weights, "rounded to bfloat16"),
    "clipped": (clipped, ""),
    "of itself": (of_itself, ""),
}


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("name", STAY)
def test_what_is_not_exactly_that_stays(name: str, m: int, rng: np.random.Generator) -> None:
    program, reason = STAY[name]
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", m, "float32", rng))
    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        fast = jax.jit(program)
        assert ops(fast, x, q, s)["quantized"] == 0
        got = fast(x, q, s)
    assert reason in jax_nano.report()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


def test_weights_of_a_batch_stay(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(3, 5, K)), jnp.float32)
    q = jnp.asarray(weights_of("int8", rng, (3, K, N)))
    s = jnp.asarray(rng.uniform(0.5, 1.5, (3, 1, N)), jnp.float32)
    want = np.einsum("bmk,bkn->bmn", x, np.asarray(q, np.float32) * s)
    with jax_nano.accelerate():
        fast = jax.jit(lambda x, q, s: jnp.einsum("bmk,bkn->bmn", x, q.astype(x.dtype) * s))
        assert ops(fast, x, q, s)["quantized"] == 0
        got = fast(x, q, s)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


def test_a_matrix_of_two_products_becomes_two_calls(rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 6, "float32", rng))

    def program(x: Array, q: Array, s: Array) -> Array:
        w = q.astype(x.dtype) * s
        return jnp.tanh(x @ w) + (x * 2 + 1) @ w

    with jax_nano.accelerate():
        fast = jax.jit(program)
        assert ops(fast, x, q, s)["quantized"] == 2
        got = fast(x, q, s)
    np.testing.assert_allclose(got, jax.jit(program)(x, q, s), rtol=1e-4, atol=1e-3)


def test_both_operands_are_quantised(rng: np.random.Generator) -> None:
    q, s = (jnp.asarray(v) for v in arguments("column", "int8", 6, "float32", rng)[1:])
    a = jnp.asarray(weights_of("int8", rng, (6, K)))

    def program(a: Array, q: Array, s: Array) -> Array:
        return (a.astype(jnp.float32) * s[:6, None]) @ (q.astype(jnp.float32) * s)

    with jax_nano.accelerate():
        fast = jax.jit(program)
        assert ops(fast, a, q, s)["quantized"] == 1
        got = fast(a, q, s)
    np.testing.assert_allclose(got, jax.jit(program)(a, q, s), rtol=1e-4, atol=1e-3)


def test_scales_of_nan_and_infinity(rng: np.random.Generator) -> None:
    """Columns that are not finite in XLA are not finite, and all others are as if there were none."""
    x, q, s = arguments("column", "int8", 4, "float32", rng)
    s[[3, 9, 11]] = np.nan, np.inf, -np.inf
    x, q, s = map(jnp.asarray, (x, q, s))

    def program(x: Array, q: Array, s: Array) -> Array:
        return x @ (q.astype(jnp.float32) * s)

    with jax_nano.accelerate():
        got = np.asarray(jax.jit(program)(x, q, s))
    want = np.asarray(jax.jit(lambda *v: program(*v))(x, q, s))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    assert np.isnan(got[:, 3]).all()
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 32, 16), (4, 0, 16), (4, 32, 0), (1, 1, 16), (3, 1, 5), (2, 7, 1)])
def test_empty_and_thin_arrays(m: int, k: int, n: int, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.float32)
    q, s = jnp.asarray(weights_of("int8", rng, (k, n))), jnp.asarray(rng.normal(size=n), jnp.float32)
    with jax_nano.accelerate():
        got = jax.jit(lambda x, q, s: x @ (q.astype(jnp.float32) * s))(x, q, s)
    np.testing.assert_allclose(got, np.asarray(x) @ (np.asarray(q, np.float32) * s), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("k", "n"), [(33, 16), (32, 17), (33, 17), (2, 2), (34, 18)])
def test_odd_sizes_of_int4(k: int, n: int, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(3, k)), jnp.bfloat16)
    q, s = jnp.asarray(weights_of("int4", rng, (k, n))), jnp.asarray(rng.uniform(0.5, 1, n), jnp.float32)

    def program(x: Array, q: Array, s: Array) -> Array:
        return (x @ q.astype(x.dtype)) * s.astype(x.dtype)

    with jax_nano.accelerate():
        fast = jax.jit(program)
        assert ops(fast, x, q, s)["quantized"] == (k % 2 == 0 and n % 2 == 0)
        got = np.asarray(fast(x, q, s), np.float64)
    size = np.asarray(abs(x), np.float64) @ abs(np.asarray(q).astype(np.float64)) * np.asarray(s, np.float64)
    want = np.asarray(x, np.float64) @ np.asarray(q).astype(np.float64) * np.asarray(s.astype(x.dtype), np.float64)
    assert (abs(got - want) <= size * 2**-7 + 1e-6).all()


# --- memory -------------------------------------------------------------------------------------------------------


def test_weights_that_are_updated_afterwards(rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 4, "float32", rng))

    def program(x: Array, q: Array, s: Array) -> Any:
        y = x @ (q.astype(x.dtype) * s.astype(x.dtype))
        return jax.nn.silu(y), q.at[2, 3].set(0), s.at[1].set(0)

    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jaxlib 0.10 says that donated memory is not used again
        for donated in ((), (1,), (1, 2), (0, 1, 2)):
            fast = jax.jit(program, donate_argnums=donated)
            got = fast(*(jnp.array(v, copy=True) for v in (x, q, s)))
            np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-3)
            np.testing.assert_array_equal(got[1], want[1])
            np.testing.assert_array_equal(got[2], want[2])


def test_weights_that_a_loop_changes(rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 4, "float32", rng))

    def step(state: Any, _: None) -> Any:
        q, x = state
        y = x @ (q.astype(x.dtype) * s)
        return (q.at[0, 0].add(1), x + y[:, :1] * 1e-2), y

    def program(q: Array, x: Array) -> Any:
        return lax.scan(step, (q, x), None, length=4)

    want = jax.jit(lambda *v: program(*v))(q, x)
    with jax_nano.accelerate():
        got = jax.jit(program)(q, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


def test_a_loop_whose_next_value_is_the_product(rng: np.random.Generator) -> None:
    """x and the result share memory, and the call may do more than the product."""
    q = jnp.asarray(weights_of("int8", rng, (N, N)))
    s = jnp.asarray(rng.uniform(0.5, 1.5, N) / 1000, jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, N)), jnp.float32)

    def program(x: Array, q: Array, s: Array) -> Array:
        return lax.fori_loop(0, 5, lambda i, h: jnp.tanh((h @ q.astype(h.dtype)) * s * i), x)

    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        got = jax.jit(program)(x, q, s)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["float8_e8m0fnu", "float32"])
def test_scaled_matmul(kind: str, rows: int, rng: np.random.Generator) -> None:
    """Both operands are quantised; the larger one is read as it is."""
    a, b = (jnp.asarray(weights_of("float8_e4m3fn", rng, (1, n, K))) for n in (rows, N))
    scales = [jnp.asarray(2.0 ** rng.integers(-2, 3, (1, n, 3)), jnp.float32).astype(kind) for n in (rows, N)]
    with jax_nano.accelerate():
        fast = jax.jit(lambda *v: jax.nn.scaled_matmul(*v))
        assert ops(fast, a, b, *scales)["quantized"] == 1, jax_nano.report()
        got = np.asarray(fast(a, b, *scales))
    wide = [np.asarray(x).astype(np.float64) * np.repeat(np.asarray(s).astype(np.float64), GROUP, -1) for x, s in
            zip((a, b), scales, strict=True)]  # fmt: skip
    want, size = (np.einsum("bmk,bnk->bmn", *v) for v in (wide, map(abs, wide)))
    assert (abs(got - want) <= K * 2**-23 * size).all()


# --- loops --------------------------------------------------------------------------------------------------------


def decoding(form: Program, steps: int = 5) -> Program:
    """A scan whose steps multiply with weights of the form; XLA makes the float matrix in front of it."""

    def program(x: Array, q: Array, s: Array) -> Any:
        def step(h: Array, _: None) -> tuple[Array, Array]:
            y = form(jnp, h, q, s, d=h.dtype.type)
            return jnp.tanh(jnp.concatenate([y, y[:, : K - N]], -1)), y.sum(-1)

        return lax.scan(step, x, None, length=steps)

    return program


def decoding_of_layers(x: Array, q: Array, s: Array) -> Any:
    """Two loops, one in the other, and two layers that share scales."""

    def inner(h: Array) -> Array:
        w = q.astype(h.dtype).reshape(3, GROUP, N) * s.astype(h.dtype)[:, None]
        y = jnp.tanh(h @ w.reshape(K, N))
        return jnp.concatenate([y, y[:, : K - N]], -1)

    def outer(h: Array, _: None) -> tuple[Array, Array]:
        h = lax.fori_loop(0, 3, lambda _, h: inner(h), h)
        return h, h[:, 0]

    return lax.scan(outer, x, None, length=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("form", ["after", "column", "grouped", "nested"])
def test_loops_carry_weights(form: str, weights: str, m: int, dtype: str, rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("grouped" if form == "nested" else form, weights, m, dtype, rng))
    s = s / (30 if weights == "int8" else 2)  # so that roundings do not grow from step to step
    program = decoding_of_layers if form == "nested" else decoding(CALLS[form][0])
    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        compiled = jax.jit(program).lower(x, q, s).compile()
        got = compiled(x, q, s)
    text = compiled.as_text()
    assert text.count('custom_call_target="jax_nano_quantized"') == 1, jax_nano.report()
    assert not any(f"{kind}[{K},{N}]" in text for kind in ("f32", "bf16"))
    tolerance = 1e-3 if dtype == "float32" else 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert abs(a - b).max() <= tolerance * max(1, abs(b).max())


def test_a_loop_that_reads_the_matrix_otherwise_too_carries_it(rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 4, "float32", rng))

    def program(x: Array, q: Array, s: Array) -> Any:
        def step(h: Array, i: Array) -> tuple[Array, Array]:
            w = q.astype(h.dtype) * s
            y = h @ w
            return jnp.tanh(jnp.concatenate([y, y[:, : K - N]], -1)), lax.dynamic_index_in_dim(w, i, 0).sum()

        return lax.scan(step, x, jnp.arange(4))

    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        fast = jax.jit(program)
        got = fast(x, q, s)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_weights_that_are_read_after_the_loop(rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 4, "float32", rng))

    def program(x: Array, q: Array, s: Array) -> Any:
        h, sums = decoding(column)(x, q, s)
        return h, sums, (q.astype(x.dtype) * s)[:3], q.at[0].set(1)

    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        got = jax.jit(program)(x, q, s)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_the_gate_keeps_few_weights(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))

    def calls(m: int, k: int, n: int, dtype: str) -> int:
        x = jnp.asarray(rng.normal(size=(m, k)), DTYPES[dtype])
        q, s = jnp.asarray(weights_of("int8", rng, (k, n))), jnp.asarray(rng.uniform(0.5, 1.5, n), DTYPES[dtype])
        with jax_nano.accelerate():
            return ops(lambda x, q, s: x @ (q.astype(x.dtype) * s), x, q, s)["quantized"]

    for m, dtype, fewest in [(4, "float32", 64), (16, "float32", 256), (17, "float32", 16384), (17, "bfloat16", 4096)]:
        assert calls(m, fewest // 16, 16, dtype) == 1
        assert calls(m, fewest // 16 - 1, 16, dtype) == 0


def test_every_product_is_reported_once(rng: np.random.Generator) -> None:
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 4, "float32", rng))

    def program(x: Array, q: Array, s: Array) -> Any:
        return x @ (q.astype(x.dtype) * s), (x @ q.astype(x.dtype)) * s, x @ jnp.sin(q.astype(x.dtype))

    plain = jax.jit(lambda *v: program(*v)).lower(x, q, s).compile().as_text()
    with jax_nano.accelerate():
        jax.jit(program).lower(x, q, s).compile()
    assert sum(count for _, count in record.products()) == dots_of(plain) == 3


def test_integer_products_with_scales_after_run_on_kernels(rng: np.random.Generator) -> None:
    """Activations that the program quantises itself."""
    x, q, s = (jnp.asarray(v) for v in arguments("column", "int8", 4, "float32", rng))

    def program(x: Array, q: Array, s: Array) -> Array:
        scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
        rows = jnp.round(x / scale).astype(jnp.int8)
        return lax.dot(rows, q, preferred_element_type=jnp.int32).astype(jnp.float32) * scale * s

    with jax_nano.accelerate():
        fast = jax.jit(program)
        assert ops(fast, x, q, s)["product"] == 1
        got = fast(x, q, s)
    np.testing.assert_allclose(got, jax.jit(program)(x, q, s), rtol=1e-5, atol=1e-3)
    assert "int8[4,96] x int8[96,64] -> int32[4,64]" in jax_nano.report()


# --- layers -------------------------------------------------------------------------------------------------------

LAYERS = 3


def dequantised(q: Any, s: Any, d: Any) -> Any:
    w = q.astype(d).reshape(*s.shape[:-1], -1, N) if s.ndim > 1 else q.astype(d)
    return (w * (s.astype(d)[:, None] if s.ndim > 1 else s.astype(d))).reshape(N, N)


def layers_in_a_scan(x: Array, q: Array, s: Array) -> Any:
    return lax.scan(lambda h, layer: (jnp.tanh(h @ dequantised(*layer, h.dtype)), h[:, 0]), x, (q, s))


def layers_from_the_last(x: Array, q: Array, s: Array) -> Any:
    """The body computes which layer it reads."""
    return lax.scan(lambda h, layer: (jnp.tanh(h @ dequantised(*layer, h.dtype)), h[:, 0]), x, (q, s), reverse=True)


def layers_scaled_afterwards(x: Array, q: Array, s: Array) -> Any:
    def step(h: Array, layer: Any) -> tuple[Array, None]:
        w, scale = layer
        return jnp.tanh((h @ w.astype(h.dtype)) * scale.reshape(-1, N)[0].astype(h.dtype)), None

    return lax.scan(step, x, (q, s))


def layers_of_steps(x: Array, q: Array, s: Array) -> Any:
    return lax.scan(lambda h, _: (layers_in_a_scan(h, q, s)[0], h[:, 0]), x, None, length=2)


def layers_made_floats_at_once(x: Array, q: Array, s: Array) -> Any:
    """XLA makes the whole stack of floats in front of the outer loop."""

    def step(h: Array, _: None) -> tuple[Array, Array]:
        stack = jax.vmap(lambda q, s: dequantised(q, s, h.dtype))(q, s)
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, stack)[0], h[:, 0]

    return lax.scan(step, x, None, length=2)


def layers_by_number(x: Array, q: Array, s: Array) -> Any:
    return lax.fori_loop(0, LAYERS, lambda i, h: jnp.tanh(h @ dequantised(q[i], s[i], h.dtype)), x)


def layers_unrolled(x: Array, q: Array, s: Array) -> Any:
    for i in range(LAYERS):
        x = jnp.tanh(x @ dequantised(q[i], s[i], x.dtype))
    return x


LAYERED: dict[str, Program] = {
    "scan": layers_in_a_scan,
    "reverse": layers_from_the_last,
    "after": layers_scaled_afterwards,
    "steps": layers_of_steps,
    "at once": layers_made_floats_at_once,
    "by number": layers_by_number,
    "unrolled": layers_unrolled,
}


def layers_of(weights: str, m: int, dtype: str, *, groups: bool, rng: np.random.Generator) -> list[Array]:
    q = weights_of(weights, rng, (LAYERS, N, N))
    scale = rng.uniform(0.5, 1.5, (LAYERS, N // 16, N) if groups else (LAYERS, N))
    scale /= np.sqrt(N) * np.abs(q.astype(np.float64)).mean() * np.linspace(0.8, 1.2, LAYERS).reshape(-1, *[1] * (
        scale.ndim - 1))  # fmt: skip
    d = DTYPES[dtype]
    return [jnp.asarray(rng.normal(size=(m, N)), d), jnp.asarray(q), jnp.asarray(scale, d)]


def check_layers(program: Program, values: list[Array], dtype: str, *, calls: int = 1) -> str:
    want = jax.jit(lambda *v: program(*v))(*values)
    with jax_nano.accelerate():
        compiled = jax.jit(program).lower(*values).compile()
        got = compiled(*values)
    text = compiled.as_text()
    assert text.count('custom_call_target="jax_nano_quantized"') == calls, jax_nano.report()
    assert not any(f"{kind}[{dims}{N},{N}]" in text for kind in ("f32", "bf16", "f16") for dims in ("", f"{LAYERS},"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=1e-4 if dtype == "float32" else 0.06
        )
    return text


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("groups", [False, True], ids=["columns", "groups"])
@pytest.mark.parametrize("form", LAYERED)
def test_a_layer_is_read_where_it_lies_in_a_stack(form: str, m: int, groups: bool, rng: np.random.Generator) -> None:
    values = layers_of("int8", m, "float32", groups=groups, rng=rng)
    text = check_layers(LAYERED[form], values, "float32", calls=LAYERS if form == "unrolled" else 1)
    if form != "after":
        assert "layers = 3" in text  # the scales, too
    assert not any(f"s8[{N},{N}]" in line or f"s8[1,{N},{N}]" in line for line in text.splitlines())


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("weights", ["int4", "uint4", "uint8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("form", ["scan", "steps"])
def test_dtypes_of_layers(form: str, weights: str, m: int, rng: np.random.Generator) -> None:
    """XLA widens those of 4 bits and float8 in front of the loop."""
    check_layers(LAYERED[form], layers_of(weights, m, "bfloat16", groups=True, rng=rng), "bfloat16")


@pytest.mark.parametrize("m", [1, 5])
def test_layers_with_zero_points(m: int, rng: np.random.Generator) -> None:
    x, q, s = layers_of("uint8", m, "float32", groups=False, rng=rng)
    z = jnp.asarray(rng.integers(100, 156, s.shape), jnp.uint8)

    def program(x: Array, q: Array, s: Array) -> Any:
        def step(h: Array, layer: Any) -> tuple[Array, None]:
            q, s, z = layer
            return jnp.tanh(h @ ((q.astype(h.dtype) - z.astype(h.dtype)) * s)), None

        return lax.scan(step, x, (q, s, z))

    check_layers(program, [x, q, s], "float32")


def test_layers_along_k(rng: np.random.Generator) -> None:
    def program(x: Array, q: Array, s: Array) -> Any:
        def step(h: Array, layer: Any) -> tuple[Array, None]:
            q, s = layer
            return jnp.tanh(h @ (q.astype(h.dtype) * s).T), None

        return lax.scan(step, x, (q, s))

    x, q, s = layers_of("int8", 3, "float32", groups=False, rng=rng)
    check_layers(program, [x, q, jnp.swapaxes(s[:, None], 1, 2)], "float32")


def test_layers_that_do_not_lie_one_by_one_are_not_read_in_place(rng: np.random.Generator) -> None:
    x, q, s = layers_of("int8", 3, "float32", groups=False, rng=rng)

    def program(x: Array, q: Array, s: Array) -> Any:
        def step(i: Array, h: Array) -> Array:
            w = lax.dynamic_index_in_dim(q, i, 1, keepdims=False).astype(h.dtype)
            return jnp.tanh(h @ (w * lax.dynamic_index_in_dim(s, i, 0, keepdims=False)))

        return lax.fori_loop(0, LAYERS, step, x)

    q = jnp.swapaxes(q, 0, 1)
    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        compiled = jax.jit(program).lower(x, q, s).compile()
        got = compiled(x, q, s)
    assert not any(f"layers = {bits}" in compiled.as_text() for bits in (1, 3))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_numbers_of_layers_wrap_and_end_as_in_jax(rng: np.random.Generator) -> None:
    x, q, s = layers_of("int8", 2, "float32", groups=False, rng=rng)

    def program(x: Array, q: Array, s: Array, i: Array) -> Array:
        w = lax.dynamic_slice_in_dim(q, i, 1, 0)[0].astype(x.dtype)
        return x @ (w * lax.dynamic_slice_in_dim(s, i, 1, 0)[0])

    with jax_nano.accelerate():
        fast = jax.jit(program)
        assert ops(fast, x, q, s, jnp.int32(0))["quantized"] == 1
        for number in (-1000, -1, 0, 1, LAYERS - 1, LAYERS, 2**31 - 1, -(2**31)):
            layer = min(max(number + LAYERS if number < 0 else number, 0), LAYERS - 1)
            want = np.asarray(x, np.float64) @ (np.asarray(q[layer], np.float64) * np.asarray(s[layer], np.float64))
            np.testing.assert_allclose(fast(x, q, s, jnp.int32(number)), want, rtol=1e-4, atol=1e-4)


def test_a_stack_that_a_loop_changes_is_not_read_late(rng: np.random.Generator) -> None:
    x, q, s = layers_of("int8", 2, "float32", groups=False, rng=rng)

    def program(x: Array, q: Array, s: Array) -> Any:
        def step(i: Array, state: Any) -> Any:
            h, q = state
            h = jnp.tanh(h @ dequantised(q[i], s[i], h.dtype))
            return h, q.at[(i + 1) % LAYERS].add(jnp.int8(3))

        return lax.fori_loop(0, 2 * LAYERS, step, (x, q))

    want = jax.jit(lambda *v: program(*v))(x, q, s)
    with jax_nano.accelerate():
        got = jax.jit(program)(x, q, s)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_scales_of_another_layer(rng: np.random.Generator) -> None:
    x, q, s = layers_of("int8", 2, "float32", groups=True, rng=rng)

    def program(x: Array, q: Array, s: Array) -> Any:
        def step(i: Array, h: Array) -> Array:
            return jnp.tanh(h @ dequantised(q[i], s[LAYERS - 1 - i], h.dtype))

        return lax.fori_loop(0, LAYERS, step, x)

    assert "layers = 1" in check_layers(program, [x, q, s], "float32")
