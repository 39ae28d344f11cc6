"""Epilogues of every kernel: right values at every edge, nothing touched outside, and the activations' errors.

The sums themselves are test_edges' business: here each way through a kernel (tiles packed or not, few rows, inner
products, blocks of K) must hand them to the epilogue once, at the end, with the right bias and residual.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import epilogues
import numpy as np
import pytest
import reference
from epilogues import Epilogue
from guarded import Region

from jax_nano import _runtime

LARGEST_ERROR = {
    "none": 0.0,
    "relu": 0.0,
    "silu": 1.2,
    "sigmoid": 1.1,
    "tanh": 0.9,
    "gelu_tanh": 1.3,
    "gelu_erf": 2.0,
}
"""In units in the last place, over all float32 numbers whose result is one that is not subnormal."""


def finishes(kernel) -> None:
    if not kernel.epilogue:
        pytest.skip("sums in another type than float32: no epilogue")


@pytest.fixture(scope="module")
def memory() -> Iterator[list[Region]]:
    regions = [Region(1 << 20) for _ in range(5)]
    yield regions
    for r in regions:
        r.__exit__(None, None, None)


def call(kernel, a, b, c, epilogue: Epilogue, **fields) -> None:
    struct = epilogue.struct(c)
    kernel.call(a, b, c, epilogue=epilogues.address(struct), **fields)


def sums(kernel, a, b) -> reference.Expected:
    """What A @ B must be before it is rounded to C's type."""
    a, b = reference.algorithm_operands(kernel.algorithm, a, b)
    return reference.expected("mk,kn->mn", a, b, acc=kernel.acc)


def numbers(rng, shape, dtype, k=1):
    """Operands whose products with K terms are of order 1 or 2."""
    return (reference.random(rng, shape, np.float32) * 1.5 / k**0.25).astype(dtype)


def sizes(tile: int) -> list[int]:
    return sorted({1, tile // 2 + 1, tile - 1, tile, tile + 1, 2 * tile + 3})


@pytest.mark.parametrize("at", ["end", "begin"])
@pytest.mark.parametrize("order_b", "CF")
def test_edges_beside_guard_pages(kernel, memory, rng, at, order_b):
    """Every way through the kernel at sizes around its tile, with another activation each time."""
    finishes(kernel)
    activations = itertools.cycle(epilogues.NAMES)
    for k, m, n in itertools.product((1, 37), sizes(kernel.mr), [*sizes(kernel.nr), 5 * kernel.nr - 1]):
        a = memory[0].array((m, k), kernel.lhs, at=at)
        stored = memory[1].array((k, n) if order_b == "C" else (n, k), kernel.rhs, at=at)
        b = stored if order_b == "C" else stored.T
        c, residual = (memory[i].array((m, n), kernel.out, at=at) for i in (2, 3))
        bias = memory[4].array((n,), kernel.out, at=at)
        a[...], b[...] = numbers(rng, a.shape, a.dtype, k), numbers(rng, b.shape, b.dtype, k)
        bias[...], residual[...] = numbers(rng, (n,), bias.dtype), numbers(rng, (m, n), c.dtype)
        product = sums(kernel, a, b)
        for way in kernel.ways(order_b=order_b, n=n):
            epilogue = Epilogue(next(activations), 0.75, bias, residual)
            c[...] = reference.poison(c.dtype)
            call(kernel, a, b, c, epilogue, **way)
            epilogue.expected(product, kernel.out).check(c, (m, n, k, way, epilogue.activation))


@pytest.mark.parametrize("activation", epilogues.NAMES)
def test_each_part_alone(kernel, rng, activation):
    finishes(kernel)
    m, n, k = kernel.mr + 2, kernel.nr + 5, 19
    a, b = numbers(rng, (m, k), kernel.lhs, k), numbers(rng, (k, n), kernel.rhs, k)
    bias, residual = numbers(rng, (n,), kernel.out), numbers(rng, (m, n), kernel.out)
    product = sums(kernel, a, b)
    for parts in ({}, {"bias": bias}, {"residual": residual}, {"scale": -2.5}):
        epilogue = Epilogue(activation, **parts)
        for order in "CF":
            for way in kernel.ways(order_b=order, n=n):
                c = reference.poisoned((m, n), kernel.out)
                call(kernel, a, np.asarray(b, order=order), c, epilogue, **way)
                epilogue.expected(product, kernel.out).check(c, (list(parts), way))


def test_an_epilogue_of_nothing_changes_no_bit(kernel, rng):
    """Of sums of many exponents, zeros of both signs among them."""
    finishes(kernel)
    m, n, k = 2 * kernel.mr + 1, kernel.nr + 3, 2
    exponents = rng.integers(-12, 12, (m, 1)).astype(np.float64)
    a = (np.exp2(exponents) * rng.choice([-1, 0, 1], (m, k))).astype(kernel.lhs)
    b = reference.random(rng, (k, n), kernel.rhs)
    for order in "CF":
        for way in kernel.ways(order_b=order, n=n):
            plain, c = kernel.product(a, np.asarray(b, order=order), **way), reference.poisoned((m, n), kernel.out)
            call(kernel, a, np.asarray(b, order=order), c, Epilogue(), **way)
            assert c.tobytes() == plain.tobytes(), way


def test_once_at_the_end_of_k(kernel, rng):
    """Blocks of every loop and sums that two calls finish: the bits of one pass over the same blocks of K."""
    finishes(kernel)
    mc, nc, kc = 2 * kernel.mr, kernel.nr, 8 * kernel.kr
    m, n, k = mc + kernel.mr + 1, 2 * nc + 5, 2 * kc + 3
    a, b = (numbers(rng, shape, d, k) for shape, d in (((m, k), kernel.lhs), ((k, n), kernel.rhs)))
    epilogue = Epilogue("gelu_tanh", 1.5, numbers(rng, (n,), kernel.out), numbers(rng, (m, n), kernel.out))
    want = epilogue.expected(sums(kernel, a, b), kernel.out)
    for pack_a, pack_b in kernel.packs():
        results = []
        for blocks in ({"mc": mc, "nc": nc}, {}):
            c = reference.poisoned((m, n), kernel.out)
            call(kernel, a, b, c, epilogue, pack_a=pack_a, pack_b=pack_b, kc=kc, **blocks)
            want.check(c, (pack_a, pack_b, blocks))
            results.append(c)
        assert results[0].tobytes() == results[1].tobytes()
        c = reference.poisoned((m, n), kernel.out)
        rs_partial = -(-n // kernel.nr) * kernel.nr
        partial = np.full((m, rs_partial), np.nan, np.float32)
        both = {"pack_a": pack_a, "pack_b": pack_b, "kc": kc, "rs_partial": rs_partial, "partial": partial.ctypes.data}
        call(kernel, a[:, : 2 * kc], b[: 2 * kc], c, epilogue, more=1, **both)
        call(kernel, a[:, 2 * kc :], b[2 * kc :], c, epilogue, accumulate=1, **both)
        assert c.tobytes() == results[0].tobytes()


def test_batches(kernel, rng):
    """One bias for all products, a residual for each."""
    finishes(kernel)
    batch, m, n, k = 3, kernel.mr + 1, kernel.nr + 1, 11
    a, b = (numbers(rng, shape, d, k) for shape, d in (((batch, m, k), kernel.lhs), ((batch, k, n), kernel.rhs)))
    bias, residual = numbers(rng, (n,), kernel.out), numbers(rng, (batch, m, n), kernel.out)
    c = reference.poisoned((batch, m, n), kernel.out)
    call(kernel, a, b, c, Epilogue("relu", 1.0, bias, residual))
    for i in range(batch):
        epilogue = Epilogue("relu", 1.0, bias, residual[i])
        epilogue.expected(sums(kernel, a[i], b[i]), kernel.out).check(c[i], i)


def test_no_terms(kernel, rng):
    """K = 0: the bias through the activation, and the residual."""
    finishes(kernel)
    m, n = kernel.mr + 1, kernel.nr + 1
    bias, residual = numbers(rng, (n,), kernel.out), numbers(rng, (m, n), kernel.out)
    a, b = np.zeros((m, 0), kernel.lhs), np.zeros((0, n), kernel.rhs)
    c = reference.poisoned((m, n), kernel.out)
    epilogue = Epilogue("silu", 1.0, bias, residual)
    call(kernel, a, b, c, epilogue)
    epilogue.expected(sums(kernel, a, b), kernel.out).check(c)


def test_kernels_without_an_epilogue_say_so(kernel, rng):
    if kernel.epilogue:
        pytest.skip("it has one")
    a, b = reference.random(rng, (2, 2), kernel.lhs), reference.random(rng, (2, 2), kernel.rhs)
    with pytest.raises(ValueError, match="has no epilogue"):
        call(kernel, a, b, np.zeros((2, 2), kernel.out), Epilogue("relu"))


def every_exponent(rng) -> np.ndarray:
    """Finite numbers of both signs and all exponents, and many where the activations bend."""
    patterns = rng.integers(0, 2**23, (254, 400)) + (np.arange(1, 255)[:, None] << 23)
    x = patterns.astype(np.uint32).ravel().view(np.float32)
    bends = [rng.uniform(-most, most, 200_000).astype(np.float32) for most in (1, 6, 16, 100)]
    return np.concatenate([x, -x, *bends])


def plain_f32(info) -> bool:
    return {info[x] for x in ("lhs", "rhs", "out")} == {"float32"} and info["algorithm"] == "default"


RUNS = {t["name"] for t in _runtime.targets() if t["supported"]}
F32 = [pytest.param(k, id=k["name"]) for k in _runtime.kernels() if k["target"] in RUNS and plain_f32(k)]


@pytest.mark.parametrize("activation", epilogues.NAMES)
@pytest.mark.parametrize("info", F32)
def test_errors_of_activations(info, rng, activation):
    x = every_exponent(rng)
    got = applied(info, activation, x)
    error = epilogues.ulps(got, epilogues.exact(activation, x))
    worst = error.argmax()
    assert error[worst] <= LARGEST_ERROR[activation], (x[worst], got[worst])


@pytest.mark.parametrize("activation", epilogues.NAMES)
@pytest.mark.parametrize("info", F32)
def test_special_values(info, activation):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, inf, nan, 0.0, -1e30, 1e30, -3.4e38, 3.4e38, -200.0, 2.0**-126], np.float32)
    want = {  # as jax.nn's functions (test_linear compares with them), where they do not overflow on the way
        "none": x,
        "relu": [0, inf, nan, 0, 0, 1e30, 0, 3.4e38, 0, 2.0**-126],
        "tanh": [-1, 1, nan, 0, -1, 1, -1, 1, -1, 2.0**-126],
        "sigmoid": [0, 1, nan, 0.5, 0, 1, 0, 1, 0, 0.5],
    }.get(activation, [nan, inf, nan, 0, 0, 1e30, 0, 3.4e38, 0, 2.0**-127])
    np.testing.assert_array_equal(applied(info, activation, x), np.array(want, np.float32))


def applied(info, activation: str, x: np.ndarray) -> np.ndarray:
    """The activation of each number, as a product of a 1 x 1 matrix with a row of them."""
    one, c = np.ones(1, np.float32), np.full_like(x, np.nan)
    struct = Epilogue(activation).struct(c)
    addresses = {"a": one.ctypes.data, "b": x.ctypes.data, "c": c.ctypes.data}
    _runtime.testing.call(
        info["name"], {**addresses, "m": 1, "n": len(x), "k": 1, "epilogue": epilogues.address(struct)}
    )
    return c
