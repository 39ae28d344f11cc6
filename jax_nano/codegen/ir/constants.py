"""Constants: one operation for each value that a function uses, at its beginning.

LLVM's IR has none of these operations, so where they stand changes nothing of it; but one for each use was a quarter of
a module, which MLIR's tools read and rewrite.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


class _Functions(threading.local):
    def __init__(self) -> None:
        self.open: list[tuple[ir.Block, dict[Hashable, ir.Value]]] = []


_FUNCTIONS = _Functions()


@contextlib.contextmanager
def of_function(block: ir.Block) -> Iterator[None]:
    """Constants that are asked for inside stand at the beginning of this block, the function's first."""
    _FUNCTIONS.open.append((block, {}))
    try:
        yield
    finally:
        _FUNCTIONS.open.pop()


def constant(ty: ir.Type, attribute: ir.Attribute) -> ir.Value:
    """The constant with this value in the function that is being written."""
    return _found((ty, attribute), lambda: arith.constant(ty, attribute))


def size(number: int) -> ir.Value:
    """The 64-bit integer in the function that is being written."""
    return _found(number, lambda: arith.constant(ir.IntegerType.get_signless(64), number))


def bit(value: bool) -> ir.Value:
    """The truth value in the function that is being written."""
    ty = ir.IntegerType.get_signless(1)
    return constant(ty, ir.IntegerAttr.get(ty, int(value)))


def _found(key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
    block, known = _FUNCTIONS.open[-1]
    if key not in known:
        with ir.InsertionPoint.at_block_begin(block):
            known[key] = make()
    return known[key]
