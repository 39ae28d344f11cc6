"""Products of tiles (AMX): 16 x 16 accumulators take 16 units along K of 16 rows of A and 16 columns of B at once.

A tile is 16 rows of 64 bytes. A's rows are rows of A, each with 16 units of K; B's rows are K steps, each with the
units of 16 columns. Meaning, in NumPy, of ``acc (+)= product(a, b)`` with a and b seen as arrays of elements:

    a = a.reshape(16, 16, kr); b = b.reshape(16, 16, kr)            # [row, step, r] and [step, column, r]
    integers:  acc += np.einsum("isr,sjr->ij", a, b)                # modulo 2**32
    bf16:      for s in range(16): even += a[:, s, 0] * b[s, :, 0]; odd += a[:, s, 1] * b[s, :, 1]
               acc += even + odd

where even and odd start from zero, each ``+=`` of a product is one fused multiply-add, and all operations round to
nearest even, take subnormal operands as zero and flush subnormal results (the vendor's description of TDPBF16PS).

The tile type of LLVM's dialect is used as it is. MLIR's amx dialect would add memrefs around the same intrinsics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir as mlir

from jax_nano._core import spec
from jax_nano._core.spec import DTYPES, Signature, Target

from .. import ir
from . import Served
from .bf16_parts import ALGORITHMS, part_of

ROWS = 16  # of a tile
UNITS = 16  # in a row of a tile
PRODUCT_CYCLES = 16  # one for each row: 512 multiply-adds of bf16 a cycle, 1024 of bytes (Sapphire Rapids)
LOAD_CYCLES = 8  # 16 rows of 64 bytes, two a cycle
_UNIT_BYTES = 4


@dataclass(frozen=True)
class AmxDot:
    """One instruction that multiplies tiles.

    Attributes:
      instruction: its mnemonic, which is also LLVM's name for it.
    """

    instruction: str
    acc: str
    kr: int
    a_elem: str
    b_elem: str
    parts: tuple[tuple[int, int], ...] = ((0, 0),)
    unit: str = "int32"
    steps_at_once: int = UNITS
    column_sums: bool = False
    temporaries: int = 0
    unrolls: bool = True

    @classmethod
    def of_bf16(cls, parts: tuple[tuple[int, int], ...] = ((0, 0),)) -> AmxDot:
        return cls("tdpbf16ps", "float32", 2, "bfloat16", "bfloat16", parts)

    @classmethod
    def of_bytes(cls, a: str, b: str) -> AmxDot:
        """For any signs: there is an instruction for each combination."""
        signs = "".join("u" if DTYPES[x].kind == "uint" else "s" for x in (a, b))
        return cls(f"tdpb{signs}d", "int32", 4, a, b)

    @property
    def instructions(self) -> tuple[str, int]:
        return (f"{self.instruction}$", 1)

    def prepare_a(self, v: ir.Value, source: str, part: int) -> ir.Value:
        if self.acc == "int32" or source == "bfloat16":
            return v
        return part_of(ir.convert(v, source, "float32"), part)

    prepare_b = prepare_a

    def product(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        shape = [*_shape(), ir.scalar_constant(UNITS * _UNIT_BYTES, "int16")]
        return _intrinsic(self.instruction, [*shape, acc, a, b])

    def narrowed(self, sums: Sequence[ir.Value], out: str) -> list[ir.Value]:
        return [ir.convert(v, self.acc, out) for v in sums]


def zero() -> ir.Value:
    """A new tile of zeros: each accumulator needs its own, or LLVM copies tiles through memory."""
    return _intrinsic("tilezero", _shape())


def load(p: ir.Ptr, stride: ir.Size) -> ir.Value:
    """The tile whose rows begin at p and ``stride`` elements of 4 bytes further on each."""
    return _intrinsic("tileloadd64", [*_shape(), p.value, ir.as_value(stride * _UNIT_BYTES)])


def store(tile: ir.Value, p: ir.Ptr, stride: ir.Size) -> None:
    """Writes all of a tile, rows as for ``load``."""
    ir.run_intrinsic("llvm.x86.tilestored64.internal", [*_shape(), p.value, ir.as_value(stride * _UNIT_BYTES), tile])


def _shape() -> list[ir.Value]:
    """Rows, and bytes in a row."""
    return [ir.scalar_constant(ROWS, "int16"), ir.scalar_constant(UNITS * _UNIT_BYTES, "int16")]


def _intrinsic(name: str, args: list[ir.Value]) -> ir.Value:
    return ir.call_intrinsic(f"llvm.x86.{name}.internal", mlir.Type.parse("!llvm.x86_amx"), args)


def kernels(target: Target) -> Iterator[Served]:
    """Products of bf16, the algorithms that name it, and every signature of bytes."""
    for out in ("float32", "bfloat16"):
        why = "tdpbf16ps: 16 times the products of vfmadd231"
        yield Served(Signature("bfloat16", "bfloat16", out), AmxDot.of_bf16(), why)
    for algorithm, parts in ALGORITHMS.items():
        why = f"{len(parts)} tdpbf16ps on bf16 parts of f32"
        yield Served(Signature("float32", "float32", "float32"), AmxDot.of_bf16(parts), why, algorithm)
    for signature in spec.signatures("int32"):
        family = AmxDot.of_bytes(signature.a, signature.b)
        yield Served(signature, family, f"{family.instruction}: takes these signs as they are")
