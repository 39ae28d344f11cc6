"""How products with quantised weights become code: one custom call on CPUs, the composition everywhere else.

The custom call is `jax_nano_quantized`, with the operands and attributes that csrc/quantized_ffi.cc describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from jax_nano._core import custom_calls, native, record
from jax_nano._core import jax_compat as compat
from jax_nano._ops import linear, sharding
from jax_nano._ops.lowering import Context, Operand, Value, fold_transposes, tell
from jax_nano._ops.quantized import NO_EPILOGUE, Options, composition, labels, split
from jax_nano._ops.quantized import quantized_p as quantized_p

_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(native.QUANTIZED_TARGET_NAME)

_BYTES = {np.dtype(jnp.int4): np.dtype(np.int8), np.dtype(jnp.uint4): np.dtype(np.uint8)}
"""Zero points of 4 bits, of which there are few, go to the kernel as bytes."""


@cache
def has_kernel(
    n: int,
    k: int,
    groups: int,
    along_k: bool,
    x: str,
    q: str,
    scale: str,
    zero: str,
    out: str,
) -> bool:
    """Whether this CPU has a kernel for a product of these sizes and dtypes, with however many rows."""
    runtime = native.runtime()
    if runtime is None or not native.target():
        return False
    try:
        runtime.plan_quantized((1, n, k, k // groups), along_k, (x, q, scale, zero, out), 1)
    except ValueError:
        return False
    return True


# The call as a primitive of its own: of matrices, never seen by a transformation.
call_p = Primitive("jax_nano_quantized_call")
call_p.def_impl(partial(xla.apply_primitive, call_p))


@call_p.def_abstract_eval
def _call_abstract_eval(x: ShapedArray, q: ShapedArray, *_: ShapedArray, options: Options) -> ShapedArray:
    return ShapedArray((x.shape[0], q.shape[0 if options.along_k else 1]), options.dtype)


def _call_lower_cpu(ctx: Context, *values: Value, options: Options) -> Sequence[Value]:
    epilogue = options.epilogue
    numbers = {
        "abi": native.ABI,
        "along_k": options.along_k,
        "zero": options.zero,
        "layers": 0,
        "bias": epilogue.bias,
        "residual": epilogue.residual,
    }
    attributes = {name: np.int64(x) for name, x in numbers.items()}
    x, q = ctx.avals_in[:2]
    with compat.location(ctx, custom_calls.name_of(native.QUANTIZED_TARGET_NAME, x.dtype.name, (x.shape, q.shape))):
        factor = np.float32(epilogue.scale)
        (out,) = _ffi_rule(ctx, *values, **attributes, activation=epilogue.activation, factor=factor)
    compat.set_frontend_attributes(out.owner, {native.BUILD: native.build()})
    return [out]


mlir.register_lowering(call_p, _call_lower_cpu, platform="cpu")
mlir.register_lowering(call_p, mlir.lower_fun(composition, multiple_results=False))


def _lower(ctx: Context, *values: Value, options: Options) -> Sequence[Value]:
    (out_aval,) = ctx.avals_out
    operands = [Operand(v, aval.shape, aval.dtype) for v, aval in zip(values, ctx.avals_in, strict=True)]
    x, q, scale, *others = operands
    zero, _ = split(others, options)
    along_k = options.along_k
    whole: Callable[..., Array] = partial(composition, options=options)
    if "cpu" in compat.lowering_platforms(ctx):
        where = sharding.placement(ctx, out_aval)
        served = _served(x, q, scale, zero, along_k, options.dtype)
        local = where is not sharding.Placement.XLA
        if where is sharding.Placement.PARTITIONED and served:
            whole = _partitioned([o.shape for o in operands], q.dtype, options)
        elif local and served:
            # Behind a transpose of the weights lies the other order of storage, which is read as it is.
            q, (_, last) = fold_transposes(q, (0, 1))
            flipped = last == 0
            operands = [x, q, scale, *others]
            whole = partial(_call, flipped=flipped, options=options._replace(along_k=along_k != flipped))
        groups = scale.shape[1 if along_k else 0]
        k = q.shape[1 if along_k else 0]
        kernel = record.quantized_text(q.dtype.name, k, groups, zero=bool(zero)) if local and served else ""
        declined = None if local and served else "no kernel for these quantised weights" if local else "several devices"
        shapes = (x.shape, ctx.avals_in[1].shape, out_aval.shape)
        dtypes = (x.dtype, q.dtype, options.dtype)
        epilogue = options.epilogue
        text = record.epilogue_text(epilogue.activation, epilogue.scale, bias=epilogue.bias, residual=epilogue.residual)
        tell(ctx, labels(len(x.shape), along_k=along_k), shapes, dtypes, "default", declined, text, kernel)
    inner = ctx.replace(
        avals_in=[ShapedArray(o.shape, o.dtype) for o in operands],
        avals_out=[ShapedArray(out_aval.shape, options.dtype)],
    )
    (out,) = mlir.lower_fun(whole, multiple_results=False)(inner, *(o.value for o in operands))
    return [compat.lower_with_types(ctx, out, out_aval)]


def _call(x: Array, q: Array, scale: Array, *others: Array, flipped: bool, options: Options) -> Array:
    """The call, of the primitive's operands: rows in one dimension, scales and zero points in q's order."""
    zero, extras = split(others, options)
    scale, *points = (v.T if flipped else v for v in (scale, *zero))
    points = [v.astype(_BYTES.get(v.dtype, v.dtype)) for v in points]
    bias, residual = options.epilogue.split(extras)
    rows = math.prod(x.shape[:-1])
    n = q.shape[0 if options.along_k else 1]
    more = [*([] if bias is None else [bias]), *([] if residual is None else [jnp.reshape(residual, (rows, n))])]
    out = call_p.bind(jnp.reshape(x, (rows, x.shape[-1])), q, scale, *points, *more, options=options)
    return jnp.reshape(out, (*x.shape[:-1], n))


def _partitioned(shapes: Sequence[tuple[int, ...]], weights: np.dtype, options: Options) -> Callable[..., Array]:
    """The call as one that XLA partitions, given the shapes of its operands."""
    weights_dims, scale_dims = ("nk", "ng") if options.along_k else ("kn", "gn")
    rows = "abcdef"[: len(shapes[0]) - 1]
    epilogue = options.epilogue
    extras = [*(["n"] if epilogue.bias else []), *([f"{rows}n"] if epilogue.residual else [])]
    operands = [f"{rows}k", weights_dims, scale_dims, *([scale_dims] if options.zero else []), *extras]
    sizes: dict[str, int] = {}
    for dims, shape in zip(operands, shapes, strict=True):
        sizes.update(zip(dims, shape, strict=True))
    of_sums = options._replace(epilogue=NO_EPILOGUE, dtype=np.dtype(np.float32))
    return sharding.partitioned_weights(
        partial(_of_shards, options=options),
        partial(_of_shards, options=of_sums),
        partial(linear.finish, epilogue=epilogue, dtype=options.dtype),
        operands,
        sizes,
        unit=2 if weights in _BYTES else 1,
    )


def _of_shards(*arrays: Array, options: Options) -> Array:
    """The product of one device's shards: the call, or the composition where they have no kernel."""
    x, q, scale, *others = arrays
    zero, _ = split(others, options)
    if _served(x, q, scale, zero, options.along_k, options.dtype):
        return _call(*arrays, flipped=False, options=options)
    return composition(*arrays, options=options)


def _served(
    x: Any,
    q: Any,
    scale: Any,
    zero: Sequence[Any],
    along_k: bool,
    dtype: np.dtype,
) -> bool:
    """Whether there is a kernel for arrays of these shapes and dtypes."""
    axis = 1 if along_k else 0
    sizes = (q.shape[1 - axis], q.shape[axis], scale.shape[axis])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    points = [np.dtype(_BYTES.get(z.dtype, z.dtype)).name for z in zero]
    names = [np.dtype(d).name for d in (x.dtype, q.dtype, scale.dtype)]
    return has_kernel(*sizes, along_k, *names, points[0] if points else "", np.dtype(dtype).name)


compat.require_devices(quantized_p)
mlir.register_lowering(quantized_p, _lower, cacheable=False)
