"""What a generated matrix product is composed of: dtypes, instructions and register tile."""

from __future__ import annotations

from dataclasses import dataclass

from . import ir
from .nanokernel import Family
from .target import Target
from .tile import Tile


@dataclass(frozen=True)
class OneProduct:
    """The product, and the way to compute it, that a kernel is composed for and that alone.

    Attributes:
      m, n: the sizes of C. A call may be of a part of it, whose rows and columns begin at multiples of mr and nr.
      fields: the fields of GemmArgs that every call has alike.
      small: by the path of small products (``small``), whatever its size.
    """

    m: int
    n: int
    fields: tuple[tuple[str, int], ...]
    small: bool = False

    def heights(self, mr: int) -> list[int]:
        """Rows that a panel of A may have."""
        return sorted({min(self.m, mr), self.m % mr or min(self.m, mr)})


@dataclass(frozen=True)
class Composition:
    """The choices that all parts of a kernel share.

    Attributes:
      target: the instruction set.
      a, b, out: dtype names of A, B and C in the caller's buffers.
      family: the nanokernel's instructions.
      tile: the register tile for packed operands.
      one: the only product that it computes; None: any.
    """

    target: Target
    a: str
    b: str
    out: str
    family: Family
    tile: Tile
    one: OneProduct | None = None

    @property
    def direct_a(self) -> bool:
        """Whether A can be read where it lies: kr of its elements, side by side, are what microkernels broadcast."""
        return self.a == self.family.a_elem and self.family.steps_at_once == 1 and not self._splits

    @property
    def direct_b(self) -> bool:
        """Whether B can be read where it lies, widened on the way into registers if need be."""
        return self.family.kr == 1 and not self._splits

    @property
    def direct_both(self) -> bool:
        """Whether vectors of both can be taken as they lie, which the inner-product and sweep paths do."""
        family = self.family
        rounds = any(ir.elem_bytes(x) > ir.elem_bytes(y) for x, y in ((self.a, family.a_elem), (self.b, family.b_elem)))
        return not self._splits and not rounds and family.steps_at_once == 1

    @property
    def _splits(self) -> bool:
        """Whether operands are cut into parts, while they are packed."""
        return getattr(self.family, "splits", False)
