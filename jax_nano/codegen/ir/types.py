"""MLIR's types for the names of dtypes, and operations in their generic form."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from jax_nano._core.spec import DTYPES

from .sizes import Value


def operation(
    name: str, results: Sequence[ir.Type], operands: Sequence[Value], *, regions: int = 0, **attributes: ir.Attribute
) -> ir.Operation:
    """An op in generic form: the Python classes of these ops take other arguments in other jaxlib versions."""
    return ir.Operation.create(name, list(results), list(operands), attributes, regions=regions)


def i32_attr(x: int) -> ir.Attribute:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(32), x)


_WORDS = {"ptr": "!llvm.ptr", "i64": "i64", "int64": "i64"}
"""MLIR types of what is no dtype of a kernel; each has 8 bytes."""


def type_of(name: str) -> ir.Type:
    """The MLIR type in memory of a dtype of the spec, or "ptr", "i64", "int64"."""
    return ir.Type.parse(_WORDS.get(name) or DTYPES[name].mlir)


def elem_bytes(name: str) -> int:
    """What an element takes in memory."""
    return 8 if name in _WORDS else DTYPES[name].bytes


def vec(n: int, elem: ir.Type) -> ir.VectorType:
    return ir.VectorType.get([n], elem)
