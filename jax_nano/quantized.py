"""Weights of 8 and 4 bits: `quantize` makes them, `quantized_matmul` multiplies with them.

One token through a layer costs what it takes to read the layer's bytes: an eighth of float32's with 4 bits. On CPUs the
weights are read where they lie and made float32 in registers, or, for many rows of x, a block at a time in the caches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_nano._core import jax_compat as compat
from jax_nano._core import spec
from jax_nano._ops import quantized as _quantized
from jax_nano._ops.quantized_lowering import (
    quantized_p as quantized_p,  # importing the primitive from here registers its lowering
)

__all__ = ["QuantizedArray", "quantize", "quantized_matmul"]


def quantized_matmul(
    x: ArrayLike,
    q: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    group: int | None = None,
    contracting: int = 0,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """``x @ ((q - zero_point) * scale)`` with weights of 8 or 4 bits, one call on CPUs.

    What is computed is the product of the dequantised weights in float32, rounded once. A scale multiplies the sum of
    its group, so an infinite one gives an infinity where dequantised weights of zero would give NaN.

    Args:
      x: shape (..., K); float32, bfloat16 or float16.
      q: shape (K, N), or (N, K) with ``contracting=1``: int8, uint8, int4, uint4, float8_e4m3fn or float8_e5m2.
      scale: shape (N,), one for each column, or (groups, N), one for each ``K / groups`` values of K in each column;
        (N,) or (N, groups) with ``contracting=1``. A scalar scales everything.
      zero_point: of the scales' shape, or None. Kernels take integers of 8 and 4 bits.
      group: values of K that share a scale; by default what scale's shape says.
      contracting: the dimension of q that is summed over.
      preferred_element_type: dtype of the result, by default x's.

    Returns:
      Shape (..., N).

    Raises:
      TypeError: an operand is not an array or has a dtype that is none of the above, or K differs.
      ValueError: scales or zero points do not fit q, groups do not divide K, or q has 4 bits and an odd size.
    """
    operands = [x, q, scale] if zero_point is None else [x, q, scale, zero_point]
    return _run(
        *compat.ensure_arraylike("quantized_matmul", *operands),
        group=None if group is None else int(group),
        contracting=int(contracting),
        preferred=None if preferred_element_type is None else np.dtype(preferred_element_type),
    )


@functools.partial(jax.jit, static_argnames=("group", "contracting", "preferred"), inline=compat.INLINE)
def _run(*operands: Array, group: int | None, contracting: int, preferred: np.dtype | None) -> Array:
    x, q, scale, *zero = operands
    if contracting not in (0, 1):
        raise ValueError(f"quantized_matmul requires contracting to be 0 or 1, got {contracting}")
    if q.ndim != 2:
        raise ValueError(f"quantized_matmul requires q of two dimensions, got shape {q.shape}")
    if q.dtype.name not in spec.WEIGHTS:
        raise TypeError(f"quantized_matmul requires q of one of {', '.join(spec.WEIGHTS)}, got {q.dtype}")
    for name, v in (("x", x), ("scale", scale)):
        if not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(f"quantized_matmul requires {name} of floating-point numbers, got {v.dtype}")
    scale, *zero = (_by_groups(v, q, contracting) for v in (scale, *zero))
    groups = scale.shape[contracting]
    k = q.shape[contracting]
    if group is not None and groups * group != k:
        raise ValueError(f"quantized_matmul: {groups} groups of {group} are not K, which is {k}")
    dtype = preferred or x.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"quantized_matmul requires a floating-point result, got {dtype}")
    along_k = contracting == 1
    _quantized.check(x, q, scale, *zero, along_k=along_k)
    return _quantized.bind(x, q, scale, *zero, along_k=along_k, dtype=np.dtype(dtype))


def _by_groups(v: Array, q: Array, contracting: int) -> Array:
    """Scales or zero points in two dimensions, of which one is the groups."""
    n = q.shape[1 - contracting]
    if v.ndim == 0:
        v = jnp.broadcast_to(v, (n,))
    return jnp.expand_dims(v, contracting) if v.ndim == 1 else v


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A matrix of quantised weights, ``(q - zero_point) * scale``: a pytree, so that models can hold it.

    ``x @ w`` is `quantized_matmul`, inside jit and outside of it.

    Attributes:
      q, scale, zero_point, contracting: as in `quantized_matmul`.
    """

    q: Array
    scale: Array
    zero_point: Array | None = None
    contracting: int = field(default=0, metadata={"static": True})

    __array_ufunc__ = None  # so that NumPy's arrays leave `@` to __rmatmul__
    __array_priority__ = 1000

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N), whichever way the weights are stored."""
        k, n = self.q.shape if self.contracting == 0 else self.q.shape[::-1]
        return k, n

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> np.dtype:
        """Of what it stands for: the scales' dtype."""
        return np.dtype(self.scale.dtype)

    @property
    def nbytes(self) -> int:
        """What q, scale and zero_point take in memory."""
        arrays = [self.q, self.scale, *([] if self.zero_point is None else [self.zero_point])]
        bits = {name: x.bits for name, x in spec.WEIGHTS.items()}
        return sum(a.size * bits.get(a.dtype.name, a.dtype.itemsize * 8) // 8 for a in arrays)

    def dequantize(self, dtype: DTypeLike | None = None) -> Array:
        """The matrix that it stands for, of shape (K, N), computed in float32."""
        scale, *zero = (_by_groups(v, self.q, self.contracting) for v in (self.scale, self.zero_point) if v is not None)
        w = _quantized.dequantized(self.q, scale, *zero, along_k=self.contracting == 1)
        return (w.T if self.contracting == 1 else w).astype(self.dtype if dtype is None else dtype)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        return quantized_matmul(x, self.q, self.scale, self.zero_point, contracting=self.contracting)


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "contracting", "scale_dtype"))
def quantize(
    w: ArrayLike,
    bits: int = 8,
    *,
    group: int | None = 128,
    symmetric: bool = True,
    contracting: int = 0,
    scale_dtype: DTypeLike = np.float32,
) -> QuantizedArray:
    """A matrix of weights, rounded to integers of 8 or 4 bits.

    Args:
      w: shape (K, N), or (N, K) with ``contracting=1``; q has its shape.
      bits: 8 or 4.
      group: values of K that share a scale; None: all of a column.
      symmetric: the largest magnitude of a group becomes 127 or 7, of int8 or int4, and there are no zero points; else
        its range becomes 0 to 255 or 15, of uint8 or uint4, and zero points are uint8.
      contracting: the dimension of w that products sum over.
      scale_dtype: float32, bfloat16 or float16.

    Returns:
      A `QuantizedArray`.

    Raises:
      TypeError: w is not an array of floating-point numbers.
      ValueError: w has not two dimensions, bits are neither 8 nor 4, groups do not divide K, or a size of 4-bit weights
        is odd.
    """
    (w,) = compat.ensure_arraylike("quantize", w)
    if w.ndim != 2:
        raise ValueError(f"quantize requires w of two dimensions, got shape {w.shape}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"quantize requires w of floating-point numbers, got {w.dtype}")
    if bits not in (4, 8):
        raise ValueError(f"quantize requires bits to be 4 or 8, got {bits}")
    if contracting not in (0, 1):
        raise ValueError(f"quantize requires contracting to be 0 or 1, got {contracting}")
    k = w.shape[contracting]
    size = k if group is None else group
    if size < 1 or k % size:
        raise ValueError(f"quantize requires groups that divide K, got {size} and {k}")
    if bits == 4 and any(n % 2 for n in w.shape):
        raise ValueError(f"quantize requires even sizes for weights of 4 bits, got shape {w.shape}")
    axis = contracting + 1
    shape = (*w.shape[:contracting], k // size, size, *w.shape[contracting + 1 :])
    grouped = jnp.reshape(w.astype(jnp.float32), shape)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _nonzero(jnp.max(jnp.abs(grouped), axis) / top).astype(scale_dtype)
        levels = jnp.round(grouped / jnp.expand_dims(scale.astype(jnp.float32), axis))
        q = jnp.clip(levels, -top, top).astype(jnp.int8 if bits == 8 else jnp.int4)
        return QuantizedArray(jnp.reshape(q, w.shape), scale, None, contracting)
    top = 2**bits - 1
    low, high = jnp.minimum(jnp.min(grouped, axis), 0), jnp.maximum(jnp.max(grouped, axis), 0)
    scale = _nonzero((high - low) / top).astype(scale_dtype)
    zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, top)
    levels = jnp.round(grouped / jnp.expand_dims(scale.astype(jnp.float32), axis)) + jnp.expand_dims(zero, axis)
    q = jnp.clip(levels, 0, top).astype(jnp.uint8 if bits == 8 else jnp.uint4)
    return QuantizedArray(jnp.reshape(q, w.shape), scale, zero.astype(jnp.uint8), contracting)


def _nonzero(scale: Array) -> Any:
    """Scales of groups of zeros are 1."""
    return jnp.where(scale > 0, scale, 1)
