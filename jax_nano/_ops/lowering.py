"""How the primitive becomes code: one custom call on CPUs, lax's own dot_general everywhere else.

One rule serves all platforms. It is not cacheable, because only then it sees which operations produced its operands and
can fold transposes into the labels. A rule for the CPU beside a default one would be simpler, but JAX fails to lower a
primitive that is not cacheable for several platforms at once (`lower_per_platform` adds a tuple to a list), so several
platforms are handled by a second primitive, `call_p`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as _stablehlo
from jax.interpreters import mlir, xla

from jax_nano._core import contraction, custom_calls, native, places, record
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Dims, Labels
from jax_nano._core.signatures import Precision, Signature
from jax_nano._dispatch import decision
from jax_nano._dispatch.decision import Product
from jax_nano._ops import cost_analysis as cost_analysis  # importing it teaches XLA's analysis about our calls
from jax_nano._ops import sharding
from jax_nano._ops.dot_general import dot_general_p as dot_general_p
from jax_nano._ops.dot_general import lax_dot_general

# JAX types avals as AbstractValue where these rules see only ShapedArray, and IR values by their kind.
Context: TypeAlias = Any
Value: TypeAlias = Any
stablehlo: Any = _stablehlo  # has no annotations

# Loading the extension here, not at the first product, reports a missing build at import.
native.runtime()


_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.TARGET_NAME)


def _custom_call(
    ctx: Context, lhs: Operand, rhs: Operand, labels: Labels, shape: tuple[int, ...], signature: Signature
) -> Value:
    shapes = (lhs.shape, rhs.shape, shape)
    dtypes = (signature.lhs.name, signature.rhs.name, signature.out.name)
    untyped = description(ctx, shapes, labels, dtypes, signature.algorithm)
    with compat.location(ctx, custom_calls.name_of(native.TARGET_NAME, lhs.dtype.name, shapes[:2])):
        if untyped is not None:
            return untyped_call(ctx, native.TARGET_NAME, untyped, (lhs, rhs), shape, signature.out)
        return _typed_call(ctx, lhs, rhs, labels, shape, signature)


def _typed_call(
    ctx: Context, lhs: Operand, rhs: Operand, labels: Labels, shape: tuple[int, ...], signature: Signature
) -> Value:
    # Building the attributes takes most of the time of lowering a product. So it is done once per module, which owns
    # them.
    cache, key = compat.module_cache(ctx), ("jax_nano attributes", labels, signature.algorithm)
    static = all(isinstance(size, int) for size in (*lhs.shape, *rhs.shape))
    if static and (attributes := cache.get(key)) is not None:
        types = [ir.RankedTensorType.get(shape, mlir.dtype_to_ir_type(signature.out))]
        operands = [lhs.value, rhs.value]
        operation = ir.Operation.create("stablehlo.custom_call", types, operands, attributes=attributes)
        return operation.results[0]
    (out,) = _ffi_rule(
        ctx.replace(
            avals_in=[ShapedArray(lhs.shape, lhs.dtype), ShapedArray(rhs.shape, rhs.dtype)],
            avals_out=[ShapedArray(shape, signature.out)],
        ),
        lhs.value,
        rhs.value,
        abi=np.int64(native.ABI),
        lhs_labels=np.asarray(labels.lhs, np.int64),
        rhs_labels=np.asarray(labels.rhs, np.int64),
        out_labels=np.asarray(labels.out, np.int64),
        algorithm=signature.algorithm,
    )
    compat.set_frontend_attributes(out.owner, {native.BUILD: native.build()})
    if static:
        cache[key] = compat.attributes_of(out.owner)
    return out


def description(
    ctx: Context,
    shapes: tuple[tuple[int, ...], ...],
    labels: Labels,
    dtypes: tuple[str, ...],
    algorithm: str,
    epilogue: native.Epilogue | None = None,
) -> str | None:
    """That of an untyped call, or None if the call is to be a typed one (`native.untyped_call`).

    Exported programs have typed calls only. They come from files, whoever wrote them, and only a typed call can see
    that its attributes do not fit its buffers.
    """
    if compat.is_exported(ctx):
        return None
    return native.untyped_call(shapes, tuple(labels), dtypes, algorithm, epilogue)


def untyped_call(
    ctx: Context, target: str, description: str, operands: Sequence[Operand], shape: tuple[int, ...], dtype: np.dtype
) -> Value:
    """A call that is not one of the typed FFI (csrc/xla/untyped.h). Its description says what the operands are."""
    cache, key = compat.module_cache(ctx), ("jax_nano untyped attributes", description)
    attributes = cache.get(key) or {
        "call_target_name": ir.StringAttr.get(target),
        "has_side_effect": ir.BoolAttr.get(False),
        "backend_config": ir.StringAttr.get(description),
        "api_version": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), custom_calls.STATUS_RETURNING),
        "operand_layouts": ir.ArrayAttr.get([_row_major(len(x.shape)) for x in operands]),
        "result_layouts": ir.ArrayAttr.get([_row_major(len(shape))]),
    }
    types = [ir.RankedTensorType.get(shape, mlir.dtype_to_ir_type(dtype))]
    values = [x.value for x in operands]
    operation = ir.Operation.create("stablehlo.custom_call", types, values, attributes=attributes)
    if key not in cache:
        compat.set_frontend_attributes(operation, {native.BUILD: native.build()})
        cache[key] = compat.attributes_of(operation)
    return operation.results[0]


def _row_major(rank: int) -> Any:
    order: Any = np.arange(rank - 1, -1, -1, dtype=np.int64)
    return ir.DenseIntElementsAttr.get(order, type=ir.IndexType.get())


class Operand(NamedTuple):
    """An array in a program that is being lowered."""

    value: Value
    shape: tuple[int, ...]
    dtype: np.dtype

    def converted(self, dtype: np.dtype) -> Operand:
        """With another dtype."""
        if self.dtype == dtype:
            return self
        shape = ir.RankedTensorType(self.value.type).shape
        to = ir.RankedTensorType.get(shape, mlir.dtype_to_ir_type(dtype))
        return Operand(stablehlo.ConvertOp(to, self.value).result, self.shape, dtype)


def _call(ctx: Context, lhs: Operand, rhs: Operand, labels: Labels, signature: Signature, out_dtype: np.dtype) -> Value:
    """The product of two arrays on one device: a call, with conversions and a transpose around it where needed."""
    call_labels, shape, perm = decision.stored(labels, lhs.shape, rhs.shape)
    lhs, rhs = lhs.converted(signature.lhs), rhs.converted(signature.rhs)
    tell(ctx, call_labels, (lhs.shape, rhs.shape, shape), signature[:3], signature.algorithm, None)
    out = _custom_call(ctx, lhs, rhs, call_labels, shape, signature)
    out = Operand(out, shape, signature.out).converted(out_dtype).value
    return out if perm is None else stablehlo.TransposeOp(out, mlir.dense_int_array(perm)).result


def tell(
    ctx: Context,
    labels: Labels,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[np.dtype],
    algorithm: str,
    declined: str | None,
    epilogue: str = "",
    kernel: str = "",
) -> None:
    """Puts a product in the report."""
    lhs, rhs, out = (record.Array(dtype.name, shape) for dtype, shape in zip(dtypes, shapes, strict=True))
    product = record.Product(compat.program_name(ctx), source_of(ctx), (lhs, rhs, out), labels, algorithm, declined)
    record.add(product._replace(epilogue=epilogue, kernel=kernel))


def source_of(ctx: Context) -> record.Source:
    """Where the equation that is being lowered comes from."""
    return record.Source(f"{ctx.name_stack}/{ctx.primitive}", places.of_user(compat.frames(ctx)))


# The call as a primitive: used inside of computations that lowering rules trace (for several platforms, or shards), so
# that no transformation ever sees it. It has neither shardings nor varying axes.
call_p = Primitive("jax_nano_call")
call_p.def_impl(partial(xla.apply_primitive, call_p))


@call_p.def_abstract_eval
def _call_abstract_eval(
    lhs: ShapedArray, rhs: ShapedArray, *, labels: Labels, out_dtype: np.dtype, **_: Any
) -> ShapedArray:
    return ShapedArray(labels.out_shape(lhs.shape, rhs.shape), out_dtype)


def _call_lower_cpu(
    ctx: Context, lhs: Value, rhs: Value, *, labels: Labels, out_dtype: np.dtype, precision: Precision
) -> Sequence[Value]:
    lhs_aval, rhs_aval = ctx.avals_in
    dtypes = (lhs_aval.dtype, rhs_aval.dtype, out_dtype)
    product = Product(labels, lhs_aval.shape, rhs_aval.shape, dtypes, precision)
    signature = decision.signature_of(product, decision.this_machine())
    assert signature is not None  # as for the whole product, of which this may be a shard
    left, right = (Operand(x, aval.shape, aval.dtype) for x, aval in ((lhs, lhs_aval), (rhs, rhs_aval)))
    return [_call(ctx, left, right, labels, signature, out_dtype)]


def lax_product(
    lhs: Array, rhs: Array, labels: Labels, *, precision: Precision, preferred_element_type: np.dtype
) -> Array:
    """A product given by labels, in lax's own primitives."""
    dimension_numbers, out_perm = contraction.dimension_numbers_of(labels)
    return lax_dot_general(
        lhs,
        rhs,
        dimension_numbers=dimension_numbers,
        out_perm=out_perm,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=None,
    )


def _call_in_lax(lhs: Array, rhs: Array, *, labels: Labels, out_dtype: np.dtype, precision: Precision) -> Array:
    return lax_product(lhs, rhs, labels, precision=precision, preferred_element_type=out_dtype)


mlir.register_lowering(call_p, _call_lower_cpu, platform="cpu")
mlir.register_lowering(call_p, mlir.lower_fun(_call_in_lax, multiple_results=False))


def fold_transposes(operand: Operand, dims: Dims) -> tuple[Operand, Dims]:
    """The array behind the transposes that made an operand, and its labels."""
    value, shape = operand.value, operand.shape
    while not isinstance(operation := value.owner, ir.Block) and operation.name == "stablehlo.transpose":
        perm = list(operation.attributes["permutation"])
        dims, shape = (contraction.before_transpose(x, perm) for x in (dims, shape))
        value = operation.operands[0]
    return Operand(value, shape, operand.dtype), dims


def _lower(ctx: Context, lhs: Value, rhs: Value, **params: Any) -> Sequence[Value]:
    lhs_aval, rhs_aval = ctx.avals_in
    (out_aval,) = ctx.avals_out
    platforms = compat.lowering_platforms(ctx)
    placement = sharding.placement(ctx, out_aval)
    dtypes = (lhs_aval.dtype, rhs_aval.dtype, out_aval.dtype)
    labels = contraction.labels_of(
        params["dimension_numbers"], params["out_perm"], len(lhs_aval.shape), len(rhs_aval.shape)
    )
    asked = Product(labels, lhs_aval.shape, rhs_aval.shape, dtypes, params["precision"])
    _, signature, declined, _ = decision.dispatch(asked, decision.this_machine(), decision.policy)
    if signature is None or placement is sharding.Placement.XLA or "cpu" not in platforms:
        if "cpu" in platforms and not record.seen_again():
            shapes = (lhs_aval.shape, rhs_aval.shape, out_aval.shape)
            tell(ctx, labels, shapes, dtypes, "default", declined or placement.value)
        return mlir.lower_fun(partial(lax_dot_general, **params), multiple_results=False)(ctx, lhs, rhs)

    left, lhs_dims = fold_transposes(Operand(lhs, lhs_aval.shape, lhs_aval.dtype), labels.lhs)
    right, rhs_dims = fold_transposes(Operand(rhs, rhs_aval.shape, rhs_aval.dtype), labels.rhs)
    labels = Labels(lhs_dims, rhs_dims, labels.out)
    if placement is sharding.Placement.LOCAL and platforms == ("cpu",):
        out = _call(ctx, left, right, labels, signature, out_aval.dtype)
    else:
        product: Callable[[Array, Array], Array]
        product = partial(call_p.bind, labels=labels, out_dtype=out_aval.dtype, precision=params["precision"])
        if placement is sharding.Placement.PARTITIONED:
            product = sharding.partitioned(product, labels)
        inner = ctx.replace(
            avals_in=[ShapedArray(x.shape, x.dtype) for x in (left, right)],
            avals_out=[ShapedArray(out_aval.shape, out_aval.dtype)],
        )
        (out,) = mlir.lower_fun(product, multiple_results=False)(inner, left.value, right.value)
    return [compat.lower_with_types(ctx, out, out_aval)]


compat.require_devices(dot_general_p)
mlir.register_lowering(dot_general_p, _lower, cacheable=False)
