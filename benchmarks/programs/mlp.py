"""A perceptron whose batches are cut out of NumPy arrays between the steps."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs import Run

Params = list[tuple[jax.Array, jax.Array]]


def training(*, images: int, sizes: list[int], batch: int) -> Run:
    """One epoch of SGD; the weights are donated. Gives the losses."""
    rng = np.random.default_rng(0)
    x = rng.random((images, sizes[0]), np.float32)
    y = rng.integers(0, sizes[-1], images)
    start = [
        (jnp.asarray(rng.standard_normal((i, o)) / np.sqrt(i), jnp.float32), jnp.zeros(o))
        for i, o in itertools.pairwise(sizes)
    ]

    def loss_of(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        for weights, bias in params[:-1]:
            x = jax.nn.relu(x @ weights + bias)
        weights, bias = params[-1]
        scores = jax.nn.log_softmax(x @ weights + bias)
        return -scores[jnp.arange(len(y)), y].mean()

    def step(params: Params, x: jax.Array, y: jax.Array) -> tuple[Params, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), loss

    compiled = jax.jit(step, donate_argnums=0)

    def run() -> Any:
        params, losses = jax.tree.map(jnp.copy, start), []
        order = np.random.default_rng(1).permutation(images)
        for first in range(0, images - batch + 1, batch):
            chosen = order[first : first + batch]
            params, loss = compiled(params, x[chosen], y[chosen])
            losses.append(loss)
        return losses

    return run
