"""The generated attentions: values against float64, edges beside guard pages, what is skipped, threads, emulation."""

from __future__ import annotations

import contextlib
from typing import Any

import attention
import numpy as np
import pytest
import reference
from attention import UNBOUNDED, Case
from attention_cases import (
    EMULATED,
    INFOS,
    LARGE,
    LAYOUTS,
    SIZES,
    around_tiles,
    case,
    emulated_kernels,
    huge_biases,
    large_scores,
    native,
    restrictions,
    stored,
)
from guarded import Region

from jax_nano import _runtime
from jax_nano.codegen import catalog


@pytest.fixture(params=list(INFOS))
def info(request: pytest.FixtureRequest) -> dict[str, Any]:
    return native(request.param)


def check(info: dict[str, Any], x: Case, context: object = "", **options: Any) -> np.ndarray:
    out, statistics = attention.run(info["name"], x, **options)
    with np.errstate(all="ignore"):
        lse = statistics[0] + statistics[1]
    want, logs = attention.expected(x)
    want.check(out, context)
    finite = np.isfinite(logs)
    assert np.array_equal(lse[~finite], logs[~finite].astype(np.float32), equal_nan=True), context
    worst = 1e-5 * np.abs(x.q.astype(np.float64)).max() * np.abs(x.k.astype(np.float64)).max() * abs(x.scale)
    assert np.all(np.abs(lse[finite] - logs[finite]) <= 1e-5 + worst + 1e-6 * np.abs(logs[finite])), context
    return out


@pytest.mark.parametrize(("t", "s", "n", "kv_heads", "h"), SIZES)
def test_restrictions(info, rng, t, s, n, kv_heads, h):
    for name, given in restrictions(rng, 2, t, s, n, sees_a_key=False).items():
        check(info, case(rng, info, 2, t, s, n, kv_heads, h, **given), name)


def test_sizes(info, rng):
    """Every number of queries and keys around tiles and blocks, and odd sizes of heads."""
    for t, s in around_tiles(info):
        check(info, case(rng, info, t=t, s=s, right=max(0, s - t)), (t, s))
    for h in (1, 3, 16, 17, 33, 64, 80, 129, 256):
        check(info, case(rng, info, t=9, s=37, h=h), h)


def test_blocks(info, rng):
    """More keys than a block has, more queries than an item."""
    check(info, case(rng, info, t=600, s=1100, n=1, kv_heads=1, h=16))
    check(info, case(rng, info, t=530, s=1100, n=2, kv_heads=1, h=64, right=570))
    check(info, case(rng, info, t=300, s=1100, n=1, kv_heads=1, h=32, left=100, right=50))


def test_scores_that_rise(info, rng):
    """Maxima that every block exceeds, so that sums are rescaled."""
    x = case(rng, info, t=13, s=1200, n=1, kv_heads=1, h=16, scale=1.0)
    rising = np.linspace(-60, 60, 1200, dtype=np.float32).reshape(1, 1, 1, 1200)
    for order in (rising, rising[..., ::-1].copy()):
        check(info, Case(x.q, x.k, x.v, bias=order, scale=0.1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(info, rng, layout):
    x = case(rng, info, 2, 21, 37, 4, 2, 24, right=16)
    check(info, Case(*(stored(a, layout) for a in (x.q, x.k, x.v)), right=16, scale=x.scale))


@pytest.mark.parametrize("at", ["end", "begin"])
def test_nothing_is_touched_beside_the_arrays(info, rng, at):
    with contextlib.ExitStack() as stack:
        regions = {name: stack.enter_context(Region(1 << 20)) for name in ("q", "k", "v", "bias", "mask", "out")}

        def place(name: str, like: np.ndarray) -> np.ndarray:
            view = regions[name].array(like.shape, like.dtype, at=at)
            view[...] = like
            return view

        for t, s, h in [(1, 1, 1), (5, 17, 3), (7, 33, 16), (2, 95, 21)]:
            x = case(rng, info, t=t, s=s, h=h, n=2, kv_heads=1)
            bias = place("bias", rng.standard_normal((1, 2, t, s)).astype(np.float32))
            mask = place("mask", rng.random((1, 2, t, s)) < 0.7)
            for given in ({}, {"bias": bias, "mask": mask}, {"left": 1, "mask": mask}):
                y = Case(place("q", x.q), place("k", x.k), place("v", x.v), **given)
                out = regions["out"].array(x.q.shape, x.q.dtype, at=at)
                out.fill(np.nan)
                check(info, y, (t, s, h), out=out)


def test_the_same_bits_for_any_number_of_threads(info, rng):
    for x in (
        case(rng, info, 1, 300, 300, 2, 1, 32, right=0),
        case(rng, info, 1, 1, 2300, 4, 1, 64),
        case(rng, info, 1, 3, 1500, 2, 1, 16, mask=rng.random((1, 1, 3, 1500)) < 0.5),
    ):
        first, logs = attention.run(info["name"], x)
        for threads in (2, 8):
            again, others = attention.run(info["name"], x, threads=threads)
            assert first.tobytes() == again.tobytes()
            assert logs.tobytes() == others.tobytes()


def test_keys_in_pieces(info, rng):
    """Few queries against many keys: pieces are merged."""
    for s in (1024, 1025, 5000):
        x = case(rng, info, 1, 1, s, 4, 2, 33, kv_lengths=np.array([s - 7], np.int32))
        sizes = attention.fields(x, x.q)
        assert _runtime.plan_attention(info["name"], sizes["sizes"], sizes["strides"])["pieces"] > 1
        check(info, x, s, threads=2)
    check(info, case(rng, info, 1, 2, 3000, 4, 4, 16, left=40), "most pieces see nothing")


def test_queries_that_see_nothing_weigh_all_alike(info, rng):
    """What jax.nn gives for a row that is masked throughout: the mean of all values, excluded or not."""
    for given in (
        {"mask": np.zeros((1, 1, 9, 20), bool)},
        {"mask": np.zeros((1, 1, 9, 20), bool), "right": 0},
        {"kv_lengths": np.array([0], np.int32)},
        {"left": -15},
        {"right": -4},
    ):
        x = case(rng, info, t=9, s=20, **given)
        out = check(info, x, given)
        assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("excluded", [-1e9, -3e38, float(np.finfo(np.float32).min)])
def test_huge_biases(info, rng, excluded):
    for t, s in ((40, 70), (1, 2100)):
        for given in huge_biases(rng, 1, t, s, 2, excluded).values():
            check(info, case(rng, info, t=t, s=s, **given), (t, list(given)))


@pytest.mark.parametrize("score", LARGE)
def test_large_scores(info, rng, score):
    """Scores whose units in the last place are larger than exponents may be, seen through windows and lengths."""
    if info["kv"] == "float16" and abs(score) > 1e9:
        pytest.skip("beyond float16")
    lengths = {"kv_lengths": np.array([11], np.int32)}
    for t, s in ((1, 40), (9, 12), (33, 71), (1, 1100), (3, 1100)):
        for given in ({}, {"left": 0}, {"right": 0}, {"left": 2, "right": 1}, lengths, {**lengths, "left": 5}):
            x = large_scores(rng, info, t, s, score, **given)
            out, want = attention.run(info["name"], x)[0], attention.expected(x)[0].value
            # Not the bounds of ``check``, which grow with scores: these are exact.
            off = 16 * float(reference.finfo(x.k.dtype).eps)
            assert np.allclose(out.astype(np.float64), want, rtol=off, atol=off), (t, s, list(given))


def test_few_queries_that_see_none_of_most_pieces(info, rng):
    """Numbers of rows that a shift does not divide by: pieces without keys end."""
    for t, n in ((3, 1), (5, 2), (7, 3)):
        check(info, case(rng, info, 1, t, 3000, n, n, 17, right=0), (t, n), threads=2)


def test_scores_that_rise_from_far_below(info, rng):
    """Blocks of weights that no float32 holds, before one of common scores."""
    score = -1e8 if info["kv"] == "float16" else -3e9
    x = large_scores(rng, info, 5, 1100, score)
    x.k[:, 1000:] /= 4096
    x.k[:, 1050:] = 0
    assert np.isfinite(check(info, x).astype(np.float32)).all()


@pytest.mark.parametrize("masked", [-1e4, -30.0])
def test_excluded_keys_of_finite_scores(info, rng, masked):
    """That they have a weight where no key that is seen has a much greater score."""
    mask = rng.random((1, 1, 40, 70)) < 0.5
    mask[0, 0, 3] = False
    bias = np.zeros((1, 1, 40, 70), np.float32)
    bias[0, 0, 5], bias[0, 0, 6] = masked - 3, masked + 2
    for given in ({"mask": mask}, {"mask": mask, "bias": bias}, {"bias": bias, "left": 9, "right": 30}, {"right": -2}):
        check(info, case(rng, info, t=40, s=70, masked=masked, **given), list(given))


def test_all_scores_minus_infinity_give_nan(info, rng):
    bias = np.zeros((1, 1, 5, 18), np.float32)
    bias[0, 0, 2] = -np.inf
    bias[0, 0, 3, 4:] = -np.inf
    out, lse = attention.run(info["name"], case(rng, info, t=5, s=18, bias=bias))
    assert np.isnan(out[:, 2]).all()
    assert np.isneginf(lse[1][:, 2]).all()
    assert np.isfinite(out[:, [0, 1, 3, 4]].astype(np.float32)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_seen_does_not_leak(info, rng, poison):
    t = s = 40
    for given in (
        {"right": 0},
        {"left": 4, "right": 3},
        {"kv_lengths": np.array([17], np.int32)},
    ):
        x = case(rng, info, t=t, s=s, **given)
        clean, logs = attention.run(info["name"], x)
        unseen = ~attention.visible(x)[0, 0]
        for key in (0, 9, 16, 31, s - 1):
            k, v = x.k.copy(), x.v.copy()
            k[0, key] = v[0, key] = poison
            out, lse = attention.run(info["name"], Case(x.q, k, v, **given, scale=x.scale))
            rows = unseen[:, key]
            worst = 4 * float(reference.finfo(x.q.dtype).eps)
            close = np.abs(out[0, rows].astype(np.float64) - clean[0, rows].astype(np.float64)) <= worst * 4
            assert close.all(), (given, key)
            assert np.array_equal(lse[:, 0, rows], logs[:, 0, rows])
            assert np.isnan(out[0, ~rows].astype(np.float32)).all() or not (~rows).any() or np.isinf(poison)


def test_exponentials(info, rng):
    """One key of score 0 and value 0, another of score -y and value 1: the result is exp(-y), for y above 20.

    The exponential itself is within 2 ulp; y in base 2 is rounded once more, which moves it by half an ulp of y.
    """
    if info["q"] != "float32" or info["kv"] != "float32":
        pytest.skip("results or values are too narrow to tell")
    y = rng.uniform(20, 87, 4096).astype(np.float32)
    zero = np.zeros((1, 4096, 1, 1), np.float32)
    v = np.zeros((1, 2, 1, 1), np.float32)
    v[0, 1] = 1
    bias = np.stack([np.zeros_like(y), -y], -1)[None, None]
    out, _ = attention.run(info["name"], Case(zero, v * 0, v, bias=bias))
    want = np.exp(-y.astype(np.float64))
    ulp = np.spacing(want.astype(np.float32)).astype(np.float64)
    moved = want * np.spacing((y * np.float32(np.log2(np.e))).astype(np.float32)) * np.log(2)
    assert (np.abs(out[0, :, 0, 0] - want) <= 2 * ulp + 1.01 * moved).all()


def test_masked_keys_do_not_leak(info, rng):
    x = case(rng, info, t=11, s=30, mask=np.arange(30)[None, None, None, :] % 3 != 1)
    clean, _ = attention.run(info["name"], x)
    k = x.k.copy()
    k[:, 1::3] = np.nan
    out, _ = attention.run(info["name"], Case(x.q, k, x.v, mask=x.mask, scale=x.scale))
    assert out.tobytes() == clean.tobytes()


def test_a_wrong_element_is_noticed(info, rng):
    x = case(rng, info, t=9, s=30)
    out, _ = attention.run(info["name"], x)
    want, _ = attention.expected(x)
    assert want.matches(out)
    out[0, 3, 1, 5] += 0.2
    assert not want.matches(out)


@pytest.fixture(scope="session")
def library() -> dict[str, tuple[dict[str, Any], Any]]:
    return emulated_kernels()


class TestEmulated:
    """Every target, whatever the CPU; workspace between guard pages."""

    @pytest.fixture(params=[k.name for k in EMULATED])
    def subject(self, request, library):
        return library[request.param]

    @pytest.mark.parametrize(("t", "s", "h", "at"), [(5, 17, 3, "end"), (35, 70, 33, "begin"), (16, 129, 64, "end")])
    def test_values(self, subject, rng, t, s, h, at):
        facts, function = subject
        bias, mask = rng.standard_normal((1, 2, t, s)).astype(np.float32), rng.random((1, 2, t, s)) < 0.7
        for given in ({}, {"right": 3}, {"left": 9, "right": 30}, {"bias": bias, "mask": mask, "right": s - t}):
            x = case(rng, facts, 1, t, s, 2, 1, h, **given)
            want, _ = attention.expected(x)
            for block in (facts["unit"], 3 * facts["unit"]):
                want.check(attention.call(facts, function, x, block=block, at=at), (list(given), block))

    @pytest.mark.parametrize(("t", "s", "h", "at"), [(1, 1, 1, "end"), (4, 70, 33, "begin"), (3, 129, 64, "end")])
    def test_few_queries(self, subject, rng, t, s, h, at):
        facts, function = subject
        if not facts["few"]:
            pytest.skip("reads no keys where they lie")
        bias, mask = rng.standard_normal((1, 2, t, s)).astype(np.float32), rng.random((1, 2, t, s)) < 0.7
        for given in ({}, {"right": 3}, {"left": 9, "right": 30}, {"bias": bias, "mask": mask, "right": s - t}):
            x = case(rng, facts, 1, t, s, 2, 1, h, **given)
            want, _ = attention.expected(x)
            for block in (facts["unit"], 3 * facts["unit"]):
                want.check(attention.call(facts, function, x, block=block, at=at, few=True), (list(given), block))

    def test_keys_one_part_after_the_other(self, subject, rng):
        facts, function = subject
        x = case(rng, facts, 2, 9, 200, 2, 2, 40, left=UNBOUNDED)
        want, _ = attention.expected(x)
        got = attention.call(facts, function, x, block=2 * facts["unit"], pieces=(64, 130))
        want.check(got)


def test_every_attention_of_the_catalog_is_in_the_extension():
    assert list(INFOS) == [k.name for k in catalog.attentions()]
