"""How `linear` becomes code: one custom call with an epilogue on CPUs, its composition everywhere else.

The custom call is `jax_nano_linear`, with the operands and attributes that csrc/xla/ffi.cc describes. It takes the
place of a product and what follows it wherever the product alone would take a kernel that has epilogues.
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
from jax_nano._core.contraction import Labels
from jax_nano._core.signatures import Precision, Signature
from jax_nano._dispatch import decision
from jax_nano._dispatch.decision import Product
from jax_nano._ops import linear, sharding
from jax_nano._ops.linear import Epilogue, composition
from jax_nano._ops.linear import linear_p as linear_p
from jax_nano._ops.lowering import (
    Context,
    Operand,
    Value,
    call_p,
    description,
    fold_transposes,
    lax_product,
    tell,
    untyped_call,
)

_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.LINEAR_TARGET_NAME)


def has_epilogue(signature: Signature | None, dtype: np.dtype) -> bool:
    """Whether the kernel for a signature can finish a result of this dtype: whether it sums in float32."""
    return signature is not None and signature.out == dtype and linear.sum_dtype(dtype) == np.float32


def _custom_call(
    ctx: Context,
    operands: Sequence[Operand],
    labels: Labels,
    signature: Signature,
    epilogue: Epilogue,
    dtype: np.dtype,
) -> Value:
    x, w, *extras = operands
    x, w = x.converted(signature.lhs), w.converted(signature.rhs)
    shape = labels.out_shape(x.shape, w.shape)
    operands = [x, w, *extras]
    text = record.epilogue_text(epilogue.activation, epilogue.scale, bias=epilogue.bias, residual=epilogue.residual)
    dtypes = (signature.lhs, signature.rhs, dtype)
    tell(ctx, labels, (x.shape, w.shape, shape), dtypes, signature.algorithm, None, text)
    untyped = description(
        ctx,
        (x.shape, w.shape, shape),
        labels,
        (signature.lhs.name, signature.rhs.name, dtype.name),
        signature.algorithm,
        native.Epilogue.of(epilogue.activation, epilogue.scale, bias=epilogue.bias, residual=epilogue.residual),
    )
    with compat.location(ctx, custom_calls.name_of(native.LINEAR_TARGET_NAME, x.dtype.name, (x.shape, w.shape))):
        if untyped is not None:
            return untyped_call(ctx, native.LINEAR_TARGET_NAME, untyped, operands, shape, dtype)
        return _typed_call(ctx, operands, labels, shape, signature, epilogue, dtype)


def _typed_call(
    ctx: Context,
    operands: Sequence[Operand],
    labels: Labels,
    shape: tuple[int, ...],
    signature: Signature,
    epilogue: Epilogue,
    dtype: np.dtype,
) -> Value:
    (out,) = _ffi_rule(
        ctx.replace(
            avals_in=[
                ShapedArray(o.shape, d) for o, d in zip(operands, _dtypes(signature, epilogue, dtype), strict=True)
            ],
            avals_out=[ShapedArray(shape, dtype)],
        ),
        *(o.value for o in operands),
        abi=np.int64(native.ABI),
        lhs_labels=np.asarray(labels.lhs, np.int64),
        rhs_labels=np.asarray(labels.rhs, np.int64),
        out_labels=np.asarray(labels.out, np.int64),
        algorithm=signature.algorithm,
        activation=epilogue.activation,
        scale=np.float32(epilogue.scale),
        bias=np.int64(epilogue.bias),
        residual=np.int64(epilogue.residual),
    )
    compat.set_frontend_attributes(out.owner, {native.BUILD: native.build()})
    return out


def _dtypes(signature: Signature, epilogue: Epilogue, dtype: np.dtype) -> list[np.dtype]:
    return [signature.lhs, signature.rhs, *(dtype,) * epilogue.operands]


# The call as a primitive of its own, as `call_p` is for plain products.
linear_call_p = Primitive("jax_nano_linear_call")
linear_call_p.def_impl(partial(xla.apply_primitive, linear_call_p))


@linear_call_p.def_abstract_eval
def _call_abstract_eval(
    x: ShapedArray, w: ShapedArray, *_: ShapedArray, labels: Labels, dtype: np.dtype, **__: Any
) -> ShapedArray:
    return ShapedArray(labels.out_shape(x.shape, w.shape), dtype)


def _call_lower_cpu(
    ctx: Context, *values: Value, labels: Labels, epilogue: Epilogue, precision: Precision, dtype: np.dtype
) -> Sequence[Value]:
    x, w, *_ = ctx.avals_in
    product = Product(labels, x.shape, w.shape, (x.dtype, w.dtype, dtype), precision)
    signature = decision.signature_of(product, decision.this_machine())
    assert signature is not None  # as for the whole product, of which this may be a shard
    operands = [Operand(v, aval.shape, aval.dtype) for v, aval in zip(values, ctx.avals_in, strict=True)]
    return [_custom_call(ctx, operands, labels, signature, epilogue, dtype)]


mlir.register_lowering(linear_call_p, _call_lower_cpu, platform="cpu")
mlir.register_lowering(linear_call_p, mlir.lower_fun(partial(composition, product=lax_product), multiple_results=False))


def _lower(ctx: Context, *values: Value, **params: Any) -> Sequence[Value]:
    (out_aval,) = ctx.avals_out
    x_aval, w_aval, *_ = ctx.avals_in
    labels, epilogue, precision, dtype = (params[p] for p in ("labels", "epilogue", "precision", "dtype"))
    platforms = compat.lowering_platforms(ctx)
    placement = sharding.placement(ctx, out_aval)
    product = Product(labels, x_aval.shape, w_aval.shape, (x_aval.dtype, w_aval.dtype, dtype), precision)
    signature = decision.dispatch(product, decision.this_machine(), decision.policy).signature
    fused = has_epilogue(signature, dtype)
    if not fused or placement is sharding.Placement.XLA or "cpu" not in platforms:
        return mlir.lower_fun(partial(composition, **params), multiple_results=False)(ctx, *values)

    x, w, *extras = (Operand(v, aval.shape, aval.dtype) for v, aval in zip(values, ctx.avals_in, strict=True))
    x, x_dims = fold_transposes(x, labels.lhs)
    w, w_dims = fold_transposes(w, labels.rhs)
    labels = Labels(x_dims, w_dims, labels.out)
    operands = [x, w, *extras]
    if placement is sharding.Placement.LOCAL and platforms == ("cpu",):
        assert signature is not None
        out = _custom_call(ctx, operands, labels, signature, epilogue, dtype)
    else:
        whole: Callable[..., Array] = partial(
            linear_call_p.bind, labels=labels, epilogue=epilogue, precision=precision, dtype=dtype
        )
        if placement is sharding.Placement.PARTITIONED:
            whole = sharding.partitioned(
                whole,
                labels,
                extras=[labels.out[-1:]] * epilogue.bias + [labels.out] * epilogue.residual,
                sums=partial(call_p.bind, labels=labels, out_dtype=linear.sum_dtype(dtype), precision=precision),
                finish=partial(linear.finish, epilogue=epilogue, dtype=dtype),
            )
        inner = ctx.replace(
            avals_in=[ShapedArray(o.shape, o.dtype) for o in operands],
            avals_out=[ShapedArray(out_aval.shape, dtype)],
        )
        (out,) = mlir.lower_fun(whole, multiple_results=False)(inner, *(o.value for o in operands))
    return [compat.lower_with_types(ctx, out, out_aval)]


compat.require_devices(linear_p)
mlir.register_lowering(linear_p, _lower, cacheable=False)
