"""Products whose transpose is computed: few columns against an A whose columns are contiguous."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import reference
from contraction import Contraction

import jax_nano
from jax_nano import _runtime

if not _runtime.supports("float32", "float32", "float32"):
    pytest.skip("no float32 kernel runs on this CPU", allow_module_level=True)

SHAPES = [
    Contraction("km,kn->mn", m=64, n=2, k=64),
    Contraction("km,nk->mn", m=333, n=8, k=1001),
    Contraction("km,kn->mn", m=1030, n=16, k=130),
    Contraction("km,nk->mn", m=5000, n=3, k=257),
    Contraction("kn,mk->nm", m=7, n=700, k=300),
    Contraction("bkm,bkn->bmn", b=5, m=70, n=5, k=90),
    Contraction("kbm,bkn->mbn", b=3, m=130, n=4, k=64),
    Contraction("ijm,jin->mn", m=100, n=6, i=7, j=80),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("c", SHAPES, ids=str)
def test_results(c, dtype, rng):
    assert c.plan(dtypes=(dtype,) * 3)["transposed"]
    exact = [rng.integers(-4, 5, shape).astype(dtype) for shape in c.shapes[:2]]
    assert np.array_equal(c.dot(*exact), np.einsum(c.subscripts, *exact))
    lhs, rhs = (reference.random(rng, shape).astype(dtype) for shape in c.shapes[:2])
    alone = c.dot(lhs, rhs)
    reference.expected(c.subscripts, lhs, rhs).check(alone)
    for threads in (2, 3, 7):
        assert c.dot(lhs, rhs, threads=threads).tobytes() == alone.tobytes(), threads


@pytest.mark.parametrize("c", SHAPES[:5], ids=str)
def test_loops_and_strides(c):
    """The plan's product, stored by its columns, is the einsum."""
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.integers(-5, 6, shape) for shape in c.shapes[:2])
    p = c.plan()
    a, b = (rhs.ravel(), lhs.ravel()) if p["swapped"] else (lhs.ravel(), rhs.ravel())
    (m, n, k), out = (p[x] for x in "mnk"), np.zeros(c.shapes[2], lhs.dtype)
    rows = a[np.arange(m)[:, None] * p["rsa"] + np.arange(k) * p["csa"]]
    columns = b[np.arange(k)[:, None] * p["rsb"] + np.arange(n) * p["csb"]]
    out.ravel()[np.arange(n)[:, None] * p["out_rows_apart"] + np.arange(m)] = (rows @ columns).T
    assert np.array_equal(out, np.einsum(c.subscripts, lhs, rhs))


def test_which_products():
    def transposed(subscripts, dtype="float32", **sizes):
        return Contraction(subscripts, **sizes).plan(dtypes=(dtype,) * 3)["transposed"]

    assert transposed("km,kn->mn", m=100, n=4, k=100)
    assert not transposed("mk,kn->mn", m=100, n=4, k=100)
    assert not transposed("km,kn->mn", m=100, n=64, k=100)
    assert not transposed("km,kn->mn", m=100, n=4, k=8)
    assert not transposed("km,kn->mn", m=8, n=4, k=100)
    assert not transposed("km,k->m", m=100, k=100)
    assert not transposed("km,kn->mn", "bfloat16", m=100, n=4, k=100)


def test_by_choice():
    """A caller may choose it where the planner would not, and learns where it is impossible."""
    c = Contraction("mk,kn->mn", m=20, n=9, k=30)
    planned = c.plan()
    choice = {**planned, "inner": False, "sweep": False, "prefetch": False, "pack_a": True, "pack_b": True}
    choice |= {"tile_rows": 6, "mc": 6, "kc": 16, "nc": 32, "split": (1, 1, 1), "split_k": 1, "transposed": True}
    mr = next(k["mr"] for k in _runtime.kernels() if k["name"] == planned["kernel"])
    choice |= {"tile_rows": mr, "mc": mr}
    arguments = (*c.shapes[:2], *c.labels, *["float32"] * 3)
    p = _runtime.testing.plan_by(*arguments, choice)
    assert (p["m"], p["n"], p["transposed"]) == (9, 20, True)
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.integers(-4, 5, shape).astype(np.float32) for shape in c.shapes[:2])
    out = reference.poisoned(c.shapes[2], np.float32)
    addresses = (lhs.ctypes.data, rhs.ctypes.data, out.ctypes.data)
    _runtime.testing.dot(*addresses, *arguments, 1, choice=choice)
    assert np.array_equal(out, lhs @ rhs)
    with pytest.raises(ValueError, match="split_k must be 1"):
        _runtime.testing.plan_by(*arguments, {**choice, "split_k": 2})
    several = Contraction("xmk,kn->mxn", x=4, m=20, n=9, k=30)
    with pytest.raises(ValueError, match="cannot be transposed"):
        _runtime.testing.plan_by(*several.shapes[:2], *several.labels, *["float32"] * 3, choice)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_epilogue(activation, rng):
    """It is applied to C as it lies, once."""
    x, w, bias, residual = (
        rng.integers(-3, 4, shape).astype(np.float32) for shape in ((200, 300), (200, 5), (5,), (300, 5))
    )

    def linear(x, w):
        return jax_nano.linear(x, w, bias, activation=activation, residual=residual)

    got = jax.jit(lambda x, w: linear(x.T, w))(x, w)
    np.testing.assert_allclose(got, linear(np.ascontiguousarray(x.T), w), rtol=1e-6, atol=1e-6)
