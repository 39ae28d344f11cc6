"""`attention_fn`: attention as the layers of flax.linen and flax.nnx call it, on `dot_product_attention`.

What needs the weights themselves, which exist nowhere in one pass, is computed by flax's composition, operation by
operation: dropout, weights to be sown into a module, and einsums of the caller's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_nano.api import dot_product_attention

_DTYPES = ("float32", "bfloat16", "float16")


def attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
) -> Array:
    """What to pass as ``attention_fn=`` to the attention layers of flax.linen and flax.nnx.

    Takes the arguments of both libraries' `dot_product_attention` and gives their results, within the rounding of the
    dtype: in one pass by `jax_nano.dot_product_attention`, scores and sums in float32. The weights are formed, as flax
    does, where dropout is active, a module is to have them, the einsums or the dot_general are the caller's, or
    `precision` names an algorithm.

    Args:
      query: shape (batch..., T, N, H).
      key, value: shape (batch..., S, K, H), where K divides N.
      bias: added to the scores; broadcasts to (batch..., N, T, S).
      mask: likewise; False or 0 excludes a score.
      broadcast_dropout: whether all batches and heads drop the same weights.
      dropout_rng: a key for it.
      dropout_rate: the share of weights that are dropped.
      deterministic: whether none are.
      dtype: that of the computation, by default the common one of query, key and value.
      precision: of the products.
      module: the module into which the weights are sown.
      promote_dtype: flax.nnx's, takes a tuple of arrays and a `dtype`; by default the arrays are promoted as there.
      is_causal: query t sees no key behind t.
      force_fp32_for_softmax: whether flax would compute it in float32 always, as is done in one pass anyway.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: what flax.linen computes products by.

    Returns:
      Shape (batch..., T, N, H).

    Raises:
      ValueError: shapes do not fit together, or dtype is no dtype of real or complex numbers.
    """
    arrays = tuple(jnp.asarray(x) for x in (query, key, value))
    q, k, v = (promote_dtype or _promoted)(arrays, dtype=dtype)
    _check(q, k, v)
    dropped = not deterministic and dropout_rate > 0.0
    einsums = (qk_attn_weights_einsum, attn_weights_value_einsum)
    if (einsums[0] is None) != (einsums[1] is None):
        raise ValueError("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together.")
    if einsums[0] is not None and (precision is not None or einsum_dot_general is not None):
        raise ValueError(
            "precision/einsum_dot_general and qk_attn_weights_einsum/attn_weights_value_einsum are mutually exclusive."
            " Please specify only one of them."
        )
    one_pass = not (
        dropped
        or module is not None
        or einsum_dot_general is not None
        or einsums[0] is not None
        or _is_algorithm(precision)
        or q.dtype.name not in _DTYPES
        or k.shape[-2:] != v.shape[-2:]
    )
    if one_pass:
        return _in_one_pass(q, k, v, bias, mask, is_causal)

    einsum: Callable[..., Array] = partial(
        jnp.einsum,
        precision=precision,
        **({} if einsum_dot_general is None else {"_dot_general": einsum_dot_general}),
    )
    weights = _weights(q, k, bias, mask, is_causal, force_fp32_for_softmax, einsums[0] or einsum)
    if module is not None:
        _sow(module, weights)
    if dropped:
        keep = 1.0 - dropout_rate
        shape = (1,) * (k.ndim - 2) + weights.shape[-2:] if broadcast_dropout else weights.shape
        assert dropout_rng is not None, "dropout needs a dropout_rng"
        kept = jax.random.bernoulli(dropout_rng, keep, shape)
        weights = weights * (kept.astype(q.dtype) / jnp.asarray(keep, dtype=q.dtype))
    return _weighted(weights, v, einsums[1] or einsum)


def _promoted(arrays: tuple[Array, ...], dtype: DTypeLike | None) -> tuple[Array, ...]:
    """Arrays of one dtype as flax has it."""
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, np.inexact):
            dtype = jnp.promote_types(np.float32, dtype)
    if not jnp.issubdtype(dtype, np.inexact):
        raise ValueError(f"Dtype must be inexact: {dtype}")
    return tuple(x.astype(dtype) for x in arrays)


def _check(q: Array, k: Array, v: Array) -> None:
    if not q.ndim == k.ndim == v.ndim:
        raise ValueError(f"q, k, v must have same rank, but got {q.ndim}, {k.ndim}, {v.ndim}.")
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(f"q, k, v batch dims must match, but got shapes {q.shape}, {k.shape}, {v.shape}.")
    if k.shape[-3] != v.shape[-3]:
        raise ValueError(f"k, v lengths must match, but got {k.shape[-3]} and {v.shape[-3]}.")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k depths must match, but got {q.shape[-1]} and {k.shape[-1]}.")
    for name, heads in (("Key", k.shape[-2]), ("Value", v.shape[-2])):
        if q.shape[-2] % heads:
            raise ValueError(f"Query heads ({q.shape[-2]}) must be multiple of {name} heads ({heads})")


def _in_one_pass(q: Array, k: Array, v: Array, bias: Any, mask: Any, is_causal: bool) -> Array:
    batch = q.shape[:-3]
    count = math.prod(batch)

    def folded(x: Array) -> Array:
        return x.reshape(count, *x.shape[-3:])

    def to_scores(x: Any) -> Array | None:
        """A bias or mask with one batch dimension, 1 where it is broadcast over all of them."""
        if x is None:
            return None
        x = jnp.asarray(x)
        x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
        if math.prod(x.shape[:-3]) != 1:
            x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
        return x.reshape(-1, *x.shape[-3:])

    allowed = to_scores(mask)
    out: Array = dot_product_attention(
        folded(q),
        folded(k),
        folded(v),
        to_scores(bias),
        None if allowed is None else allowed.astype(bool),
        is_causal=is_causal,
    )
    return out.reshape(q.shape)


def _weights(
    q: Array, k: Array, bias: Any, mask: Any, is_causal: bool, force_fp32: bool, einsum: Callable[..., Array]
) -> Array:
    """Shape (batch..., N, T, S)."""
    dtype, heads, kv_heads = q.dtype, q.shape[-2], k.shape[-2]
    scaled = q / jnp.sqrt(q.shape[-1]).astype(dtype)
    if heads == kv_heads:
        scores = einsum("...qhd,...khd->...hqk", scaled, k)
    else:
        grouped = scaled.reshape(*q.shape[:-2], kv_heads, heads // kv_heads, q.shape[-1])
        scores = einsum("...qhgd,...kh1d->...hgqk", grouped, jnp.expand_dims(k, -2))
        scores = scores.reshape(*scores.shape[:-4], heads, *scores.shape[-2:])
    if bias is not None:
        scores = scores + bias
    allowed = None if mask is None else jnp.asarray(mask) != 0
    if is_causal:
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        allowed = causal if allowed is None else allowed & causal
    if allowed is not None:
        least: Any = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
        scores = jnp.where(allowed, scores, least.min)
    if force_fp32 and dtype != np.float32:
        return jax.nn.softmax(scores.astype(np.float32))
    return jax.nn.softmax(scores).astype(dtype)


def _weighted(weights: Array, v: Array, einsum: Callable[..., Array]) -> Array:
    heads, kv_heads = weights.shape[-3], v.shape[-2]
    if heads == kv_heads:
        return einsum("...hqk,...khd->...qhd", weights, v)
    grouped = weights.reshape(*weights.shape[:-3], kv_heads, heads // kv_heads, *weights.shape[-2:])
    out = einsum("...hgqk,...kh1d->...qhgd", grouped, jnp.expand_dims(v, -2))
    return out.reshape(*out.shape[:-3], heads, out.shape[-1])


def _is_algorithm(precision: Any) -> bool:
    """Whether it names an algorithm, which products in one pass do not follow."""
    if isinstance(precision, str):
        return precision.upper() in set(jax.lax.DotAlgorithmPreset.__members__) - {"DEFAULT"}
    return isinstance(precision, jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset)


def _sow(module: Any, weights: Array) -> None:
    """Leaves the weights where either library looks for them."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    else:
        module.sow("intermediates", "attention_weights", weights)
