"""Reverse mode of attention: a primitive for the cotangents of queries, keys, values and, where it is asked for, bias.

From maxima and logarithms, and the cotangents of the results, weights are computed once more: no matrix of scores is
kept, or formed. `composition` says what the primitive means in products; it is what it becomes where it has no kernel,
a block of keys at a time, and what its own derivatives are made of.

Shapes: q, k, v, and bias, mask and lengths as in `attention`; then maxima, logarithms and deltas, float32 [B, T, N],
and the cotangents of the results, [B, T, N, H] of q's dtype. A query's delta is the sum of its results times their
cotangents, less the cotangent of its logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Labels
from jax_nano._ops.attention import MASKED, Options, allowed_scores, attention_tangent_p, folded, grouped
from jax_nano._ops.dot_general import bind_labels

attention_gradients_p = Primitive("jax_nano_attention_gradients")
attention_gradients_p.multiple_results = True
attention_gradients_p.def_impl(partial(xla.apply_primitive, attention_gradients_p))

KEYS_AT_ONCE = 512
"""Of which `composition` holds weights: memory grows with the number of queries alone."""


def gradients(
    *operands: Array, dout: Any, dlogs: Any, options: Options, bias_too: bool
) -> tuple[Array, Array, Array, Any]:
    """Cotangents of q, k, v and, with ``bias_too``, bias (else None), from those of results and logarithms.

    None: zero. The operands are those of attention, then its results.
    """
    *primals, out, maxima, logs = operands
    _, _, q_lengths, _ = options.split(primals[3:])
    dout = jnp.zeros_like(out) if dout is None else dout.astype(out.dtype)
    if q_lengths is not None:
        here = lax.broadcasted_iota(np.int32, out.shape[:2], 1) < q_lengths[:, None]
        dout = jnp.where(here[:, :, None, None], dout, 0)
    delta = jnp.sum(dout.astype(np.float32) * out.astype(np.float32), axis=-1)
    if dlogs is not None:
        delta = delta - dlogs
    given = compat.match_varying_axes(*primals, maxima, logs, delta, dout)
    dq, dk, dv, *dbias = attention_gradients_p.bind(*given, options=options, bias_too=bias_too)
    return dq, dk, dv, dbias[0] if bias_too else None


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


def composition(*operands: Array, options: Options, bias_too: bool) -> tuple[Array, ...]:
    """What the primitive means."""
    q, k, v, *extras, maxima, logs, delta, dout = operands
    bias, mask, q_lengths, kv_lengths = options.split(extras)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    group = n // kv_heads

    def rows(x: Array) -> Array:
        """[B, T, N] as [B, K, G, T, 1]."""
        return jnp.transpose(x.reshape(b, t, kv_heads, group), (0, 2, 3, 1))[..., None]

    maxima, logs, delta = rows(maxima), rows(logs), rows(delta)
    queries, dout = (x.reshape(b, t, kv_heads, group, x.shape[-1]) for x in (q, dout))

    def scores_of(first: Any, size: int) -> tuple[Array, Array | None]:
        """Of a block of keys, and which of them are allowed."""
        keys = lax.dynamic_slice_in_dim(k, first, size, 1)
        scores = _product("btkgh,bskh->bkgts", queries, keys) * np.float32(options.scale)
        if bias is not None:
            scores = scores + grouped(lax.dynamic_slice_in_dim(bias, first, size, 3), kv_heads)
        part = None if mask is None else lax.dynamic_slice_in_dim(mask, first, size, 3)
        allowed = allowed_scores(options, part, q_lengths, kv_lengths, t, size, first, kv_heads)
        if allowed is not None:
            scores = jnp.where(allowed, scores, MASKED)
        return scores, allowed

    def block(dq: Array, first: Any, size: int) -> tuple[Array, tuple[Array, Array, Any]]:
        keys, values = (lax.dynamic_slice_in_dim(x, first, size, 1) for x in (k, v))
        scores, allowed = scores_of(first, size)
        weights = jnp.exp((scores - maxima) - logs)
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
    if rest or not parts:
        dq, part = block(dq, whole * KEYS_AT_ONCE, rest)
        parts.append(part)
    dkeys, dvalues = (jnp.concatenate([x[i] for x in parts], axis=1) for i in (0, 1))
    dbias = jnp.concatenate([x[2] for x in parts], axis=3) if bias_too else None
    dq = (dq * np.float32(options.scale)).astype(q.dtype).reshape(q.shape)
    return (dq, dkeys, dvalues) if dbias is None else (dq, dkeys, dvalues, dbias)


@attention_gradients_p.def_abstract_eval
def _abstract_eval(*operands: ShapedArray, options: Options, bias_too: bool) -> tuple[ShapedArray, ...]:
    return tuple(x.update(weak_type=False) for x in operands[: 3 + bias_too])


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    instantiated = [ad.instantiate_zeros(x) for x in tangents]
    outs = attention_gradients_p.bind(*primals, **params)
    return outs, jax.jvp(partial(composition, **params), tuple(primals), tuple(instantiated))[1]


def _transpose_of_tangent(
    cotangents: Sequence[Any], *operands: Any, options: Options, wanted: tuple[int, ...]
) -> list[Any]:
    count = len(operands) - len(wanted)
    dout, dlogs = (None if isinstance(x, ad.Zero) else x for x in cotangents)
    found = gradients(*operands[:count], dout=dout, dlogs=dlogs, options=options, bias_too=3 in wanted)
    return [None] * count + [found[i] for i in wanted]


def _own_batches(x: Array, mapped: int | None) -> int:
    """The size of an operand's batch dimension, which is its first but for the mapped one."""
    return int(x.shape[1 if mapped == 0 else 0])


def _batched(
    args: Sequence[Array], dims: Sequence[int | None], *, options: Options, bias_too: bool
) -> tuple[list[Array], list[int]]:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    args, dims = list(args), list(dims)
    others = _own_batches(args[0], dims[0])
    broadcast = set(range(3, 3 + options.bias + options.mask))
    bias_batches = others
    if bias_too:  # whose cotangents are those of one member of the batch: it has a bias of its own
        broadcast.discard(3)
        bias_batches = _own_batches(args[3], dims[3])
        shared = dims[3] is None
        bias = jnp.broadcast_to(args[3], (size, *args[3].shape)) if shared else jnp.moveaxis(args[3], dims[3] or 0, 0)
        args[3], dims[3] = jnp.broadcast_to(bias, (size, others, *bias.shape[2:])), 0
    operands = [
        folded(x, d, size, others, broadcasts=i in broadcast) for i, (x, d) in enumerate(zip(args, dims, strict=True))
    ]
    outs = attention_gradients_p.bind(*operands, options=options, bias_too=bias_too)
    outs = [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in outs]
    if bias_too and bias_batches != outs[3].shape[1]:
        outs[3] = jnp.sum(outs[3], axis=1, keepdims=True)
    return outs, [0] * len(outs)


ad.primitive_jvps[attention_gradients_p] = _jvp
ad.primitive_transposes[attention_tangent_p] = _transpose_of_tangent
batching.primitive_batchers[attention_gradients_p] = _batched
