"""The primitive of products with quantised weights.

    out[..., n] = sum over k of x[..., k] * (q[k, n] - zero[g, n]) * scale[g, n]        g = k // group

in float32 (float64 where x is), rounded to the result's dtype once. `composition` says the same in JAX's own
operations: it is what the primitive becomes where there is no kernel, and what its rules are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_nano._core import contraction
from jax_nano._core import jax_compat as compat
from jax_nano._ops.dot_general import bind_labels, dot_general_p

quantized_p = Primitive("jax_nano_quantized")
quantized_p.def_impl(partial(xla.apply_primitive, quantized_p))


def bind(x: Array, q: Array, scale: Array, *zero: Array, along_k: bool, dtype: np.dtype) -> Array:
    """The product. All arguments are canonical.

    Args:
      x: shape (..., K).
      q: shape (K, N), or (N, K) if `along_k`.
      scale, zero: shape (groups, N), or (N, groups) if `along_k`.
      dtype: of the result.
    """
    operands = compat.match_varying_axes(x, q, scale, *zero)
    out: Array = quantized_p.bind(*operands, along_k=along_k, dtype=dtype)
    return out


def dequantized(q: Array, scale: Array, *zero: Array, along_k: bool, dtype: Any = np.float32) -> Array:
    """``(q - zero) * scale`` in q's shape, computed in `dtype`."""
    axis = 1 if along_k else 0
    groups = scale.shape[axis]
    shape = (*q.shape[:axis], groups, q.shape[axis] // max(groups, 1), *q.shape[axis + 1 :])
    w = jnp.reshape(q, shape).astype(dtype)
    for point in zero:
        w = w - jnp.expand_dims(point, axis + 1).astype(dtype)
    return jnp.reshape(w * jnp.expand_dims(scale, axis + 1).astype(dtype), q.shape)


def composition(x: Array, q: Array, scale: Array, *zero: Array, along_k: bool, dtype: np.dtype) -> Array:
    """What the primitive means."""
    wide = np.promote_types(x.dtype, np.float32) if x.dtype == np.float64 else np.dtype(np.float32)
    w = dequantized(q, scale, *zero, along_k=along_k, dtype=wide)
    whole = labels(x.ndim, along_k=along_k)
    out = bind_labels(x.astype(wide), w, whole, precision=None, preferred_element_type=wide)
    return out.astype(dtype)


def labels(ndim: int, *, along_k: bool) -> contraction.Labels:
    """Those of the product of x, of so many dimensions, and q."""
    rows = tuple(range(ndim - 1))
    k, n = ndim - 1, ndim
    return contraction.Labels((*rows, k), (n, k) if along_k else (k, n), (*rows, n))


@quantized_p.def_abstract_eval
def _abstract_eval(
    x: ShapedArray, q: ShapedArray, scale: ShapedArray, *zero: ShapedArray, along_k: bool, dtype: np.dtype
) -> ShapedArray:
    check(x, q, scale, *zero, along_k=along_k)
    dimension_numbers, out_perm = contraction.dimension_numbers_of(labels(x.ndim, along_k=along_k))
    params = {"precision": None, "preferred_element_type": dtype, "out_sharding": None}
    weights = q.update(dtype=x.dtype)
    out, _ = dot_general_p.abstract_eval(x, weights, dimension_numbers=dimension_numbers, out_perm=out_perm, **params)
    return out


def check(x: Any, q: Any, scale: Any, *zero: Any, along_k: bool) -> None:
    """Raises ValueError if shapes do not fit together, or 4-bit rows end inside a byte."""
    axis = 1 if along_k else 0
    if x.ndim < 1 or q.ndim != 2 or scale.ndim != 2:
        raise ValueError(
            "quantized_matmul requires x of at least one dimension, q and scale of two,"
            f" got shapes {x.shape}, {q.shape} and {scale.shape}"
        )
    k, n, groups = q.shape[axis], q.shape[1 - axis], scale.shape[axis]
    if x.shape[-1] != k:
        raise TypeError(f"quantized_matmul requires contracting dimensions of one size, got {x.shape} and {q.shape}")
    if scale.shape[1 - axis] != n:
        raise ValueError(f"quantized_matmul requires a scale for each of {n} columns, got shape {scale.shape}")
    if groups < 1 or k % groups:
        raise ValueError(f"quantized_matmul requires groups that divide K, got {groups} of them for {k}")
    for point in zero:
        if point.shape != scale.shape:
            raise ValueError(
                f"quantized_matmul requires zero points of the scales' shape {scale.shape}, got {point.shape}"
            )
    if q.dtype in (jnp.int4, jnp.uint4) and (k % 2 or n % 2):
        raise ValueError(f"quantized_matmul requires even sizes of weights of 4 bits, got shape {q.shape}")


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, along_k: bool, dtype: np.dtype) -> tuple[Array, Any]:
    x, q, scale, *zero = primals
    dx, dq, dscale, *dzero = tangents
    product = partial(composition, along_k=along_k, dtype=dtype)
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(product(dx, q, scale, *zero))
    if not isinstance(dscale, ad.Zero):
        terms.append(product(x, q, dscale, *zero))
    if _moves(dq, q):
        terms.append(product(x, dq, scale))
    for d, point in zip(dzero, zero, strict=True):
        if _moves(d, point):
            terms.append(product(x, jnp.zeros_like(q), scale, d))
    tangent: Any = None
    for term in terms:
        tangent = term if tangent is None else tangent + term
    out = bind(*primals, along_k=along_k, dtype=dtype)
    return out, ad.Zero.from_primal_value(out) if tangent is None else tangent


def _moves(tangent: Any, primal: Any) -> bool:
    """Whether an operand that is nearly always of integers has a tangent."""
    return not isinstance(tangent, ad.Zero) and bool(jnp.issubdtype(primal.dtype, jnp.floating))


def _batch(args: Sequence[Array], dims: Sequence[int | None], *, along_k: bool, dtype: np.dtype) -> tuple[Array, int]:
    x, *weights = args
    x_dim, *others = dims
    if all(dim is None for dim in others):
        assert x_dim is not None
        return bind(jnp.moveaxis(x, x_dim, 0), *weights, along_k=along_k, dtype=dtype), 0
    product = partial(composition, along_k=along_k, dtype=dtype)
    return jax.vmap(product, in_axes=tuple(dims))(*args), 0


ad.primitive_jvps[quantized_p] = _jvp
batching.primitive_batchers[quantized_p] = _batch
