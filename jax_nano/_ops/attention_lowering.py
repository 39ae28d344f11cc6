"""How attention becomes code: one custom call on CPUs, its composition everywhere else.

The custom call is `jax_nano_attention`, with the operands and attributes that csrc/xla/attention_ffi.cc describes.
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
from jax_nano._ops.lowering import Context, Operand, Value, fold_transposes

MOST_ELEMENTS = 1024
"""Of a query, key or value: blocks of longer ones do not fit the caches that attention is planned for."""

_DIMS = (0, 1, 2, 3)
_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.ATTENTION_TARGET_NAME)


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


def _lower(ctx: Context, *values: Value, options: Options) -> Sequence[Value]:
    out_aval, lse_aval = ctx.avals_out
    avals = [ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    local = sharding.placement(ctx, out_aval) is sharding.Placement.LOCAL
    if not local or compat.lowering_platforms(ctx) != ("cpu",) or not has_kernel(*avals[:3]):
        return mlir.lower_fun(partial(composition, options=options), multiple_results=True)(ctx, *values)
    operands, dims = [], []
    for value, aval in zip(values[:3], avals[:3], strict=True):
        operand, order = fold_transposes(Operand(value, aval.shape, aval.dtype), _DIMS)
        operands.append(operand)
        dims.append(np.asarray(order, np.int64))
    inner = ctx.replace(
        avals_in=[ShapedArray(x.shape, x.dtype) for x in operands] + avals[3:],
        avals_out=[ShapedArray(x.shape, x.dtype) for x in (out_aval, lse_aval)],
    )
    out, lse = _ffi_rule(
        inner,
        *(x.value for x in operands),
        *values[3:],
        abi=np.int64(native.ABI),
        q_dims=dims[0],
        k_dims=dims[1],
        v_dims=dims[2],
        out_dims=np.asarray(_DIMS, np.int64),
        scale=np.float64(options.scale),
        left=np.int64(options.left),
        right=np.int64(options.right),
        bias=np.int64(options.bias),
        mask=np.int64(options.mask),
        q_lengths=np.int64(options.q_lengths),
        kv_lengths=np.int64(options.kv_lengths),
        residual=np.int64(True),
    )
    compat.set_frontend_attributes(out.owner, {native.BUILD: native.build()})
    return [compat.lower_with_types(ctx, x, aval) for x, aval in ((out, out_aval), (lse, lse_aval))]


compat.require_devices(attention_p)
mlir.register_lowering(attention_p, _lower, cacheable=False)
