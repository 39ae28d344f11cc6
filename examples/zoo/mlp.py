"""Equinox's multilayer perceptron, mapped over a batch."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import Workload


def training(*, inputs: int, outputs: int, width: int, depth: int, batch: int) -> Workload:
    """One step of SGD with momentum on labelled vectors."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, inputs), np.float32))
    labels = jnp.asarray(rng.integers(0, outputs, batch, np.int32))
    model = eqx.nn.MLP(inputs, outputs, width, depth, key=jax.random.key(0))
    weights, rest = eqx.partition(model, eqx.is_array)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def loss_of(weights: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        scores = jax.vmap(eqx.combine(weights, rest))(x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def step(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        weights, memory = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, *inputs)
        updates, memory = optimizer.update(gradient, memory, weights)
        return (eqx.apply_updates(weights, updates), memory), loss

    return Workload(step, (weights, optimizer.init(weights)), (x, labels))
