"""Where the five loops of ``macrokernel`` stand: what each hands on to the loops inside of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .arguments import Given
from .ir import Ptr, Size, Value


@dataclass(frozen=True)
class BlockOfRows:
    """Some rows of one product: up to mc.

    Attributes:
      x: the fields of GemmArgs for this product: a, b and c are its operands, next_a and next_b what lies between
        these and those of the next product, in elements; 0 if there is none.
      ic, rows: where they begin, and how many there are.
    """

    x: Given
    ic: Size
    rows: Size


@dataclass(frozen=True)
class BlockOfA:
    """A block of A: these rows, and up to kc values of K.

    Attributes:
      x, ic, rows: as above.
      pc, depth: the values of K.
      is_last_of_m, is_last_of_k: whether the product ends with it, in either direction.
      mode: what microkernels do with earlier sums, and whether there are later ones.
      epilogue: the address of one if the sums are finished here, else 0.
      a: the block where it lies.
      packed_strides: between rows and between steps of a packed panel.
    """

    x: Given
    ic: Size
    rows: Size
    pc: Size
    depth: Size
    is_last_of_m: Value | bool
    is_last_of_k: Value | bool
    mode: Size
    epilogue: Size
    a: Ptr
    packed_strides: tuple[Size, Size]


@dataclass(frozen=True)
class BlockOfColumns:
    """Up to nc columns of B and C that meet a block of A.

    Attributes:
      block: of A.
      jc, cols: where they begin, and how many there are.
      b: B's block where it lies.
    """

    block: BlockOfA
    jc: Size
    cols: Size
    b: Ptr


@dataclass(frozen=True)
class BlockOfB:
    """A block of B where it lies; none if it has no depth."""

    start: Ptr
    depth: Size


@dataclass(frozen=True)
class OperandB:
    """B's block as rows of tiles read it: from panels, or where it lies.

    Attributes:
      columns: the block that it belongs to.
      tile_rows: names of the functions for such a B, by the height of a panel of A.
      b: the first element.
      row_step, panel_step: elements between its rows, and between its panels for each of their columns.
      wrap: of a B where it lies, elements from what stands beside the block to what comes after it.
      next_block: what is wanted after it, to be prefetched.
    """

    columns: BlockOfColumns
    tile_rows: Mapping[int, str]
    b: Ptr
    row_step: Size
    panel_step: Size
    wrap: Size
    next_block: BlockOfB


@dataclass(frozen=True)
class PanelOfA:
    """A panel of A that meets a block of B.

    Attributes:
      operand: that block.
      i, rows: where it begins in the block of A, and its rows, up to tile_rows.
      a, rsa, csa: the panel, packed or where it lies, and units between its rows and between its steps.
      steps: K steps.
      walks: the table of what its row of tiles prefetches.
    """

    operand: OperandB
    i: Size
    rows: Size
    a: Ptr
    rsa: Size
    csa: Size
    steps: Size
    walks: Ptr
