"""How the primitive becomes code: one custom call on CPUs, lax's own dot_general everywhere else.

One rule serves all platforms, not cacheable, because only then does it see who produced its operands and
can fold a transpose into the labels. A rule for the CPU beside a default one would be simpler, but JAX
fails to lower a primitive that is not cacheable for several platforms at once (`lower_per_platform` adds
a tuple to a list), so several platforms are handled by a second primitive, `call_p`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as _stablehlo
from jax.interpreters import mlir, xla

from jax_nano import _cost_analysis as _cost_analysis  # importing it teaches XLA's analysis about our calls
from jax_nano import _gate, _native, _report, _shapes, _sharding, _signatures
from jax_nano import _jax_compat as compat
from jax_nano._primitive import dot_general_p as dot_general_p
from jax_nano._primitive import lax_dot_general
from jax_nano._shapes import DimensionNumbers, Dims, Labels
from jax_nano._signatures import Precision, Signature

# JAX types avals as AbstractValue where these rules see only ShapedArray, and IR values by their kind.
Context: TypeAlias = Any
Value: TypeAlias = Any
stablehlo: Any = _stablehlo  # has no annotations

# Loading the extension here, not at the first product, reports a missing build at import.
_native.runtime()


class Choice(NamedTuple):
    """What becomes of a product on a CPU."""

    labels: Labels
    signature: Signature | None  # None if it takes lax's own lowering
    declined: str | None  # why it does, in words


@lru_cache(maxsize=4096)
def choose(
    dimension_numbers: DimensionNumbers,
    out_perm: Dims | None,
    precision: Precision,
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    dtypes: tuple[np.dtype, np.dtype, np.dtype],
) -> Choice:
    """The choice for a product: a function of its parameters, its static shapes and dtypes, and the target."""
    labels = _shapes.labels_of(dimension_numbers, out_perm, len(lhs_shape), len(rhs_shape))
    signature = signature_of(labels, precision, lhs_shape, rhs_shape, dtypes)
    if signature is None:
        return Choice(labels, None, "no kernel for {} x {} -> {} at precision {}".format(*dtypes, precision))
    # XLA computes the algorithms that round operands in plain float32: they go to a kernel at any size.
    rounds = signature.algorithm != _signatures.DEFAULT
    operands = dtypes[0].name, dtypes[1].name
    declined = _gate.declines(labels, lhs_shape, rhs_shape, dtypes=operands, any_size=rounds)
    return Choice(labels, None if declined else signature, declined)


def signature_of(
    labels: Labels,
    precision: Precision,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    dtypes: tuple[np.dtype, np.dtype, np.dtype],
) -> Signature | None:
    """The kernel's dtypes for a product of these, None if there is none."""
    sizes = labels.sizes(lhs_shape, rhs_shape)
    terms = math.prod(sizes[x] for x in labels.contracting)
    return _signatures.find(*dtypes, precision, terms, _native.supports)


class Stored(NamedTuple):
    """How a call stores its result."""

    labels: Labels
    shape: tuple[int, ...]
    perm: Dims | None  # the transpose that makes it the result that was asked for


@lru_cache(maxsize=4096)
def stored(labels: Labels, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]) -> Stored:
    """The closest to `labels` that kernels can store."""
    out = _shapes.runnable_out(labels, lhs_shape, rhs_shape)
    shape = labels._replace(out=out).out_shape(lhs_shape, rhs_shape)
    return Stored(labels._replace(out=out), shape, None if out == labels.out else _shapes.positions(out, labels.out))


_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(_native.TARGET_NAME)


def _custom_call(
    ctx: Context, lhs: Operand, rhs: Operand, labels: Labels, shape: tuple[int, ...], signature: Signature
) -> Value:
    # To build the attributes is most of what it takes to lower a product: once for a module, in whose IR they are.
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
        abi=np.int64(_native.ABI),
        lhs_labels=np.asarray(labels.lhs, np.int64),
        rhs_labels=np.asarray(labels.rhs, np.int64),
        out_labels=np.asarray(labels.out, np.int64),
        algorithm=signature.algorithm,
    )
    compat.set_frontend_attributes(out.owner, {_native.BUILD: _native.build()})
    if static:
        cache[key] = compat.attributes_of(out.owner)
    return out


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
    """The product of two arrays on one device, with what a kernel cannot do done around the call."""
    call_labels, shape, perm = stored(labels, lhs.shape, rhs.shape)
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
) -> None:
    """Puts a product in the report."""
    lhs, rhs, out = (_report.Array(dtype.name, shape) for dtype, shape in zip(dtypes, shapes, strict=True))
    source = f"{ctx.name_stack}/{ctx.primitive}"
    _report.add(
        _report.Product(compat.program_name(ctx), source, (lhs, rhs, out), labels, algorithm, declined, epilogue)
    )


# The call as a primitive of its own: for programs that contain it as a part, and never seen by a
# transformation. It knows neither shardings nor varying axes.
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
    signature = signature_of(labels, precision, lhs_aval.shape, rhs_aval.shape, dtypes)
    assert signature is not None  # as for the whole product, of which this may be a shard
    left, right = (Operand(x, aval.shape, aval.dtype) for x, aval in ((lhs, lhs_aval), (rhs, rhs_aval)))
    return [_call(ctx, left, right, labels, signature, out_dtype)]


def lax_product(
    lhs: Array, rhs: Array, labels: Labels, *, precision: Precision, preferred_element_type: np.dtype
) -> Array:
    """A product given by labels, in lax's own primitives."""
    dimension_numbers, out_perm = _shapes.dimension_numbers_of(labels)
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
        dims, shape = (_shapes.before_transpose(x, perm) for x in (dims, shape))
        value = operation.operands[0]
    return Operand(value, shape, operand.dtype), dims


def _lower(ctx: Context, lhs: Value, rhs: Value, **params: Any) -> Sequence[Value]:
    lhs_aval, rhs_aval = ctx.avals_in
    (out_aval,) = ctx.avals_out
    platforms = compat.lowering_platforms(ctx)
    placement = _sharding.placement(ctx, out_aval)
    dtypes = (lhs_aval.dtype, rhs_aval.dtype, out_aval.dtype)
    labels, signature, declined = choose(
        params["dimension_numbers"],
        params["out_perm"],
        params["precision"],
        lhs_aval.shape,
        rhs_aval.shape,
        dtypes,
    )
    if signature is None or placement is _sharding.Placement.XLA or "cpu" not in platforms:
        if "cpu" in platforms and not _report.seen_again():
            shapes = (lhs_aval.shape, rhs_aval.shape, out_aval.shape)
            tell(ctx, labels, shapes, dtypes, "default", declined or placement.value)
        return mlir.lower_fun(partial(lax_dot_general, **params), multiple_results=False)(ctx, lhs, rhs)

    left, lhs_dims = fold_transposes(Operand(lhs, lhs_aval.shape, lhs_aval.dtype), labels.lhs)
    right, rhs_dims = fold_transposes(Operand(rhs, rhs_aval.shape, rhs_aval.dtype), labels.rhs)
    labels = Labels(lhs_dims, rhs_dims, labels.out)
    if placement is _sharding.Placement.LOCAL and platforms == ("cpu",):
        out = _call(ctx, left, right, labels, signature, out_aval.dtype)
    else:
        product: Callable[[Array, Array], Array]
        product = partial(call_p.bind, labels=labels, out_dtype=out_aval.dtype, precision=params["precision"])
        if placement is _sharding.Placement.PARTITIONED:
            product = _sharding.partitioned(product, labels)
        inner = ctx.replace(
            avals_in=[ShapedArray(x.shape, x.dtype) for x in (left, right)],
            avals_out=[ShapedArray(out_aval.shape, out_aval.dtype)],
        )
        (out,) = mlir.lower_fun(product, multiple_results=False)(inner, left.value, right.value)
    return [compat.lower_with_types(ctx, out, out_aval)]


compat.require_devices(dot_general_p)
mlir.register_lowering(dot_general_p, _lower, cacheable=False)
