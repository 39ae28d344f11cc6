"""Loops that carry weights: what XLA widened in front of a loop is carried as it was, and the numbers stay right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax

import jax_nano
from jax_nano._dispatch import decision

F32 = np.float32
BF16 = jnp.bfloat16
F16 = np.float16
STEPS = 5
N, WIDE = 48, 80
"""No other array of the programs below is as large as a weight."""

Program = Callable[..., Any]


def weights(rng: np.random.Generator, dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Arrays of which a layer makes the state smaller, so that roundings do not grow from step to step."""
    return [jnp.asarray(reference.random(rng, shape) / (2 * shape[-2] ** 0.5), dtype) for shape in shapes]


def wide_weights(text: str, shapes: Sequence[tuple[int, ...]]) -> set[str]:
    """The float32 arrays outside of fusions that have as many elements as one of the weights."""
    sizes = {int(np.prod(shape)) for shape in shapes}
    fused = set(re.findall(r"fusion\(.*calls=(%[\w.-]+)", text))
    parts = [part for part in text.split("\n\n") if part.split(" ")[0] not in fused]
    found = re.findall(r"f32\[([\d,]+)\]", "".join(parts))
    return {x for x in found if int(np.prod([int(i) for i in x.split(",")])) in sizes}


def check(fun: Program, *args: Any, narrow: bool, rtol: float = 4e-2) -> str:
    """Compares a program with itself without acceleration, and in float64; its accelerated text.

    Args:
      fun: takes weights and other arrays.
      args: its arguments; the matrices among them are weights.
      narrow: whether no weight may be left in float32.
    """
    want = jax.jit(fun)(*args)
    with jax_nano.accelerate():
        accelerated = jax.jit(fun).lower(*args).compile()
    got, text = accelerated(*args), accelerated.as_text()
    exact = in_float64(fun, *args)
    for x, y, z in zip(*(jax.tree.leaves(t) for t in (got, want, exact)), strict=True):
        assert x.dtype == y.dtype
        scale = float(np.max(np.abs(z), initial=1e-30))
        errors = [float(np.max(np.abs(np.asarray(t, np.float64) - z), initial=0)) / scale for t in (x, y)]
        assert errors[0] <= rtol, errors
    shapes = [x.shape for x in jax.tree.leaves(args) if x.ndim >= 2 and min(x.shape[-2:]) >= N]
    assert shapes
    if narrow:
        assert not wide_weights(text, shapes), wide_weights(text, shapes)
    return text


def in_float64(fun: Program, *args: Any) -> Any:
    """A program of the same numbers in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, np.floating) else x, args)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(fun)(*wide))


def decode(layer: Callable[..., jax.Array]) -> Program:
    """A scan over steps of a layer of the state and the weights."""

    def program(x: jax.Array, *ws: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(h: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            h = layer(h, *ws)
            return h, h.sum(-1)

        return lax.scan(step, x, None, length=STEPS)

    return program


def perceptron(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return h / 2 + jnp.tanh(h @ w) @ v


def scan_in_scan(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    def inner(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return perceptron(h, w, v), None

    def outer(h: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        h = lax.scan(inner, h, None, length=3)[0]
        return jnp.sin(h), h.sum()

    return lax.scan(outer, x, None, length=STEPS)[0]


def scan_beside_scan(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """The outer loop's own products read what the inner loop carries too."""

    def inner(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return perceptron(h, w, v), None

    def outer(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = lax.scan(inner, perceptron(h, w, v), None, length=3)[0]
        return jnp.sin(h), None

    return lax.scan(outer, x, None, length=STEPS)[0]


def two_loops(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    first = decode(perceptron)(x, w, v)[0]
    return decode(lambda h, w, v: jnp.cos(h) / 2 + jax.nn.relu(h @ w) @ v)(first, w, v)[0]


def prefill(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Products in front of the loop and after it read the weights too."""
    h = jnp.sin(perceptron(x, w, v))
    h = decode(perceptron)(h, w, v)[0]
    return perceptron(jnp.sin(h), w, v)


def while_loop(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, h = state
        return i + 1, perceptron(h, w, v)

    return lax.while_loop(lambda state: (state[0] < STEPS) & (abs(state[1]).max() < 1e4), body, (jnp.int32(0), x))[1]


def several_products(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return h / 2 + jnp.tanh(h @ w + jnp.sin(h) @ w) @ v


def transposed(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return h / 2 + jnp.tanh(h @ v.T) @ w.T


def both_ways(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return h / 2 + jnp.tanh(h @ w) @ w.T + jnp.tanh(h @ v.T) @ v


def computed(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """The weights are computed by the program itself."""
    w, v = (jnp.cos(x) * x for x in (w, v))
    return decode(perceptron)(x, w, v)[0]


def carried_by_hand(x: jax.Array, w: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights are part of the state, and results."""

    def body(_: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        h, w, v = state
        return perceptron(h, w, v), w, v

    return lax.fori_loop(0, STEPS, body, (x, w, v))


NARROW: dict[str, Program] = {
    "scan": decode(perceptron),
    "float16": decode(perceptron),
    "while": while_loop,
    "scan in scan": scan_in_scan,
    "scan beside scan": scan_beside_scan,
    "two loops": two_loops,
    "before and after": prefill,
    "several products": decode(several_products),
    "transposed": decode(transposed),
    "both ways": decode(both_ways),
    "computed": computed,
    "carried by hand": carried_by_hand,
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", NARROW)
def test_no_wide_copy_is_left(name: str, rows: int, rng: np.random.Generator) -> None:
    dtype = F16 if name == "float16" else BF16
    x, w, v = weights(rng, dtype, (rows, N), (N, WIDE), (WIDE, N))
    text = check(NARROW[name], x, w, v, narrow=True)
    assert "jax_nano_" in text


def in_place(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Updates what was carried once the loop is done with it."""
    h = decode(perceptron)(h, w, v)[0]
    return h @ w.at[3].set(v[:, 0]).at[5].add(1)


def in_place_in_front(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Carries an array that was updated in place, and updates it once more."""
    w = lax.dynamic_update_slice(w, v[:3, :7].T[:3, :3] + 1, (jnp.int32(h[0, 0] > 9), jnp.int32(0)))
    first = decode(perceptron)(h, w, v)[0]
    w = lax.dynamic_update_slice(w, v[3:6, :5] - 1, (jnp.int32(2), jnp.int32(h[0, 0] > 9)))
    return decode(perceptron)(first, w, v)[0] + first


def updated_in_the_outer_loop(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """The inner loop's weights are another loop's state, which changes with every trip."""

    def outer(state: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        h, w = state
        h = decode(perceptron)(h, w, v)[0]
        return (h, w.at[i].set(jnp.tile(h[0], 2)[:WIDE])), None

    (h, w), _ = lax.scan(outer, (x, w), jnp.arange(STEPS))
    return h @ w


def swapped(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Elements of the state change places: none stays what it is."""

    def body(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, a, b = state
        return perceptron(h, a, v), b, a

    return lax.fori_loop(0, STEPS, body, (x, w, jnp.cos(w)))[0]


def read_elsewhere(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Not only products read the weights: w.sum would be converted in each trip."""
    return h / 2 + jnp.tanh(h @ w) @ v + jnp.where(h > 1e3, w[:, 0] * jnp.cos(w * h[0, 0]).max(), 0)


def in_a_branch(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return lax.cond(h[0, 0] > 0, lambda: perceptron(h, w, v), lambda: h / 3)


def condition_reads(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    def go_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] < STEPS) & (abs((w.astype(F32) * state[0]).max()) < 1e4)

    return lax.while_loop(go_on, lambda state: (state[0] + 1, perceptron(state[1], w, v)), (jnp.int32(0), x))[1]


RIGHT: dict[str, Program] = {
    "in place": in_place,
    "in place in front": in_place_in_front,
    "updated in the outer loop": updated_in_the_outer_loop,
    "swapped": swapped,
    "read elsewhere": decode(read_elsewhere),
    "in a branch": decode(in_a_branch),
    "condition reads": condition_reads,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_whatever_is_carried(name: str, rng: np.random.Generator) -> None:
    x, w, v = weights(rng, BF16, (1, N), (N, WIDE), (WIDE, N))
    check(RIGHT[name], x, w, v, narrow=False)


@pytest.mark.parametrize("donated", [(0,), (1,), (0, 1, 2)], ids=str)
def test_donated_arguments(donated: tuple[int, ...], rng: np.random.Generator) -> None:
    """What takes over the memory of a donated weight is written while the loop may still read that."""
    arrays = weights(rng, BF16, (1, N), (N, WIDE), (WIDE, N))

    def program(x: jax.Array, w: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        next_w = jnp.cos(w)
        return decode(perceptron)(x, w, v)[0], next_w, v - 1

    want = jax.jit(program)(*arrays)
    with jax_nano.accelerate():
        got = jax.jit(program, donate_argnums=donated)(*(x.copy() for x in arrays))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, F32), np.asarray(b, F32), rtol=0.04, atol=0.04)


def test_no_conversion_in_each_trip(rng: np.random.Generator) -> None:
    """A loop that reads the wide array for something else too keeps it."""
    x, w, v = weights(rng, BF16, (1, N), (N, WIDE), (WIDE, N))

    def layer(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        wide = w.astype(h.dtype)
        return h / 2 + jnp.tanh(h @ wide) @ v.astype(h.dtype) + lax.reduce_max(h[0, 0] * wide, (0, 1)) / 99

    text = check(decode(layer), x.astype(F32), w, v, narrow=False)
    assert not re.search(rf"= f32\[{N},{WIDE}\]\S* convert\(.*get-tuple-element", text)
    assert not re.search(rf"= f32\[{WIDE},{N}\]", text)  # the other one, which only a product reads


def test_int8_weights_that_no_kernel_reads(rng: np.random.Generator) -> None:
    x, v = weights(rng, F32, (1, N), (WIDE, N))
    w = jnp.asarray(rng.integers(-9, 9, (N, WIDE)), np.int8)

    def layer(h: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        return h / 2 + jnp.tanh(0.1 * (h @ w.astype(h.dtype))) @ v / 8

    check(decode(layer), x, w, v, narrow=False, rtol=1e-4)


def test_gate_keeps_wide_what_the_caches_hold(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """A vector's loop reads 1 MB as fast in float32, and four rows do not: the gate's measurements."""
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    n, wide = 256, 512
    for rows, is_narrow in ((1, False), (4, True)):
        x, w, v = weights(rng, BF16, (rows, n), (n, wide), (wide, n))
        with jax_nano.accelerate():
            text = jax.jit(decode(perceptron)).lower(x, w, v).compile().as_text()
        assert bool(wide_weights(text, [w.shape])) != is_narrow


def test_gate_opens_loops_for_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls where weights fill the caches, and none in a loop that XLA compiles into one function."""
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=True))
    for n, wide, calls in ((64, 256, None), (1024, 2048, 2)):
        shapes = [jax.ShapeDtypeStruct(x, BF16) for x in ((1, n), (n, wide), (wide, n))]
        with jax_nano.accelerate():
            text = jax.jit(decode(perceptron)).lower(*shapes).compile().as_text()
        found = len(re.findall('custom_call_target="jax_nano_', text))
        assert calls is None or found == calls
        assert "xla_cpu_small_call" not in text or not found
