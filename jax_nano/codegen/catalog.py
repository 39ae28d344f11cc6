"""THE list of kernels: target x signature x register tile, with reasons.

Registry, tests and benchmarks all read what is listed here (through the manifest), so no kernel exists untested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import ir
from .amx_microkernel import TILE_REGISTERS, AmxMicrokernel, block_tile
from .inner import InnerMicrokernel
from .macrokernel import Gemm
from .microkernel import Microkernel
from .nanokernel import Family
from .nanokernel.amx import AmxDot
from .nanokernel.bf16_dot import Bf16Dot
from .nanokernel.bf16_parts import ALGORITHMS
from .nanokernel.fma import Fma
from .nanokernel.int8_dot import Int8Vnni, Int8Widened
from .sweep import SweepMicrokernel
from .target import TARGETS, Target
from .tile import Tile, check, panel_tile

SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "int32": "i32",
}


@dataclass(frozen=True)
class Kernel:
    """One generated matrix product.

    Attributes:
      target: the instruction set it is compiled for.
      a, b, out: dtype names of A, B and C in memory.
      family: the instructions of its nanokernel, which fix the accumulator.
      tile: the register tile of its main microkernel.
      algorithm: the DotAlgorithm preset that it computes, or "default".
      why: the reason for this family and tile, for people.
    """

    target: Target
    a: str
    b: str
    out: str
    family: Family
    tile: Tile
    algorithm: str
    why: str

    @property
    def name(self) -> str:
        dtypes = "_".join(SHORT[d] for d in (self.a, self.b, self.family.acc, self.out))
        algorithm = "" if self.algorithm == "default" else f"_{self.algorithm.lower()}"
        return f"gemm_{dtypes}{algorithm}_{self.tile.mr}x{self.tile.nr}_{self.target.name}"

    @property
    def signature(self) -> str:
        algorithm = "" if self.algorithm == "default" else f" ({self.algorithm})"
        return f"{SHORT[self.a]} x {SHORT[self.b]} -> {SHORT[self.family.acc]} -> {SHORT[self.out]}{algorithm}"

    @property
    def symbol(self) -> str:
        """The C identifier of the generated function."""
        return "jax_nano_" + self.name.replace("-", "_")

    @property
    def gemm(self) -> Gemm:
        return Gemm(self.target, self.a, self.b, self.out, self.family, self.tile)

    def mlir(self) -> str:
        """The kernel's verified MLIR module, as composed."""
        with ir.new_module() as module:
            self.gemm.emit(module, self.symbol)
            return module.text()

    def microkernels(self) -> dict[str, Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Its microkernels by the names of their generated functions."""
        return {m.name(self.symbol): m for m in self.gemm.microkernels()}


FLOAT_SIGNATURES = (
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float16", "float32"),
    ("float16", "float16", "float16"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "float16", "float32"),
    ("float16", "float32", "float32"),
    ("float64", "float64", "float64"),
)
"""(A, B, C) that are multiplied in f32 or f64."""

INTEGER_SIGNATURES = (
    ("int8", "int8", "int32"),
    ("int8", "int8", "int8"),
    ("uint8", "uint8", "int32"),
    ("uint8", "uint8", "uint8"),
    ("int8", "uint8", "int32"),
    ("int8", "uint8", "int16"),
    ("uint8", "int8", "int32"),
    ("uint8", "int8", "int16"),
)
"""(A, B, C) that are multiplied exactly in i32; a narrower C takes the low bits, as jnp does."""


def kernels() -> Iterator[Kernel]:
    """Every kernel of the package, in a fixed order."""
    for name in ("x86-64-v3", "x86-64-v4"):
        yield from _vector_kernels(TARGETS[name])
    for name in ("avx_vnni", "avx512_vnni"):
        yield from _vnni_kernels(TARGETS[name])
    yield from _bf16_kernels(TARGETS["avx512_bf16"])
    yield from _amx_kernels(TARGETS["amx"])


def _vector_kernels(target: Target) -> Iterator[Kernel]:
    """Plain vector instructions: every signature has a kernel here, the ones below replace some of them."""
    for a, b, out in FLOAT_SIGNATURES:
        acc = "float64" if out == "float64" else "float32"
        widened = "" if a == b == acc else ", widened on the way in"
        yield _kernel(target, a, b, out, Fma(acc), f"one vfmadd231 a vector and K value{widened}")
    for algorithm, parts in ALGORITHMS.items():
        family: Family = Fma("float32", parts, splits=True)
        why = f"{len(parts)} vfmadd231 on bf16 parts: no faster than f32, the numbers that a bf16 unit gives"
        yield _kernel(target, "float32", "float32", "float32", family, why, algorithm)
    for a, b, out in INTEGER_SIGNATURES:
        family = Int8Widened(target.vector_bits)
        yield _kernel(target, a, b, out, family, "vpmaddwd on pairs of i16: exact where vpmaddubsw saturates")


def _vnni_kernels(target: Target) -> Iterator[Kernel]:
    for a, b, out in INTEGER_SIGNATURES:
        bits = target.vector_bits
        if b == "int8":
            shifted = ", A shifted by 128 and the sums over B taken off" if a == "int8" else ""
            yield _kernel(target, a, b, out, Int8Vnni(bits, a == "int8"), f"vpdpbusd on quads of bytes{shifted}")
        else:
            why = "vpdpwssd on pairs of i16: vpdpbusd takes no unsigned B"
            yield _kernel(target, a, b, out, Int8Widened(bits, vnni=True), why)


def _bf16_kernels(target: Target) -> Iterator[Kernel]:
    bits = target.vector_bits
    for out in ("float32", "bfloat16"):
        why = "vdpbf16ps: twice the products of vfmadd231 on Zen 4 and 5; microcoded on Xeons, which have AMX instead"
        yield _kernel(target, "bfloat16", "bfloat16", out, Bf16Dot(bits), why)
    for algorithm, parts in ALGORITHMS.items():
        why = f"{len(parts)} vdpbf16ps on bf16 parts of f32"
        yield _kernel(target, "float32", "float32", "float32", Bf16Dot(bits, parts), why, algorithm)


def _amx_kernels(target: Target) -> Iterator[Kernel]:
    def kernel(a: str, b: str, out: str, family: AmxDot, why: str, algorithm: str = "default") -> Kernel:
        why = f"{why}; 2 x 2 tiles: 4 loads for 4 products, 7 of {TILE_REGISTERS} tile registers"
        return Kernel(target, a, b, out, family, block_tile(), algorithm, why)

    for out in ("float32", "bfloat16"):
        yield kernel("bfloat16", "bfloat16", out, AmxDot.of_bf16(), "tdpbf16ps: 16 times the products of vfmadd231")
    for algorithm, parts in ALGORITHMS.items():
        why = f"{len(parts)} tdpbf16ps on bf16 parts of f32"
        yield kernel("float32", "float32", "float32", AmxDot.of_bf16(parts), why, algorithm)
    for a, b, out in INTEGER_SIGNATURES:
        family = AmxDot.of_bytes(a, b)
        yield kernel(a, b, out, family, f"{family.instruction}: takes these signs as they are")


def _kernel(target: Target, a: str, b: str, out: str, family: Family, why: str, algorithm: str = "default") -> Kernel:
    temporaries = family.temporaries
    tile = check(panel_tile(target, ir.elem_bytes(family.acc), temporaries), target, temporaries)
    used = f"{tile.registers + temporaries} of {target.vector_registers} registers"
    return Kernel(target, a, b, out, family, tile, algorithm, f"{why}; {used}")


def find(name: str) -> Kernel:
    """The kernel of this name; KeyError names the known ones."""
    known = {k.name: k for k in kernels()}
    if name not in known:
        raise KeyError(f"no kernel {name!r}; known: {', '.join(known)}")
    return known[name]
