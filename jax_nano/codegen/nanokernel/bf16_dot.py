"""Dot products of bf16 pairs into f32 (AVX512-BF16).

Meaning, per lane:  ``acc += a[1] * b[1]; acc += a[0] * b[0]`` with subnormal inputs and results taken as zero and
rounding to nearest even after each of the two steps, whatever MXCSR says (the vendor's description of VDPBF16PS).
A sum that is rounded to bf16 is treated likewise (VCVTNE2PS2BF16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir as mlir

from jax_nano._core.spec import Signature, Target

from .. import ir
from . import Served, VectorFamily
from .bf16_parts import ALGORITHMS, part_of


@dataclass(frozen=True)
class Bf16Dot(VectorFamily):
    """``vdpbf16ps``: two K values a step. Vectors are as wide as their accumulators."""

    parts: tuple[tuple[int, int], ...] = ((0, 0),)
    acc: str = "float32"
    kr: int = 2
    a_elem: str = "bfloat16"
    b_elem: str = "bfloat16"
    unit: str = "int32"
    instructions: tuple[str, int] = (r"vdpbf16ps$", 1)

    def prepare_a(self, v: ir.Value, source: str, part: int) -> ir.Value:
        return v if source == "bfloat16" else part_of(ir.convert(v, source, "float32"), part)

    prepare_b = prepare_a

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        lanes = ir.lanes_of(acc)
        pairs = [ir.bitcast(x, 2 * lanes, mlir.BF16Type.get()) for x in (b, a)]
        return ir.call_intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", acc.type, [acc, *pairs])

    def narrowed(self, sums: Sequence[ir.Value], out: str) -> list[ir.Value]:
        """Two vectors at a time: half as many stores, each of a whole line."""
        if out != "bfloat16":
            return super().narrowed(sums, out)
        elements_of_c = []
        for i in range(0, len(sums), 2):
            lower, *higher = sums[i : i + 2]
            lanes = ir.lanes_of(lower) * (1 + len(higher))
            name = f"llvm.x86.avx512bf16.cvtne{'2' if higher else ''}ps2bf16.{32 * ir.lanes_of(lower)}"
            elements = ir.call_intrinsic(name, ir.vec(lanes, mlir.BF16Type.get()), [*higher, lower])
            elements_of_c.append(ir.bitcast(elements, lanes, out))
        return elements_of_c


def kernels(target: Target) -> Iterator[Served]:
    """Products of bf16, and the algorithms that name it."""
    for out in ("float32", "bfloat16"):
        why = "vdpbf16ps: twice the products of vfmadd231 on Zen 4 and 5; microcoded on Xeons, which have AMX instead"
        yield Served(Signature("bfloat16", "bfloat16", out), Bf16Dot(), why)
    for algorithm, parts in ALGORITHMS.items():
        why = f"{len(parts)} vdpbf16ps on bf16 parts of f32"
        yield Served(Signature("float32", "float32", "float32"), Bf16Dot(parts), why, algorithm)
