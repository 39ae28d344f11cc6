"""The primitive of `dot_product_attention`: softmax(scale * Q K^T + bias) V and what its weights are computed from.

`composition` says what it means in JAX's own operations, which is jax.nn's: it is what the primitive becomes where it
has no kernel, and what forward-mode derivatives are made of. The tangent is a primitive of its own, linear in the
tangents of queries, keys, values and bias, so that reverse mode finds a rule for its transpose: `attention_gradients`,
which computes the weights once more from maxima and logarithms.

Shapes: q [B, T, N, H], k and v [B, S, K, H] with K a divisor of N; then, where there are any, bias (float32) and mask
(bool) [B or 1, N or 1, T or 1, S], lengths of queries and of keys and values (int32) [B]. Results: [B, T, N, H] of q's
dtype, and twice float32 [B, T, N]: what is subtracted from a query's scores, about their maximum, and the logarithm of
the sum of exponentials of what is left. Their sum is the logarithm of the softmax's denominator. They stand apart
because in float32 nothing is left of a logarithm beside a score of -1e9. Derivatives take the former as constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec

from jax_nano._core import jax_compat as compat

attention_p = Primitive("jax_nano_attention")
attention_p.multiple_results = True
attention_p.def_impl(partial(xla.apply_primitive, attention_p))

attention_tangent_p = Primitive("jax_nano_attention_tangent")
attention_tangent_p.multiple_results = True
attention_tangent_p.def_impl(partial(xla.apply_primitive, attention_tangent_p))

MASKED = float(np.float32(-0.7) * np.finfo(np.float32).max)
"""jax.nn's score of a masked key."""

UNBOUNDED = 2**40

RESULTS = 3
"""Of the primitive."""


class Options(NamedTuple):
    """What an attention is apart from its arrays.

    Attributes:
      scale: of scores.
      left, right: query t sees keys t - left <= s <= t + right; UNBOUNDED: all on that side.
      bias, mask, q_lengths, kv_lengths: which operands follow q, k and v, in this order.
    """

    scale: float
    left: int
    right: int
    bias: bool
    mask: bool
    q_lengths: bool
    kv_lengths: bool

    def split(self, extras: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """The operands behind q, k and v, None where there is none."""
        left = list(extras)
        bias, mask, q_lengths, kv_lengths = (left.pop(0) if given else None for given in self[3:])
        return bias, mask, q_lengths, kv_lengths


def bind(q: Array, k: Array, v: Array, *extras: Array, options: Options) -> tuple[Array, Array, Array]:
    """Results, maxima and logarithms. All arguments are canonical."""
    operands = compat.match_varying_axes(q, k, v, *extras)
    out, maxima, logs = attention_p.bind(*operands, options=options)
    return out, maxima, logs


def grouped(x: Array, kv_heads: int) -> Array:
    """A bias or mask [B, N or 1, T, S] with its heads in groups: [B, K or 1, G or 1, T, S]."""
    b, n, t, s = x.shape
    return x.reshape(b, 1, 1, t, s) if n == 1 else x.reshape(b, kv_heads, n // kv_heads, t, s)


def allowed_scores(
    options: Options, mask: Any, q_lengths: Any, kv_lengths: Any, queries: int, keys: int, first: Any, kv_heads: int
) -> Any:
    """Which scores [B, K, G, T, keys] count, of keys from `first` on; None: all."""
    at_q = lax.broadcasted_iota(np.int32, (queries, keys), 0)
    at_k = lax.broadcasted_iota(np.int32, (queries, keys), 1) + first
    parts: list[Any] = []
    if options.left < UNBOUNDED:
        parts.append(at_k >= at_q - options.left)
    if options.right < UNBOUNDED:
        parts.append(at_k <= at_q + options.right)
    if q_lengths is not None:
        parts.append(at_q < q_lengths[:, None, None, None, None])
    if kv_lengths is not None:
        parts.append(at_k < kv_lengths[:, None, None, None, None])
    if mask is not None:
        parts.append(grouped(mask, kv_heads))
    allowed: Any = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def composition(
    q: Array, k: Array, v: Array, *extras: Array, options: Options, scale: Any = None
) -> tuple[Array, Array, Array]:
    """What the primitive means. `scale` may be an array, in the place of the options'."""
    bias, mask, q_lengths, kv_lengths = options.split(extras)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    wide = jnp.promote_types(q.dtype, np.float32)
    queries = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", queries, k, preferred_element_type=wide)
    scores = scores * jnp.asarray(options.scale if scale is None else scale, wide)
    if bias is not None:
        scores = scores + grouped(bias, kv_heads).astype(wide)
    allowed = allowed_scores(options, mask, q_lengths, kv_lengths, t, s, 0, kv_heads)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.asarray(-0.7 * float(np.finfo(wide).max), wide))
    scores = scores.astype(np.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(k.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, v.shape[-1])
    if q_lengths is not None:
        out = out * (lax.broadcasted_iota(np.int32, (b, t), 1) < q_lengths[:, None])[:, :, None, None].astype(out.dtype)
    maxima = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-np.inf))
    maxima = jnp.where(jnp.isfinite(maxima), maxima, 0)
    logs = jnp.log(jnp.sum(jnp.exp(scores - maxima), axis=-1))
    maxima, logs = (jnp.moveaxis(x.reshape(b, n, t), 1, 2) for x in (maxima, logs))
    return out.astype(q.dtype), maxima, logs


@attention_p.def_abstract_eval
def _abstract_eval(
    q: ShapedArray, k: ShapedArray, v: ShapedArray, *extras: ShapedArray, options: Options
) -> tuple[ShapedArray, ShapedArray, ShapedArray]:
    rows = q.sharding.update(spec=PartitionSpec(*q.sharding.spec[:3]))
    whole = q.sharding.update(spec=PartitionSpec(*q.sharding.spec[:3], None))
    out = q.update(shape=(*q.shape[:3], v.shape[-1]), weak_type=False, sharding=whole)
    statistics = q.update(shape=q.shape[:3], dtype=np.dtype(np.float32), weak_type=False, sharding=rows)
    return out, statistics, statistics


# --- forward mode ---------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, options: Options) -> tuple[Any, Any]:
    results = bind(*primals, options=options)
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    wanted = tuple(i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero) and i < 3 + options.bias)
    if not wanted:
        return results, tuple(zeros)
    given = [tangents[i] for i in wanted]
    out, logs = attention_tangent_p.bind(*primals, *results, *given, options=options, wanted=wanted)
    return results, (out, zeros[1], logs)


def _tangent(*operands: Array, options: Options, wanted: tuple[int, ...]) -> tuple[Array, Array]:
    """The tangents of results and logarithms, from those of the operands that are `wanted`, which come last."""
    count = len(operands) - len(wanted) - RESULTS
    primals, given = operands[:count], operands[count + RESULTS :]

    def function(*chosen: Array) -> tuple[Array, Array]:
        filled = list(primals)
        for i, x in zip(wanted, chosen, strict=True):
            filled[i] = x
        out, _, logs = composition(*filled, options=options)
        return out, logs

    _, out = jax.jvp(function, tuple(primals[i] for i in wanted), given)
    tangent: tuple[Array, Array] = out
    return tangent


@attention_tangent_p.def_abstract_eval
def _tangent_abstract_eval(*operands: ShapedArray, options: Options, wanted: tuple[int, ...]) -> Any:
    out, _, logs = operands[len(operands) - len(wanted) - RESULTS : len(operands) - len(wanted)]
    return out, logs


def _tangent_jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    instantiated = [ad.instantiate_zeros(x) for x in tangents]
    outs = attention_tangent_p.bind(*primals, **params)
    return outs, jax.jvp(partial(_tangent, **params), tuple(primals), tuple(instantiated))[1]


# --- batches --------------------------------------------------------------------------------------------------


def folded(x: Array, dim: int | None, size: int, others: int, *, broadcasts: bool) -> Array:
    """An operand with a mapped dimension in front folded into its own batch dimension, of ``others`` batches.

    One whose batch dimension is broadcast and that is not mapped stays as it is.
    """
    if dim is None and broadcasts and x.shape[0] == 1:
        return x
    x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
    if broadcasts and x.shape[1] == 1 and others != 1:
        x = jnp.broadcast_to(x, (size, others, *x.shape[2:]))
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _batched(
    primitive: Primitive, args: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[list[Array], list[int]]:
    options: Options = params["options"]
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    others = args[0].shape[0] if dims[0] is None else np.delete(args[0].shape, dims[0])[0]
    broadcast = set(range(3, 3 + options.bias + options.mask))
    if 3 in params.get("wanted", ()):  # the bias's tangent, which is the last
        broadcast.add(len(args) - 1)
        if dims[3] is not None or dims[-1] is not None:  # both alike
            args, dims = list(args), list(dims)
            for i in (3, len(args) - 1):
                if dims[i] is None:
                    args[i], dims[i] = jnp.broadcast_to(args[i], (size, *args[i].shape)), 0
    operands = [
        folded(x, d, size, int(others), broadcasts=i in broadcast)
        for i, (x, d) in enumerate(zip(args, dims, strict=True))
    ]
    outs = primitive.bind(*operands, **params)
    return [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in outs], [0] * len(outs)


ad.primitive_jvps[attention_p] = _jvp
ad.primitive_jvps[attention_tangent_p] = _tangent_jvp
batching.primitive_batchers[attention_p] = partial(_batched, attention_p)
batching.primitive_batchers[attention_tangent_p] = partial(_batched, attention_tangent_p)
mlir.register_lowering(attention_tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
