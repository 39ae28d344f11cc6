"""A layer of multi-head attention, written with einsum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs import Run


def attend(*, batch: int, tokens: int, heads: int, width: int, count: int) -> Run:
    """Forward, `count` times, each on what the last one gave."""
    rng = np.random.default_rng(0)
    features = heads * width
    x = jnp.asarray(rng.standard_normal((batch, tokens, features)), jnp.float32)
    shapes = (features, 3, heads, width), (heads, width, features)
    into, out = (jnp.asarray(rng.standard_normal(shape) / np.sqrt(features), jnp.float32) for shape in shapes)

    @jax.jit
    def layer(x: jax.Array, into: jax.Array, out: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(jnp.einsum("btf,fchd->btchd", x, into), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width)
        seen = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return jnp.einsum("bqhd,hdf->bqf", seen, out)

    def run() -> Any:
        y = x
        for _ in range(count):
            y = layer(y, into, out)
        return y

    return run
