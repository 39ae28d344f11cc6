"""A BERT-like encoder from flax.linen's layers, weights and activations in bfloat16."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo import Workload

BF16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


class Layer(nn.Module):
    """Attention, then a perceptron, each beside a shortcut and before a norm."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = nn.LayerNorm(**BF16)(x + nn.MultiHeadDotProductAttention(self.heads, **BF16)(x, mask=mask))
        y = nn.gelu(nn.Dense(self.hidden, **BF16)(x), approximate=False)
        return nn.LayerNorm(**BF16)(x + nn.Dense(x.shape[-1], **BF16)(y))


class Encoder(nn.Module):
    """Scores of the masked tokens [batch, tokens, vocabulary]; token 0 is padding."""

    vocabulary: int
    layers: int
    heads: int
    features: int
    hidden: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        words = nn.Embed(self.vocabulary, self.features, **BF16)
        places = nn.Embed(tokens.shape[1], self.features, **BF16)
        x = nn.LayerNorm(**BF16)(words(tokens) + places(jnp.arange(tokens.shape[1])))
        mask = nn.make_attention_mask(tokens > 0, tokens > 0)
        for _ in range(self.layers):
            x = Layer(self.heads, self.hidden)(x, mask)
        return words.attend(x)


def build(*, batch: int, tokens: int, vocabulary: int, **sizes: int) -> tuple[Encoder, Any, jax.Array]:
    """The model, its weights, and text whose last quarter is padding."""
    text = np.random.default_rng(0).integers(1, vocabulary, (batch, tokens), np.int32)
    text[:, -(tokens // 4) :] = 0
    model = Encoder(vocabulary, **sizes)
    return model, jax.jit(model.init)(jax.random.key(0), text), jnp.asarray(text)


def forward(**sizes: int) -> Workload:
    """Scores of a batch of texts."""
    model, weights, text = build(**sizes)

    def step(state: tuple[()], inputs: Any) -> tuple[tuple[()], jax.Array]:
        return state, model.apply(*inputs)

    return Workload(step, (), (weights, text))


def training(**sizes: int) -> Workload:
    """One step of SGD with momentum; the loss is taken in float32."""
    import optax

    model, weights, text = build(**sizes)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def loss_of(weights: Any, text: jax.Array) -> jax.Array:
        scores = model.apply(weights, text).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(scores, text).mean(where=text > 0)

    def step(state: Any, text: jax.Array) -> tuple[Any, jax.Array]:
        weights, memory = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, text)
        updates, memory = optimizer.update(gradient, memory, weights)
        return (optax.apply_updates(weights, updates), memory), loss

    return Workload(step, (weights, optimizer.init(weights)), text)
