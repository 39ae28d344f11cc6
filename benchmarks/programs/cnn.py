"""A convolutional network for images of 28 x 28, trained with Adam: flax's example for MNIST."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.programs import Run


class CNN(nnx.Module):
    """Two convolutions, two dense layers: scores [batch, 10] of images [batch, 28, 28, 1]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.dense = nnx.Linear(3136, 256, rngs=rngs)
        self.scores = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.pool(nnx.relu(self.conv1(x)))
        x = self.pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.scores(x)


def training(*, batch: int, count: int) -> Run:
    """Steps on random images; gives the losses."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((batch, 28, 28, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch))
    graph, start = nnx.split(CNN(nnx.Rngs(0)))
    optimizer = optax.adam(1e-3)

    def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        scores = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def run() -> Any:
        params, state, losses = start, optimizer.init(start), []
        for _ in range(count):
            params, state, loss = step(params, state, images, labels)
            losses.append(loss)
        return losses

    return run
