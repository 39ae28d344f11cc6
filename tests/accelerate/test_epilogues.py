"""What follows a product and is computed by its call: scale, bias, activation, residual, conversion."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from programs import ops

import jax_nano

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda y: y,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu_tanh": jax.nn.gelu,
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
}
EPS = {"float32": 2e-5, "bfloat16": 2**-6, "float16": 2**-9}
"""XLA rounds to a narrow dtype after every operation, and has its constants in it."""


def compiled(fun: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """The program's text without computations that are fused, and its result; checked against plain XLA's."""
    want = jax.jit(fun)(*args)
    with jax_nano.accelerate():
        program = jax.jit(fun).lower(*args).compile()
    got = program(*args)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    eps = EPS[min((str(x.dtype) for x in args), key=lambda d: jnp.dtype(d).itemsize)]
    size = float(np.abs(np.float64(want)).max())
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=eps, atol=eps * size)
    return program.as_text(), got


def arrays(rng: np.random.Generator, *dtypes: str) -> list[jax.Array]:
    """x, w, b and a residual."""
    shapes = ((24, 40), (40, 56), (56,), (24, 56))
    return [jnp.asarray(reference.random(rng, s), d) for s, d in zip(shapes, (dtypes * 4)[:4], strict=True)]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_one_call(name: str, bias: bool, residual: bool, scale: float, dtype: str, rng: np.random.Generator) -> None:
    x, w, b, r = arrays(rng, dtype)

    def fun(x: Any, w: Any, b: Any, r: Any) -> Any:
        y = x @ w if scale == 1 else scale * (x @ w)
        y = ACTIVATIONS[name](y + b if bias else y)
        return y + r if residual else y

    text, _ = compiled(fun, x, w, b, r)
    if name == "gelu_erf" and scale != 1 and not bias and "jax_nano_dot_general" in text:
        return  # JAX 0.10 has multiplied the scale into the constants of gelu
    plain = name == "none" and not bias and not residual and scale == 1
    assert f'custom_call_target="jax_nano_{"dot_general" if plain else "linear"}"' in text
    assert "fusion(" not in text
    assert "convert(" not in text
    if not plain:
        assert f" activation={name} " in text or f'activation = "{name}"' in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_narrow_results_err_less_than_xlas(name: str, dtype: str, rng: np.random.Generator) -> None:
    """Against float64: the call rounds once, XLA after each operation."""
    x, w, b, r = arrays(rng, dtype)
    r = r if name == "tanh" else -r

    def fun(x: Any, w: Any, b: Any, r: Any) -> Any:
        return ACTIVATIONS[name](x @ w + b) + r

    _, got = compiled(fun, x, w, b, r)
    xlas = jax.jit(fun)(x, w, b, r)
    with jax.enable_x64(True):
        exact = np.asarray(fun(*(jnp.asarray(v, jnp.float64) for v in (x, w, b, r))))
    error, of_xla = (np.abs(np.asarray(v, np.float64) - exact) for v in (got, xlas))
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact) + 1e-9)) - {"bfloat16": 8, "float16": 11}[dtype])
    assert np.all(error <= 1.02 * half_ulp + 1e-5)
    assert error.sum() < of_xla.sum()


MIXED: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "result of a wide sum": (
        lambda x, w, b, r: jax.nn.relu(jnp.dot(x, w, preferred_element_type="float32") + b).astype("bfloat16"),
        ("bfloat16",),
        "relu",
    ),
    "a bias of float32 that is rounded": (
        lambda x, w, b, r: jnp.tanh(x @ w + b.astype("bfloat16")),
        ("bfloat16", "bfloat16", "float32"),
        "tanh",
    ),
    "a wide result with a narrow bias": (
        lambda x, w, b, r: jax.nn.relu(x @ w + b),
        ("float32", "float32", "bfloat16"),
        "relu",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name: str, rng: np.random.Generator) -> None:
    fun, dtypes, expected = MIXED[name]
    text, _ = compiled(fun, *arrays(rng, *dtypes, *["float32"] * (4 - len(dtypes)) * (len(dtypes) > 1)))
    assert f" activation={expected} " in text
    assert " bias=1 " in text


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, w, b, r: jax.nn.relu(jnp.dot(x, w, preferred_element_type="float32").astype("float16") + 1.0),
        lambda x, w, b, r: (x @ w).astype("float32") * 0.3 + r.astype("float32"),
        lambda x, w, b, r: (jnp.dot(x, w, preferred_element_type="float32") + b.astype("float32") * 1.001).astype(
            "bfloat16"
        ),
    ],
)
def test_what_is_not_an_epilogue_of_a_narrow_product(fun: Callable[..., Any], rng: np.random.Generator) -> None:
    """Roundings that the program asked for stay, and operands are not rounded that were not."""
    x, w, b, r = arrays(rng, "bfloat16")
    text, _ = compiled(fun, x, w, b, r)
    assert "bias = 1" not in text


def test_layers_of_a_narrow_dtype_pass_it_on(rng: np.random.Generator) -> None:
    """XLA converts what the next product reads to float32 at the end of the loop that computes it."""
    x, w, b, _ = arrays(rng, "bfloat16")
    w, v = w / 8, jnp.asarray(reference.random(rng, (56, 40)) / 8, "bfloat16")

    def chain(x: Any, w: Any, b: Any, v: Any) -> Any:
        h = jax.nn.gelu(x @ w + b) @ v
        return jnp.sin(h) @ w @ v

    with jax_nano.accelerate():
        found = ops(chain, x, w, b, v)
    assert (found["linear"], found["product"], found["dot"], found["fusion"]) == (1, 3, 0, 1)
    text, _ = compiled(chain, x, w, b, v)
    constraints = re.findall("operand_layout_constraints=(.*?}), ", text)
    assert len(constraints) == 4
    assert "f32" not in "".join(constraints)


def test_gradients_of_narrow_weights_are_not_copied(rng: np.random.Generator) -> None:
    """XLA rounds them, converts them back and transposes them, in loops of their own."""
    x, w, _, r = arrays(rng, "float32")

    def loss(w: Any, x: Any, r: Any) -> Any:
        return ((x.astype("bfloat16") @ w.astype("bfloat16")) * r.astype("bfloat16")).astype("float32").sum()

    want = jax.jit(jax.grad(loss))(w, x, r)
    with jax_nano.accelerate():
        program = jax.jit(jax.grad(loss)).lower(w, x, r).compile()
    text = program.as_text()
    assert text.count("custom-call(") == 1
    assert " = bf16[40,56]{1,0} custom-call(" in text
    np.testing.assert_allclose(program(w, x, r), want, rtol=2**-7, atol=2**-7)


def test_leading_dimensions(rng: np.random.Generator) -> None:
    x, w, b, r = (jnp.asarray(reference.random(rng, s)) for s in ((3, 8, 40), (40, 56), (56,), (3, 8, 56)))
    text, _ = compiled(lambda x, w, b, r: jax.nn.gelu(x @ w + b) + r, x, w, b, r)
    assert 'custom_call_target="jax_nano_linear"' in text
    assert "fusion(" not in text


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, w, b, r: (x @ w, jnp.tanh(x @ w + b)),  # the product itself is a result
        lambda x, w, b, r: jnp.sin(x @ w + b),  # no such activation
        lambda x, w, b, r: jnp.maximum(x @ w + b, 0.5),  # nearly relu
        lambda x, w, b, r: jax.nn.relu(x @ w + b) * r,  # a gate
        lambda x, w, b, r: jax.nn.relu(x @ w + r[:1, :1]),  # a bias along another dimension
        lambda x, w, b, r: jax.nn.relu(r - x @ w),
        lambda x, w, b, r: jnp.tanh(x @ w + b.sum()),
    ],
)
def test_what_is_not_an_epilogue(fun: Callable[..., Any], rng: np.random.Generator) -> None:
    x, w, b, r = arrays(rng, "float32")
    want = jax.jit(fun)(x, w, b, r)
    with jax_nano.accelerate():
        program = jax.jit(fun).lower(x, w, b, r).compile()
    assert "jax_nano_linear" not in program.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), program(x, w, b, r), want)


def test_a_square_bias_runs_along_the_right_dimension(rng: np.random.Generator) -> None:
    x, w, b = (jnp.asarray(reference.random(rng, s)) for s in ((32, 32), (32, 32), (32,)))
    text, _ = compiled(lambda x, w, b: jax.nn.relu(x @ w + b), x, w, b)
    assert "jax_nano_linear" in text
    text, _ = compiled(lambda x, w, b: jax.nn.relu(x @ w + b[:, None]), x, w, b)
    assert "jax_nano_linear" not in text


def test_an_exponential_number_of_terms_is_given_up(rng: np.random.Generator) -> None:
    x, w = (jnp.asarray(reference.random(rng, s, np.float32)) * 0.01 for s in ((24, 40), (40, 56)))

    def fun(x: Any, w: Any) -> Any:
        y = x @ w
        for _ in range(60):
            y = y * y + 0.001
        return y

    text, _ = compiled(fun, x, w)
    assert "jax_nano_linear" not in text


# Sizes with several blocks in every direction: what one of them writes, another would read.
OVERWRITTEN: dict[str, Callable[[Any, Any, Any], Any]] = {
    "operand, by an activation": lambda h, w, b: jnp.tanh(h @ w + b),
    "operand, by a transpose": lambda h, w, b: (h @ w).T,
    "operand and residual": lambda h, w, b: h + jnp.tanh(h @ w + b),
    "residual": lambda h, w, b: h + w @ w,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OVERWRITTEN)
def test_what_a_result_takes_the_place_of_is_read_before(name: str, dtype: str, rng: np.random.Generator) -> None:
    """XLA has one buffer for a loop's variable, and for an argument that is donated and its result.

    Compared with float32 programs: XLA's own product of bfloat16, in JAX 0.12, rounds its sums on the way.
    """
    step = OVERWRITTEN[name]
    h, w = (jnp.asarray(reference.random(rng, (1100, 1100)), dtype) / 64 for _ in range(2))
    b = jnp.asarray(reference.random(rng, (1100,)), dtype)

    def loop(h: Any, w: Any, b: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, h: step(h, w, b), h)

    for program, donated in ((loop, ()), (step, 0)):
        want = np.asarray(jax.jit(program)(*(v.astype("float32") for v in (h, w, b))))
        with jax_nano.accelerate():
            got = jax.jit(program, donate_argnums=donated)(jnp.array(h), w, b)
        size = float(np.abs(want).max())
        np.testing.assert_allclose(np.float64(got), want, rtol=EPS[dtype], atol=EPS[dtype] * size)
