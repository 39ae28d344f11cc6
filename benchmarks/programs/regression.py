"""Linear classifiers: logistic regression for ten digits by gradient descent, softmax regression in minibatches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.datasets import load_digits

from benchmarks.programs import Run

Params = tuple[jax.Array, jax.Array]


def logistic(*, rows: int, count: int) -> Run:
    """Gradient descent on all of scikit-learn's digits, one class against the others; gives weights and biases."""
    digits = load_digits()
    x = jnp.asarray(digits.data[:rows] / 16, jnp.float32)
    y = jax.nn.one_hot(digits.target[:rows], 10)

    def loss_of(params: Params) -> jax.Array:
        weights, bias = params
        scores = x @ weights + bias
        likelihood = y * jax.nn.log_sigmoid(scores) + (1 - y) * jax.nn.log_sigmoid(-scores)
        return -likelihood.mean() + 1e-4 * (weights**2).sum()

    @jax.jit
    def step(params: Params) -> Params:
        return jax.tree.map(lambda p, g: p - 1.0 * g, params, jax.grad(loss_of)(params))

    def run() -> Any:
        params = jnp.zeros((x.shape[1], 10)), jnp.zeros(10)
        for _ in range(count):
            params = step(params)
        return params

    return run


def softmax(*, rows: int, batch: int, inputs: int = 784, classes: int = 10) -> Run:
    """One pass of SGD with momentum over images, as a scan over batches; gives the losses and the weights."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((rows // batch, batch, inputs)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, (rows // batch, batch)))

    def loss_of(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(x @ params[0] + params[1])
        return -scores[jnp.arange(len(y)), y].mean()

    @jax.jit
    def epoch(params: Params, images: jax.Array, labels: jax.Array) -> tuple[Params, jax.Array]:
        def step(carry: tuple[Params, Params], batch: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            params, memory = carry
            loss, gradient = jax.value_and_grad(loss_of)(params, *batch)
            memory = jax.tree.map(lambda m, g: 0.9 * m + g, memory, gradient)
            return (jax.tree.map(lambda p, m: p - 0.01 * m, params, memory), memory), loss

        (params, _), losses = lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), (images, labels))
        return params, losses

    start = jnp.zeros((inputs, classes)), jnp.zeros(classes)
    return lambda: epoch(start, images, labels)
