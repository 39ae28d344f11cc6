"""Kernels for quantised weights, without XLA: against float64, at every edge, beside guard pages, in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantized
import reference
from guarded import Region
from quantized import Case

from jax_nano import _runtime
from jax_nano._core import spec

WEIGHTS = tuple(spec.WEIGHTS)
INTEGERS = ("int8", "uint8", "int4", "uint4")
FLOATS = ("float32", "bfloat16", "float16")
MANY_ROWS = (
    (17, 34, 48, 16, "float32"),
    (70, 300, 330, 330, "bfloat16"),
    (33, 514, 640, 320, "bfloat16"),
    (40, 66, 816, 272, "bfloat16"),
    (130, 80, 288, 48, "bfloat16"),
    (1100, 258, 32, 16, "bfloat16"),
    (64, 258, 544, 32, "float16"),
)
"""m, n, k, group, and the dtype of x and of the result."""

pytestmark = pytest.mark.skipif(not _runtime.selected_target(), reason="this CPU runs no kernels")


def run(case: Case, threads: int = 1, out: np.ndarray | None = None) -> np.ndarray:
    """The product by the runtime, in memory full of NaN beforehand."""
    out = reference.poisoned((case.m, case.n), quantized.dtype(case.out)) if out is None else out
    arrays = [case.x, case.packed, case.scale, case.zero, out, None, None]
    addresses = [0 if a is None else a.ctypes.data for a in arrays]
    _runtime.testing.quantized(addresses, sizes(case), case.along_k, case.dtypes, threads)
    return out


def plan(case: Case, threads: int = 1) -> Any:
    return _runtime.plan_quantized(sizes(case), case.along_k, case.dtypes, threads)


def sizes(case: Case) -> tuple[int, int, int, int]:
    return case.m, case.n, case.k, case.group


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_signature(weights: str, along_k: bool, rng: np.random.Generator) -> None:
    zeros = (None, "int8", "uint8") if weights in INTEGERS else (None,)
    for x, scale, zero, wide in itertools.product(FLOATS, FLOATS, zeros, (False, True)):
        for m in (1, 3, 17):
            case = Case.random(rng, m, 160, 128, 64, weights, x, scale, zero, "float32" if wide else x, along_k)
            assert plan(case)["few"] == (m <= 16)
            case.check(run(case))


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("x", ["float32", "bfloat16"])
def test_edge_sizes(x: str, weights: str, along_k: bool, rng: np.random.Generator) -> None:
    """Every end of a register of weights, of a group, of rows of x, and of a block of columns. x of bfloat16 may have
    kernels of its own where there are no zero points.
    """
    zero = "int8" if weights in INTEGERS and x == "float32" else None
    ns = (2, 16, 30, 48, 112, 128, 144, 258, 272)
    whole = ((50, 50), (51, 51), (112, 112))
    ks = ((16, 16), (32, 16), (48, 16), (64, 32), (96, 32), (192, 64), (256, 128), (560, 80), *whole)
    for m, n, (k, group) in itertools.product((1, 2, 4, 5, 15), ns, ks):
        if along_k and k * spec.WEIGHTS[weights].bits % 8:
            continue
        case = Case.random(rng, m, n, k, group, weights, x, "float32", zero, "float32", along_k)
        case.check(run(case), f"{m}x{n}x{k} in groups of {group}")


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_many_rows(weights: str, along_k: bool, rng: np.random.Generator) -> None:
    for zero, (m, n, k, group, out) in itertools.product(
        (None, "uint8") if weights in INTEGERS else (None,), MANY_ROWS
    ):
        x = out
        case = Case.random(rng, m, n, k, group, weights, x, "float32", zero, out, along_k)
        assert not plan(case)["few"]
        case.check(run(case), f"{m}x{n}x{k}")
        assert np.array_equal(run(case, 3).view(np.uint8), run(case, 1).view(np.uint8))


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("weights", INTEGERS)
@pytest.mark.parametrize("x", ["float32", "bfloat16"])
def test_small_integers_are_exact(x: str, weights: str, along_k: bool, rng: np.random.Generator) -> None:
    for m, zero in itertools.product((1, 4, 8, 40), ("int8", "uint8", None)):
        case = Case.random(rng, m, 272, 256, 32, weights, x, "float32", zero, "float32", along_k)
        case = case.with_x(reference.small_integers(rng, case.x.shape).astype(quantized.dtype(x))).with_scale(
            np.exp2(rng.integers(-2, 3, case.given_scale.shape)).astype(np.float32)
        )
        np.testing.assert_array_equal(run(case), case.exact())


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e4m3fn"])
def test_any_number_of_threads_gives_the_same_bits(weights: str, along_k: bool, rng: np.random.Generator) -> None:
    for m in (1, 3):
        case = Case.random(rng, m, 2064, 1024, 128, weights, "bfloat16", "float16", None, "float32", along_k)
        one = run(case)
        case.check(one)
        for threads in (2, 3, 8):
            assert plan(case, threads)["n_parts"] * plan(case, threads)["k_parts"] > 1
            assert np.array_equal(run(case, threads), one)


@pytest.mark.parametrize(("k", "group", "parts"), [(768, 128, 6), (640, 64, 5), (1408, 128, 4), (1536, 768, 4)])
def test_k_is_split_equally(k: int, group: int, parts: int, rng: np.random.Generator) -> None:
    """At groups, or inside of long ones; 11 groups of 128 have no equal parts."""
    case = Case.random(rng, 1, 2304, k, group, "int4", "float32", "float32", "int8", "float32", False)
    assert plan(case)["k_parts"] == parts
    one = run(case)
    case.check(one)
    assert np.array_equal(run(case, 4), one)


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("at", ["begin", "end"])
def test_nothing_is_touched_outside(
    weights: str, along_k: bool, at: str, rng: np.random.Generator, memory: list[Region]
) -> None:
    zero = "int8" if weights in INTEGERS else None
    for m, n, k, group in itertools.product((1, 3, 8, 17), (2, 18, 48, 130, 144, 272), (48, 80), (16, None)):
        case = Case.random(rng, m, n, k, group or k, weights, "bfloat16", "float16", zero, "bfloat16", along_k)
        case = case.placed(memory, at)
        out = memory[-1].array((m, n), quantized.dtype("bfloat16"), at=at)
        out[...] = np.nan
        case.check(run(case, out=out), f"{m}x{n}x{k}")


@pytest.fixture(scope="module")
def memory() -> Iterator[list[Region]]:
    regions = [Region(1 << 16) for _ in range(5)]
    yield regions
    for r in regions:
        r.__exit__(None, None, None)


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("x", FLOATS)
def test_special_numbers_of_float8(x: str, along_k: bool, rng: np.random.Generator) -> None:
    """NaN and Inf reach the columns that have them, and no others; the smallest numbers are not lost."""
    for weights, m in itertools.product(("float8_e4m3fn", "float8_e5m2"), (1, 17)):
        case = Case.random(rng, m, 64, 64, 64, weights, x, "float32", None, "float32", along_k)
        q = case.q.copy()
        every = np.arange(256, dtype=np.uint8).view(q.dtype)
        finite = every[np.isfinite(every.astype(np.float32))]
        q[...] = np.resize(finite, q.shape)
        q[5, 7] = np.nan
        if weights == "float8_e5m2":
            q[6, 9] = np.inf
        case = case.with_q(q)
        got = run(case)
        assert np.isnan(got[:, 7]).all()
        case.check(got)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_float8_and_integer(weights: str) -> None:
    """Each weight without a zero point, as rows of ones pick it, exactly."""
    values = np.arange(2 ** spec.WEIGHTS[weights].bits).astype(np.uint8)
    if weights in INTEGERS:
        values = (values.astype(np.int64) - spec.WEIGHTS[weights].flip).astype(quantized.stored(weights))
    else:
        values = values.view(quantized.dtype(weights))
        values = values[np.isfinite(values.astype(np.float32))]
    for x, along_k, m in itertools.product(("float32", "bfloat16"), (False, True), (1, 17)):
        q = np.broadcast_to(np.resize(values, 256), (256, 256))
        ones = np.zeros((m, 256), quantized.dtype(x))
        ones[:, 37] = 1
        case = Case(ones, q, np.ones((1, 256), np.float32), None, weights, "float32", along_k)
        np.testing.assert_array_equal(run(case), np.broadcast_to(q[37].astype(np.float32), (m, 256)))


@pytest.mark.parametrize("weights", INTEGERS)
def test_every_value_and_zero_point(weights: str) -> None:
    """Each weight against each zero point of a byte, exactly: what kernels compute is q - zero point."""
    bits, flip = spec.WEIGHTS[weights].bits, spec.WEIGHTS[weights].flip
    values = np.arange(2**bits) - flip
    cases = itertools.product(("float32", "bfloat16"), ("int8", "uint8"), (False, True), (1, 17))
    for dtype, zero, along_k, m in cases:
        points = np.arange(256, dtype=np.uint8).view(zero)
        q = np.broadcast_to(np.resize(values, 256)[:, None], (256, 256)).astype(quantized.stored(weights))
        x = np.zeros((m, 256), quantized.dtype(dtype))
        x[:, 37 % 2**bits] = 1
        case = Case(x, q, np.ones((1, 256), np.float32), points[None, :], weights, "float32", along_k)
        want = values[37 % 2**bits] - points.astype(np.int64)
        np.testing.assert_array_equal(run(case), np.broadcast_to(want.astype(np.float32), (m, 256)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_large_and_small_x(weights: str, rng: np.random.Generator) -> None:
    """What formats multiply x and sums with are powers of two, so that nothing changes as long as nothing leaves the
    range of float32, where int4's sums are 2**14 times as large.
    """
    for along_k, m, exponent in itertools.product((False, True), (1, 3), (90, -90)):
        case = Case.random(rng, m, 144, 256, 64, weights, "float32", "float32", None, "float32", along_k)
        case = case.with_x(reference.small_integers(rng, case.x.shape))
        power = np.float32(2.0**exponent)
        np.testing.assert_array_equal(run(case.with_x(case.x * power)), run(case) * power)


def test_a_zero_weight_counts_for_nothing() -> None:
    """Not even beside values whose products with an offset would cancel out only nearly."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((1, 512)) * 1e6).astype(np.float32)
    for weights, along_k in itertools.product(("int8", "int4"), (False, True)):
        q = np.zeros((512, 128), quantized.stored(weights))
        case = Case(x, q, np.ones((4, 128), np.float32), None, weights, "float32", along_k)
        assert not run(case).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 24, "k": 48}, "groups of 24"),
        ({"group": 7}, "groups of 7"),
        ({"q": "int4", "n": 33}, "end inside a byte"),
        ({"q": "int16"}, "weights of int16"),
        ({"x": "float64"}, "float64"),
        ({"zero": "float32"}, "float32"),
        ({"q": "float8_e5m2", "zero": "int8"}, "zero points of floats"),
    ],
)
def test_what_no_kernel_takes_is_refused(change: dict[str, object], message: str) -> None:
    given = {"n": 64, "k": 64, "group": 32, "x": "float32", "q": "int8", "scale": "float32", "zero": "", **change}
    dtypes = (given["x"], given["q"], given["scale"], given["zero"], "float32")
    with pytest.raises(ValueError, match=message):
        _runtime.plan_quantized((1, given["n"], given["k"], given["group"]), False, dtypes, 1)


@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e5m2"])
def test_k_is_split_where_columns_are_few(weights: str, rng: np.random.Generator) -> None:
    """The parts follow from the shape: the same bits for any number of threads."""
    bits = spec.WEIGHTS[weights].bits
    for m, n, k, group in ((1, 256, 32768 // bits, 64), (3, 80, 131072 // bits, 1024), (8, 144, 65536 // bits, 2048)):
        case = Case.random(rng, m, n, k, group, weights, "float32", "bfloat16", None, "float32", False)
        assert plan(case)["k_parts"] > 1
        one = run(case)
        case.check(one)
        for threads in (2, 5):
            assert np.array_equal(run(case, threads), one)


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_epilogues(m: int, out: str, along_k: bool, rng: np.random.Generator) -> None:
    case = Case.random(rng, m, 272, 128, 32, "int8", "float32", "float32", None, out, along_k)
    bias, residual = (rng.standard_normal(shape).astype(quantized.dtype(out)) for shape in (272, (m, 272)))
    got = reference.poisoned((m, 272), quantized.dtype(out))
    arrays = (case.x, case.packed, case.scale, None, got, bias, residual)
    addresses = [0 if a is None else a.ctypes.data for a in arrays]
    for threads in (1, 3):
        _runtime.testing.quantized(addresses, sizes(case), along_k, case.dtypes, threads, "relu", 0.5)
        want = np.maximum(0.5 * case.exact() + bias.astype(np.float64), 0) + residual.astype(np.float64)
        eps = float(ml_dtypes.finfo(quantized.dtype(out)).eps)
        sums = np.abs(case.given_x.astype(np.float64)) @ np.abs(case.weights_in_float64())
        bound = eps * (np.abs(want) + np.abs(residual.astype(np.float64))) + 128 * np.finfo(np.float32).eps * sums
        assert (np.abs(got.astype(np.float64) - want) <= bound).all()


def test_a_wrong_element_is_noticed(rng: np.random.Generator) -> None:
    case = Case.random(rng, 2, 64, 64, 32, "int8", "float32", "float32", None, "float32", False)
    got = run(case)
    got[1, 5] *= 1.001
    with pytest.raises(AssertionError):
        case.check(got)
