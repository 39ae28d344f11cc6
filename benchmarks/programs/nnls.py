"""Non-negative least squares by accelerated projected gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.programs import Run


def solve(*, rows: int, columns: int, count: int) -> Run:
    """The x >= 0 that minimises |A x - b|; gives it and what is left."""
    rng = np.random.default_rng(0)
    A = jnp.asarray(rng.random((rows, columns)), jnp.float32)
    b = jnp.asarray(rng.random(rows), jnp.float32)
    rate = jnp.float32(1 / np.linalg.norm(np.asarray(A), 2) ** 2)

    @jax.jit
    def nnls(A: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        def iterate(i: int, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, y = point
            after = jnp.maximum(y - rate * (A.T @ (A @ y - b)), 0)
            return after, after + i / (i + 3) * (after - x)

        start = jnp.zeros(columns)
        x, _ = lax.fori_loop(0, count, iterate, (start, start))
        return x, jnp.linalg.norm(A @ x - b)

    def run() -> Any:
        return nnls(A, b)

    return run
