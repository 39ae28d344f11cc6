"""The primitive of products with quantised weights.

    out[..., n] = activation(factor * y[..., n] + bias[n]) + residual[..., n]
      y[..., n] = sum over k of x[..., k] * (q[k, n] - zero[g, n]) * scale[g, n]        g = k // group

in float32 (float64 where x is), rounded to the result's dtype once. `composition` says the same in JAX's own
operations: it is what the primitive becomes where there is no kernel, and what its rules are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_nano._core import contraction
from jax_nano._core import jax_compat as compat
from jax_nano._ops import linear
from jax_nano._ops.dot_general import bind_labels, dot_general_p
from jax_nano._ops.linear import Epilogue

quantized_p = Primitive("jax_nano_quantized")
quantized_p.def_impl(partial(xla.apply_primitive, quantized_p))


NO_EPILOGUE = Epilogue("none", 1.0, False, False)


class Options(NamedTuple):
    """The primitive's parameters.

    Attributes:
      along_k: q is (N, K), scale and zero points are (N, groups).
      zero: whether there are zero points.
      epilogue: bias and residual are of the result's dtype.
      dtype: of the result.
    """

    along_k: bool
    zero: bool
    epilogue: Epilogue
    dtype: np.dtype


def bind(x: Array, q: Array, scale: Array, *others: Array, options: Options) -> Array:
    """The product. All arguments are canonical.

    Args:
      x: shape (..., K).
      q: shape (K, N), or (N, K) if along_k.
      scale: shape (groups, N), or (N, groups) if along_k.
      others: zero points of the scale's shape, a bias (N,) and a residual (..., N), as far as the options have them.
    """
    operands = compat.match_varying_axes(x, q, scale, *others)
    out: Array = quantized_p.bind(*operands, options=options)
    return out


def split(others: Sequence[Any], options: Options) -> tuple[Sequence[Any], Sequence[Any]]:
    """Zero points, and what the epilogue takes."""
    return others[: int(options.zero)], others[int(options.zero) :]


def dequantized(q: Array, scale: Array, *zero: Array, along_k: bool, dtype: Any = np.float32) -> Array:
    """``(q - zero) * scale`` in q's shape, computed in `dtype`."""
    axis = 1 if along_k else 0
    groups = scale.shape[axis]
    shape = (*q.shape[:axis], groups, q.shape[axis] // max(groups, 1), *q.shape[axis + 1 :])
    w = jnp.reshape(q, shape).astype(dtype)
    for point in zero:
        w = w - jnp.expand_dims(point, axis + 1).astype(dtype)
    return jnp.reshape(w * jnp.expand_dims(scale, axis + 1).astype(dtype), q.shape)


def sums(x: Array, q: Array, scale: Array, *zero: Array, along_k: bool) -> Array:
    """y, in the dtype in which it is computed."""
    wide = np.promote_types(x.dtype, np.float32) if x.dtype == np.float64 else np.dtype(np.float32)
    w = dequantized(q, scale, *zero, along_k=along_k, dtype=wide)
    whole = labels(x.ndim, along_k=along_k)
    return bind_labels(x.astype(wide), w, whole, precision=None, preferred_element_type=wide)


def composition(x: Array, q: Array, scale: Array, *others: Array, options: Options) -> Array:
    """What the primitive means."""
    zero, extras = split(others, options)
    y = sums(x, q, scale, *zero, along_k=options.along_k)
    return linear.finish(y, *extras, epilogue=options.epilogue, dtype=options.dtype)


def labels(ndim: int, *, along_k: bool) -> contraction.Labels:
    """Those of the product of x, of so many dimensions, and q."""
    rows = tuple(range(ndim - 1))
    k, n = ndim - 1, ndim
    return contraction.Labels((*rows, k), (n, k) if along_k else (k, n), (*rows, n))


@quantized_p.def_abstract_eval
def _abstract_eval(
    x: ShapedArray, q: ShapedArray, scale: ShapedArray, *others: ShapedArray, options: Options
) -> ShapedArray:
    zero, extras = split(others, options)
    check(x, q, scale, *zero, along_k=options.along_k)
    dimension_numbers, out_perm = contraction.dimension_numbers_of(labels(x.ndim, along_k=options.along_k))
    params = {"precision": None, "preferred_element_type": options.dtype, "out_sharding": None}
    weights = q.update(dtype=x.dtype)
    out, _ = dot_general_p.abstract_eval(x, weights, dimension_numbers=dimension_numbers, out_perm=out_perm, **params)
    bias, residual = options.epilogue.split(extras)
    for name, have, want in (("bias", bias, out.shape[-1:]), ("residual", residual, out.shape)):
        if have is not None and (have.shape != want or have.dtype != out.dtype):
            raise ValueError(f"quantized_matmul's {name} is {have.str_short()}, expected {out.dtype}{list(want)}")
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


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, options: Options) -> tuple[Array, Any]:
    """The primal is the call; tangents go through the composition, of which JAX removes what nobody asks for."""
    out = bind(*primals, options=options)
    moving = [i for i, (t, p) in enumerate(zip(tangents, primals, strict=True)) if _moves(t, p)]
    if not moving:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())

    def of_moving(*values: Array) -> Array:
        operands = list(primals)
        for i, v in zip(moving, values, strict=True):
            operands[i] = v
        return composition(*operands, options=options)

    _, tangent = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
    return out, tangent


def _moves(tangent: Any, primal: Any) -> bool:
    """Whether an operand, which may be one of integers, has a tangent."""
    return not isinstance(tangent, ad.Zero) and bool(jnp.issubdtype(primal.dtype, jnp.floating))


def _batch(args: Sequence[Array], dims: Sequence[int | None], *, options: Options) -> tuple[Array, int]:
    """A batch of rows is more rows; a batch of weights is a batch of products of dequantised ones."""
    _, extras = split(dims[3:], options)
    bias, residual = options.epilogue.split(extras)
    shared = all(dim is None for dim in (*dims[1 : 3 + int(options.zero)], bias))
    if shared and dims[0] is not None and (residual is not None or not options.epilogue.residual):
        x = jnp.moveaxis(args[0], dims[0], 0)
        last = (jnp.moveaxis(args[-1], residual, 0),) if options.epilogue.residual else ()
        between = args[1 : len(args) - len(last)]
        return bind(x, *between, *last, options=options), 0
    return jax.vmap(partial(composition, options=options), in_axes=tuple(dims))(*args), 0


ad.primitive_jvps[quantized_p] = _jvp
batching.primitive_batchers[quantized_p] = _batch
