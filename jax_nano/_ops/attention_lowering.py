"""How attention and its gradients become code: one custom call each on CPUs, their compositions everywhere else.

The custom calls are `jax_nano_attention` and `jax_nano_attention_gradients`, with the operands and attributes that
csrc/xla/attention_ffi.cc and attention_gradients_ffi.cc describe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import mlir

from jax_nano._core import jax_compat as compat
from jax_nano._core import native
from jax_nano._ops import sharding
from jax_nano._ops.attention import Options, composition
from jax_nano._ops.attention import attention_p as attention_p
from jax_nano._ops.attention_gradients import attention_gradients_p
from jax_nano._ops.attention_gradients import composition as gradients_composition
from jax_nano._ops.lowering import Context, Operand, Value, fold_transposes

MOST_ELEMENTS = 1024
"""Of a query, key or value: blocks of longer ones do not fit the caches that attention is planned for."""

_DIMS = (0, 1, 2, 3)
_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.ATTENTION_TARGET_NAME)
_gradients_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.ATTENTION_GRADIENTS_TARGET_NAME)


def has_kernel(q: ShapedArray, k: ShapedArray, v: ShapedArray) -> bool:
    """Whether a kernel on this CPU computes it."""
    static = all(isinstance(size, int) for x in (q, k, v) for size in x.shape)
    return (
        static
        and min(*q.shape, *k.shape, *v.shape) > 0
        and max(q.shape[-1], v.shape[-1]) <= MOST_ELEMENTS
        and k.dtype == v.dtype
        and native.supports_attention(q.dtype.name, k.dtype.name)
    )


def _runs(ctx: Context, q: ShapedArray, k: ShapedArray, v: ShapedArray) -> bool:
    """Whether the program that is being lowered calls a kernel."""
    local = sharding.placement(ctx, ctx.avals_out[0]) is sharding.Placement.LOCAL
    return local and compat.lowering_platforms(ctx) == ("cpu",) and has_kernel(q, k, v)


def _call(
    rule: Callable[..., Any],
    ctx: Context,
    values: Sequence[Value],
    permutable: int,
    options: Options,
    **attributes: Any,
) -> Sequence[Value]:
    """A custom call whose first operands, the `permutable`, may have their dimensions in any order."""
    avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    operands, dims = [], [np.asarray(_DIMS, np.int64)] * 4
    for i, (value, aval) in enumerate(zip(values[:permutable], avals[:permutable], strict=True)):
        operand, order = fold_transposes(Operand(value, aval.shape, aval.dtype), _DIMS)
        operands.append(operand)
        dims[i] = np.asarray(order, np.int64)
    inner = ctx.replace(
        avals_in=[ShapedArray(x.shape, x.dtype) for x in operands] + avals[permutable:],
        avals_out=[ShapedArray(x.shape, x.dtype) for x in ctx.avals_out],
    )
    outs = rule(
        inner,
        *(x.value for x in operands),
        *values[permutable:],
        abi=np.int64(native.ABI),
        q_dims=dims[0],
        k_dims=dims[1],
        v_dims=dims[2],
        out_dims=dims[3],
        scale=np.float64(options.scale),
        left=np.int64(options.left),
        right=np.int64(options.right),
        bias=np.int64(options.bias),
        mask=np.int64(options.mask),
        q_lengths=np.int64(options.q_lengths),
        kv_lengths=np.int64(options.kv_lengths),
        **{name: np.int64(x) for name, x in attributes.items()},
    )
    compat.set_frontend_attributes(outs[0].owner, {native.BUILD: native.build()})
    return [compat.lower_with_types(ctx, x, aval) for x, aval in zip(outs, ctx.avals_out, strict=True)]


def _lower(ctx: Context, *values: Value, options: Options) -> Sequence[Value]:
    if not _runs(ctx, *ctx.avals_in[:3]):
        return mlir.lower_fun(partial(composition, options=options), multiple_results=True)(ctx, *values)
    return _call(_ffi_rule, ctx, values, 3, options, residual=True)


def _lower_gradients(ctx: Context, *values: Value, options: Options, bias_too: bool) -> Sequence[Value]:
    if not _runs(ctx, *ctx.avals_in[:3]):
        meaning = partial(gradients_composition, options=options, bias_too=bias_too)
        return mlir.lower_fun(meaning, multiple_results=True)(ctx, *values)
    q, k, v, *extras, lse, delta, dout = range(len(values))
    order = [q, k, v, dout, lse, delta, *extras]
    inner = ctx.replace(avals_in=[ctx.avals_in[i] for i in order])
    return _call(_gradients_ffi_rule, inner, [values[i] for i in order], 4, options, dbias=bias_too)


compat.require_devices(attention_p)
compat.require_devices(attention_gradients_p)
mlir.register_lowering(attention_p, _lower, cacheable=False)
mlir.register_lowering(attention_gradients_p, _lower_gradients, cacheable=False)
