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
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from jax_nano._core import custom_calls, native, record
from jax_nano._core import jax_compat as compat
from jax_nano._dispatch import decision
from jax_nano._ops import sharding
from jax_nano._ops.attention import MASKED, UNBOUNDED, Options, composition
from jax_nano._ops.attention import attention_p as attention_p
from jax_nano._ops.attention_gradients import attention_gradients_p
from jax_nano._ops.attention_gradients import composition as gradients_composition
from jax_nano._ops.lowering import Context, Operand, Value, fold_transposes, source_of

_DIMS = (0, 1, 2, 3)
_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.ATTENTION_TARGET_NAME)
_gradients_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.ATTENTION_GRADIENTS_TARGET_NAME)


def why_no_kernel(q: ShapedArray, k: ShapedArray, v: ShapedArray) -> str | None:
    """Why no kernel on this CPU computes it; None: one does."""
    attention = decision.Attention((q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype))
    return decision.why_no_attention(attention, decision.this_machine())


def _runs(ctx: Context) -> tuple[sharding.Placement, str | None]:
    """How the program that is being lowered calls a kernel; XLA: not at all, and why."""
    if compat.lowering_platforms(ctx) != ("cpu",):
        return sharding.Placement.XLA, "a program for other platforms than CPUs"
    why = why_no_kernel(*ctx.avals_in[:3])
    where = sharding.placement(ctx, ctx.avals_out[0])
    if why is None and where is sharding.Placement.XLA:
        why = where.value
    return (sharding.Placement.XLA, why) if why is not None else (where, None)


def _tell(ctx: Context, options: Options, declined: str | None) -> None:
    """Puts an attention in the report: what XLA computes when that is certain."""
    if "cpu" not in compat.lowering_platforms(ctx) or (declined is not None and record.seen_again()):
        return
    arrays = tuple(record.Array(x.dtype.name, x.shape) for x in (*ctx.avals_in[:3], ctx.avals_out[0]))
    causal = options.left == UNBOUNDED and options.right == 0
    parts = {
        "causal": causal,
        "window": not causal and min(options.left, options.right) < UNBOUNDED,
        "bias": options.bias,
        "mask": options.mask,
        "lengths": options.q_lengths or options.kv_lengths,
    }
    detail = ", ".join(name for name, there in parts.items() if there)
    record.add(record.Attention(compat.program_name(ctx), source_of(ctx), arrays, detail, declined))


def _partitioned(
    ctx: Context,
    call: Callable[..., Sequence[Array]],
    operands: Sequence[str],
    results: Sequence[str],
    sums: Sequence[int],
) -> Callable[..., Sequence[Array]]:
    """The call as one that XLA partitions, with dimensions of size 1 among those of a bias or mask named so."""
    q, k = ctx.avals_in[:2]
    sizes = {"b": q.shape[0], "n": q.shape[2], "k": k.shape[2]}

    def named(dims: str, aval: ShapedArray) -> str:
        return "".join("1" if dims.startswith("bnts") and n == 1 else x for x, n in zip(dims, aval.shape, strict=True))

    operands = [named(dims, aval) for dims, aval in zip(operands, ctx.avals_in, strict=True)]
    results = [named(dims, aval) for dims, aval in zip(results, ctx.avals_out, strict=True)]
    return sharding.partitioned_attention(call, operands, results, sizes, sums)


def _extras(options: Options) -> list[str]:
    return ["bnts"] * (options.bias + options.mask) + ["b"] * (options.q_lengths + options.kv_lengths)


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
        masked=np.float64(MASKED),
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


def _lower_call(ctx: Context, *values: Value, options: Options) -> Sequence[Value]:
    with _named(native.ATTENTION_TARGET_NAME, ctx):
        return _call(_ffi_rule, ctx, values, 3, options, residual=True)


def _named(target: str, ctx: Context) -> Any:
    """The location of a call: queries and keys say which one."""
    q, k = ctx.avals_in[:2]
    return compat.location(ctx, custom_calls.name_of(target, q.dtype.name, (q.shape, k.shape)))


def _lower(ctx: Context, *values: Value, options: Options) -> Sequence[Value]:
    where, declined = _runs(ctx)
    _tell(ctx, options, declined)
    if where is sharding.Placement.LOCAL:
        return _lower_call(ctx, *values, options=options)
    meaning: Callable[..., Any] = partial(composition, options=options)
    if where is sharding.Placement.PARTITIONED:
        call = partial(attention_call_p.bind, options=options)
        operands = ["btnh", "bskh", "bskw", *_extras(options)]
        meaning = _partitioned(ctx, call, operands, ["btnw", "btn", "btn"], ())
    return _lowered(ctx, meaning, values)


def _lower_gradients_call(ctx: Context, *values: Value, options: Options, bias_too: bool) -> Sequence[Value]:
    q, k, v, *extras, maxima, logs, delta, dout = range(len(values))
    order = [q, k, v, dout, maxima, logs, delta, *extras]
    inner = ctx.replace(avals_in=[ctx.avals_in[i] for i in order])
    with _named(native.ATTENTION_GRADIENTS_TARGET_NAME, ctx):
        return _call(_gradients_ffi_rule, inner, [values[i] for i in order], 4, options, dbias=bias_too)


def _lower_gradients(ctx: Context, *values: Value, options: Options, bias_too: bool) -> Sequence[Value]:
    where, _ = _runs(ctx)
    meaning: Callable[..., Any] = partial(gradients_composition, options=options, bias_too=bias_too)
    if where is sharding.Placement.LOCAL:
        return _lower_gradients_call(ctx, *values, options=options, bias_too=bias_too)
    if where is sharding.Placement.PARTITIONED:
        call = partial(attention_gradients_call_p.bind, options=options, bias_too=bias_too)
        operands = ["btnh", "bskh", "bskw", *_extras(options), "btn", "btn", "btn", "btnw"]
        results = ["btnh", "bskh", "bskw", *["bnts"] * bias_too]
        meaning = _partitioned(ctx, call, operands, results, (3,) * bias_too)
    return _lowered(ctx, meaning, values)


def _lowered(ctx: Context, meaning: Callable[..., Any], values: Sequence[Value]) -> Sequence[Value]:
    outs = mlir.lower_fun(meaning, multiple_results=True)(ctx, *values)
    return [compat.lower_with_types(ctx, x, aval) for x, aval in zip(outs, ctx.avals_out, strict=True)]


def _call_primitive(primitive: Primitive, lower: Callable[..., Any]) -> Primitive:
    """A primitive for the call alone: what is inside a partitioned operation."""
    call = Primitive(f"{primitive.name}_call")
    call.multiple_results = True
    call.def_impl(partial(xla.apply_primitive, call))
    call.def_abstract_eval(lambda *avals, **params: primitive.abstract_eval(*avals, **params)[0])
    mlir.register_lowering(call, lower)
    return call


attention_call_p = _call_primitive(attention_p, _lower_call)
attention_gradients_call_p = _call_primitive(attention_gradients_p, _lower_gradients_call)
compat.require_devices(attention_p)
compat.require_devices(attention_gradients_p)
mlir.register_lowering(attention_p, _lower, cacheable=False)
mlir.register_lowering(attention_gradients_p, _lower_gradients, cacheable=False)
