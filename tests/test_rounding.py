"""What judges the models lets rounding pass, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import rounding
from jax import lax


def program(x: jax.Array, w: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
    """A loop, a branch, a gradient, and a result that is one number."""

    def layer(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(x @ w), x.sum()

    def loss(w: jax.Array) -> jax.Array:
        return jax.nn.softmax(jax.checkpoint(jnp.dot)(jax.nn.relu(x @ w), v)).max(-1).mean()

    last, sums = lax.scan(layer, x, None, length=3)
    twice = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]
    branch = lax.cond(x[0, 0] > 5, lambda x: x, lambda x: x @ w, x)
    return {"last": last, "sums": sums, "twice": twice, "branch": branch, "gradient": jax.grad(loss)(w)}


def operands(rng: np.random.Generator, dtype: str) -> list[jax.Array]:
    x, w, v = (reference.random(rng, shape) / 4 for shape in ((24, 32), (32, 32), (32, 10)))
    return [jnp.asarray(each, dtype) for each in (x, w, v)]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_orders_of_summation_pass(dtype: str, rng: np.random.Generator) -> None:
    x, w, v = operands(rng, dtype)
    order = rng.permutation(32)
    got = jax.jit(lambda x, w, v: program(x[:, order], w[order][:, order], v[order]))(x, w, v)
    back = np.argsort(order)
    got["last"], got["branch"], got["twice"] = (got[name][:, back] for name in ("last", "branch", "twice"))
    got["gradient"] = got["gradient"][back][:, back]
    want = jax.jit(program)(x, w, v)
    rounding.check(got, want, rounding.deviations(program, want, x, w, v))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_missing_term_fails(dtype: str, rng: np.random.Generator) -> None:
    x, w, v = operands(rng, dtype)
    got = jax.jit(program)(x, w.at[7].set(0), v)  # every product lacks the eighth of its 32 terms
    want = jax.jit(program)(x, w, v)
    allowed = rounding.deviations(program, want, x, w, v)
    for name in ("last", "twice", "branch", "gradient"):
        with pytest.raises(AssertionError, match="apart"):
            rounding.check({name: got[name]}, {name: want[name]}, {name: allowed[name]})


def test_nan_and_wrong_integers_fail() -> None:
    fine = {"real": jnp.ones(3), "integer": jnp.arange(3)}
    allowed = {"real": 1.0, "integer": 0.0}
    rounding.check(fine, fine, allowed)
    for wrong, match in (
        ({**fine, "real": jnp.ones(3).at[1].set(jnp.nan)}, "finite"),
        ({**fine, "integer": jnp.arange(3) + 1}, "apart"),
    ):
        with pytest.raises(AssertionError, match=match):
            rounding.check(wrong, fine, allowed)


def test_deviations_are_of_the_size_of_rounding(rng: np.random.Generator) -> None:
    """Of a single product, within `reference`'s bound, and not far below it."""
    a, b = reference.random(rng, (24, 32)), reference.random(rng, (32, 16))
    bound = reference.expected("mk,kn->mn", a, b).bound.max()
    found = rounding.deviations(jnp.matmul, jnp.matmul(a, b), a, b)
    assert 0.3 * bound < found < 1.2 * bound  # a unit in the last place is added, and float32's own rounding
