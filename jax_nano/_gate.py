"""The decline gate: products too small to be worth a call stay with XLA, which can fuse them.

A custom call costs about 0.1 us more than an instruction that XLA emits inline, and XLA can neither fuse
nor constant-fold it. The gate looks only at the static shapes, so that the same program always makes the
same choice. `JAX_NANO_GATE=off` in the environment (read at import) lets every product through.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from jax_nano._shapes import Labels

# A product is declined if it has fewer multiply-adds than this. Measured by benchmarks/gate.py.
MIN_MULTIPLY_ADDS: Final = 512

_SWITCH: Final = {"on": True, "off": False}


def _read_switch(value: str) -> bool:
    try:
        return _SWITCH[value.strip().lower()]
    except KeyError:
        raise ValueError(f"JAX_NANO_GATE={value}: expected one of {', '.join(_SWITCH)}") from None


enabled: bool = _read_switch(os.environ.get("JAX_NANO_GATE") or "on")


def declines(labels: Labels, lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> str | None:
    """Why a product stays with XLA, or None. A symbolic size counts as large."""
    if not enabled:
        return None
    multiply_adds = 1
    size: Any  # an int, or JAX's symbolic dimension
    for size in labels.sizes(lhs_shape, rhs_shape).values():
        if not isinstance(size, int):
            return None
        multiply_adds *= size
    if multiply_adds < MIN_MULTIPLY_ADDS:
        return f"too small: {multiply_adds} multiply-adds, the gate opens at {MIN_MULTIPLY_ADDS}"
    return None
