"""A Kalman filter's likelihood and its gradient: thousands of tiny products in a scan, none worth a call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo import Workload


def log_likelihood(transition: jax.Array, emission: jax.Array, observations: jax.Array) -> jax.Array:
    """Of observations [steps, observed] under x' = transition @ x + noise, y = emission @ x + noise."""
    states, observed = len(transition), len(emission)
    process, measurement = 0.1 * jnp.eye(states), 0.2 * jnp.eye(observed)

    def step(belief: tuple[jax.Array, jax.Array], y: jax.Array) -> tuple[Any, jax.Array]:
        mean, covariance = belief
        mean = transition @ mean
        covariance = transition @ covariance @ transition.T + process
        surprise = y - emission @ mean
        spread = emission @ covariance @ emission.T + measurement
        # By hand for two observed values: what a solver of LAPACK costs would hide what products cost.
        determinant = spread[0, 0] * spread[1, 1] - spread[0, 1] * spread[1, 0]
        inverse = jnp.array([[spread[1, 1], -spread[0, 1]], [-spread[1, 0], spread[0, 0]]]) / determinant
        gain = covariance @ emission.T @ inverse
        likelihood = -0.5 * (surprise @ inverse @ surprise + jnp.log(determinant))
        return (mean + gain @ surprise, covariance - gain @ emission @ covariance), likelihood

    start = jnp.zeros(states), jnp.eye(states)
    return lax.scan(step, start, observations)[1].sum()


def gradient(*, states: int, steps: int) -> Workload:
    """Likelihood and gradient for both matrices, two values observed at a time."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((states, states)))[0]
    matrices = 0.9 * rotation, rng.standard_normal((2, states))
    observations = rng.standard_normal((steps, 2))
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in (*matrices, observations))

    def step(state: tuple[()], inputs: Any) -> tuple[tuple[()], Any]:
        return state, jax.value_and_grad(log_likelihood, (0, 1))(*inputs)

    return Workload(step, (), inputs)
