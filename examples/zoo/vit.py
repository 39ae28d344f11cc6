"""A vision transformer with one block, from flax.linen's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo import Workload


class ViT(nn.Module):
    """Scores [batch, classes] of images [batch, size, size, 3]."""

    patch: int
    heads: int
    features: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        side = (self.patch, self.patch)
        x = nn.Conv(self.features, side, strides=side, padding="VALID")(images)
        x = x.reshape(len(x), -1, self.features)
        first = self.param("first", nn.initializers.zeros, (1, 1, self.features))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.features)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))

        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
        x = x + nn.Dense(self.features)(y)
        return nn.Dense(self.classes)(nn.LayerNorm()(x)[:, 0])


def build(*, batch: int, image: int, **sizes: int) -> tuple[ViT, Any, tuple[jax.Array, jax.Array]]:
    """The model, its weights, and images with labels."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, image, image, 3), np.float32))
    labels = jnp.asarray(rng.integers(0, sizes["classes"], batch, np.int32))
    model = ViT(**sizes)
    return model, jax.jit(model.init)(jax.random.key(0), images), (images, labels)


def stepper(model: nn.Module, optimizer: Any) -> Callable[[Any, Any], tuple[Any, jax.Array]]:
    """One step of training on images with labels; the state is weights and optimizer's."""
    import optax

    def loss_of(weights: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(weights, images), labels).mean()

    def step(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        weights, memory = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, *inputs)
        updates, memory = optimizer.update(gradient, memory, weights)
        return (optax.apply_updates(weights, updates), memory), loss

    return step


def training(**sizes: int) -> Workload:
    """One step of SGD with momentum."""
    import optax

    model, weights, batch = build(**sizes)
    optimizer = optax.sgd(1e-2, momentum=0.9)
    return Workload(stepper(model, optimizer), (weights, optimizer.init(weights)), batch)
