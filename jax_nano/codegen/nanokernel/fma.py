"""Fused multiply-add: f32 and f64 accumulators, one K value a step.

Meaning, for a register tile C[mr, nr]:  ``C += np.outer(A[:, k], B[k, :])``, each element rounded once. Narrower
float operands are widened, which is exact, on their way into the panels or registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jax_nano._core import spec
from jax_nano._core.spec import DTYPES, Signature, Target

from .. import ir
from . import Served, VectorFamily
from .bf16_parts import ALGORITHMS, part_of


@dataclass(frozen=True)
class Fma(VectorFamily):
    """``vfmadd231ps/pd``.

    Attributes:
      acc: "float32" or "float64".
      parts: for DotAlgorithms that name bf16 operands: which bf16 parts of the operands are multiplied.
      splits: whether operands are cut into bf16 parts at all.
    """

    acc: str
    parts: tuple[tuple[int, int], ...] = ((0, 0),)
    splits: bool = False
    kr: int = 1

    @property
    def a_elem(self) -> str:
        return self.acc

    @property
    def b_elem(self) -> str:
        return self.acc

    @property
    def unit(self) -> str:
        return self.acc

    @property
    def instructions(self) -> tuple[str, int]:
        return (r"vfmadd\d+p[sd]$", 1)

    def prepare_a(self, v: ir.Value, source: str, part: int) -> ir.Value:
        wide = ir.convert(v, source, self.acc)
        return ir.convert(part_of(wide, part), "bfloat16", "float32") if self.splits else wide

    prepare_b = prepare_a

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        return ir.fma(a, b, acc)


def kernels(target: Target) -> Iterator[Served]:
    """Every signature of real numbers and every algorithm: other targets' kernels replace some of them."""
    for signature in spec.signatures("float32", "float64"):
        acc = DTYPES[signature.out].accumulator
        widened = "" if signature.a == signature.b == acc else ", widened on the way in"
        yield Served(signature, Fma(acc), f"one vfmadd231 a vector and K value{widened}")
    for algorithm, parts in ALGORITHMS.items():
        why = f"{len(parts)} vfmadd231 on bf16 parts: no faster than f32, the numbers that a bf16 unit gives"
        yield Served(Signature("float32", "float32", "float32"), Fma("float32", parts, splits=True), why, algorithm)
