"""A recurrent network over characters: a scan of gated units, trained by SGD."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.programs import Run

Params = dict[str, jax.Array]


def _loss(params: Params, text: jax.Array) -> jax.Array:
    """How badly each character is foreseen, text [times + 1, batch]."""

    def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = x @ params["input"] + h @ params["state"] + params["bias"]
        update, candidate = jnp.split(both, 2, axis=-1)
        gate = jax.nn.sigmoid(update)
        h = (1 - gate) * h + gate * jnp.tanh(candidate)
        return h, h

    start = jnp.zeros((text.shape[1], params["state"].shape[0]))
    _, states = lax.scan(cell, start, params["embedding"][text[:-1]])
    scores = jax.nn.log_softmax(states @ params["output"])
    return -jnp.take_along_axis(scores, text[1:, :, None], axis=-1).mean()


def training(*, vocabulary: int, hidden: int, batch: int, times: int, count: int) -> Run:
    """Steps of SGD; the weights are donated. Gives the losses."""
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (vocabulary, hidden),
        "input": (hidden, 2 * hidden),
        "state": (hidden, 2 * hidden),
        "bias": (2 * hidden,),
        "output": (hidden, vocabulary),
    }
    start = {
        name: jnp.asarray(rng.standard_normal(shape) / np.sqrt(hidden), jnp.float32) for name, shape in shapes.items()
    }
    text = jnp.asarray(rng.integers(0, vocabulary, (times + 1, batch)))

    def step(params: Params, text: jax.Array) -> tuple[Params, jax.Array]:
        loss, gradient = jax.value_and_grad(_loss)(params, text)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), loss

    compiled = jax.jit(step, donate_argnums=0)

    def run() -> Any:
        params, losses = jax.tree.map(jnp.copy, start), []
        for _ in range(count):
            params, loss = compiled(params, text)
            losses.append(loss)
        return losses

    return run
