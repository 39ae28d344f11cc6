"""An f32 as a sum of bf16 parts, for the DotAlgorithms BF16_BF16_F32, _X3 and _X6.

Part 0 is the value rounded to bf16, part 1 the rest rounded to bf16, part 2 what is left then. Each part has 8 of
f32's 24 significant bits, so three parts hold an f32 exactly unless it is near the ends of the exponent range.
"""

from __future__ import annotations

from jax_nano._core import spec

from .. import ir

FINITE = 3
"""The number of part 0 without Inf and NaN, which are zero: Inf times the rest of 1.0, zero, must add no NaN."""

ALGORITHMS: dict[str, tuple[tuple[int, int], ...]] = {
    name: tuple((a or (FINITE if b else 0), b or (FINITE if a else 0)) for a, b in pairs)
    for name, pairs in spec.ALGORITHMS.items()
}
"""Products of parts for each algorithm, small ones first. Only the last one sees Inf and NaN."""


def part_of(v: ir.Value, part: int) -> ir.Value:
    """The bf16 bits of a part of f32 values, scalar or vector.

    An Inf or NaN has no rest: its further parts are zero, so that the value counts once.
    """
    if part == FINITE:
        rounded = _rounded(v)
        return ir.convert(ir.zero_unless_finite(rounded, rounded), "float32", "bfloat16")
    rest = v
    for _ in range(part):
        rounded = _rounded(rest)
        rest = ir.zero_unless_finite(ir.subtract(rest, rounded), rounded)
    return ir.convert(rest, "float32", "bfloat16")


def _rounded(v: ir.Value) -> ir.Value:
    """The f32 values nearest to ``v`` that are bf16's."""
    return ir.convert(ir.convert(v, "float32", "bfloat16"), "bfloat16", "float32")
