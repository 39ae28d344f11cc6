"""A model of what a product must cost at least: its multiply-adds, and the bytes that have to move.

Two limits are compared: how many multiply-adds a core can issue in a cycle, and how many bytes it can fetch
in one from the nearest cache that holds the operands and the result. The rest (packing, edges, calls) is
what a kernel adds to the larger of the two. Pure Python; sizes in elements unless they say bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

import ml_dtypes  # which gives NumPy the names of narrow dtypes; JAX itself must not be imported yet by `run`
import numpy as np

from jax_nano._core import spec

# Multiply-adds that one core starts in a cycle with registers as operands: two vector instructions, each with
# one accumulator a lane and `kr` K values a lane; a tile instruction, 16 x 16 sums over 64 bytes of K in 16
# cycles. Cores that execute 512-bit instructions in two halves start one (AMD's Zen 4).
VECTORS_PER_CYCLE: Final = 2
TILE_BYTES_PER_CYCLE: Final = 16 * 16 * 64 // 16

# Bytes a cycle that one core reads in long runs, typical of servers since 2019. (Memory: an EPYC with Zen 3
# gave 44 GB/s, 13 bytes a cycle, to one core, November 2026; the benchmark measures yours.)
BYTES_PER_CYCLE: Final = {"L1": 64.0, "L2": 32.0, "L3": 20.0, "memory": 13.0}

# Products of rounded parts that stand for one product of a DotAlgorithm.
PARTS: Final = {name: len(pairs) for name, pairs in spec.ALGORITHMS.items()}


@cache
def element_bytes(dtype: str) -> int:
    """What an element takes in memory, for the name of any dtype that JAX has."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


@dataclass(frozen=True)
class Product:
    """`batch` products C[m, n] = A[m, k] B[k, n] with their dtypes' names."""

    m: int
    n: int
    k: int
    batch: int
    lhs: str
    rhs: str
    out: str
    algorithm: str = spec.DEFAULT_ALGORITHM

    @property
    def multiply_adds(self) -> int:
        """Those that mathematics asks for; an algorithm of several parts computes a multiple of them."""
        return self.batch * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Each operand read once and the result written once."""
        a = self.m * self.k * element_bytes(self.lhs)
        b = self.k * self.n * element_bytes(self.rhs)
        c = self.m * self.n * element_bytes(self.out)
        return self.batch * (a + b + c)


@dataclass(frozen=True)
class Cost:
    """The two limits in cycles of one core, and what follows from them."""

    product: Product
    peak: float  # multiply-adds a cycle
    level: str  # where the operands and the result fit: a key of BYTES_PER_CYCLE
    compute_cycles: float
    memory_cycles: float

    @property
    def flops_per_byte(self) -> float:
        return 2 * self.product.multiply_adds / self.product.bytes if self.product.bytes else 0.0

    @property
    def share_of_peak(self) -> float:
        """The part of the peak that memory allows."""
        slower = max(self.compute_cycles, self.memory_cycles)
        return self.compute_cycles / slower if slower else 1.0

    @property
    def bound(self) -> str:
        return "multiply-adds" if self.compute_cycles >= self.memory_cycles else self.level


def cost(product: Product, kernel_target: str, acc: str, kr: int, caches: dict[str, int], *, halves: bool) -> Cost:
    """The cost of a product on one core.

    Args:
      product: what is computed.
      kernel_target, acc, kr: of the kernel that computes it.
      caches: bytes of "l1d", "l2" and "l3".
      halves: whether the CPU executes 512-bit instructions in two halves.
    """
    peak = multiply_adds_per_cycle(kernel_target, acc, kr, product.lhs, halves=halves)
    level = level_of(product.bytes, caches)
    work = product.multiply_adds * PARTS.get(product.algorithm, 1)
    return Cost(product, peak, level, work / peak, product.bytes / BYTES_PER_CYCLE[level])


def multiply_adds_per_cycle(target: str, acc: str, kr: int, operand: str, *, halves: bool) -> float:
    """The peak of one core for kernels of this target."""
    facts = spec.TARGETS[target]
    if facts.tiles:
        return TILE_BYTES_PER_CYCLE / (1 if element_bytes(operand) == 1 else 2)
    width = facts.vector_bits // 8
    vectors = VECTORS_PER_CYCLE / (2 if halves and width == 64 else 1)
    return vectors * width / element_bytes(acc) * kr


def level_of(size_bytes: int, caches: dict[str, int]) -> str:
    """The nearest of a core's caches that holds so many bytes, or "memory"."""
    for level, name in (("L1", "l1d"), ("L2", "l2"), ("L3", "l3")):
        if size_bytes <= caches[name]:
            return level
    return "memory"


def tiles(size: int, unit: int) -> int:
    """Register tiles that cover so many rows or columns."""
    return math.ceil(size / unit)


def duration(ns: float) -> str:
    """A time in words, e.g. "12 us"."""
    for limit, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "us")):
        if ns >= limit:
            return f"{ns / limit:.3g} {unit}"
    return f"{ns:.3g} ns"
