"""The register-tile model: which mr x nr block of C lives in registers.

A nanokernel keeps ``mr * nv`` accumulators (nr = nv vectors), holds the smaller side of the outer product in
registers and streams the other through one register, so a tile fits when

    mr * nv + min(mr, nv) + 1 <= registers.

Among the tiles that fit, loads must not be the bottleneck: a K step issues ``mr + nv`` loads for ``mr * nv``
fused multiply-adds. Of those that remain the largest ``mr`` wins: the macrokernel streams B from L2 and each
vector of B is used mr times, while A's side comes from L1.
"""

from __future__ import annotations

from dataclasses import dataclass

from .target import Target


@dataclass(frozen=True)
class Tile:
    """mr rows by nv vectors of ``lanes`` accumulator elements; ``kr`` K values are consumed per step."""

    mr: int
    nv: int
    lanes: int
    kr: int = 1

    @property
    def nr(self) -> int:
        """Columns of the tile, in elements."""
        return self.nv * self.lanes

    @property
    def accumulators(self) -> int:
        return self.mr * self.nv

    @property
    def registers(self) -> int:
        """Vector registers that the nanokernel needs at once."""
        return self.accumulators + min(self.mr, self.nv) + 1

    @property
    def holds_b(self) -> bool:
        """Whether B's vectors are held and A's elements streamed (else the other way round)."""
        return self.nv <= self.mr


def check(tile: Tile, target: Target, temporaries: int = 0) -> Tile:
    """Returns ``tile``, or raises ValueError naming both numbers if it cannot live in the register file."""
    need = tile.registers + temporaries
    if need > target.vector_registers:
        raise ValueError(f"{tile.mr}x{tile.nr} needs {need} vector registers, {target.name} has {target.vector_registers}")
    return tile


def choose(target: Target, acc_bytes: int, *, kr: int = 1, temporaries: int = 0) -> Tile:
    """The register tile for compute-bound products.

    Args:
      target: the instruction set.
      acc_bytes: bytes of an accumulator element.
      kr: K values per step.
      temporaries: registers that the nanokernel needs beyond the rule, e.g. for widened operands.
    """
    lanes = target.lanes(acc_bytes)
    budget = target.vector_registers - temporaries
    fits = [
        Tile(mr, nv, lanes, kr)
        for nv in range(1, budget)
        for mr in range(1, budget)
        if mr * nv + min(mr, nv) + 1 <= budget
    ]
    balance = target.loads_per_cycle / target.fma_per_cycle
    # One load port stays free for the prefetcher's refills and the C tile: ask for a quarter of slack.
    unbound = [t for t in fits if (t.mr + t.nv) / t.accumulators <= 0.75 * balance]
    return max(unbound, key=lambda t: (t.mr, t.accumulators))
