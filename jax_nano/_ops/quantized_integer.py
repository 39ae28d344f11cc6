"""Products with quantised weights whose activations are quantised too, a row at a time: sums of integers.

Each row of x becomes integers of 8 bits, with the scale that makes its largest magnitude 127; products are summed in
int32 by the kernels for integers, and scaled afterwards. Results differ from those of the float product by the rounding
of x, which derivatives take no notice of: they are those of the float product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_nano._core.contraction import Labels
from jax_nano._ops import linear, quantized
from jax_nano._ops.dot_general import bind_labels
from jax_nano._ops.quantized import Options, split

TOP = 127

MOST_IN_GROUP = 2**16
"""Values of K whose products with differences of up to 255 an int32 holds: 127 * 255 * 2**16 < 2**31."""


def rows_as_int8(x: Array) -> tuple[Array, Array]:
    """Each row (the last dimension) as int8, and its scale in float32; a row of zeros has the scale 1.

    A row with a NaN, or with an infinity, has such a scale.
    """
    wide = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=0)
    scale = jnp.where(most == 0, 1, most / TOP)
    return jnp.clip(jnp.round(wide / scale), -TOP, TOP).astype(jnp.int8), scale


def product(x: Array, q: Array, scale: Array, *others: Array, options: Options) -> Array:
    """The same product as the primitive's, for weights that are integers.

    Groups are a batch of products, each summed in int32; larger ones than that holds are summed in floats.
    """
    out: Array = _product(options, x, q, scale, *others)
    return out


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(options: Options, x: Array, q: Array, scale: Array, *others: Array) -> Array:
    zero, extras = split(others, options)
    along_k = options.along_k
    n, groups = q.shape[0 if along_k else 1], scale.shape[1 if along_k else 0]
    size = x.shape[-1] // groups
    rows, row_scale = rows_as_int8(jnp.reshape(x, (-1, x.shape[-1])))
    if size > MOST_IN_GROUP:
        rounded = jnp.reshape(rows.astype(jnp.float32) * row_scale, x.shape)
        return quantized.bind(rounded, q, scale, *others, options=options)
    weights, origin = _as_int8(q)
    grouped = jnp.reshape(rows, (rows.shape[0], groups, size))
    blocks = jnp.reshape(weights, (n, groups, size) if along_k else (groups, size, n))
    m_label, g_label, k_label, n_label = range(4)
    of_q = (n_label, g_label, k_label) if along_k else (g_label, k_label, n_label)
    labels = Labels((m_label, g_label, k_label), of_q, (g_label, m_label, n_label))
    sums = bind_labels(grouped, blocks, labels, precision=None, preferred_element_type=np.dtype(np.int32))
    points = [v.T if along_k else v for v in zero]
    if origin or points:
        total = jnp.sum(grouped.astype(jnp.int32), axis=-1).T[:, :, None]
        shift: Any = -origin
        if points and jnp.issubdtype(points[0].dtype, jnp.integer):
            shift = points[0].astype(jnp.int32)[:, None, :] - origin
        elif points:
            shift = points[0].astype(jnp.float32)[:, None, :] - origin
        sums = sums - total * shift
    scales = (scale.T if along_k else scale).astype(jnp.float32)[:, None, :]
    y = jnp.sum(sums.astype(jnp.float32) * scales, axis=0) * row_scale
    y = jnp.reshape(y, (*x.shape[:-1], n))
    return linear.finish(y, *extras, epilogue=options.epilogue, dtype=options.dtype)


@_product.defjvp
def _product_jvp(options: Options, primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[Array, Any]:
    """Tangents go through the float product: a rounding has no derivative."""
    moving = [i for i, v in enumerate(primals) if jnp.issubdtype(v.dtype, jnp.floating)]

    def of_moving(*values: Array) -> Array:
        operands = list(primals)
        for i, v in zip(moving, values, strict=True):
            operands[i] = v
        return quantized.composition(*operands, options=options)

    _, tangent = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
    return _product(options, *primals), tangent


def _as_int8(q: Array) -> tuple[Array, int]:
    """Weights as int8, and what has been subtracted from them."""
    if q.dtype == jnp.uint8:
        return (q.astype(jnp.int16) - 128).astype(jnp.int8), 128
    return q.astype(jnp.int8), 0
