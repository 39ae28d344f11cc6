"""k-means: distances by a product, means by another with the memberships."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.programs import Run


def cluster(*, points: int, features: int, clusters: int, count: int) -> Run:
    """Lloyd's iterations from the first points; gives the centres and the mean distance to them.

    The points lie around as many centres, well apart, so that rounding sends none of them elsewhere.
    """
    rng = np.random.default_rng(0)
    around = 8 * rng.standard_normal((clusters, features))
    nearest = np.concatenate([np.arange(clusters), rng.integers(0, clusters, points - clusters)])
    x = jnp.asarray(around[nearest] + rng.standard_normal((points, features)), jnp.float32)

    def distances(x: jax.Array, centres: jax.Array) -> jax.Array:
        return (x**2).sum(1)[:, None] - 2 * x @ centres.T + (centres**2).sum(1)

    @jax.jit
    def lloyd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def iterate(_: int, centres: jax.Array) -> jax.Array:
            members = jax.nn.one_hot(distances(x, centres).argmin(1), clusters)
            return members.T @ x / jnp.maximum(members.sum(0), 1)[:, None]

        centres = lax.fori_loop(0, count, iterate, x[:clusters])
        return centres, distances(x, centres).min(1).mean()

    def run() -> Any:
        return lloyd(x)

    return run
