"""Products that XLA fuses with what stands around them: they run on kernels, and none is missing in the report.

What a program has of them is counted in what XLA compiles without acceleration, with its fusions opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from programs import dots_of

import jax_nano
from jax_nano._core import record
from jax_nano._dispatch import decision

BF16: Final = jnp.bfloat16
Program = Callable[..., Any]


def arrays(rng: np.random.Generator, *shapes: tuple[int, ...], dtype: Any = np.float32) -> list[jax.Array]:
    return [jnp.asarray(reference.random(rng, shape) / np.sqrt(shape[-1]), dtype) for shape in shapes]


@pytest.fixture
def gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indirectly: whether the decline gate is on."""
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=request.param))
    jax.clear_caches()  # the gate is not a part of their keys


both_gates = pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"], indirect=True)


def counted(fun: Program, *args: Any, rtol: float = 2e-5) -> tuple[int, list[record.Product | record.Attention]]:
    """The products of a program, and those that run on kernels. Checks results and report.

    Every product is in the report, with a reason if it is XLA's, and no other one is. An attention in one pass stands
    for two products, with its gradients for six.
    """
    plain = jax.jit(fun).lower(*args).compile()
    jax_nano.clear_report()
    with jax_nano.accelerate():
        accelerated = jax.jit(fun).lower(*args).compile()
    told: list[record.Product | record.Attention] = [x for x, count in record.products() for _ in range(count)]
    for x, count in record.attentions():
        if x.declined is None:
            told += [x] * (count * x.products)
    before, after = dots_of(plain.as_text()), dots_of(accelerated.as_text())
    assert len(told) == before, jax_nano.report()
    left = [product for product in told if product.declined is not None]
    assert len(left) == after, jax_nano.report()
    assert all(re.search(r"[a-z]{2}", product.declined or "") for product in left)
    for x, y in zip(jax.tree.leaves(accelerated(*args)), jax.tree.leaves(plain(*args)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        a, b = (np.asarray(z, np.float64) for z in (x, y))
        scale = float(np.max(np.abs(b), initial=1e-30))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)
    return before, [product for product in told if product.declined is None]


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def with_weights(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), weights


def network(x: jax.Array, f: jax.Array, g: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.nn.relu(lax.conv_general_dilated(x, f, (2, 2), "SAME", dimension_numbers=numbers))
    y = jax.nn.relu(lax.conv_general_dilated(y, g, (2, 2), "SAME", dimension_numbers=numbers))
    return jax.nn.log_softmax(jax.nn.relu(y.reshape(len(x), -1) @ w) @ v)


def squares(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((x @ w - y) ** 2)


SQUARE: Final = ((64, 48), (48, 64), (64, 64))
HEADS: Final = ((2, 32, 4, 64),) * 3
IMAGES: Final = ((8, 16, 16, 16), (3, 3, 16, 32), (3, 3, 32, 32), (512, 64), (64, 10))

# What is computed, the shapes of its arguments, and how many of its products run on kernels: all of them.
PROGRAMS: Final[dict[str, tuple[Program, tuple[tuple[int, ...], ...], int]]] = {
    "mean squared error": (squares, SQUARE, 1),
    "its gradient": (jax.grad(squares, (0, 1)), SQUARE, 3),
    "softmax": (lambda x, w: jax.nn.softmax(x @ w), SQUARE[:2], 1),
    "log of a sum of exponentials": (lambda x, w: jax.nn.logsumexp(x @ w, axis=-1), SQUARE[:2], 1),
    "norm": (lambda x, w: jnp.linalg.norm(x @ w), SQUARE[:2], 1),
    "the largest": (lambda x, w: (x @ w).max(-1), SQUARE[:2], 1),
    "the place of the largest": (lambda x, w: (x @ w).argmax(-1), SQUARE[:2], 1),
    "sum of a transposed product": (lambda x, w: jnp.sum((w.T @ x.T) ** 2, axis=0), SQUARE[:2], 1),
    "operands computed in the fusion": (lambda x, w: (jnp.tanh(x) @ jnp.exp(w)).sum(), SQUARE[:2], 1),
    "an operand that the rest reads too": (lambda x: (lambda t: (t @ t * t).sum())(jnp.tanh(x)), ((64, 64),), 1),
    "a chain": (lambda x, w: (jax.nn.relu(x @ w) @ w).sum(), ((64, 64), (64, 64)), 2),
    "two that are added": (lambda x, w: (x @ w + w @ x).sum(0), ((64, 64), (64, 64)), 2),
    "a sum of what the next one reads": (
        lambda x, w: (lambda e: (e @ w / e.sum(1)[:, None]).max(0))(jnp.exp(x @ w)),
        ((64, 64), (64, 64)),
        2,
    ),
    "attention": (attention, HEADS, 2),
    "attention that returns its weights": (with_weights, HEADS, 2),
    "jax.nn's attention": (jax.nn.dot_product_attention, HEADS, 2),
    "causal attention": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), HEADS, 2),
    "gradients of attention": (jax.grad(lambda *x: (attention(*x) ** 2).sum(), (0, 1, 2)), HEADS, 6),
    "convolutions and dense layers": (network, IMAGES, 2),
    "in a loop": (lambda x, w: lax.fori_loop(0, 3, lambda i, x: jax.nn.softmax(x @ w), x), ((64, 64), (64, 64)), 1),
    "in a branch": (
        lambda x, w: lax.cond(x[0, 0] > 0, lambda: (x @ w).sum(), lambda: (w @ x).max()),
        ((64, 64), (64, 64)),
        2,
    ),
    "vmap": (jax.vmap(squares), tuple((3, *shape) for shape in SQUARE), 1),
}


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_all_run_on_kernels(name: str, dtype: Any, rng: np.random.Generator) -> None:
    fun, shapes, products = PROGRAMS[name]
    tolerance = 2e-5 if dtype == np.float32 else 4e-2
    if (name, dtype) == ("the place of the largest", BF16):
        tolerance = 1e3  # rounding decides between equals
    before, ours = counted(fun, *arrays(rng, *shapes, dtype=dtype), rtol=tolerance)
    assert len(ours) == before == products, jax_nano.report()


@both_gates
@pytest.mark.parametrize("name", PROGRAMS)
def test_none_is_hidden(gate: None, name: str, rng: np.random.Generator) -> None:
    """Small ones, which the gate declines, are listed too."""
    del gate
    fun, shapes, _ = PROGRAMS[name]
    if shapes is not IMAGES:
        shapes = tuple(tuple(min(n, 4) for n in shape) for shape in shapes)
    counted(fun, *arrays(rng, *shapes))


@both_gates
@pytest.mark.parametrize("matrix", [(3, 3), (2, 3)])
@pytest.mark.parametrize("rows", [33000, 40000])
@pytest.mark.parametrize("reduce", [jnp.sum, jnp.max])
def test_wide_products_before_a_sum(
    gate: None, matrix: tuple[int, int], rows: int, reduce: Any, rng: np.random.Generator
) -> None:
    """YNNPACK of jaxlib 0.10.2 gets these wrong beyond 32768 columns, if it computes both."""
    del gate
    m, v = reference.random(rng, matrix), reference.random(rng, (rows, matrix[1]))
    with jax_nano.accelerate():
        got = jax.jit(jax.vmap(lambda m, v: reduce((m @ v) ** 2), (None, 0)))(m, v)
    product = v.astype(np.float64) @ m.T.astype(np.float64)
    want = (product**2).sum(1) if reduce is jnp.sum else (product**2).max(1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [True], indirect=True)
def test_what_stays_in_a_fusion_has_its_own_reason(gate: None) -> None:
    del gate
    _, ours = counted(squares, *(np.ones((3, 3), np.float32),) * 3)
    assert not ours
    assert "left to XLA: too small: XLA writes out its terms" in jax_nano.report()


@pytest.mark.parametrize("gate", [True], indirect=True)
@pytest.mark.parametrize(("terms", "calls"), [(64, 0), (256, 1)])
def test_large_results_of_short_sums_stay(gate: None, terms: int, calls: int, rng: np.random.Generator) -> None:
    """XLA has each part of the result in a cache when it reads it again."""
    del gate
    x, w = arrays(rng, (1024, terms), (terms, 512))
    _, ours = counted(lambda x, w: jax.nn.softmax(x @ w), x, w)
    assert len(ours) == calls
    assert ("sums of 64 terms: what follows reads the 2 MiB in a cache" in jax_nano.report()) == (not calls)


INTEGERS: Final[dict[str, tuple[Program, Any, Any]]] = {
    "vectors": (lambda a, b: jnp.vdot(a, b, preferred_element_type=jnp.int32), (np.int8, 70000), (np.int8, 70000)),
    "a row and a column": (lambda a, b: lax.dot(a[None], b[:, None], preferred_element_type=jnp.int32),)
    + ((np.int8, 70000),) * 2,
    "bytes in, bytes out": (jnp.vdot, (np.int8, 70000), (np.int8, 70000)),
    "different signs": (
        lambda a, b: jnp.vdot(a, b, preferred_element_type=jnp.int32),
        (np.uint8, 70000),
        (np.int8, 70000),
    ),
    "several": (
        lambda a, b: jnp.einsum("bi,bi->b", a, b, preferred_element_type=jnp.int32),
        (np.int8, (3, 70000)),
        (np.int8, (3, 70000)),
    ),
    "in a loop that changes one": (
        lambda a, b: lax.fori_loop(
            0, 3, lambda _, c: c + jnp.vdot(c, b, preferred_element_type=jnp.int32).astype(c.dtype), a
        ),
        (np.int8, 70000),
        (np.int8, 70000),
    ),
    "a sum that does not begin with zero": (
        lambda a, b: lax.reduce(a.astype(np.int32) * b.astype(np.int32), np.int32(7), lax.add, (0,)),
        (np.int8, 70000),
        (np.int8, 70000),
    ),
    "the largest product": (
        lambda a, b: (a.astype(np.int32) * b.astype(np.int32)).max(),
        (np.int8, 70000),
        (np.int8, 70000),
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_products_of_integer_vectors(name: str, rng: np.random.Generator) -> None:
    """XLA multiplies and adds up in steps: there is no dot in its program."""
    fun, *operands = INTEGERS[name]
    args = [rng.integers(0 if t == np.uint8 else -128, 128, shape).astype(t) for t, shape in operands]
    plain = jax.jit(fun).lower(*args).compile()
    jax_nano.clear_report()
    with jax_nano.accelerate():
        accelerated = jax.jit(fun).lower(*args).compile()
    np.testing.assert_array_equal(accelerated(*args), plain(*args))
    is_product = name in list(INTEGERS)[:5]
    assert ("1 products compiled, 1 run on kernels" in jax_nano.report()) == is_product
    assert ("reduce-window" in accelerated.as_text()) != is_product


def test_weights_of_bytes_are_read_as_they_are(rng: np.random.Generator) -> None:
    """By the kernel that reads them: the program has no loop that writes them as floats."""
    x, scale = arrays(rng, (1, 512), (1, 512), dtype=BF16)
    w = rng.integers(-128, 128, (512, 512)).astype(np.int8)
    _, ours = counted(lambda x, w, s: (x @ w.astype(BF16)) * s, x, w, scale, rtol=1e-2)
    assert [[array.dtype for array in product.arrays[:2]] for product in ours] == [["bfloat16", "int8"]]


def test_a_fusion_keeps_its_sum() -> None:
    """A loop of XLA's takes two to five times as long for it as YNNPACK."""
    args = (np.ones((64, 64), np.float32),) * 2
    fun = jax.jit(lambda x, w: jnp.sum((x @ w) ** 2))
    plain = fun.lower(*args).compile().as_text()
    with jax_nano.accelerate():
        text = fun.lower(*args).compile().as_text()
    assert text.count("__ynn_fusion") == plain.count("__ynn_fusion") == 1
    assert re.search(r"jax_nano_dot_general", text)
