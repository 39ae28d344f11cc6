"""Targets, which are the spec's, and the CPU cores for which ``report`` judges their loops."""

from __future__ import annotations

from dataclasses import dataclass

from jax_nano._core.spec import TARGETS, Target

__all__ = ["CORES", "TARGETS", "Core", "Target"]


@dataclass(frozen=True)
class Core:
    """What its vendor publishes of a CPU core: Intel's Optimization Reference Manual, AMD's Optimization Guides.

    Attributes:
      name: LLVM's name for it.
      slots: operations that enter the back end in a cycle.
      products, additions, loads: vector operations a cycle, by vector bits: multiplications of any kind, 32-bit integer
        additions (which share pipes with the products), and loads, broadcast ones too.
    """

    name: str
    slots: int
    products: dict[int, int]
    additions: dict[int, int]
    loads: dict[int, int]


CORES: dict[str, Core] = {
    c.name: c
    for c in (
        # Zen runs 512-bit operations in two halves.
        Core("znver3", 6, {256: 2}, {256: 4}, {256: 2}),
        Core("znver4", 6, {256: 2, 512: 1}, {256: 4, 512: 2}, {256: 2, 512: 1}),
        Core("skylake", 4, {256: 2}, {256: 3}, {256: 2}),
        # While 512-bit operations run, port 1 takes none of any width: ports 0 and 5 are left.
        Core("skylake-avx512", 4, {512: 2}, {512: 2}, {512: 2}),
        Core("icelake-server", 5, {512: 2}, {512: 2}, {512: 2}),
        Core("sapphirerapids", 6, {512: 2}, {512: 2}, {512: 2}),
        Core("alderlake", 6, {256: 2}, {256: 3}, {256: 3}),
    )
}
