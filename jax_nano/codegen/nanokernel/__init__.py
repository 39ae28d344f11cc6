"""Nanokernels: the straight-line body of one register tile and one K step.

:class:`Family` is what an instruction family must say about itself (one file per family beside this one);
:func:`step` composes any family's operations in the order that keeps every accumulator in a register.

Each of those files also says, in a function ``kernels(target)``, which signatures it serves on the targets that name it
in the spec, and with which instructions.

A K step consumes ``kr`` values of K. In a packed panel they lie side by side and form one *unit*: one f32, one f64,
or 32 bits that hold two bf16 or four int8. A microkernel moves units and never looks inside.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from jax_nano._core.spec import DEFAULT_ALGORITHM, Signature, Target

from ..ir import Value, convert
from ..tile import Tile


class Family(Protocol):
    """One way to multiply and add: the instructions of a K step, and the operands they want.

    Attributes:
      acc: dtype name of the accumulator.
      kr: K values that one step consumes.
      a_elem, b_elem: dtype names of the elements in packed panels.
      steps_at_once: K steps that the instructions consume at once, 1 but for tiles; panels are filled up to a multiple.
      unit: dtype name of kr packed elements taken together; accumulators have as many lanes as a vector of units.
      parts: the terms that stand for one product: pairs (part of A, part of B), summed in this order. An operand
        that is taken whole has the one part 0.
      column_sums: whether each panel of B begins with a row of corrections, summed over the panel by
        ``correction``, from which accumulators start instead of zero.
      temporaries: registers the instructions need beyond accumulators, held and streamed operand.
      unrolls: whether the main loop may hold several K steps.
      instructions: a regular expression for the mnemonics that multiply, and how many of them one product takes.
    """

    @property
    def acc(self) -> str: ...
    @property
    def kr(self) -> int: ...
    @property
    def a_elem(self) -> str: ...
    @property
    def b_elem(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def steps_at_once(self) -> int: ...
    @property
    def parts(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def column_sums(self) -> bool: ...
    @property
    def temporaries(self) -> int: ...
    @property
    def unrolls(self) -> bool: ...
    @property
    def instructions(self) -> tuple[str, int]: ...

    def prepare_a(self, v: Value, source: str, part: int) -> Value:
        """The elements (scalar or vector) that stand in A's panel for values of dtype ``source``."""
        ...

    def prepare_b(self, v: Value, source: str, part: int) -> Value:
        """The same for B's panel."""
        ...

    def product(self, a: Value, b: Value, acc: Value) -> Value:
        """``acc + a * b``, summed over the kr values inside each unit. All vectors are as wide as ``acc``."""
        ...

    def narrowed(self, sums: Sequence[Value], out: str) -> list[Value]:
        """Sums that lie side by side as elements of C: as many vectors, or fewer and longer ones."""
        ...


class Served(NamedTuple):
    """A signature that a nanokernel serves.

    Attributes:
      signature: dtypes of A, B and C.
      family: the instructions.
      why: the reason for them, for people.
      algorithm: the DotAlgorithm preset that is computed.
    """

    signature: Signature
    family: Family
    why: str
    algorithm: str = DEFAULT_ALGORITHM


def served(target: Target) -> Iterator[Served]:
    """What the nanokernels of a target serve."""
    for name in target.nanokernels:
        yield from importlib.import_module(f"{__name__}.{name}").kernels(target)


class VectorFamily:
    """What families of vector instructions have in common, unless they say otherwise."""

    acc: str

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0),)

    @property
    def steps_at_once(self) -> int:
        return 1

    @property
    def column_sums(self) -> bool:
        return False

    @property
    def temporaries(self) -> int:
        return 0

    @property
    def unrolls(self) -> bool:
        return True

    def narrowed(self, sums: Sequence[Value], out: str) -> list[Value]:
        return [convert(v, self.acc, out) for v in sums]


class Corrected(Family, Protocol):
    """A family with ``column_sums``."""

    def shift(self) -> Value:
        """A vector of A's units that stand for zero: what its products with B add to the sums is too much."""
        ...

    def correction(self, b: Value, acc: Value) -> Value:
        """The correction ``acc`` with that of one more vector of B's units added."""
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
