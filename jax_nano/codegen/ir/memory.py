"""Memory: typed addresses, loads, stores, prefetches, and room on the stack."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .sizes import I64, Size, Value, as_value, is_constant
from .types import elem_bytes, i32_attr, operation, type_of, vec
from .vectors import zeros

_DYNAMIC = -(2**31)  # MLIR's mark for "this index is an operand"


class Ptr:
    """A typed address. Offsets are in elements of ``elem`` (a dtype name)."""

    __slots__ = ("elem", "value")

    def __init__(self, value: Value, elem: str):
        self.value = value
        self.elem = elem

    @property
    def type(self) -> ir.Type:
        return type_of(self.elem)

    def at(self, offset: Size) -> Ptr:
        """The address ``offset`` elements further on."""
        if is_constant(offset, 0):
            return self
        constant = offset if isinstance(offset, int) and -(2**31) < offset < 2**31 else None
        gep = operation(
            "llvm.getelementptr",
            [self.value.type],
            [self.value] if constant is not None else [self.value, as_value(offset)],
            elem_type=ir.TypeAttr.get(self.type),
            rawConstantIndices=ir.DenseI32ArrayAttr.get([_DYNAMIC if constant is None else constant]),
        )
        return Ptr(gep.result, self.elem)

    def at_scaled(self, index: Size, scale: int) -> Ptr:
        """The address ``index * scale`` BYTES further (scale 1, 2, 4 or 8): one x86 address ``p + index * scale``."""
        return Ptr(Ptr(self.value, {1: "int8", 2: "int16", 4: "int32", 8: "int64"}[scale]).at(index).value, self.elem)

    @staticmethod
    def of_address(address: I64, elem: str) -> Ptr:
        """What an integer points to."""
        return Ptr(operation("llvm.inttoptr", [type_of("ptr")], [address.value]).result, elem)

    @property
    def address(self) -> I64:
        """The address as an integer."""
        return I64(operation("llvm.ptrtoint", [type_of("i64")], [self.value]).result)

    def as_type(self, elem: str) -> Ptr:
        return Ptr(self.value, elem)

    def load(self, lanes: int | None = None, mask: Value | None = None, alignment: int | None = None) -> Value:
        """A scalar (no ``lanes``) or a vector; lanes that ``mask`` leaves out are not read and give zero.

        The address is a multiple of ``alignment`` bytes, unless given of an element's.
        """
        align = alignment or elem_bytes(self.elem)
        if lanes is None:
            return llvm.load(self.type, self.value, alignment=align)
        ty = vec(lanes, self.type)
        if mask is None:
            return llvm.load(ty, self.value, alignment=align)
        operands = [self.value, mask, zeros(lanes, self.elem)]
        return operation("llvm.intr.masked.load", [ty], operands, alignment=i32_attr(align)).result

    def store(self, value: Value, mask: Value | None = None) -> None:
        align = elem_bytes(self.elem)
        if mask is None:
            llvm.store(value, self.value, alignment=align)
        else:
            operation("llvm.intr.masked.store", [], [value, self.value, mask], alignment=i32_attr(align))

    def prefetch(self, *, write: bool = False, level: int = 1) -> None:
        """Fetches the line into the data cache of this level and all beyond it."""
        data_cache, keep = i32_attr(1), i32_attr(4 - level)
        operation("llvm.intr.prefetch", [], [self.value], rw=i32_attr(int(write)), hint=keep, cache=data_cache)


def select_ptr(condition: Value | bool, a: Ptr, b: Ptr) -> Ptr:
    """One of two addresses of elements of the same type."""
    if isinstance(condition, bool):
        return a if condition else b
    return Ptr(arith.select(condition, a.value, b.value), a.elem)


def alloca(count: int, elem: str) -> Ptr:
    """Room for ``count`` elements on the stack, 64-byte aligned. Only at the top of a function."""
    op = operation(
        "llvm.alloca",
        [type_of("ptr")],
        [as_value(count)],
        elem_type=ir.TypeAttr.get(type_of(elem)),
        alignment=ir.IntegerAttr.get(type_of("int64"), 64),
    )
    return Ptr(op.result, elem)
