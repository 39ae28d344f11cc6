"""The oracle must fail what is wrong: a bound that passes everything would make every other test worthless."""

from __future__ import annotations

import numpy as np
import pytest
import reference


@pytest.fixture(params=[1, 7, 64, 257, 4096])
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(request.param)
    a = reference.random(rng, (9, request.param))
    b = reference.random(rng, (request.param, 11))
    return a, b, a @ b


def test_accepts_numpy(case):
    a, b, c = case
    reference.expected("mk,kn->mn", a, b).check(c)


def test_accepts_the_worst_order_of_summation(case):
    a, b, _ = case
    c = np.zeros((9, 11), np.float32)
    for k in np.argsort(-np.abs(a).sum(0)):
        c += np.outer(a[:, k], b[k])
    reference.expected("mk,kn->mn", a, b).check(c)


@pytest.mark.parametrize("how", ["scaled", "zero", "nan", "inf", "neighbour", "negated", "one operand element"])
def test_one_wrong_element_fails(case, how):
    a, b, c = case
    want = reference.expected("mk,kn->mn", a, b)
    bad = c.copy()
    if how == "one operand element":
        k = np.argmax(np.abs(a[4]))
        bad[4, 5] += a[4, k] * (b[k, 6] - b[k, 5])
    else:
        bad[4, 5] = {
            "scaled": c[4, 5] + 3 * want.bound[4, 5],
            "zero": 0,
            "nan": np.nan,
            "inf": np.inf,
            "neighbour": c[4, 6],
            "negated": -c[4, 5],
        }[how]
    assert want.matches(c)
    assert not want.matches(bad)
    with pytest.raises(AssertionError, match=r"1 of 99 elements are wrong; the first, \(4, 5\)"):
        want.check(bad)


def test_nan_and_inf_must_be_where_they_belong():
    a = np.ones((2, 3), np.float32)
    b = np.ones((3, 2), np.float32)
    a[0, 1], b[1, 1] = np.inf, 0
    want = reference.expected("mk,kn->mn", a, b)
    good = np.array([[np.inf, np.nan], [3, 2]], np.float32)
    assert want.matches(good)
    assert not want.matches(np.array([[np.inf, np.inf], [3, 2]], np.float32))
    assert not want.matches(np.array([[-np.inf, np.nan], [3, 2]], np.float32))
    assert not want.matches(np.array([[np.inf, np.nan], [np.nan, 2]], np.float32))


def test_shape_counts():
    a = np.zeros((2, 3), np.float32)
    want = reference.expected("mk,kn->mn", a, np.zeros((3, 1), np.float32))
    assert not want.matches(np.zeros((2, 2), np.float32))


def test_counts_every_contracted_dimension():
    a = np.ones((2, 3, 5), np.float32)
    want = reference.expected("mij,ijn->mn", a, np.ones((3, 5, 4), np.float32))
    assert want.value[0, 0] == 15
    assert want.bound[0, 0] == pytest.approx(15 * 15 * np.finfo(np.float32).eps)


def test_longdouble_judges_float64():
    a = np.array([[1.0, 1e-17]])
    b = np.array([[1.0], [1.0]])
    want = reference.expected("mk,kn->mn", a, b, acc=np.float64)
    assert want.value.dtype == np.longdouble
    want.check(a @ b)
    assert not want.matches(a @ b + 1e-14)


def test_integers_are_exact_and_wrap():
    rng = np.random.default_rng(0)
    a, b = reference.random(rng, (3, 300), np.int8), reference.random(rng, (300, 4), np.uint8)
    wide = a.astype(np.int64) @ b.astype(np.int64)
    for out in (np.int32, np.int8):
        want = reference.expected("mk,kn->mn", a, b, acc=np.int32, out=out)
        assert want.matches(wide.astype(out))
        bad = wide.astype(out)
        bad[1, 2] += 1
        assert not want.matches(bad)


@pytest.mark.parametrize("out", ["bfloat16", "float16"])
def test_narrow_results_may_be_off_by_one_rounding(out):
    rng = np.random.default_rng(0)
    a, b = (reference.random(rng, (40, 40), out) for _ in range(2))
    want = reference.expected("mk,kn->mn", a, b, out=out)
    c = (a.astype(np.float64) @ b.astype(np.float64)).astype(out)
    assert want.matches(c)
    assert not want.matches((c.astype(np.float32) * 1.03).astype(out))
