"""The decline gate: products that XLA computes faster stay with XLA, which can also fuse them.

A call costs about 0.15 us, and one product of a batch about 25 ns; XLA emits tiny products inline, and fuses
outer products into what reads them. The gate looks only at the static shapes, so that a program always makes
the same choice; a symbolic size counts as large. `JAX_NANO_GATE=off` in the environment (read at import)
lets every product through.

The constants were measured on one AMD EPYC (Zen 4) core, float32, products in a fori_loop, November 2026:
`python -m benchmarks gate` repeats it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

from jax_nano._shapes import Labels

# Multiply-adds of one product. XLA emits up to 6x6x6 inline (0.06 us against 0.2), and is slower than a
# call from 7x7x7 (0.7 us). In a batch it is faster up to 3x3x3, and 25 times slower at 4x4x4.
MIN_SINGLE: Final = 6 * 6 * 6 + 1
MIN_BATCHED: Final = 64

# Multiply-adds of a matrix-vector or vector-vector product. XLA's own loops are as fast as ours for float32
# (1x1024x1024: 60 us against 58; along K: 51 against 53), and small ones need no call (1x64x64: 0.25 us against 0.4);
# but they convert bfloat16 first (1x1024x1024 along K: 89 us against 25; 64x64: 0.8 against 1.2).
MIN_VECTOR: Final = math.inf
MIN_VECTOR_NARROW: Final = 2**18  # where the matrix has at most two bytes an element

_SWITCH: Final = {"on": True, "off": False}


def _read_switch(value: str) -> bool:
    try:
        return _SWITCH[value.strip().lower()]
    except KeyError:
        raise ValueError(f"JAX_NANO_GATE={value}: expected one of {', '.join(_SWITCH)}") from None


enabled: bool = _read_switch(os.environ.get("JAX_NANO_GATE") or "on")


def declines(
    labels: Labels,
    lhs_shape: Sequence[int],
    rhs_shape: Sequence[int],
    *,
    element_bytes: tuple[int, int] = (4, 4),
    any_size: bool = False,
) -> str | None:
    """Why a product stays with XLA, or None.

    Args:
      labels, lhs_shape, rhs_shape: the product.
      element_bytes: of each operand's elements.
      any_size: XLA would compute something else.
    """
    if not enabled or any_size:
        return None
    sizes = labels.sizes(lhs_shape, rhs_shape)
    m, n, k, batch = (
        _count(sizes[x] for x in dims) for dims in (labels.lhs_free, labels.rhs_free, labels.contracting, labels.batch)
    )
    if 0 in (m, n, k, batch):
        return "empty"
    if k == 1:
        return "an outer product"
    work = m * n * k
    if 1 in (m, n):
        lhs_bytes, rhs_bytes = element_bytes
        matrix_bytes = max(element_bytes) if m == n else rhs_bytes if m == 1 else lhs_bytes
        least_work = MIN_VECTOR_NARROW if matrix_bytes <= 2 else MIN_VECTOR
        return "a product with a vector: XLA's loops are as fast" if work < least_work else None
    least = MIN_SINGLE if batch == 1 else MIN_BATCHED
    return f"too small: {work} multiply-adds of at least {least}" if work < least else None


def _count(sizes: Iterable[Any]) -> float:
    """The product of sizes; infinite if one is symbolic."""
    count: float = 1
    for size in sizes:
        count *= size if isinstance(size, int) else math.inf
    return count
