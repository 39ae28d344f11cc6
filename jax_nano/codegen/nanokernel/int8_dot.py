"""Integer dot products: int8 and uint8 operands into int32, exact for every input.

Two ways. Widened to 16 bits, pairs are multiplied and added without overflow (255 * 255 * 2 < 2**31), whatever the
signs. With VNNI, ``vpdpbusd`` takes four bytes at once, but only unsigned by signed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jax_nano._core import spec
from jax_nano._core.spec import Target

from .. import ir
from . import Served, VectorFamily


@dataclass(frozen=True)
class Int8Widened(VectorFamily):
    """``vpmaddwd`` + ``vpaddd`` on pairs of int16, or VNNI's ``vpdpwssd``, which is both in one.

    Meaning, per lane:  ``acc += a[0] * b[0] + a[1] * b[1]`` modulo 2**32.
    """

    bits: int
    vnni: bool = False
    acc: str = "int32"
    kr: int = 2
    a_elem: str = "int16"
    b_elem: str = "int16"
    unit: str = "int32"

    @property
    def unrolls(self) -> bool:
        # With 32 registers LLVM spills temporaries in spite of the barriers, and with two operations for each product
        # two wide units have time for the loop instructions of every step.
        return self.vnni or self.bits == 256

    @property
    def temporaries(self) -> int:
        return 0 if self.vnni else 1

    @property
    def instructions(self) -> tuple[str, int]:
        return ("vpdpwssd$" if self.vnni else "vpmaddwd$", 1)

    def prepare_a(self, v: ir.Value, source: str, part: int) -> ir.Value:
        return ir.convert(v, source, "int16")

    prepare_b = prepare_a

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        bits = 32 * ir.lanes_of(acc)
        pairs = [ir.bitcast(x, bits // 16, "int16") for x in (a, b)]
        if self.vnni:
            return ir.call_intrinsic(f"llvm.x86.avx512.vpdpwssd.{bits}", acc.type, [acc, *pairs])
        name = {256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}[bits]
        return ir.add_vectors(acc, ir.call_intrinsic(name, acc.type, pairs))


@dataclass(frozen=True)
class Int8Vnni(VectorFamily):
    """``vpdpbusd``: A's bytes unsigned, B's signed.

    Meaning, per lane:  ``acc += sum(a[i] * b[i] for i in range(4))`` modulo 2**32, a unsigned, b signed.

    A signed A is stored as ``a + 128``; the 128 times the sums over B's columns that this adds are taken off the
    accumulators before they start. (An unsigned B would need sums over A's rows: those signatures are widened.)
    """

    bits: int
    signed_a: bool
    acc: str = "int32"
    kr: int = 4
    a_elem: str = "uint8"
    b_elem: str = "int8"
    unit: str = "int32"
    instructions: tuple[str, int] = ("vpdpbusd$", 1)

    @property
    def column_sums(self) -> bool:
        return self.signed_a

    def prepare_a(self, v: ir.Value, source: str, part: int) -> ir.Value:
        return ir.xor_constant(v, -128) if self.signed_a else v

    def prepare_b(self, v: ir.Value, source: str, part: int) -> ir.Value:
        return v

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        bits = 32 * ir.lanes_of(acc)
        quads = [ir.bitcast(x, bits // 8, "int8") for x in (a, b)]
        return ir.call_intrinsic(f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, [acc, *quads])

    def shift(self) -> ir.Value:
        """128 in every byte, as a zero of a signed A is stored."""
        return ir.bitcast(ir.constant_vector(-128, self.bits // 8, "int8"), self.bits // 32, "int32")

    def correction(self, b: ir.Value, acc: ir.Value) -> ir.Value:
        """``acc - 128 * (sum of the unit's four bytes of b)``."""
        return ir.subtract(acc, self.product(self.shift(), b, ir.zeros(self.bits // 32, "int32")))


def kernels(target: Target) -> Iterator[Served]:
    """Every signature of bytes."""
    bits, has_vnni = target.vector_bits, {"avx_vnni", "avx512_vnni"} & set(target.requires)
    for signature in spec.signatures("int32"):
        signed_a = signature.a == "int8"
        if not has_vnni:
            yield Served(signature, Int8Widened(bits), "vpmaddwd on pairs of i16: exact where vpmaddubsw saturates")
        elif signature.b == "int8":
            shifted = ", A shifted by 128 and the sums over B taken off" if signed_a else ""
            yield Served(signature, Int8Vnni(bits, signed_a), f"vpdpbusd on quads of bytes{shifted}")
        else:
            why = "vpdpwssd on pairs of i16: vpdpbusd takes no unsigned B"
            yield Served(signature, Int8Widened(bits, vnni=True), why)
