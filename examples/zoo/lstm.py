"""Haiku's LSTM over characters, unrolled by a scan, with haiku's perceptron on top."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import Workload


def training(*, vocabulary: int, hidden: int, batch: int, tokens: int) -> Workload:
    """One step of SGD with momentum on text [tokens + 1, batch]."""
    text = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (tokens + 1, batch), np.int32))

    def scores_of(text: jax.Array) -> jax.Array:
        core = hk.LSTM(hidden)
        embedded = hk.Embed(vocabulary, hidden)(text)
        outputs, _ = hk.dynamic_unroll(core, embedded, core.initial_state(text.shape[1]))
        return hk.nets.MLP([hidden, vocabulary])(outputs)

    network = hk.without_apply_rng(hk.transform(scores_of))
    weights = jax.jit(network.init)(jax.random.key(0), text[:-1])
    optimizer = optax.sgd(1e-1, momentum=0.9)

    def loss_of(weights: Any, text: jax.Array) -> jax.Array:
        scores = network.apply(weights, text[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, text[1:]).mean()

    def step(state: Any, text: jax.Array) -> tuple[Any, jax.Array]:
        weights, memory = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, text)
        updates, memory = optimizer.update(gradient, memory, weights)
        return (optax.apply_updates(weights, updates), memory), loss

    return Workload(step, (weights, optimizer.init(weights)), text)
