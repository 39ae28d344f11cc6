"""Rows of numbers converted to float32 and back: x, scales, zero points, and the result, of any of their dtypes.

Which dtype a row has is a number, the place of its name in ``DTYPES`` (``jax_nano._core.spec.QUANTIZED_ROWS``), that is
known when the function is called, not when it is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from jax_nano._core.spec import DTYPES, QUANTIZED_ROWS

from .. import ir
from ..arguments import Given
from ..ir import I64, Ptr, Size, Value


@dataclass(frozen=True)
class Rows:
    """The two functions of a module.

    Attributes:
      prefix: of their names.
      lanes: float32 in a vector.
    """

    module: ir.Module
    prefix: str
    lanes: int

    def emit_load(self) -> None:
        """Adds the function behind ``load``."""
        self.module.function(self._name("load"), ["i64", "i64", "float32", "i64", "i64"], self._load, internal=True)

    def emit_store(self) -> None:
        """Adds the function behind ``store``."""
        self.module.function(self._name("store"), ["float32", "i64", "i64", "i64"], self._store, internal=True)

    def emit_gather(self) -> None:
        """Adds the function behind ``gather``."""
        self.module.function(self._name("gather"), ["i64", "i64", "i64", "float32", "i64"], self._gather, internal=True)

    def _name(self, what: str) -> str:
        return f"{self.prefix}_rows_{what}"

    def load(self, source: I64, dtype: Size, to: Ptr, count: Size, step: Size = 1) -> None:
        """``count`` elements at the address ``source`` as float32, ``step`` apart."""
        self.module.call(self._name("load"), [source, dtype, to, count, step])

    @staticmethod
    def of_x(x: Given, row: Size, step: int) -> tuple[I64, Size]:
        """Where a row of x lies, and the dtype for ``load``: pairs of bfloat16 are moved as if they were float32."""
        dtype = x.x_dtype if step == 1 else QUANTIZED_ROWS.index("float32")
        return address(x.x, row, x.rsx // step, dtype), dtype

    def store(self, source: Ptr, to: I64, dtype: Size, count: Size) -> None:
        """``count`` float32 as elements of ``dtype`` at the address ``to``, each rounded once."""
        self.module.call(self._name("store"), [source, to, dtype, count])

    def gather(self, source: I64, dtype: Size, step: Size, to: Ptr, count: Size) -> None:
        """``count`` elements ``step`` apart from the address ``source`` on as float32."""
        self.module.call(self._name("gather"), [source, dtype, step, to, count])

    def scalar(self, address: I64, dtype: Size, index: Size) -> Value:
        """One element as a float32."""

        def one(name: str) -> list[Value]:
            return [_widened(Ptr.of_address(address, name).at(index).load(), name)]

        (v,) = ir.switch(
            dtype, [partial(one, name) for name in QUANTIZED_ROWS], like=[ir.scalar_constant(0, "float32")]
        )
        return v

    def _each_dtype(self, dtype: I64, names: tuple[str, ...], body: Callable[[str], None]) -> None:
        ir.switch(dtype, [partial(body, name) for name in names])

    def _load(self, source: I64, dtype: I64, to: Ptr, count: I64, step: I64) -> None:
        def of(name: str) -> None:
            p = Ptr.of_address(source, name)
            whole = ir.select_size(ir.equal(step, 1), count // self.lanes * self.lanes, 0)
            for i, lanes in self._vectors_and_elements(whole, count):
                to.at(i * step).store(_widened(p.at(i).load(lanes), name))

        self._each_dtype(dtype, QUANTIZED_ROWS, of)

    def _gather(self, source: I64, dtype: I64, step: I64, to: Ptr, count: I64) -> None:
        def of(name: str) -> None:
            p = Ptr.of_address(source, name)
            whole = ir.select_size(ir.equal(step, 1), count // self.lanes * self.lanes, 0)
            for i, lanes in self._vectors_and_elements(whole, count):
                to.at(i).store(_widened(p.at(i * step).load(lanes), name))

        self._each_dtype(dtype, tuple(x for x in QUANTIZED_ROWS if DTYPES[x].kind == "float"), of)

    def _store(self, source: Ptr, to: I64, dtype: I64, count: I64) -> None:
        def of(name: str) -> None:
            p = Ptr.of_address(to, name)
            for i, lanes in self._vectors_and_elements(count // self.lanes * self.lanes, count):
                p.at(i).store(ir.convert(source.at(i).load(lanes), "float32", name))

        self._each_dtype(dtype, tuple(x for x in QUANTIZED_ROWS if DTYPES[x].kind == "float"), of)

    def _vectors_and_elements(self, whole: Size, count: Size) -> Iterator[tuple[I64, int | None]]:
        """The loop over ``whole`` elements by vectors, and the one over the others: where, and how many lanes."""
        for i in ir.range_(0, whole, self.lanes):
            yield i, self.lanes
        for i in ir.range_(whole, count):
            yield i, None


def _widened(v: Value, name: str) -> Value:
    """float32 of an element or a vector of one of these dtypes."""
    if DTYPES[name].kind == "float":
        return ir.convert(v, name, "float32")
    return ir.int32_to_float32(ir.convert(v, name, "int32"))


def address(first: I64, index: Size, pitch: Size, dtype: Size) -> I64:
    """The address of a row, ``index`` rows of ``pitch`` elements behind the first one."""
    at = first + index * pitch * bytes_of(dtype)
    assert isinstance(at, I64)
    return at


def bytes_of(dtype: Size) -> Size:
    """Bytes of an element of one of the dtypes of rows, by its number."""
    size: Size = 0
    for number, name in enumerate(QUANTIZED_ROWS):
        size = ir.select_size(ir.equal(dtype, number), DTYPES[name].bytes, size)
    return size
