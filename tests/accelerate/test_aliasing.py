"""Updates in place, caches and donation around products: no call reads what has been overwritten, or overwrites it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_nano

N = 64


def updated_then_read(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    a = jnp.tanh(a)
    d = lax.dynamic_update_slice(a, b[:32, :32], (i, jnp.int32(0)))
    return d @ b, a @ b


def read_then_updated(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    a = jnp.tanh(a)
    first = a @ b
    d = lax.dynamic_update_slice(a, first[:8, :], (i, jnp.int32(0)))
    return d @ b, first


def argument_updated(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    d = lax.dynamic_update_slice(a, b[:3, :], (i, jnp.int32(0)))
    return d @ b, a @ b, d


def reads_itself(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    """What is written comes from other places of the same array."""
    a = jnp.sin(a)
    d = lax.dynamic_update_slice(a, jnp.flip(a, 0)[:32], (i, jnp.int32(0)))
    return d @ b, a


def scattered(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    a = jnp.tanh(a)
    d = a.at[i + jnp.arange(5)].set(b[:5]).at[:, i].add(1)
    return d @ b, a @ b, d


def cache_in_a_loop(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    def step(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[Any, jax.Array]:
        cache, x = carry
        new = lax.dynamic_update_slice(cache, x[:1] @ b, (t, jnp.int32(0)))
        return (new, jnp.tanh(x @ b)), new @ x.T - cache @ x.T

    return lax.scan(step, (a, b), i + jnp.arange(4, dtype=jnp.int32))


def loop_keeps_the_old(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    def step(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        old, new = carry
        return new, lax.dynamic_update_slice(new, jnp.tanh(old @ b)[:7], (t, jnp.int32(0)))

    return lax.fori_loop(jnp.int32(0), jnp.int32(3), step, (a, jnp.tanh(a))), i


def branch_updates(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    a = jnp.tanh(a)
    d = lax.cond(i > 2, lambda x: lax.dynamic_update_slice(x, b[:9], (i, jnp.int32(0))), lambda x: x, a)
    return d @ b, a @ b


def result_in_its_place(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    """What is updated in a donated argument is overwritten by a result as soon as XLA has converted it."""
    d = a.at[i + jnp.arange(3)].add(b[:3])
    first = d @ b
    other = jnp.tanh(first) + b
    return other, (other @ d.T)[:5]


def next_in_its_place(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    """The same in a loop's variable, and then in the loop's result."""

    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d, total = carry
        other, rows = result_in_its_place(d, b, t)
        return other, total + rows

    d, total = lax.fori_loop(jnp.int32(0), jnp.int32(3), step, (a, jnp.zeros((5, N), a.dtype)))
    other, rows = result_in_its_place(d, b, i)
    return other, rows, total


def loop_then_result(a: jax.Array, b: jax.Array, i: jax.Array) -> Any:
    """A donated argument is a loop's variable, whose last value a result overwrites."""
    d = lax.fori_loop(jnp.int32(0), jnp.int32(3), lambda t, d: d.at[t].add(b[i]), a)
    first = d @ b
    other = jnp.tanh(first) + b
    return other, (other @ d.T)[:5]


PROGRAMS = [
    *(result_in_its_place, next_in_its_place, loop_then_result),
    *(updated_then_read, read_then_updated, argument_updated, reads_itself, scattered),
    *(cache_in_a_loop, loop_keeps_the_old, branch_updates),
]


def operands(rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = (rng.uniform(-0.3, 0.3, (N, N)).astype(dtype) for _ in range(2))
    return a, b


@pytest.mark.parametrize("donated", [(), (0,), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda x: x.__name__)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_updates_in_place(
    program: Callable[..., Any], dtype: Any, donated: tuple[int, ...], rng: np.random.Generator
) -> None:
    a, b = operands(rng, dtype)
    i = np.int32(3)
    with jax.enable_x64(True):
        want = jax.jit(program)(a.astype(np.float64), b.astype(np.float64), i)
    with jax_nano.accelerate():
        accelerated = jax.jit(program, donate_argnums=donated)
        assert "jax_nano" in accelerated.lower(a, b, i).compile().as_text()
        got = accelerated(jnp.asarray(a), jnp.asarray(b), i)
    plain = jax.jit(program)(a, b, i)
    for x, y, z in zip(*map(jax.tree.leaves, (got, plain, want)), strict=True):
        x, y, z = (np.asarray(each, np.float64) for each in (x, y, z))
        eps = float(jnp.finfo(dtype).eps)
        bound = 2 * np.abs(y - z).max() + 8 * eps * max(1.0, np.abs(z).max())
        assert np.abs(x - z).max() <= bound


def test_what_a_shortened_loop_updates_is_a_copy(rng: np.random.Generator) -> None:
    a, b = operands(rng, np.float16)
    with jax_nano.accelerate():
        text = jax.jit(updated_then_read).lower(a, b, np.int32(3)).compile().as_text()
    loop = re.search(r"(%\S+) \([^\n]*{\n(?:(?!\n}).)*ROOT %dynamic_update_slice", text, re.DOTALL)
    assert loop is not None
    updated = re.search(rf"fusion\((%[^,]+), [^\n]*calls={re.escape(loop[1])}\n", text)
    assert updated is not None
    assert re.search(rf"{re.escape(updated[1])} = f16\[64,64\]\S* copy\(", text)
