"""The primitive of `dot_product_attention`: softmax(scale * Q K^T + bias) V and the logarithms of its denominators.

`composition` says what it means in JAX's own operations, which is jax.nn's: it is what the primitive becomes where it
has no kernel, and what forward-mode derivatives are made of. The tangent is a primitive of its own, linear in the
tangents of queries, keys, values and bias, so that reverse mode finds a rule for its transpose: `backward`, which
computes the weights once more from the logarithms, a block of keys at a time.

Shapes: q [B, T, N, H], k and v [B, S, K, H] with K a divisor of N; then, where there are any, bias (float32) and mask
(bool) [B or 1, N or 1, T or 1, S], lengths of queries and of keys and values (int32) [B]. Results: [B, T, N, H] of q's
dtype and float32 [B, T, N].
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
from jax_nano._core.contraction import Labels
from jax_nano._ops.dot_general import bind_labels

attention_p = Primitive("jax_nano_attention")
attention_p.multiple_results = True
attention_p.def_impl(partial(xla.apply_primitive, attention_p))

attention_tangent_p = Primitive("jax_nano_attention_tangent")
attention_tangent_p.multiple_results = True
attention_tangent_p.def_impl(partial(xla.apply_primitive, attention_tangent_p))

MASKED = float(np.float32(-0.7) * np.finfo(np.float32).max)
"""jax.nn's score of a masked key."""

UNBOUNDED = 2**40

KEYS_AT_ONCE = 512
"""Of which `backward` holds weights: memory grows with the number of queries alone."""


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


def bind(q: Array, k: Array, v: Array, *extras: Array, options: Options) -> tuple[Array, Array]:
    """Results and logarithms. All arguments are canonical."""
    operands = compat.match_varying_axes(q, k, v, *extras)
    out, lse = attention_p.bind(*operands, options=options)
    return out, lse


def _product(subscripts: str, lhs: Array, rhs: Array) -> Array:
    """An einsum of two operands into float32, in one product of ours."""
    dims = subscripts.replace("->", ",").split(",")
    return bind_labels(
        lhs,
        rhs,
        Labels(*(tuple(map(ord, x)) for x in dims)),
        precision=None,
        preferred_element_type=np.dtype(np.float32),
    )


def _grouped(x: Array, kv_heads: int) -> Array:
    """A bias or mask [B, N or 1, T, S] with its heads in groups: [B, K or 1, G or 1, T, S]."""
    b, n, t, s = x.shape
    return x.reshape(b, 1, 1, t, s) if n == 1 else x.reshape(b, kv_heads, n // kv_heads, t, s)


def _allowed(
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
        parts.append(_grouped(mask, kv_heads))
    allowed: Any = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def composition(
    q: Array, k: Array, v: Array, *extras: Array, options: Options, scale: Any = None
) -> tuple[Array, Array]:
    """What the primitive means. `scale` may be an array, in the place of the options'."""
    bias, mask, q_lengths, kv_lengths = options.split(extras)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    wide = jnp.promote_types(q.dtype, np.float32)
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide)
    scores = scores * jnp.asarray(options.scale if scale is None else scale, wide)
    if bias is not None:
        scores = scores + _grouped(bias, kv_heads).astype(wide)
    allowed = _allowed(options, mask, q_lengths, kv_lengths, t, s, 0, kv_heads)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.asarray(-0.7 * float(np.finfo(wide).max), wide))
    scores = scores.astype(np.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(k.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, v.shape[-1])
    if q_lengths is not None:
        out = out * (lax.broadcasted_iota(np.int32, (b, t), 1) < q_lengths[:, None])[:, :, None, None].astype(out.dtype)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return out.astype(q.dtype), jnp.moveaxis(lse.reshape(b, n, t), 1, 2)


@attention_p.def_abstract_eval
def _abstract_eval(
    q: ShapedArray, k: ShapedArray, v: ShapedArray, *extras: ShapedArray, options: Options
) -> tuple[ShapedArray, ShapedArray]:
    rows = q.sharding.update(spec=PartitionSpec(*q.sharding.spec[:3]))
    whole = q.sharding.update(spec=PartitionSpec(*q.sharding.spec[:3], None))
    out = q.update(shape=(*q.shape[:3], v.shape[-1]), weak_type=False, sharding=whole)
    return out, q.update(shape=q.shape[:3], dtype=np.dtype(np.float32), weak_type=False, sharding=rows)


# --- forward mode ---------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, options: Options) -> tuple[Any, Any]:
    out, lse = bind(*primals, options=options)
    wanted = tuple(i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero) and i < 3 + options.bias)
    if not wanted:
        return (out, lse), tuple(ad.Zero(jax.typeof(x).to_tangent_aval()) for x in (out, lse))
    given = [tangents[i] for i in wanted]
    return (out, lse), tuple(attention_tangent_p.bind(*primals, out, lse, *given, options=options, wanted=wanted))


def _tangent(*operands: Array, options: Options, wanted: tuple[int, ...]) -> tuple[Array, Array]:
    """The tangents of both results, from those of the operands that are `wanted`, which come last."""
    count = len(operands) - len(wanted) - 2
    primals, given = operands[:count], operands[count + 2 :]

    def function(*chosen: Array) -> tuple[Array, Array]:
        filled = list(primals)
        for i, x in zip(wanted, chosen, strict=True):
            filled[i] = x
        return composition(*filled, options=options)

    _, out = jax.jvp(function, tuple(primals[i] for i in wanted), given)
    tangent: tuple[Array, Array] = out
    return tangent


@attention_tangent_p.def_abstract_eval
def _tangent_abstract_eval(*operands: ShapedArray, options: Options, wanted: tuple[int, ...]) -> Any:
    return tuple(operands[len(operands) - len(wanted) - 2 : len(operands) - len(wanted)])


def _tangent_jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    instantiated = [ad.instantiate_zeros(x) for x in tangents]
    outs = attention_tangent_p.bind(*primals, **params)
    return outs, jax.jvp(partial(_tangent, **params), tuple(primals), tuple(instantiated))[1]


# --- reverse mode ---------------------------------------------------------------------------------------------


def _transpose(cotangents: Sequence[Any], *operands: Any, options: Options, wanted: tuple[int, ...]) -> list[Any]:
    count = len(operands) - len(wanted) - 2
    dout, dlse = (None if isinstance(x, ad.Zero) else x for x in cotangents)
    found = backward(*operands[: count + 2], dout=dout, dlse=dlse, options=options, bias_too=3 in wanted)
    return [None] * (count + 2) + [found[i] for i in wanted]


def backward(
    *operands: Array, dout: Any, dlse: Any, options: Options, bias_too: bool
) -> tuple[Array, Array, Array, Any]:
    """Cotangents of q, k, v and, where it is asked for, bias, from those of the results (None: zero).

    The weights of a block of keys at a time are computed once more from the results' logarithms.
    """
    q, k, v, *extras, out, lse = operands
    bias, mask, q_lengths, kv_lengths = options.split(extras)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    group = n // kv_heads
    dout = jnp.zeros_like(out) if dout is None else dout.astype(out.dtype)
    if q_lengths is not None:
        here = lax.broadcasted_iota(np.int32, (b, t), 1) < q_lengths[:, None]
        dout = jnp.where(here[:, :, None, None], dout, 0)
    delta = jnp.sum(dout.astype(np.float32) * out.astype(np.float32), axis=-1)
    if dlse is not None:
        delta = delta - dlse

    def rows(x: Array) -> Array:
        """[B, T, N] as [B, K, G, T, 1]."""
        return jnp.transpose(x.reshape(b, t, kv_heads, group), (0, 2, 3, 1))[..., None]

    delta, lse = rows(delta), rows(lse)
    # Queries that see no key weigh all alike.
    nobody = lse <= MASKED
    queries, dout = (x.reshape(b, t, kv_heads, group, x.shape[-1]) for x in (q, dout))

    def block(dq: Array, first: Any, size: int) -> tuple[Array, tuple[Array, Array, Any]]:
        keys, values = (lax.dynamic_slice_in_dim(x, first, size, 1) for x in (k, v))
        scores = _product("btkgh,bskh->bkgts", queries, keys) * np.float32(options.scale)
        if bias is not None:
            scores = scores + _grouped(lax.dynamic_slice_in_dim(bias, first, size, 3), kv_heads)
        part = None if mask is None else lax.dynamic_slice_in_dim(mask, first, size, 3)
        allowed = _allowed(options, part, q_lengths, kv_lengths, t, size, first, kv_heads)
        if allowed is not None:
            scores = jnp.where(allowed, scores, MASKED)
        weights = jnp.exp(scores - lse)
        weights = jnp.where(nobody, weights / s, weights)
        dvalues = _product("bkgts,btkgh->bskh", weights.astype(v.dtype), dout)
        dscores = weights * (_product("btkgh,bskh->bkgts", dout, values) - delta)
        if allowed is not None:
            dscores = jnp.where(allowed, dscores, 0)
        narrow = dscores.astype(k.dtype)
        dkeys = _product("bkgts,btkgh->bskh", narrow, queries) * np.float32(options.scale)
        dq = dq + _product("bkgts,bskh->btkgh", narrow, keys)
        dbias = None
        if bias_too:
            dbias = dscores.reshape(b, n, t, size)
            over = tuple(i for i in range(3) if bias.shape[i] == 1 and dbias.shape[i] != 1)
            dbias = jnp.sum(dbias, axis=over, keepdims=True) if over else dbias
        return dq, (dkeys.astype(k.dtype), dvalues.astype(v.dtype), dbias)

    dq = jnp.zeros((b, t, kv_heads, group, h), np.float32)
    whole, rest = divmod(s, KEYS_AT_ONCE)
    parts: list[tuple[Array, Array, Any]] = []
    if whole > 1:
        starts = jnp.arange(whole, dtype=np.int32) * KEYS_AT_ONCE
        dq, stacked = lax.scan(lambda dq, first: block(dq, first, KEYS_AT_ONCE), dq, starts)

        def joined(x: Array, axis: int) -> Array:
            """Blocks in front of everything as one dimension at ``axis``."""
            moved = jnp.moveaxis(x, 0, axis)
            return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

        dkeys, dvalues, dbias = stacked
        parts.append((joined(dkeys, 1), joined(dvalues, 1), None if dbias is None else joined(dbias, 3)))
    elif whole == 1:
        dq, part = block(dq, 0, KEYS_AT_ONCE)
        parts.append(part)
    if rest:
        dq, part = block(dq, whole * KEYS_AT_ONCE, rest)
        parts.append(part)
    dkeys, dvalues = (jnp.concatenate([x[i] for x in parts], axis=1) for i in (0, 1))
    dbias = jnp.concatenate([x[2] for x in parts], axis=3) if bias_too else None
    dq = (dq * np.float32(options.scale)).astype(q.dtype).reshape(q.shape)
    return dq, dkeys, dvalues, dbias


# --- batches --------------------------------------------------------------------------------------------------


def _folded(x: Array, dim: int | None, size: int, others: int, *, broadcasts: bool) -> Array:
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
    folded = [
        _folded(x, d, size, int(others), broadcasts=i in broadcast)
        for i, (x, d) in enumerate(zip(args, dims, strict=True))
    ]
    outs = primitive.bind(*folded, **params)
    return [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in outs], [0] * len(outs)


ad.primitive_jvps[attention_p] = _jvp
ad.primitive_jvps[attention_tangent_p] = _tangent_jvp
ad.primitive_transposes[attention_tangent_p] = _transpose
batching.primitive_batchers[attention_p] = partial(_batched, attention_p)
batching.primitive_batchers[attention_tangent_p] = partial(_batched, attention_tangent_p)
mlir.register_lowering(attention_tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
