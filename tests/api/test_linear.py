"""linear against its composition in JAX's own operations: values, errors, transformations, sharding, programs."""

from __future__ import annotations

import epilogues
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_nano
from jax_nano import _activations

FLOATS = ("float32", "bfloat16", "float16")
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
CALL, PLAIN_CALL = "custom-call jax_nano_linear", "custom-call jax_nano_dot_general"


def composed(x, w, b=None, *, activation=None, residual=None, scale=1.0, preferred_element_type=None):
    """What linear means, with nothing of jax_nano but the activations' names."""
    arrays = [v for v in (x, w, b, residual) if v is not None]
    dtype = preferred_element_type or jnp.result_type(*arrays)
    wide = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
    y = jnp.matmul(x, w, preferred_element_type=wide)
    y = y if scale == 1 else y * jnp.asarray(scale, wide)
    y = y if b is None else y + b.astype(dtype).astype(wide)
    y = _activations.FUNCTIONS[_activations.name_of(activation)](y)
    y = y if residual is None else y + residual.astype(dtype).astype(wide)
    return y.astype(dtype)


def arrays(rng, m=9, k=17, n=33, dtype="float32", batch=()):
    """x, w, b and a residual whose products are of order 1."""
    shapes = ((*batch, m, k), (k, n), (n,), (*batch, m, n))
    x, w, b, r = (jnp.asarray(reference.random(rng, s), dtype) for s in shapes)
    return x, w / jnp.asarray(k**0.5, dtype), b, r


def close(got, want) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        tolerance = TOLERANCE.get(str(y.dtype), 0)
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", epilogues.NAMES)
def test_values(rng, activation, dtype):
    x, w, b, r = arrays(rng, dtype=dtype)
    for options in ({}, {"residual": r}, {"scale": 0.5, "residual": r}):
        for bias in (None, b):
            close(
                jax_nano.linear(x, w, bias, activation=activation, **options),
                composed(x, w, bias, activation=activation, **options),
            )
