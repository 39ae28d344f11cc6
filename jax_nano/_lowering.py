"""How the primitive becomes code: one custom call on CPUs, lax's own dot_general everywhere else.

One rule serves all platforms, not cacheable, because only then does it see who produced its operands and
can fold a transpose into the labels. A rule for the CPU beside a default one would be simpler, but JAX
fails to lower a primitive that is not cacheable for several platforms at once (`lower_per_platform` adds
a tuple to a list), so several platforms are handled by a second primitive, `call_p`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import mlir, xla

from jax_nano import _gate, _native, _shapes, _sharding
from jax_nano import _jax_compat as compat
from jax_nano._primitive import Precision, lax_dot_general
from jax_nano._primitive import dot_general_p as dot_general_p
from jax_nano._shapes import DimensionNumbers, Dims, Labels

# JAX types avals as AbstractValue where these rules see only ShapedArray, and IR values by their kind.
Context: TypeAlias = Any
Value: TypeAlias = Any

# Loading the extension here, not at the first product, reports a missing build at import.
_native.runtime()


class Choice(NamedTuple):
    """What becomes of a product on a CPU."""

    labels: Labels
    declined: str | None  # why it takes lax's own lowering, in words
    bare: bool  # a kernel does it as it is: nothing to convert before, nothing to transpose after


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
    converted = operand_dtypes(*dtypes)
    if isinstance(precision, (lax.DotAlgorithm, lax.DotAlgorithmPreset)):
        declined: str | None = f"precision {precision} asks for an algorithm"
    elif converted is None:
        declined = "no kernel for {} x {} -> {} on this CPU".format(*dtypes)
    else:
        declined = _gate.declines(labels, lhs_shape, rhs_shape)
    in_place = _shapes.runnable_out(labels, lhs_shape, rhs_shape) == labels.out
    return Choice(labels, declined, bare=in_place and converted == dtypes[:2])


def operand_dtypes(lhs: np.dtype, rhs: np.dtype, out: np.dtype) -> tuple[np.dtype, np.dtype] | None:
    """What to convert the operands to before the call, None if there is no kernel.

    lax converts operands of different dtypes to that of the result. A kernel that reads them as they are
    is better; one for the converted operands means the same.
    """
    if _native.supports(lhs.name, rhs.name, out.name):
        return lhs, rhs
    if lhs != rhs and _native.supports(out.name, out.name, out.name):
        return out, out
    return None


_ffi_rule: Callable[..., Any] = jax.ffi.ffi_lowering(_native.TARGET_NAME)


def _custom_call(ctx: Context, lhs: Value, rhs: Value, labels: Labels) -> Sequence[Value]:
    return _ffi_rule(
        ctx,
        lhs,
        rhs,
        abi=np.int64(_native.ABI),
        lhs_labels=np.asarray(labels.lhs, np.int64),
        rhs_labels=np.asarray(labels.rhs, np.int64),
        out_labels=np.asarray(labels.out, np.int64),
        algorithm="default",
    )


# The custom call as a primitive of its own: for programs that contain it as a part, and never seen by a
# transformation. It knows neither shardings nor varying axes.
call_p = Primitive("jax_nano_call")
call_p.def_impl(partial(xla.apply_primitive, call_p))


@call_p.def_abstract_eval
def _call_abstract_eval(lhs: ShapedArray, rhs: ShapedArray, *, labels: Labels, out_dtype: np.dtype) -> ShapedArray:
    return ShapedArray(labels.out_shape(lhs.shape, rhs.shape), out_dtype)


def _call_lower_cpu(ctx: Context, lhs: Value, rhs: Value, *, labels: Labels, out_dtype: np.dtype) -> Sequence[Value]:
    del out_dtype
    return _custom_call(ctx, lhs, rhs, labels)


def _call_in_lax(lhs: Array, rhs: Array, *, labels: Labels, out_dtype: np.dtype) -> Array:
    dimension_numbers, out_perm = _shapes.dimension_numbers_of(labels)
    return lax_dot_general(
        lhs,
        rhs,
        dimension_numbers=dimension_numbers,
        out_perm=out_perm,
        precision=None,
        preferred_element_type=out_dtype,
        out_sharding=None,
    )


mlir.register_lowering(call_p, _call_lower_cpu, platform="cpu")
mlir.register_lowering(call_p, mlir.lower_fun(_call_in_lax, multiple_results=False))


def local_product(lhs: Array, rhs: Array, *, labels: Labels, out_dtype: np.dtype) -> Array:
    """The product of two arrays on one device, with what a kernel cannot do done around the call."""
    dtypes = operand_dtypes(lhs.dtype, rhs.dtype, out_dtype)
    assert dtypes is not None
    lhs, rhs = (
        x if x.dtype == dtype else lax.convert_element_type(x, dtype)
        for x, dtype in zip((lhs, rhs), dtypes, strict=True)
    )
    stored = _shapes.runnable_out(labels, lhs.shape, rhs.shape)
    out = call_p.bind(lhs, rhs, labels=labels._replace(out=stored), out_dtype=out_dtype)
    return out if stored == labels.out else lax.transpose(out, _shapes.positions(stored, labels.out))


def _fold_transposes(value: Value, dims: Dims) -> tuple[Value, Dims]:
    """The array behind the transposes that made an operand, and its labels."""
    while not isinstance(value.owner, ir.Block) and value.owner.name == "stablehlo.transpose":
        dims = _shapes.before_transpose(dims, list(value.owner.attributes["permutation"]))
        value = value.owner.operands[0]
    return value, dims


def _lower(ctx: Context, lhs: Value, rhs: Value, **params: Any) -> Sequence[Value]:
    lhs_aval, rhs_aval = ctx.avals_in
    (out_aval,) = ctx.avals_out
    platforms = compat.lowering_platforms(ctx)
    placement = _sharding.placement(ctx, out_aval)
    labels, declined, bare = choose(
        params["dimension_numbers"],
        params["out_perm"],
        params["precision"],
        lhs_aval.shape,
        rhs_aval.shape,
        (lhs_aval.dtype, rhs_aval.dtype, out_aval.dtype),
    )
    if declined or placement is _sharding.Placement.XLA or "cpu" not in platforms:
        return mlir.lower_fun(partial(lax_dot_general, **params), multiple_results=False)(ctx, lhs, rhs)

    sizes = labels.sizes(lhs_aval.shape, rhs_aval.shape)
    lhs, lhs_dims = _fold_transposes(lhs, labels.lhs)
    rhs, rhs_dims = _fold_transposes(rhs, labels.rhs)
    labels = Labels(lhs_dims, rhs_dims, labels.out)
    inner = ctx.replace(
        avals_in=[
            ShapedArray(tuple(sizes[x] for x in dims), aval.dtype)
            for dims, aval in ((lhs_dims, lhs_aval), (rhs_dims, rhs_aval))
        ],
        avals_out=[ShapedArray(out_aval.shape, out_aval.dtype)],
    )
    if bare and placement is _sharding.Placement.LOCAL and platforms == ("cpu",):
        (out,) = _custom_call(inner, lhs, rhs, labels)
    else:
        product: Callable[[Array, Array], Array]
        product = partial(local_product, labels=labels, out_dtype=out_aval.dtype)
        if placement is _sharding.Placement.PARTITIONED:
            product = _sharding.partitioned(product, labels)
        (out,) = mlir.lower_fun(product, multiple_results=False)(inner, lhs, rhs)
    return [compat.lower_with_types(ctx, out, out_aval)]


compat.require_devices(dot_general_p)
mlir.register_lowering(dot_general_p, _lower, cacheable=False)
