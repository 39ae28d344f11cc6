"""A GPT-2 from flax.nnx's layers: the whole forward pass, a training step, decoding with a key-value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo import Workload


class Block(nnx.Module):
    """Attention, then a perceptron, each after a norm and beside a shortcut."""

    def __init__(self, heads: int, features: int, hidden: int, dtype: Any, rngs: nnx.Rngs) -> None:
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(features, epsilon=1e-5, **kinds)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, **kinds)
        self.norm2 = nnx.LayerNorm(features, epsilon=1e-5, **kinds)
        self.up = nnx.Linear(features, hidden, **kinds)
        self.down = nnx.Linear(hidden, features, **kinds)

    def __call__(self, x: jax.Array, mask: jax.Array | None, decode: bool) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask, decode=decode)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Scores of the next token [batch, tokens, vocabulary] after each of tokens [batch, tokens]."""

    def __init__(
        self,
        vocabulary: int,
        layers: int,
        heads: int,
        features: int,
        hidden: int,
        tokens: int,
        dtype: Any = jnp.float32,
        seed: int = 0,
    ) -> None:
        rngs = nnx.Rngs(seed)
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embedding = nnx.Embed(vocabulary, features, **kinds)
        self.positions = nnx.Embed(tokens, features, **kinds)
        self.blocks = nnx.List([Block(heads, features, hidden, dtype, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, **kinds)

    def __call__(self, tokens: jax.Array, start: jax.Array | int = 0, decode: bool = False) -> jax.Array:
        x = self.embedding(tokens) + self.positions(start + jnp.arange(tokens.shape[1]))
        mask = None if decode else nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask, decode)
        return self.embedding.attend(self.norm(x))


def text(batch: int, tokens: int, vocabulary: int) -> jax.Array:
    """Random tokens [batch, tokens]."""
    return jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, (batch, tokens), np.int32))


def loss_of(model: GPT, tokens: jax.Array) -> jax.Array:
    """How badly each token is foreseen from those before it."""
    import optax

    scores = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()


def forward(*, tokens: int, batch: int = 1, vocabulary: int, **sizes: int) -> Workload:
    """Scores of all tokens of a prompt."""
    graph, weights = nnx.split(GPT(vocabulary, tokens=tokens, **sizes))

    def step(state: tuple[()], inputs: Any) -> tuple[tuple[()], jax.Array]:
        weights, prompt = inputs
        return state, nnx.merge(graph, weights)(prompt)

    return Workload(step, (), (weights, text(batch, tokens, vocabulary)))


def training(*, tokens: int, batch: int, vocabulary: int, learning_rate: float = 3e-4, **sizes: int) -> Workload:
    """One step of AdamW; the result is the loss."""
    import optax

    model = GPT(vocabulary, tokens=tokens, **sizes)
    graph, state = nnx.split((model, nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)))

    def step(state: Any, batch_of_text: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        loss, gradient = nnx.value_and_grad(loss_of)(model, batch_of_text)
        optimizer.update(model, gradient)
        return nnx.state((model, optimizer)), loss

    return Workload(step, state, text(batch, tokens + 1, vocabulary))


def decoding(*, tokens: int, filled: int, vocabulary: int, dtype: Any = jnp.bfloat16, **sizes: int) -> Workload:
    """The next token's scores after `filled` tokens; the state is the cache, and the tokens so far."""
    model = GPT(vocabulary, tokens=tokens, dtype=jnp.dtype(dtype), **sizes)
    for block in model.blocks:
        attention = block.attention
        attention.init_cache((1, tokens, attention.in_features), jnp.dtype(dtype))
    graph, cache, weights = nnx.split(model, nnx.Cache, ...)

    def step(state: Any, weights: Any) -> tuple[Any, jax.Array]:
        cache, token, position = state
        model = nnx.merge(graph, cache, weights)
        scores = model(token, position, decode=True)
        return (nnx.state(model, nnx.Cache), scores.argmax(-1).astype(token.dtype), position + 1), scores

    state = cache, text(1, 1, vocabulary), jnp.int32(0)
    prompt = jax.jit(step)
    for _ in range(filled):
        state, _ = prompt(state, weights)
    return Workload(step, state, weights)
