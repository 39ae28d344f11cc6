"""A GPT-2 of flax.nnx's modules that decodes with a key-value cache, whose matrices may be quantised.

It multiplies with `@` alone. So a layer's weights are an array, or any pytree that `@` multiplies from the left with
rows of numbers, as `jax_nano.QuantizedArray` and `Dequantized` do. It knows nothing of jax_nano.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """``x @ weights + bias`` for x[rows, inputs]."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, *, bias: bool = True) -> None:
        self.weights = nnx.Param(0.02 * rngs.params.normal((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weights.get_value()
        return y if self.bias is None else y + self.bias.get_value()


class Attention(nnx.Module):
    """Attention to all tokens so far, whose keys and values the cache holds."""

    def __init__(self, features: int, heads: int, tokens: int, rngs: nnx.Rngs) -> None:
        self.inputs = Linear(features, 3 * features, rngs)
        self.outputs = Linear(features, features, rngs)
        cache = jnp.zeros((heads, tokens, features // heads))
        self.keys, self.values = nnx.Cache(cache), nnx.Cache(cache)

    def __call__(self, x: jax.Array, start: jax.Array | int) -> jax.Array:
        heads, tokens, size = self.keys.get_value().shape
        q, k, v = jnp.moveaxis(self.inputs(x).reshape(len(x), 3, heads, size), 0, 2)
        for cache, new in ((self.keys, k), (self.values, v)):
            cache.set_value(jax.lax.dynamic_update_slice(cache.get_value(), new, (0, start, 0)))
        scores = jnp.einsum("htd,hcd->htc", q, self.keys.get_value()) / size**0.5
        seen = jnp.arange(tokens) <= start + jnp.arange(len(x))[:, None]
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("htc,hcd->thd", shares, self.values.get_value())
        return self.outputs(out.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then a perceptron, each after a norm and beside a shortcut."""

    def __init__(self, features: int, heads: int, tokens: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(features, epsilon=1e-5, dtype=None, rngs=rngs)
        self.attention = Attention(features, heads, tokens, rngs)
        self.norm2 = nnx.LayerNorm(features, epsilon=1e-5, dtype=None, rngs=rngs)
        self.up = Linear(features, 4 * features, rngs)
        self.down = Linear(4 * features, features, rngs)

    def __call__(self, x: jax.Array, start: jax.Array | int) -> jax.Array:
        x = x + self.attention(self.norm1(x), start)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Scores [count, vocabulary] of what follows each of tokens [count], the first of which has place ``start``.

    The cache holds keys and values of ``tokens`` places; calls fill it from the front.
    """

    def __init__(self, *, vocabulary: int, blocks: int, heads: int, features: int, tokens: int, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.embedding = nnx.Param(0.02 * rngs.params.normal((vocabulary, features)))
        self.positions = nnx.Param(0.02 * rngs.params.normal((tokens, features)))
        self.blocks = nnx.List([Block(features, heads, tokens, rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, dtype=None, rngs=rngs)
        self.head = Linear(features, vocabulary, rngs, bias=False)

    def __call__(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        x = self.embedding[tokens] + self.positions[start + jnp.arange(len(tokens))]
        for block in self.blocks:
            x = block(x, start)
        return self.head(self.norm(x))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dequantized:
    """Quantised weights as one multiplies with them in JAX: q[k, n] of integers, scale[groups, n]."""

    q: jax.Array
    scale: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        groups, n = self.scale.shape
        grouped = self.q.astype(x.dtype).reshape(groups, -1, n) * self.scale.astype(x.dtype)[:, None]
        return x @ grouped.reshape(-1, n)


def with_matrices(model: Decoder, change: Callable[[Any], Any]) -> Decoder:
    """The model with other weights in its layers; it shares all else."""
    graph, state = nnx.split(model)
    changed = nnx.merge(graph, state)
    for _, module in nnx.iter_modules(changed):
        if isinstance(module, Linear):
            module.weights = nnx.Param(change(module.weights.get_value()))
    return changed


def in_dtype(model: Decoder, dtype: Any) -> Decoder:
    """The model with all of its numbers, weights and cache, in another dtype."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda v: v.astype(dtype), state))


def matrix_bytes(model: Decoder) -> int:
    """Of all layers' weights, scales included: what a token reads."""
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    arrays = jax.tree.leaves([layer.weights.get_value() for layer in layers])
    return sum(a.size * (4 if a.dtype in (jnp.int4, jnp.uint4) else 8 * a.dtype.itemsize) // 8 for a in arrays)


Step = Callable[[Any, Any], tuple[Any, jax.Array]]


def decoding(model: Decoder, prompt: jax.Array) -> tuple[Step, Any, Any]:
    """Greedy decoding, as ``step(state, weights) -> (state, scores[vocabulary])`` for one token.

    Returns:
      The step, the state after the prompt (cache, token, its place), and the weights. Whoever runs it donates the
      state, or the cache is copied for each token.
    """
    graph, cache, weights = nnx.split(model, nnx.Cache, ...)

    def run(cache: Any, weights: Any, tokens: jax.Array, start: Any) -> tuple[Any, jax.Array]:
        model = nnx.merge(graph, cache, weights)
        scores = model(tokens, start)[-1]
        state = nnx.state(model, nnx.Cache), scores.argmax(-1).astype(tokens.dtype)[None], start + len(tokens)
        return state, scores

    def step(state: Any, weights: Any) -> tuple[Any, jax.Array]:
        cache, token, place = state
        return run(cache, weights, token, place)

    state, _ = jax.jit(run)(cache, weights, prompt, jnp.int32(0))
    return step, state, weights


def scoring(model: Decoder) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """``scores(weights, tokens[count]) -> [count, vocabulary]``, with nothing before the tokens; and the weights."""
    graph, cache, weights = nnx.split(model, nnx.Cache, ...)

    def scores(weights: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree.map(jnp.zeros_like, cache), weights)(tokens, 0)

    return scores, weights
