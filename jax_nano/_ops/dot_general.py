"""The primitive: lax.dot_general's parameters, and a permutation of the result.

`out_perm` lets one product store its result in any order of dimensions: a gradient in the layout of its
operand, a vmapped product with the batch in front. Where lax adds a transpose, this primitive needs none.
Shape, dtype, weak type, sharding and varying axes come from lax's own rules, as do the errors.

Operands that reach a rule may be Python's numbers, as `jax.grad(f)(1.5)` passes them: they have no shape of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p as lax_dot_general_p
from jax.extend.core.primitives import transpose_p as lax_transpose_p
from jax.interpreters import batching, xla
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jax_nano._core import contraction
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import DimensionNumbers, Dims, Labels
from jax_nano._core.signatures import Precision

dot_general_p = Primitive("jax_nano_dot_general")
dot_general_p.def_impl(partial(xla.apply_primitive, dot_general_p))


def bind(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: DimensionNumbers,
    *,
    out_perm: Dims | None = None,
    precision: Precision = None,
    preferred_element_type: Any = None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """transpose(dot_general(lhs, rhs), out_perm), as one equation. All arguments are canonical.

    out_sharding is that of the transposed result. If an operand was traced as a transpose, the equation takes the array
    before the transpose, so that gradients have that layout too.
    """
    lhs, rhs = compat.match_varying_axes(lhs, rhs)
    params: dict[str, Any] = {"precision": precision, "preferred_element_type": preferred_element_type}
    if compat.untransposed(lhs) or compat.untransposed(rhs):
        avals = jax.typeof(lhs), jax.typeof(rhs)
        lax_dot_general_p.abstract_eval(*avals, dimension_numbers=dimension_numbers, out_sharding=None, **params)
        labels = contraction.labels_of(dimension_numbers, out_perm, *(x.ndim for x in avals))
        lhs, lhs_dims = _before_transposes(lhs, labels.lhs)
        rhs, rhs_dims = _before_transposes(rhs, labels.rhs)
        dimension_numbers, out_perm = contraction.dimension_numbers_of(Labels(lhs_dims, rhs_dims, labels.out))
    return dot_general_p.bind(
        lhs, rhs, dimension_numbers=dimension_numbers, out_perm=out_perm, out_sharding=out_sharding, **params
    )


def _before_transposes(x: Any, dims: Dims) -> tuple[Any, Dims]:
    while (found := compat.untransposed(x)) is not None:
        x, perm = found
        dims = contraction.before_transpose(dims, perm)
    return x, dims


def bind_labels(lhs: Array, rhs: Array, labels: Labels, **params: Any) -> Array:
    """`bind` for a product given by labels."""
    dimension_numbers, out_perm = contraction.dimension_numbers_of(labels)
    return bind(lhs, rhs, dimension_numbers, out_perm=out_perm, **params)


def lax_dot_general(
    lhs: Array,
    rhs: Array,
    *,
    dimension_numbers: DimensionNumbers,
    out_perm: Dims | None,
    precision: Precision,
    preferred_element_type: Any,
    out_sharding: NamedSharding | None,
) -> Array:
    """What the primitive means, in lax's own primitives."""
    if out_sharding is not None and out_perm is not None:
        out_sharding = compat.permute_sharding(out_sharding, contraction.inverse(out_perm))
    out = lax_dot_general_p.bind(
        lhs,
        rhs,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    return out if out_perm is None else jax.lax.transpose(out, out_perm)


@dot_general_p.def_abstract_eval
def _abstract_eval(
    lhs: ShapedArray,
    rhs: ShapedArray,
    *,
    out_perm: Dims | None,
    out_sharding: NamedSharding | None,
    **params: Any,
) -> ShapedArray:
    if out_sharding is not None and out_perm is not None:
        out_sharding = compat.permute_sharding(out_sharding, contraction.inverse(out_perm))
    out, _ = lax_dot_general_p.abstract_eval(lhs, rhs, out_sharding=out_sharding, **params)
    if out_perm is not None:
        out, _ = lax_transpose_p.abstract_eval(out, permutation=out_perm)
    return out


def _cotangent(
    lhs: Any, rhs: Any, operand: Any, labels: Labels, precision: Precision, preferred_element_type: Any
) -> Array:
    out = bind_labels(
        lhs,
        rhs,
        labels,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=compat.cotangent_sharding(operand),
    )
    if out.dtype == operand.dtype:
        return out
    return compat.convert_element_type(out, operand.dtype, operand.weak_type)


def _transpose_lhs(
    g: Array,
    lhs: Any,
    rhs: Array,
    *,
    dimension_numbers: DimensionNumbers,
    out_perm: Dims | None,
    precision: Precision,
    preferred_element_type: Any,
    out_sharding: NamedSharding | None,
) -> Array:
    del out_sharding
    labels = contraction.labels_of(dimension_numbers, out_perm, lhs.aval.ndim, np.ndim(rhs))
    return _cotangent(g, rhs, lhs.aval, contraction.lhs_cotangent(labels), precision, preferred_element_type)


def _transpose_rhs(
    g: Array,
    lhs: Array,
    rhs: Any,
    *,
    dimension_numbers: DimensionNumbers,
    out_perm: Dims | None,
    precision: Precision,
    preferred_element_type: Any,
    out_sharding: NamedSharding | None,
) -> Array:
    del out_sharding
    labels = contraction.labels_of(dimension_numbers, out_perm, np.ndim(lhs), rhs.aval.ndim)
    return _cotangent(lhs, g, rhs.aval, contraction.rhs_cotangent(labels), precision, preferred_element_type)


def _batch(
    axis_data: Any,
    args: tuple[Array, Array],
    dims: tuple[int | None, int | None],
    *,
    dimension_numbers: DimensionNumbers,
    out_perm: Dims | None,
    out_sharding: NamedSharding | None,
    **params: Any,
) -> tuple[Array, int | None]:
    lhs, rhs = args
    lhs_dim, rhs_dim = dims
    if lhs_dim is None and rhs_dim is None:
        out = bind(lhs, rhs, dimension_numbers, out_perm=out_perm, out_sharding=out_sharding, **params)
        return out, None
    # Under vmap nothing has looked at the dimension numbers yet.
    unbatched = [
        ShapedArray(x.shape if dim is None else contraction.remove_index(x.shape, dim), x.dtype)
        for x, dim in zip(map(jax.typeof, args), dims, strict=True)
    ]
    lax_dot_general_p.abstract_eval(*unbatched, dimension_numbers=dimension_numbers, out_sharding=None, **params)
    labels = contraction.labels_of(dimension_numbers, out_perm, *(x.ndim for x in unbatched))
    if out_sharding is not None:
        out_sharding = compat.sharding_for_vmap(axis_data, out_sharding, 0)
    out = bind_labels(lhs, rhs, contraction.batched(labels, lhs_dim, rhs_dim), out_sharding=out_sharding, **params)
    return out, 0


compat.define_bilinear(dot_general_p, bind, _transpose_lhs, _transpose_rhs)
batching.fancy_primitive_batchers[dot_general_p] = _batch
