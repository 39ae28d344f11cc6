"""Hamiltonian Monte Carlo: the weights of a logistic regression, several chains at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.programs import Run


def sample(*, rows: int, features: int, chains: int, draws: int, leaps: int, step_size: float = 0.02) -> Run:
    """Draws weights [draws, chains, features]."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, features)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 2, rows), jnp.float32)

    def log_density(weights: jax.Array) -> jax.Array:
        scores = x @ weights
        return jnp.sum(y * scores - jnp.logaddexp(0.0, scores)) - 0.5 * jnp.sum(weights**2)

    gradient = jax.grad(log_density)

    def draw(weights: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_momentum, key_accept = jax.random.split(key)
        momentum = jax.random.normal(key_momentum, weights.shape)

        def leap(_: int, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            position, velocity = point
            velocity = velocity + 0.5 * step_size * gradient(position)
            position = position + step_size * velocity
            return position, velocity + 0.5 * step_size * gradient(position)

        proposal, velocity = lax.fori_loop(0, leaps, leap, (weights, momentum))
        energy_before = 0.5 * jnp.sum(momentum**2) - log_density(weights)
        energy = 0.5 * jnp.sum(velocity**2) - log_density(proposal)
        accepted = jnp.log(jax.random.uniform(key_accept)) < energy_before - energy
        weights = jnp.where(accepted, proposal, weights)
        return weights, weights

    @jax.jit
    def sampler(start: jax.Array, key: jax.Array) -> jax.Array:
        def all_chains(weights: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.vmap(draw)(weights, jax.random.split(key, chains))

        return lax.scan(all_chains, start, jax.random.split(key, draws))[1]

    start, key = jnp.zeros((chains, features)), jax.random.key(0)

    def run() -> Any:
        return sampler(start, key)

    return run
