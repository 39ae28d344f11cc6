"""The generated gradients of attention: values against float64, edges beside guard pages, threads, emulation."""

from __future__ import annotations

import contextlib
from typing import Any

import attention
import attention_cases as cases
import attention_gradients as gradients
import numpy as np
import pytest
import reference
from attention import Case, visible
from attention_cases import (
    EMULATED,
    INFOS,
    LARGE,
    LAYOUTS,
    SIZES,
    around_tiles,
    emulated_kernels,
    huge_biases,
    large_scores,
    native,
    restrictions,
    stored,
)
from guarded import Region


def case(rng: np.random.Generator, info: dict[str, Any], *sizes: int, **given: Any) -> tuple[Case, gradients.Given]:
    """A case (``attention_cases.case``) and what its gradients are computed from."""
    x = cases.case(rng, info, *sizes, **given)
    return x, gradients.given(x, cases.array(rng, (*x.q.shape[:3], x.v.shape[3]), info["q"]))


@pytest.fixture(params=list(INFOS))
def info(request: pytest.FixtureRequest) -> dict[str, Any]:
    return native(request.param)


def check(info: dict[str, Any], x: Case, g: gradients.Given, context: object = "", **options: Any) -> dict[str, Any]:
    out = gradients.run(info["name"], x, g, dbias=x.bias is not None, **options)
    for name, want in gradients.expected(x, g).items():
        want.check(out[name], (context, name))
    return out


@pytest.mark.parametrize(("t", "s", "n", "kv_heads", "h"), SIZES)
def test_restrictions(info, rng, t, s, n, kv_heads, h):
    for name, given in restrictions(rng, 2, t, s, n, sees_a_key=True).items():
        check(info, *case(rng, info, 2, t, s, n, kv_heads, h, **given), name)


def test_sizes(info, rng):
    """Every number of queries and keys around tiles, and odd sizes of heads."""
    for t, s in around_tiles(info):
        check(info, *case(rng, info, t=t, s=s, right=max(0, s - t)), (t, s))
    for h, width in ((1, 1), (3, 5), (16, 17), (33, 16), (64, 64), (80, 80), (129, 40), (256, 256)):
        check(info, *case(rng, info, t=9, s=37, h=h, width=width), (h, width))


def test_blocks_chunks_and_pieces(info, rng):
    """More keys than a block has, more queries than a chunk, keys in pieces."""
    for sizes, given in (
        ({"t": 110, "s": 700, "n": 1, "kv_heads": 1, "h": 16}, {}),
        ({"t": 110, "s": 1100, "n": 2, "kv_heads": 1, "h": 64}, {"right": 990}),
        ({"t": 300, "s": 900, "n": 1, "kv_heads": 1, "h": 32}, {"left": 100, "right": 50}),
        ({"t": 150, "s": 300, "n": 6, "kv_heads": 2, "h": 40}, {"right": 0}),
    ):
        x, g = case(rng, info, **sizes, **given)
        planned = gradients.plan(info["name"], x)
        assert planned["pieces"] > 1
        assert planned["shared_bytes"] > 0
        assert sizes["t"] * sizes["n"] // sizes["kv_heads"] > planned["chunk"]
        check(info, x, g, sizes, threads=2)
    x, g = case(rng, info, 4, 120, 400, 8, 8, 16)
    assert gradients.plan(info["name"], x)["pieces"] == 1
    check(info, x, g)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(info, rng, layout):
    x, g = case(rng, info, 2, 21, 37, 4, 2, 24, right=16)
    y = Case(*(stored(a, layout) for a in (x.q, x.k, x.v)), right=16, scale=x.scale)
    check(info, y, gradients.Given(stored(g.dout, layout), g.maxima, g.logs, g.delta))


@pytest.mark.parametrize("at", ["end", "begin"])
def test_nothing_is_touched_beside_the_arrays(info, rng, at):
    with contextlib.ExitStack() as stack:
        names = ("q", "k", "v", "bias", "mask", "dout", "dq", "dk", "dv", "dbias")
        regions = {name: stack.enter_context(Region(1 << 20)) for name in names}

        def place(name: str, like: np.ndarray) -> np.ndarray:
            view = regions[name].array(like.shape, like.dtype, at=at)
            view[...] = like
            return view

        for t, s, h in [(1, 1, 1), (5, 17, 3), (7, 33, 16), (2, 95, 21)]:
            bias, mask = rng.standard_normal((1, 2, t, s)).astype(np.float32), rng.random((1, 2, t, s)) < 0.7
            mask[..., 0] = True
            for given in ({}, {"bias": place("bias", bias), "mask": place("mask", mask)}, {"left": 1, "right": 2}):
                x, g = case(rng, info, t=t, s=s, h=h, n=2, kv_heads=1, **given)
                y = Case(place("q", x.q), place("k", x.k), place("v", x.v), scale=x.scale, **given)
                there = gradients.Given(place("dout", g.dout), g.maxima, g.logs, g.delta)
                out = {k: place(k, v) for k, v in gradients.results(x, dbias=x.bias is not None).items()}
                check(info, y, there, (t, s, h), out=out)


def test_the_same_bits_for_any_number_of_threads(info, rng):
    bias = rng.standard_normal((1, 1, 200, 600)).astype(np.float32)
    for x, g in (
        case(rng, info, 1, 300, 700, 2, 1, 32, right=0),
        case(rng, info, 3, 70, 70, 5, 5, 64),
        case(rng, info, 2, 200, 600, 2, 2, 16, bias=bias),
    ):
        first = gradients.run(info["name"], x, g, dbias=x.bias is not None)
        for threads in (2, 8):
            again = gradients.run(info["name"], x, g, threads=threads, dbias=x.bias is not None)
            assert all(first[name].tobytes() == again[name].tobytes() for name in first)


def test_queries_that_see_nothing_weigh_all_alike(info, rng):
    """What jax.nn's derivative is for a row that is masked throughout: values get equal shares of its cotangent."""
    mask = np.ones((1, 1, 9, 20), bool)
    mask[0, 0, 3] = False
    for given in ({"mask": mask}, {"mask": mask, "right": 0}, {"kv_lengths": np.array([0], np.int32)}, {"right": -4}):
        x, g = case(rng, info, t=9, s=20, **given)
        out = check(info, x, g, list(given))
        assert np.isfinite(out["dv"].astype(np.float32)).all()
        assert (np.abs(out["dv"].astype(np.float32)).max(axis=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("excluded", [-1e9, -3e38, float(np.finfo(np.float32).min)])
def test_huge_biases(info, rng, excluded):
    """From the statistics that the kernel itself leaves: what a row's weights are is not lost beside its scores."""
    for given in huge_biases(rng, 1, 40, 70, 2, excluded).values():
        x, g = case(rng, info, t=40, s=70, **given)
        _, statistics = attention.run(info["name"], x)
        check(info, x, g, list(given))
        check(info, x, gradients.Given(g.dout, *statistics, g.delta), list(given))


@pytest.mark.parametrize("score", LARGE)
def test_large_scores(info, rng, score):
    """Weights of scores whose units in the last place are larger than exponents may be."""
    if info["kv"] == "float16" and abs(score) > 1e9:
        pytest.skip("beyond float16")
    lengths = {"kv_lengths": np.array([11], np.int32)}
    for t, s in ((1, 40), (9, 12), (33, 71)):
        for given in ({}, {"left": 0}, {"right": 0}, {"left": 2, "right": 1}, lengths):
            x = large_scores(rng, info, t, s, score, **given)
            if not visible(x).any(-1).all():
                continue
            dout = cases.array(rng, (*x.q.shape[:3], x.v.shape[3]), info["q"])
            # Statistics of the forward half, as in a program; what must come of them from float64 ones.
            out, (maxima, logs) = attention.run(info["name"], x)
            delta = (out.astype(np.float64) * dout.astype(np.float64)).sum(-1).astype(np.float32)
            scores = np.where(attention.allowed(x), attention.scores_of(x)[0], x.masked)
            top = scores.max(-1, keepdims=True)
            total = np.log(np.exp(scores - top).sum(-1, keepdims=True))
            exact = (np.moveaxis(a[..., 0], 1, 2) for a in (top, total))
            want = gradients.expected(x, gradients.Given(dout, *exact, delta.astype(np.float64)))
            found = gradients.run(info["name"], x, gradients.Given(dout, maxima, logs, delta), dbias=False)
            off = 64 * float(reference.finfo(x.k.dtype).eps)
            for name, by in (("dv", 1.0), ("dq", np.abs(x.k).max()), ("dk", np.abs(x.q).max())):
                error = np.abs(found[name].astype(np.float64) - want[name].value)
                assert np.all(error <= off * float(by)), (t, s, list(given), name)


@pytest.mark.parametrize("masked", [-1e4, -30.0])
def test_excluded_keys_of_finite_scores(info, rng, masked):
    """That they have a weight where no key that is seen has a much greater score."""
    mask = rng.random((1, 1, 40, 70)) < 0.5
    mask[0, 0, 3] = False
    bias = np.zeros((1, 1, 40, 70), np.float32)
    bias[0, 0, 5], bias[0, 0, 6] = masked - 3, masked + 2
    for given in ({"mask": mask}, {"mask": mask, "bias": bias}, {"bias": bias, "left": 9, "right": 30}, {"right": -2}):
        x, g = case(rng, info, t=40, s=70, masked=masked, **given)
        _, statistics = attention.run(info["name"], x)
        check(info, x, gradients.Given(g.dout, *statistics, g.delta), list(given))


def test_all_scores_minus_infinity_give_nan(info, rng):
    bias = np.zeros((1, 1, 5, 18), np.float32)
    bias[0, 0, 3, 4:] = -np.inf
    x, g = case(rng, info, t=5, s=18, bias=bias)
    check(info, x, g)
    bias[0, 0, 2] = -np.inf
    x, g = case(rng, info, t=5, s=18, bias=bias)
    out = gradients.run(info["name"], x, g, dbias=True)
    assert np.isnan(out["dq"][:, 2].astype(np.float32)).all()
    assert np.isfinite(out["dq"][:, [0, 1, 3, 4]].astype(np.float32)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_seen_does_not_leak(info, rng, poison):
    """Keys and values that a query does not see, and queries and cotangents that do not see a key."""
    t = s = 40
    for given in ({"right": 0}, {"left": 4, "right": 3}, {"kv_lengths": np.array([17], np.int32)}):
        x, g = case(rng, info, t=t, s=s, **given)
        want = gradients.expected(x, g)
        seen = np.broadcast_to(visible(x)[0, 0], (t, s))
        for at in (0, 9, 16, 31, s - 1):
            k, v = x.k.copy(), x.v.copy()
            k[0, at] = v[0, at] = poison
            out = gradients.run(info["name"], Case(x.q, k, v, **given, scale=x.scale), g)
            rows = ~seen[:, at]
            want["dq"][0, rows].check(out["dq"][0, rows], (list(given), at))
            q, dout = x.q.copy(), g.dout.copy()
            q[0, at] = dout[0, at] = poison
            there = gradients.Given(dout, g.maxima, g.logs, g.delta)
            out = gradients.run(info["name"], Case(q, x.k, x.v, **given, scale=x.scale), there)
            keys = ~seen[at]
            for name in ("dk", "dv"):
                want[name][0, keys].check(out[name][0, keys], (list(given), at, name))
                assert not np.isfinite(out[name][0, ~keys].astype(np.float32)).any() or not (~keys).any()


def test_a_wrong_element_is_noticed(info, rng):
    x, g = case(rng, info, t=9, s=30)
    out = gradients.run(info["name"], x, g)
    for name, want in gradients.expected(x, g).items():
        assert want.matches(out[name])
        out[name][0, 3, 1, 5] += 0.2
        assert not want.matches(out[name])


def test_the_bound_would_notice_a_missing_key(info, rng):
    """With one key of many left out of the sums, most results are beyond their bounds."""
    if info["q"] != "float32" or info["kv"] != "float32":
        pytest.skip("the bounds of narrower numbers are wider than a key's part")
    x, g = case(rng, info, t=40, s=150, h=32)
    out = gradients.run(info["name"], x, g)
    less = Case(x.q, x.k, x.v, scale=x.scale, kv_lengths=np.array([149], np.int32))
    want = gradients.expected(less, g)["dq"]
    assert not want.matches(out["dq"])


@pytest.fixture(scope="session")
def library() -> dict[str, tuple[dict[str, Any], Any]]:
    return emulated_kernels("_gradients")


class TestEmulated:
    """Every target, whatever the CPU; workspace between guard pages."""

    @pytest.fixture(params=[k.name for k in EMULATED])
    def subject(self, request, library):
        return library[request.param]

    @pytest.mark.parametrize(
        ("t", "s", "h", "width", "at"), [(5, 17, 3, 5, "end"), (35, 70, 33, 33, "begin"), (16, 129, 64, 40, "end")]
    )
    def test_values(self, subject, rng, t, s, h, width, at):
        facts, function = subject
        bias, mask = rng.standard_normal((1, 2, t, s)).astype(np.float32), rng.random((1, 2, t, s)) < 0.7
        mask[..., 0] = True
        for given in ({}, {"right": 3}, {"left": 9, "right": 30}, {"bias": bias, "mask": mask, "right": s - t}):
            x, g = case(rng, facts, 1, t, s, 2, 2, h, width, **given)
            wanted = gradients.expected(x, g)
            for block, chunk in ((facts["unit"], facts["mr"]), (3 * facts["unit"], 2 * facts["mr"])):
                out = gradients.call(facts, function, x, g, block=block, chunk=chunk, at=at)
                for name, want in wanted.items():
                    want.check(out[name], (list(given), block, name))
