"""THE list of kernels: target x signature x register tile, with reasons.

Registry, tests and benchmarks all read what is listed here (through the manifest), so no kernel exists untested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import ir
from .macrokernel import Gemm
from .microkernel import Microkernel
from .nanokernel import Family
from .nanokernel.fma import Fma
from .target import TARGETS, Target
from .tile import Tile, check, choose

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
      tile: the register tile of its full microkernel.
      why: the reason for this family and tile, for people.
    """

    target: Target
    a: str
    b: str
    out: str
    family: Family
    tile: Tile
    why: str

    @property
    def name(self) -> str:
        dtypes = "_".join(SHORT[d] for d in (self.a, self.b, self.family.acc, self.out))
        return f"gemm_{dtypes}_{self.tile.mr}x{self.tile.nr}_{self.target.name}"

    @property
    def signature(self) -> str:
        return f"{SHORT[self.a]} x {SHORT[self.b]} -> {SHORT[self.family.acc]} -> {SHORT[self.out]}"

    @property
    def symbol(self) -> str:
        """The C identifier of the generated function."""
        return "jax_nano_" + self.name.replace("-", "_")

    @property
    def gemm(self) -> Gemm:
        return Gemm(self.a, self.b, self.out, self.family, self.tile)

    def mlir(self) -> str:
        """The kernel's verified MLIR module, as composed."""
        with ir.new_module() as module:
            self.gemm.emit(module, self.symbol)
            return module.text()

    def microkernels(self) -> dict[str, Microkernel]:
        """Its microkernels by the names of their generated functions."""
        return {m.name(self.symbol): m for m in self.gemm.microkernels()}


def kernels() -> Iterator[Kernel]:
    """Every kernel of the package, in a fixed order."""
    for target in TARGETS.values():
        yield _fma(target, "float32")


def _fma(target: Target, dtype: str) -> Kernel:
    family = Fma(dtype)
    tile = check(choose(target, ir.elem_bytes(dtype)), target)
    why = f"one vfmadd231 a vector and K value; {tile.registers} of {target.vector_registers} registers"
    return Kernel(target, dtype, dtype, dtype, family, tile, why)


def find(name: str) -> Kernel:
    """The kernel of this name; KeyError names the known ones."""
    known = {k.name: k for k in kernels()}
    if name not in known:
        raise KeyError(f"no kernel {name!r}; known: {', '.join(known)}")
    return known[name]
