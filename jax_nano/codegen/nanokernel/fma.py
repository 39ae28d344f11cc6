"""Fused multiply-add: f32 and f64 accumulators, one K value a step.

Meaning, for a register tile C[mr, nr]:  ``C += np.outer(A[:, k], B[k, :])``, each element rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import ir


@dataclass(frozen=True)
class Fma:
    """``vfmadd231ps/pd``: operands and accumulator of one float type."""

    acc: str
    kr: int = 1

    @property
    def a_panel(self) -> str:
        return self.acc

    @property
    def b_panel(self) -> str:
        return self.acc

    @property
    def instructions(self) -> tuple[str, int]:
        return (r"vfmadd\d+p[sd]$", 1)

    def cycles_per_product(self, cpu: str) -> float:
        # Two FMA pipes everywhere; Zen 4 runs a 512-bit FMA through both at once.
        return 1.0 if cpu == "znver4" else 0.5

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        return ir.fma(a, b, acc)
