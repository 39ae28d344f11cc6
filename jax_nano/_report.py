"""What became of each product that was compiled in this process: kept as it happens, told when it is asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from jax_nano._shapes import Labels


class Array(NamedTuple):
    """An array as it lies in memory, its dimensions in row-major order."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Product(NamedTuple):
    """A product of a program, and what became of it."""

    program: str
    source: str  # what JAX calls the operation, e.g. "jit(loss)/dot_general"
    arrays: tuple[Array, Array, Array]  # lhs, rhs, out
    labels: Labels  # of the arrays' dimensions
    algorithm: str
    declined: str | None  # why XLA computes it; None: a kernel does


_lock = threading.Lock()
_products: Counter[Product] = Counter()


def add(products: Iterable[Product]) -> None:
    """Remembers products of a program that is being compiled."""
    with _lock:
        _products.update(products)


def products() -> list[tuple[Product, int]]:
    """Every product compiled so far, in order, and how often."""
    with _lock:
        return list(_products.items())


def clear() -> None:
    """Forgets every product."""
    with _lock:
        _products.clear()
