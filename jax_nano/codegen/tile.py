"""The register-tile model: which mr x nr block of C lives in registers.

A nanokernel keeps ``mr * nv`` accumulators (nr = nv vectors), holds the smaller side of the outer product in
registers and streams the other through one register, so a tile fits when

    mr * nv + min(mr, nv) + 1 + temporaries <= registers.

*Packed tiles* serve packed operands. Loads must not be their bottleneck: a K step issues ``mr + nv`` loads for
``mr * nv`` products. Of the tiles that remain the largest ``mr`` wins: the macrokernel streams B from L2 and each
vector of B is used mr times, while A's side comes from L1.

*Direct tiles* serve a B that is read once, where it lies, by few rows of A: there memory is the bottleneck, and the
widest tile reads the longest runs of each row of B.
"""

from __future__ import annotations

from dataclasses import dataclass

from .target import Target

MAX_DIRECT_VECTORS = 8


@dataclass(frozen=True)
class Tile:
    """mr rows by nv vectors of ``lanes`` accumulator elements."""

    mr: int
    nv: int
    lanes: int

    @property
    def nr(self) -> int:
        """Columns of the tile, in elements."""
        return self.nv * self.lanes

    @property
    def accumulators(self) -> int:
        return self.mr * self.nv

    @property
    def registers(self) -> int:
        """Vector registers that the nanokernel needs at once, its instructions' temporaries not counted."""
        return self.accumulators + min(self.mr, self.nv) + 1

    @property
    def holds_b(self) -> bool:
        """Whether B's vectors are held and A's elements streamed (else the other way round)."""
        return self.nv <= self.mr


def check(tile: Tile, target: Target, temporaries: int = 0) -> Tile:
    """Returns ``tile``, or raises ValueError naming both numbers if it cannot live in the register file."""
    need = tile.registers + temporaries
    if need > target.vector_registers:
        raise ValueError(
            f"{tile.mr}x{tile.nr} needs {need} vector registers, {target.name} has {target.vector_registers}"
        )
    return tile


def packed_tile(target: Target, acc_bytes: int, temporaries: int = 0) -> Tile:
    """The register tile for packed operands.

    Args:
      target: the instruction set.
      acc_bytes: bytes of an accumulator element.
      temporaries: registers that the instructions need beyond the rule.
    """
    lanes = target.lanes(acc_bytes)
    budget = target.vector_registers - temporaries
    fits = [
        Tile(mr, nv, lanes)
        for nv in range(1, budget)
        for mr in range(1, budget)
        if Tile(mr, nv, lanes).registers <= budget
    ]
    balance = target.loads_per_cycle / target.fma_per_cycle
    # A quarter of the load slots stays free for what the prefetcher refills and for the tile of C.
    unbound = [t for t in fits if (t.mr + t.nv) / t.accumulators <= 0.75 * balance]
    return max(unbound, key=lambda t: (t.mr, t.accumulators))


def direct_tile(panel: Tile, rows: int, target: Target, temporaries: int = 0) -> Tile:
    """The register tile for ``rows`` <= mr rows against a B that is not packed."""
    budget = target.vector_registers - temporaries
    fits = [
        tile
        for nv in range(panel.nv, MAX_DIRECT_VECTORS + 1)
        if (tile := Tile(rows, nv, panel.lanes)).registers <= budget
    ]
    return fits[-1] if fits else Tile(rows, panel.nv, panel.lanes)
