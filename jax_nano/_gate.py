"""The decline gate: products that XLA computes faster stay with XLA, which can also fuse them.

A call costs about 0.15 us, and one product of a batch about 25 ns; XLA emits tiny products inline, and fuses
outer products into what reads them. The gate looks only at the static shapes and at how wide elements are, so that a
program always makes the same choice; a symbolic size counts as large. `JAX_NANO_GATE=off` in the environment (read at
import) lets every product through.

The constants were measured on one AMD EPYC (Zen 4) core, products in a fori_loop, November 2026:
`python -m benchmarks gate` repeats it, and says what is still on the wrong side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

from jax_nano._shapes import Labels

# Multiply-adds of one product. XLA emits small ones inline: in float32 up to 7x7x7 (0.09 us against 0.37; 8x8x8: 0.53),
# in other dtypes up to 5x5x5 (6x6x6, float64: 0.93 us against 0.37; int8: 1.0 against 0.46). In a batch it is faster up
# to 3x3x3, and 9 times slower at 4x4x4.
MIN_SINGLE: Final = 8**3
MIN_SINGLE_OTHER: Final = 6**3  # where elements have not 4 bytes
MIN_BATCHED: Final = 64

# Large results of sums this short are written by XLA as fast as memory takes them (512x512 of K = 2: 14 us against 41,
# 4: 30 against 50, 16: 55 against 76, 32: 119 against 126).
SHALLOW_K: Final = 16
SHALLOW_MIN_RESULT: Final = 2**16

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
    if batch == 1 and k <= SHALLOW_K and SHALLOW_MIN_RESULT <= m * n < math.inf and min(element_bytes) >= 4:
        return f"sums of {k} terms: XLA writes the result as fast"
    single = MIN_SINGLE if max(element_bytes) == 4 else MIN_SINGLE_OTHER
    least = single if batch == 1 else MIN_BATCHED
    return f"too small: {work} multiply-adds of at least {least}" if work < least else None


def _count(sizes: Iterable[Any]) -> float:
    """The product of sizes; infinite if one is symbolic."""
    count: float = 1
    for size in sizes:
        count *= size if isinstance(size, int) else math.inf
    return count
