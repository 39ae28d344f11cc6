"""Nanokernels: the straight-line body of one register tile and one K step.

:class:`Family` is what an instruction family must say about itself (one file per family beside this one);
:func:`step` composes any family's operations in the order that keeps every accumulator in a register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..ir import Value
from ..tile import Tile


class Family(Protocol):
    """One way to multiply and add: the instructions of a K step.

    Attributes:
      kr: K values that one step consumes; packed operands interleave so many.
      a_panel, b_panel: dtype names of the elements of A and B that the nanokernel loads.
      acc: dtype name of the accumulator.
      instructions: a regular expression for the mnemonics that multiply, and how many of them one product takes.
    """

    @property
    def kr(self) -> int: ...
    @property
    def a_panel(self) -> str: ...
    @property
    def b_panel(self) -> str: ...
    @property
    def acc(self) -> str: ...
    @property
    def instructions(self) -> tuple[str, int]: ...

    def cycles_per_product(self, cpu: str) -> float:
        """The fewest cycles that a product of full vectors takes on an llvm-mca model, by its issue ports alone."""
        ...

    def product(self, a: Value, b: Value, acc: Value) -> Value:
        """``acc + a * b`` for vectors of ``kr`` interleaved K values."""
        ...


def step(
    tile: Tile,
    family: Family,
    load_a: Callable[[int], Value],
    load_b: Callable[[int], Value],
    accumulators: Sequence[Value],
) -> list[Value]:
    """One K step of a register tile: holds the smaller side, streams the larger one through one register.

    Args:
      tile: its shape.
      family: the instructions.
      load_a: emits the load and broadcast of A's row i.
      load_b: emits the load of B's vector j.
      accumulators: mr * nv vectors, row by row.

    Returns:
      The new accumulators. With the other order the same 6x16 tile spills three accumulators a step and runs at
      41 of 103 GFLOP/s (EPYC, AVX2).
    """
    acc = list(accumulators)
    if tile.holds_b:
        held = [load_b(j) for j in range(tile.nv)]
        for i in range(tile.mr):
            streamed = load_a(i)
            for j in range(tile.nv):
                acc[i * tile.nv + j] = family.product(streamed, held[j], acc[i * tile.nv + j])
    else:
        held = [load_a(i) for i in range(tile.mr)]
        for j in range(tile.nv):
            streamed = load_b(j)
            for i in range(tile.mr):
                acc[i * tile.nv + j] = family.product(held[i], streamed, acc[i * tile.nv + j])
    return acc
