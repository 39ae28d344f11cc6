"""An epoch of examples/digits.py: batches of images are taken between the steps."""

from __future__ import annotations

from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.programs import Run


def epoch(*, hidden: list[int], batch: int) -> Run:
    """Training as the example's `train` does it, with jnp's product; gives the losses."""
    data = digits.Data.load(0)
    optimizer = optax.adamw(1e-3)
    start = digits.init_params(0, [data.train_images.shape[1], *hidden, 10])
    step = jax.jit(digits.make_step(jnp.matmul, optimizer))

    def run() -> Any:
        params, state, losses = start, optimizer.init(start), []
        for images, labels in data.batches(np.random.default_rng(0), batch):
            params, state, loss = step(params, state, images, labels)
            losses.append(loss)
        return losses

    return run
