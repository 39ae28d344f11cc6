"""Weights of 8 and 4 bits: `quantize` makes them, `quantized_matmul` multiplies with them.

One token through a layer costs what it takes to read the layer's bytes: an eighth of float32's with 4 bits. On CPUs the
weights are read where they lie and made float32 in registers, or, for many rows of x, a block at a time in the caches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_nano._core import activations as _activations
from jax_nano._core import jax_compat as compat
from jax_nano._core import spec
from jax_nano._ops import linear as _linear
from jax_nano._ops import quantized as _quantized
from jax_nano._ops import quantized_integer as _integer
from jax_nano._ops.quantized_lowering import (
    quantized_p as quantized_p,  # importing the primitive from here registers its lowering
)

__all__ = ["QuantizedArray", "quantize", "quantized_dot_general", "quantized_matmul"]


def quantized_matmul(
    x: ArrayLike,
    q: Any,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    *,
    group: int | None = None,
    contracting: int = 0,
    bias: ArrayLike | None = None,
    activation: str | Callable[[Array], Array] | None = None,
    residual: ArrayLike | None = None,
    activations: str | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """``activation(x @ ((q - zero_point) * scale) + bias) + residual`` with weights of 8 or 4 bits, one call on CPUs.

    What is computed is the product of the dequantised weights in float32, rounded once. A scale multiplies the sum of
    its group, so an infinite one gives an infinity where dequantised weights of zero would give NaN.

    Args:
      x: shape (..., K); float32, bfloat16 or float16.
      q: shape (K, N), or (N, K) with ``contracting=1``: int8, uint8, int4, uint4, float8_e4m3fn or float8_e5m2. Or a
        `QuantizedArray`, or anything with ``qvalue``, ``scale`` and ``zero_point`` as Qwix's QArray has them, instead
        of q, scale and zero_point.
      scale: shape (N,), one for each column, or (groups, N), one for each ``K / groups`` values of K in each column;
        (N,) or (N, groups) with ``contracting=1``. A scalar scales everything.
      zero_point: of the scales' shape, or None. Kernels take integers of 8 and 4 bits.
      group: values of K that share a scale; by default what scale's shape says.
      contracting: the dimension of q that is summed over.
      bias: shape (N,), or None.
      activation: as in `linear`.
      residual: shape (..., N), or None.
      activations: "int8" quantises each row of x to 8 bits first, and sums integers: **this changes results**, by half
        a step of 1/127 of a row's largest magnitude in each x. Weights must be integers then. None: x stays as it is.
      preferred_element_type: dtype of the result, by default x's.

    Returns:
      Shape (..., N).

    Raises:
      TypeError: an operand is not an array or has a dtype that is none of the above, or K differs.
      ValueError: scales, zero points, bias or residual do not fit, groups do not divide K, q has 4 bits and an odd
        size, or activation or activations are not known.
    """
    if scale is None:
        q, scale, zero_point, contracting = _parts(q, zero_point, contracting)
    epilogue = _linear.Epilogue(_activations.name_of(activation), 1.0, bias is not None, residual is not None)
    operands = [v for v in (x, q, scale, zero_point, bias, residual) if v is not None]
    return _run(
        *compat.ensure_arraylike("quantized_matmul", *operands),
        zero=zero_point is not None,
        group=None if group is None else int(group),
        contracting=int(contracting),
        epilogue=epilogue,
        activations=activations,
        preferred=None if preferred_element_type is None else np.dtype(preferred_element_type),
    )


def _parts(q: Any, zero_point: Any, contracting: int) -> tuple[Any, Any, Any, int]:
    """q, scale, zero point and the contracting dimension of an array that has them all."""
    if zero_point is None and isinstance(q, QuantizedArray):
        return q.q, q.scale, q.zero_point, q.contracting
    if zero_point is None and hasattr(q, "qvalue") and hasattr(q, "scale"):
        return q.qvalue, q.scale, getattr(q, "zero_point", None), contracting
    raise TypeError(f"quantized_matmul requires a scale, or a quantised array that has one, got {type(q).__name__}")


_STATIC = ("zero", "group", "contracting", "epilogue", "activations", "preferred")


@functools.partial(jax.jit, static_argnames=_STATIC, inline=compat.INLINE)
def _run(
    *operands: Array,
    zero: bool,
    group: int | None,
    contracting: int,
    epilogue: _linear.Epilogue,
    activations: str | None,
    preferred: np.dtype | None,
) -> Array:
    x, q, scale, *others = operands
    points, extras = others[: int(zero)], others[int(zero) :]
    if contracting not in (0, 1):
        raise ValueError(f"quantized_matmul requires contracting to be 0 or 1, got {contracting}")
    if q.ndim != 2:
        raise ValueError(f"quantized_matmul requires q of two dimensions, got shape {q.shape}")
    if q.dtype.name not in spec.WEIGHTS:
        raise TypeError(f"quantized_matmul requires q of one of {', '.join(spec.WEIGHTS)}, got {q.dtype}")
    for name, v in (("x", x), ("scale", scale)):
        if not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(f"quantized_matmul requires {name} of floating-point numbers, got {v.dtype}")
    if activations not in (None, "int8"):
        raise ValueError(f'quantized_matmul requires activations to be None or "int8", got {activations!r}')
    if activations and not jnp.issubdtype(q.dtype, jnp.integer):
        raise ValueError(f"quantized_matmul with activations of int8 requires q of integers, got {q.dtype}")
    scale, *points = (_by_groups(v, q, contracting) for v in (scale, *points))
    k = q.shape[contracting]
    if group is not None and scale.shape[contracting] * group != k:
        raise ValueError(f"quantized_matmul: {scale.shape[contracting]} groups of {group} are not K, which is {k}")
    dtype = np.dtype(preferred or x.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"quantized_matmul requires a floating-point result, got {dtype}")
    options = _quantized.Options(contracting == 1, zero, epilogue, dtype)
    _quantized.check(x, q, scale, *points, along_k=options.along_k)
    shape = (*x.shape[:-1], q.shape[1 - contracting])
    for name, v, want in zip(("bias", "residual"), epilogue.split(extras), (shape[-1:], shape), strict=True):
        if v is not None and v.shape != want:
            raise ValueError(f"quantized_matmul requires a {name} of shape {want}, got {v.shape}")
    extras = [v.astype(dtype) for v in extras]
    compute = _integer.product if activations else _quantized.bind
    return compute(x, q, scale, *points, *extras, options=options)


def _by_groups(v: Array, q: Array, contracting: int) -> Array:
    """Scales or zero points as a matrix with one for each column, of which the contracting dimension is the groups."""
    n = q.shape[1 - contracting]
    if v.ndim == 0:
        v = jnp.broadcast_to(v, (n,))
    if v.ndim == 1:
        return jnp.expand_dims(v, contracting)
    # One for several columns, as Qwix's arrays may have it.
    columns = v.shape[1 - contracting] if v.ndim == 2 else n
    return jnp.repeat(v, n // columns, 1 - contracting) if columns != n and columns and n % columns == 0 else v


def quantized_dot_general(
    x: ArrayLike,
    q: Any,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    *,
    dimension_numbers: Any,
    activations: str | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """`jax.lax.dot_general` of x and ``(q - zero_point) * scale``.

    Args:
      x: float32, bfloat16 or float16.
      q: of as many dimensions as its weights have, in one of the dtypes of `quantized_matmul`; or an array that has
        scales, as there.
      scale: of q's rank: each of its sizes divides q's, and a scale is that of as many neighbours.
      zero_point: likewise, or None.
      dimension_numbers: as in `jax.lax.dot_general`.
      activations, preferred_element_type: as in `quantized_matmul`.

    Returns:
      As `jax.lax.dot_general`: dimensions of the batch, of x and of q that are not contracted. One call where neither
      has batch dimensions and the scales' groups follow each other along all of q's contracting dimensions together,
      and 4-bit q is a matrix of even sizes; otherwise the product of dequantised weights.

    Raises:
      TypeError: as `quantized_matmul` and `jax.lax.dot_general`.
      ValueError: scales or zero points do not fit q.
    """
    if scale is None:
        q, scale, zero_point, _ = _parts(q, zero_point, 0)
    arrays = [v for v in (x, q, scale, zero_point) if v is not None]
    x, q, *grids = compat.ensure_arraylike("quantized_dot_general", *arrays)
    for v in grids:
        if v.ndim != q.ndim or any(size < 1 or n % size for n, size in zip(q.shape, v.shape, strict=True)):
            raise ValueError(
                f"quantized_dot_general requires scales and zero points whose sizes divide q's {q.shape}, got {v.shape}"
            )
    # Raises what lax does if they do not fit.
    jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b.astype(a.dtype), dimension_numbers), x, q)
    if q.dtype.name not in spec.WEIGHTS:
        raise TypeError(f"quantized_dot_general requires q of one of {', '.join(spec.WEIGHTS)}, got {q.dtype}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantized_dot_general requires x of floating-point numbers, got {x.dtype}")
    if activations not in (None, "int8"):
        raise ValueError(f'quantized_dot_general requires activations to be None or "int8", got {activations!r}')
    (x_contracting, q_contracting), (_, q_batch) = dimension_numbers
    flat = None
    if len(q_contracting) and not len(q_batch) and len(x_contracting) == len(q_contracting):
        order = sorted(range(len(q_contracting)), key=lambda i: q_contracting[i])  # of q, whose groups must stay
        contracted = [q_contracting[i] for i in order]
        free = [i for i in range(q.ndim) if i not in contracted]
        flat = _flattened(q, grids, contracted, free)
    if flat is not None and spec.WEIGHTS[q.dtype.name].bits < 8 and any(n % 2 for n in flat[0].shape):
        flat = None  # rows would end inside a byte
    if flat is None:
        weights = _dequantized(q, *grids, dtype=jnp.float32)
        dtype = preferred_element_type or x.dtype
        out = jax.lax.dot_general(
            x.astype(jnp.float32), weights, dimension_numbers, precision="highest", preferred_element_type=jnp.float32
        )
        return out.astype(dtype)
    matrix, flat_grids, along = flat
    rows = [i for i in range(x.ndim) if i not in x_contracting]
    x = jnp.transpose(x, (*rows, *(x_contracting[i] for i in order)))
    x = jnp.reshape(x, (*x.shape[: len(rows)], math.prod(x.shape[len(rows) :])))
    out = quantized_matmul(
        x,
        matrix,
        *flat_grids,
        contracting=along,
        activations=activations,
        preferred_element_type=preferred_element_type,
    )
    return jnp.reshape(out, (*out.shape[:-1], *(q.shape[i] for i in free)))


def _flattened(
    q: Array, grids: Sequence[Array], contracted: Sequence[int], free: Sequence[int]
) -> tuple[Array, list[Array], int] | None:
    """q as a matrix, its scales and zero points likewise, and which of its dimensions is contracted; None if the groups
    of the contracted dimensions do not lie side by side in their product.
    """
    along = int(list(contracted) == list(range(q.ndim - len(contracted), q.ndim)))
    order = (*free, *contracted) if along else (*contracted, *free)

    def matrix(v: Array) -> Array:
        sizes = [math.prod(v.shape[i] for i in dims) for dims in (contracted, free)]
        return jnp.reshape(jnp.transpose(v, order), sizes[::-1] if along else sizes)

    out = []
    for v in grids:
        whole, done = [v.shape[i] == q.shape[i] for i in contracted], False
        for i, is_whole in zip(contracted, whole, strict=True):
            if done and v.shape[i] != 1:
                return None
            done = done or not is_whole
        for i in free:
            v = jnp.repeat(v, q.shape[i] // v.shape[i], i)
        out.append(matrix(v))
    return None if len({v.shape for v in out}) > 1 else (matrix(q), out, along)


def _dequantized(q: Array, scale: Array, *zero: Array, dtype: Any) -> Array:
    """(q - zero) * scale, with scales and zero points for blocks of q."""

    def whole(v: Array) -> Array:
        for i, size in enumerate(v.shape):
            v = jnp.repeat(v, q.shape[i] // size, i)
        return v.astype(dtype)

    w = q.astype(dtype)
    for point in zero:
        w = w - whole(point)
    return w * whole(scale)


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
        return quantized_matmul(x, self)


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
    scale = _nonzero(high / top - low / top).astype(scale_dtype)
    zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, top)
    levels = jnp.round(grouped / jnp.expand_dims(scale.astype(jnp.float32), axis)) + jnp.expand_dims(zero, axis)
    q = jnp.clip(levels, 0, top).astype(jnp.uint8 if bits == 8 else jnp.uint4)
    return QuantizedArray(jnp.reshape(q, w.shape), scale, zero.astype(jnp.uint8), contracting)


def _nonzero(scale: Array) -> Any:
    """Scales of groups of zeros are 1; those of groups with a NaN are NaN."""
    return jnp.where(scale == 0, 1, scale)
