"""What follows a product and is computed by its call: bias, activation, scale, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_nano

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda y: y,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu_tanh": jax.nn.gelu,
}


def compiled(fun: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """The program's text without computations that are fused, and its result; checked against plain XLA's."""
    want = jax.jit(fun)(*args)
    with jax_nano.accelerate():
        program = jax.jit(fun).lower(*args).compile()
    got = program(*args)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    return program.as_text(), got


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_one_call(name: str, bias: bool, residual: bool, scale: float, rng: np.random.Generator) -> None:
    x, w, b, r = (jnp.asarray(reference.random(rng, s)) for s in ((24, 40), (40, 56), (56,), (24, 56)))

    def fun(x: Any, w: Any, b: Any, r: Any) -> Any:
        y = x @ w if scale == 1 else scale * (x @ w)
        y = ACTIVATIONS[name](y + b if bias else y)
        return y + r if residual else y

    text, _ = compiled(fun, x, w, b, r)
    plain = name == "none" and not bias and not residual and scale == 1
    assert f'custom_call_target="jax_nano_{"dot_general" if plain else "linear"}"' in text
    assert "fusion(" not in text
    if not plain:
        assert f'activation = "{name}"' in text


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
    x, w, b, r = (jnp.asarray(reference.random(rng, s)) for s in ((24, 40), (40, 56), (56,), (24, 56)))
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
