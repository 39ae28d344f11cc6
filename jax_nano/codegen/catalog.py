"""THE list of kernels: target x signature x register tile, with reasons.

It follows from the spec's targets and from what their nanokernels serve. Registry, tests and benchmarks all read it
(through the manifest), so no kernel exists untested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import ATTENTION_SIGNATURES, DEFAULT_ALGORITHM, DTYPES, Signature

from . import ir, nanokernel, small
from .amx_microkernel import TILE_REGISTERS, AmxMicrokernel, block_tile
from .attention.kernel import Attention
from .gemm import Gemm
from .generated import Generated
from .inner_microkernel import InnerMicrokernel
from .microkernel import Microkernel
from .nanokernel import Family, Served
from .sweep_microkernel import SweepMicrokernel
from .target import TARGETS, Target
from .tile import Tile, check, packed_tile


@dataclass(frozen=True)
class Kernel(Generated):
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

    INFO = spec.KERNEL_INFO

    @property
    def name(self) -> str:
        dtypes = "_".join(DTYPES[d].short for d in (self.a, self.b, self.family.acc, self.out))
        algorithm = "" if self.algorithm == DEFAULT_ALGORITHM else f"_{self.algorithm.lower()}"
        return f"gemm_{dtypes}{algorithm}_{self.tile.mr}x{self.tile.nr}_{self.target.name}"

    @property
    def signature(self) -> str:
        algorithm = "" if self.algorithm == DEFAULT_ALGORITHM else f" ({self.algorithm})"
        a, b, acc, out = (DTYPES[x].short for x in (self.a, self.b, self.family.acc, self.out))
        return f"{a} x {b} -> {acc} -> {out}{algorithm}"

    @property
    def gemm(self) -> Gemm:
        return Gemm(self.target, self.a, self.b, self.out, self.family, self.tile)

    def facts(self) -> dict[str, Any]:
        family, gemm = self.family, self.gemm
        return {
            "lhs": self.a,
            "rhs": self.b,
            "acc": family.acc,
            "out": self.out,
            "algorithm": self.algorithm,
            "mr": self.tile.mr,
            "nr": self.tile.nr,
            "kr": family.kr * family.steps_at_once,
            "a_panel_bytes": ir.elem_bytes(family.a_elem) * len(family.parts),
            "b_panel_bytes": ir.elem_bytes(family.b_elem) * len(family.parts),
            "b_header_bytes": ir.elem_bytes(family.unit) * family.column_sums,
            "direct_a": gemm.direct_a,
            "direct_b": gemm.direct_b,
            "pairs_most": small.MOST if small.serves(gemm) and not gemm.direct_b else 0,
            "inner": gemm.inner is not None,
            "sweep": gemm.sweep is not None,
            "narrow_out": ir.elem_bytes(self.out) < ir.elem_bytes(family.acc),
            "epilogue": gemm.epilogue is not None,
            "lanes": self.tile.lanes,
            "direct_vectors": "".join(map(str, gemm.direct_vectors)),
        }

    def mlir(self) -> str:
        with ir.new_module() as module:
            self.gemm.emit(module, self.symbol)
            return module.text()

    def microkernels(self) -> dict[str, Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Its microkernels by the names of their generated functions."""
        return {m.name(self.symbol): m for m in self.gemm.microkernels()}


@dataclass(frozen=True)
class AttentionKernel(Generated):
    """One generated attention.

    Attributes:
      target: the instruction set it is compiled for.
      q, kv: dtype names of queries and results, and of keys and values.
      family: the instructions of its nanokernel, which sum in float32.
      tile: the register tile of its microkernel.
      why: the reason for this family and tile, for people.
    """

    target: Target
    q: str
    kv: str
    family: Family
    tile: Tile
    why: str

    INFO = spec.ATTENTION_INFO

    @property
    def name(self) -> str:
        q, kv = (DTYPES[d].short for d in (self.q, self.kv))
        return f"attention_{q}_{kv}_{self.tile.mr}x{self.tile.nr}_{self.target.name}"

    @property
    def signature(self) -> str:
        q, kv = (DTYPES[d].short for d in (self.q, self.kv))
        return f"{q}, {kv} -> f32 -> {q}"

    @property
    def attention(self) -> Attention:
        return Attention(self.target, self.q, self.kv, self.family, self.tile)

    def facts(self) -> dict[str, Any]:
        family, attention = self.family, self.attention
        return {
            "q": self.q,
            "kv": self.kv,
            "mr": self.tile.mr,
            "nr": self.tile.nr,
            "kr": family.kr * family.steps_at_once,
            "unit": attention.unit,
            "lanes": self.tile.lanes,
            "pack_bytes": ir.elem_bytes(family.b_elem),
            "few": attention.inner is not None,
            "converts": attention.converts,
        }

    def mlir(self) -> str:
        with ir.new_module() as module:
            self.attention.emit(module, self.symbol)
            return module.text()

    def microkernels(self) -> dict[str, Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Its microkernels by the names of their generated functions."""
        return {m.name(self.symbol): m for m in self.attention.microkernels()}


def attentions() -> Iterator[AttentionKernel]:
    """Every generated attention, in a fixed order: of each target those whose products it has instructions for."""
    products = {Signature(q, kv, "float32"): (q, kv) for q, kv in ATTENTION_SIGNATURES}
    for target in TARGETS.values():
        for served in nanokernel.served(target):
            if served.signature in products and served.algorithm == DEFAULT_ALGORITHM:
                kernel = _kernel(target, served)
                q, kv = products[served.signature]
                yield AttentionKernel(target, q, kv, kernel.family, kernel.tile, kernel.why)


def kernels() -> Iterator[Kernel]:
    """Every matrix product of the package, in a fixed order."""
    for target in TARGETS.values():
        for served in nanokernel.served(target):
            yield _kernel(target, served)


def _kernel(target: Target, served: Served) -> Kernel:
    family = served.family
    if target.tiles:
        tile, used = block_tile(), f"2 x 2 tiles: 4 loads for 4 products, 7 of {TILE_REGISTERS} tile registers"
    else:
        temporaries = family.temporaries
        tile = check(packed_tile(target, ir.elem_bytes(family.acc), temporaries), target, temporaries)
        used = f"{tile.registers + temporaries} of {target.vector_registers} registers"
    return Kernel(target, *served.signature, family, tile, served.algorithm, f"{served.why}; {used}")


def find(name: str) -> Kernel | AttentionKernel:
    """The kernel of this name; KeyError names the known ones."""
    known: dict[str, Kernel | AttentionKernel] = {k.name: k for k in kernels()}
    known |= {k.name: k for k in attentions()}
    if name not in known:
        raise KeyError(f"no kernel {name!r}; known: {', '.join(known)}")
    return known[name]
