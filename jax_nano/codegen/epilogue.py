"""The epilogue: what becomes of finished sums before they are C.

    c = activation(scale * sum + bias[column]) + residual        rounded to C's dtype once

On the last pass over K a row of tiles has its microkernels leave each tile on the stack instead of in C, a kilobyte or
two that stay in L1 (as all of a tile's registers would have to at a call), and calls the one function of the kernel
that is emitted here: it takes a vector at a time through all of the above in registers and writes C, once. So the K
loops and the microkernels are those of a plain product, which pays for one branch a tile.

    void name(sums, ld, rows, cols, c, rsc, old, rs_old, mode, column, epilogue)

``sums`` holds rows of whole vectors, ``ld`` apart; with ADD in ``mode`` the ``old`` sums are added to them. The other
operands come from the ``Epilogue`` (csrc/plan/kernel_abi.h) that GemmArgs points to: bias and residual have C's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from . import ir
from .activation import FUNCTIONS
from .ir import I64, Ptr, Size, Value
from .microkernel import MORE

EPILOGUE = names(spec.EPILOGUE)


@dataclass(frozen=True)
class Epilogue:
    """The function that finishes a tile.

    Attributes:
      out: dtype name of C, bias and residual.
      acc: dtype name of the sums.
      lanes: sums in a vector.
      masks: whether vectors of any dtype are masked at little cost; else the last, partial vector of a row goes
        through copies on the stack.
    """

    out: str
    acc: str
    lanes: int
    masks: bool

    PARAMS = ("sums", "ld", "rows", "cols", "c", "rsc", "old", "rs_old", "mode", "column", "epilogue")

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the function to the module (once) and returns its name."""
        name = f"{prefix}_epilogue"
        pointers = {"sums": self.acc, "c": self.out, "old": self.acc}
        module.function(name, {p: pointers.get(p, "i64") for p in self.PARAMS}, self._body, internal=True)
        return name

    def _body(
        self,
        sums: Ptr,
        ld: I64,
        rows: I64,
        cols: I64,
        c: Ptr,
        rsc: I64,
        old: Ptr,
        rs_old: I64,
        mode: I64,
        column: I64,
        epilogue: I64,
    ) -> None:
        nothing = {dtype: self._nothing(dtype) for dtype in (self.acc, self.out)}
        copies = None if self.masks else _Copies(self.lanes, self.acc, self.out)
        given = Ptr.of_address(epilogue, "int64")
        fields = {name: I64(given.at(i).load()) for i, name in enumerate(EPILOGUE)}
        scale = given.at(EPILOGUE.index("scale")).as_type("float64").load()
        factor = ir.splat(ir.convert(scale, "float64", self.acc), self.lanes)
        bias = Ptr.of_address(fields["bias"], self.out).at(column)
        adds, has_bias = ir.negate(ir.equal(mode % 2, 0)), ir.negate(ir.equal(fields["bias"], 0))
        has_residual = ir.negate(ir.equal(fields["has_residual"], 0))

        def vector(i: I64, j: I64) -> None:
            here = c.at(i * rsc + j)
            residual = Ptr(here.as_type("int8").at(fields["residual_offset"]).value, self.out)
            sources: Sequence[Ptr] = (
                ir.select_ptr(adds, old.at(i * rs_old + j), nothing[self.acc]),
                ir.select_ptr(has_bias, bias.at(j), nothing[self.out]),
                ir.select_ptr(has_residual, residual, nothing[self.out]),
            )
            v = sums.at(i * ld + j).load(self.lanes)
            active = cols - j
            if copies is None:
                mask = ir.lane_mask(active, self.lanes)
                here.store(self._finished(v, sources, factor, fields["activation"], mask), mask)
                return
            partly = ir.less(active, self.lanes)
            sources = copies.of(sources, active, partly)
            copies.store(self._finished(v, sources, factor, fields["activation"], None), here, active, partly)

        for i in ir.range_(0, rows):
            for j in ir.range_(0, cols, self.lanes):
                vector(i, j)

    def _nothing(self, dtype: str) -> Ptr:
        """A vector of -0.0, the one number that leaves all others as they are when it is added."""
        p = ir.alloca(self.lanes, dtype)
        p.store(ir.convert(ir.constant_vector(-0.0, self.lanes, self.acc), self.acc, dtype))
        return p

    def _finished(
        self, sums: Value, sources: Sequence[Ptr], factor: Value, activation: I64, mask: Value | None
    ) -> Value:
        """A vector of C."""

        def load(p: Ptr) -> Value:
            return ir.convert(p.load(self.lanes, mask), p.elem, self.acc)

        old, bias, residual = sources
        x = ir.fma(ir.add_vectors(sums, load(old)), factor, load(bias))
        first, *_ = (spec.activation_code(name) for name in spec.ACTIVATIONS)
        cases = [partial(lambda f: [f(x)], FUNCTIONS[name]) for name in spec.ACTIVATIONS]
        (y,) = ir.switch(activation, cases, first=first, like=[x])
        return ir.convert(ir.add_vectors(y, load(residual)), self.acc, self.out)


class Landing:
    """Where a row's microkernels leave their tiles: in C, or on the stack if they are to be finished.

    Args:
      module: where to call the function.
      function: the name of the epilogue's, None for a kernel without one.
      narrow_out: whether C's type is too narrow for partial sums.
      shape: rows and columns of the largest tile.
      row: the arguments of the row of tiles (``microkernel.ROW_PARAMS``) by name.
    """

    def __init__(
        self, module: ir.Module, function: str | None, narrow_out: bool, shape: tuple[int, int], row: Mapping[str, Any]
    ):
        self._module, self._function, self._row = module, function, row
        self._place = "partial" if narrow_out else "c"
        self._step: Size = 1
        self._fields = {x: row[x] for x in ("c", "rsc", "mode", "partial", "rs_partial")}
        if function is None:
            return
        stride = "rs_partial" if narrow_out else "rsc"
        self._old, self._rs_old = row[self._place], row[stride]
        self._sums, self._ld = ir.alloca(shape[0] * shape[1], row[self._place].elem), shape[1]
        self._finishes = ir.negate(ir.equal(row["epilogue"], 0))
        self._fields |= {
            self._place: ir.select_ptr(self._finishes, self._sums, self._old),
            stride: ir.select_size(self._finishes, self._ld, self._rs_old),
            "mode": ir.select_size(self._finishes, MORE if narrow_out else 0, row["mode"]),
        }
        self._step = ir.select_size(self._finishes, 0, 1)

    def at(self, j: Size) -> dict[str, Any]:
        """The arguments of a microkernel that say where the tile at column j goes."""
        moved = {x: self._row[x].at(j) for x in ("c", "partial")}
        return self._fields | moved | {self._place: self._fields[self._place].at(j * self._step)}

    def finish(self, j: Size, rows: Size, cols: Size) -> None:
        """To be called when the microkernel has left the tile at column j, of which so much exists."""
        if self._function is None:
            return
        row = self._row
        arguments = {
            "sums": self._sums,
            "ld": self._ld,
            "rows": rows,
            "cols": cols,
            "c": row["c"].at(j),
            "rsc": row["rsc"],
            "old": self._old.at(j),
            "rs_old": self._rs_old,
            "mode": row["mode"],
            "column": row["column"] + j,
            "epilogue": row["epilogue"],
        }
        ir.if_(self._finishes, partial(self._module.call_by_name, self._function, arguments))


class _Copies:
    """Room for one vector of each operand and of the result, and the copying of those of its elements that exist."""

    def __init__(self, lanes: int, acc: str, out: str):
        self._lanes = lanes
        self._rooms = [ir.alloca(lanes, dtype) for dtype in (acc, out, out)]
        self._result = ir.alloca(lanes, out)

    def of(self, sources: Sequence[Ptr], active: Size, partly: Value | bool) -> Sequence[Ptr]:
        """The sources, or copies of them where only a part of a vector exists."""

        def copied() -> Sequence[Ptr]:
            for source, room in zip(sources, self._rooms, strict=True):
                for i in ir.range_(0, active):
                    room.at(i).store(source.at(i).load())
            return self._rooms

        return ir.if_(partly, copied, lambda: sources, like=self._rooms)

    def store(self, v: Value, to: Ptr, active: Size, partly: Value | bool) -> None:
        """Stores a vector, or the part of it that exists."""

        def some() -> None:
            self._result.store(v)
            for i in ir.range_(0, active):
                to.at(i).store(self._result.at(i).load())

        ir.if_(partly, some, lambda: to.store(v))
