"""An f32 as a sum of bf16 parts, for the DotAlgorithms BF16_BF16_F32, _X3 and _X6.

Part 0 is the value rounded to bf16, part 1 the rest rounded to bf16, part 2 what is left then. Each part has 8 of
f32's 24 significant bits, so three parts hold an f32 exactly unless it is near the ends of the exponent range.
"""

from __future__ import annotations

from .. import ir

ALGORITHMS: dict[str, tuple[tuple[int, int], ...]] = {
    "BF16_BF16_F32": ((0, 0),),
    "BF16_BF16_F32_X3": ((1, 0), (0, 1), (0, 0)),
    "BF16_BF16_F32_X6": ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0)),
}
"""Products of parts for each algorithm, small ones first."""


def part_of(v: ir.Value, part: int) -> ir.Value:
    """The bf16 bits of a part of f32 values, scalar or vector.

    An Inf or NaN has no rest: its further parts are zero, so that the value counts once.
    """
    rest = v
    for _ in range(part):
        rounded = ir.convert(ir.convert(rest, "float32", "bfloat16"), "bfloat16", "float32")
        rest = ir.zero_unless_finite(ir.subtract(rest, rounded), rounded)
    return ir.convert(rest, "float32", "bfloat16")
