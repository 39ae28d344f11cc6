"""linear of random shapes, dtypes and epilogues against float64, within the stated bound; its gradients; its bits."""

from __future__ import annotations

import os
from typing import Any

import epilogues
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_python

import jax_nano
from jax_nano._core import activations

EXAMPLES = settings(derandomize=True, deadline=None, database=None)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
FLOATS = st.sampled_from(["float32", "bfloat16", "float16"])


@st.composite
def layers(draw: st.DrawFn, sizes: Any = SIZES, dtypes: Any = FLOATS) -> tuple[list[Any], dict[str, Any]]:
    """Operands x, w, bias, residual, of which the last two may be None, and the other arguments."""
    batch = draw(st.lists(st.sampled_from([1, 2, 3]), max_size=2))
    m, k, n = (draw(sizes) for _ in range(3))
    rows = (*batch, m) if draw(st.booleans()) else tuple(batch)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(shape: tuple[int, ...], dtype: str) -> jax.Array:
        return jnp.asarray(reference.random(rng, shape) / max(k, 1) ** 0.25, dtype)

    lhs, rhs, other = draw(dtypes), draw(dtypes), draw(dtypes)
    x, w = array((*rows, k), lhs), array((k, n), rhs)
    bias = array((n,), other) if draw(st.booleans()) else None
    residual = array((*rows, n), other) if draw(st.booleans()) else None
    options = {
        "activation": draw(st.sampled_from(epilogues.NAMES)),
        "scale": draw(st.sampled_from([1.0, 0.125, -1.7])),
    }
    return [x, w, bias, residual], options


@given(layers(), st.sampled_from([None, "float32", "bfloat16"]))
@settings(EXAMPLES, max_examples=150)
def test_values(layer: Any, preferred: str | None) -> None:
    """Summed and finished in float32, rounded once: the bound that every kernel's epilogue is held to."""
    (x, w, bias, residual), options = layer
    got = jax_nano.linear(x, w, bias, residual=residual, preferred_element_type=preferred, **options)
    given_ = [v for v in (x, w, bias, residual) if v is not None]
    dtype = jnp.dtype(preferred or jnp.result_type(*given_))
    assert (got.shape, got.dtype) == ((*x.shape[:-1], w.shape[1]), dtype)

    # Operands of other dtypes are converted to the result's first, as lax does.
    wide = [np.asarray(v.astype(dtype) if v.dtype != x.dtype or v.dtype != w.dtype else v) for v in given_]
    x, w = (np.asarray(v if x.dtype == w.dtype else v.astype(dtype)) for v in (x, w))
    extras = iter(wide[2:])
    bias, residual = (None if v is None else next(extras).astype(dtype) for v in (bias, residual))
    rows = x.reshape(-1, x.shape[-1]) if x.size else np.zeros((int(np.prod(x.shape[:-1])), x.shape[-1]), x.dtype)
    product = reference.expected("mk,kn->mn", rows, w, acc=np.float32)
    finished = epilogues.Epilogue(
        options["activation"],
        options["scale"],
        bias,
        None if residual is None else residual.reshape(len(rows), w.shape[1]),
    ).expected(product, dtype.name)
    finished.check(np.asarray(got).reshape(len(rows), w.shape[1]), (layer, preferred))


@given(layers(sizes=st.sampled_from([1, 2, 3, 5, 8]), dtypes=st.just("float32")), st.booleans())
@settings(EXAMPLES, max_examples=40)
def test_gradients(layer: Any, jit: bool) -> None:
    """By every operand, against the same in jnp."""
    operands, options = layer
    there = [v for v in operands if v is not None]

    def composed(x: Any, w: Any, bias: Any, residual: Any) -> Any:
        y = options["scale"] * (x @ w) + (0 if bias is None else bias)
        y = activations.FUNCTIONS[options["activation"]](y)
        return y if residual is None else y + residual

    def ours(x: Any, w: Any, bias: Any, residual: Any) -> Any:
        return jax_nano.linear(x, w, bias, residual=residual, **options)

    def loss(f: Any) -> Any:
        def of(*args: Any) -> Any:
            rest = iter(args)
            return jnp.sin(f(*(None if v is None else next(rest) for v in operands))).sum()

        gradient = jax.value_and_grad(of, tuple(range(len(there))))
        return jax.jit(gradient) if jit else gradient

    got, want = (jax.tree.leaves(loss(f)(*there)) for f in (ours, composed))
    for g, v in zip(got, want, strict=True):
        assert g.aval == v.aval
        g, v = np.asarray(g, np.float64), np.asarray(v, np.float64)
        assert np.all(np.abs(g - v) <= 1e-5 * max(np.abs(v).max(initial=0), 10.0))


# Prints a checksum of what layers of several shapes and dtypes give: our own, and those of an accelerated program.
BITS = """
import hashlib, os, sys
cpus = sys.argv[1]
if cpus != "all":
    os.sched_setaffinity(0, {int(cpus)})
import jax, jax.numpy as jnp, numpy as np, jax_nano
digest = hashlib.sha256()
rng = np.random.default_rng(0)
for dtype in ("float32", "bfloat16", "float16"):
    for rows, k, n in ((1, 512, 700), (7, 300, 1000), (300, 517, 300), (1024, 64, 96)):
        shapes = ((rows, k), (k, n), (n,), (rows, n))
        x, w, b, r = (jnp.asarray(rng.standard_normal(s) / k**0.25, dtype) for s in shapes)
        own = jax.jit(lambda *a: jax_nano.linear(*a[:3], activation="gelu_erf", residual=a[3]))
        theirs = jax.jit(lambda x, w, b, r: jax.nn.silu(x @ w + b) + r)
        with jax_nano.accelerate():
            for f in (own, theirs)[: 1 + (rows > 1)]:  # a product with a vector is fused by XLA itself
                assert "jax_nano_linear" in f.lower(x, w, b, r).compile().as_text()
                digest.update(np.asarray(f(x, w, b, r)).tobytes())
print(digest.hexdigest())
"""


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """XLA's pool with one thread and with many, on one CPU and on all."""
    cpu = str(min(os.sched_getaffinity(0)))
    found = {
        (threads, cpus): run_python(BITS, cpus, env={"NPROC": threads, "JAX_NANO_GATE": "off"})
        for threads, cpus in (("1", "all"), ("2", "all"), ("5", "all"), ("3", cpu))
    }
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [n for n in epilogues.NAMES if n != "none"])
def test_activations_of_narrow_dtypes(activation: str, dtype: str) -> None:
    """Of every number of the dtype: the nearest there is, but for what float32 errs; and nearer than XLA's.

    But subnormal bfloat16 numbers, which are float32's: the CPU's bfloat16 products take them for zero.
    """
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):
        x = x[np.isfinite(x.astype(np.float64))]
    info = reference.finfo(dtype)
    least = float(info.smallest_normal) if dtype == "bfloat16" else 0.0
    x = x[np.abs(x.astype(np.float64)) >= least]
    want = epilogues.exact(activation, x.astype(np.float32)).astype(np.float64)
    one = np.ones((1, 1), dtype)
    got = np.asarray(jax_nano.linear(one, x[None], activation=activation))[0].astype(np.float64)
    xlas = np.asarray(jax.jit(activations.FUNCTIONS[activation])(x)).astype(np.float64)
    exponent = np.maximum(np.frexp(want)[1] - 1, np.log2(float(info.smallest_normal)))
    half_ulp = np.ldexp(0.5 * float(info.eps), exponent.astype(int))
    fits = (np.abs(want) <= float(info.max)) & (np.abs(want) >= least)
    error, of_xla = (np.abs(y - want)[fits] for y in (got, xlas))
    assert np.all(error <= 1.001 * half_ulp[fits] + 2.0**-148)
    assert error.max() <= of_xla.max()
    assert error.sum() <= of_xla.sum()
