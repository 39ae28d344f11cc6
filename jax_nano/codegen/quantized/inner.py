"""Few rows of x and weights that lie along K: inner products of x with a few columns at a time.

x is copied once, into the order of fields, filled up with zeros to whole registers. Then

    for j in n by ``cols``
      for each group of k
        for each register of the group
          sums[cols, rows] += x[rows, fields] * (fields of the weights - zero point)
        y[cols, rows] += scale * sums                    lane by lane
      y = the sum of its lanes

Where a register holds several groups, its lanes have scales and zero points of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import ir
from ..ir import I64, Ptr, Size, Value
from ..target import Target
from .columns import ROWS, bytes_of
from .formats import CHUNK, Format, Integers, block, field_count
from .rows import Rows

FEW_COLUMNS, COLUMNS = 2, 4  # at once: as many streams, each element of x read once for all of them
POSITIONS = 2  # of fields in a word, each with a zero point of its own


@dataclass(frozen=True)
class Products:
    """Inner products of ``rows`` rows of x with some columns, where ``groups`` of them fill a register, or one fills
    some.
    """

    form: Format
    target: Target
    rows: int
    groups: int

    PARAMS = ("q0", "q1", "q2", "q3", "x", "y", "work", "scales", "zeros", "pitch", "k", "group", "flip")

    def name(self, prefix: str) -> str:
        return f"{prefix}_inner_{self.rows}x{self.cols}_{self.groups}"

    @property
    def cols(self) -> int:
        return COLUMNS if self.rows == 1 else FEW_COLUMNS

    def emit(self, module: ir.Module, prefix: str) -> None:
        pointers = dict.fromkeys(("q0", "q1", "q2", "q3"), "int8") | dict.fromkeys(
            ("x", "y", "work", "scales", "zeros"), "float32"
        )
        module.function(self.name(prefix), [pointers.get(p, "i64") for p in self.PARAMS], self._body, internal=True)

    def _body(self, *args: Any) -> None:
        q0, q1, q2, q3, x, y, work, scales, zeros, pitch, k, group, flip = args
        of_q = [q0, q1, q2, q3][: self.cols]
        form, lanes, rows, cols = self.form, self.form.lanes, self.rows, self.cols
        count, width = field_count(form), block(form)
        words = (k % width) * form.bits // 32
        mask = ir.lane_mask(words, lanes)
        totals = [[work.at((c * rows + i) * lanes) for i in range(rows)] for c in range(cols)]
        origins = work.at(cols * rows * lanes)
        zero = ir.zeros(lanes, "float32")
        for of_column in totals:
            for p in of_column:
                p.store(zero)
        bits: list[Value] = []
        if isinstance(form, Integers):
            bits = form.zeros(ir.int32_to_float32(ir.as_int32(flip)))[:POSITIONS]

        def per_lane(of_column: Ptr, first: Size) -> Value:
            """The numbers of a register's groups, each in the lanes of its group."""
            values = [ir.splat(of_column.at(first + r).load(), lanes) for r in range(self.groups)]
            out = values[0]
            for r in range(1, self.groups):
                out = ir.select(ir.lane_mask(r * lanes // self.groups, lanes), out, values[r])
            return out

        def put_origins(first: Size) -> None:
            for c in range(cols):
                point = per_lane(zeros.at(c * pitch), first)
                for position, v in enumerate(bits):
                    origins.at((c * POSITIONS + position) * lanes).store(ir.add_vectors(v, point))

        def register(at: Sequence[Ptr], acc: list[Value], load: Callable[[Ptr], Value]) -> list[Value]:
            *columns, factors = at
            # Or LLVM keeps what every register needs in registers, of which there are not enough.
            ir.keep_order()
            fields = [form.fields(load(p), range(count), flip) for p in columns]
            for f in range(count):
                of_x = [factors.at((i * count + f) * lanes).load(lanes) for i in range(rows)]
                for c, of_column in enumerate(fields):
                    v = next(of_column)
                    if form.is_integer:
                        v = ir.subtract(v, origins.at((c * POSITIONS + f % POSITIONS) * lanes).load(lanes))
                    for i, factor in enumerate(of_x):
                        acc[c * rows + i] = ir.fma(factor, v, acc[c * rows + i])
            return acc

        def whole(p: Ptr) -> Value:
            return p.as_type("int32").load(lanes, alignment=1)

        def partial_(p: Ptr) -> Value:
            return p.as_type("int32").load(lanes, mask, alignment=1)

        def next_of(at: Sequence[Ptr]) -> list[Ptr]:
            *columns, factors = at
            return [*(p.at(lanes * 4) for p in columns), factors.at(rows * count * lanes)]

        def flush(acc: Sequence[Value], first: Size) -> None:
            for c in range(cols):
                scale = per_lane(scales.at(c * pitch), first)
                for i in range(rows):
                    p = totals[c][i]
                    p.store(ir.fma(acc[c * rows + i], scale, p.load(lanes)))

        start = [zero] * (cols * rows)
        registers = k // width
        at: list[Any] = [*of_q, x]
        if self.groups == 1:
            in_group = (group + (width - 1)) // width

            def one_group(first: I64, *at: Ptr) -> list[Any]:
                number = first // in_group
                if form.is_integer:
                    put_origins(number)
                here = ir.minimum(registers - first, in_group)

                def body(_: I64, *carried: Any) -> list[Any]:
                    at, acc = carried[: cols + 1], list(carried[cols + 1 :])
                    return [*next_of(at), *register(at, acc, whole)]

                carried = ir.loop(0, here, 1, [*at, *start], body)
                flush(carried[cols + 1 :], number)
                return carried[: cols + 1]

            at = ir.loop(0, registers, in_group, at, one_group)

            def rest() -> None:  # of the only group: where there are several, whole registers fill each
                if form.is_integer:
                    put_origins(0)
                flush(register(at, list(start), partial_), 0)

            ir.if_(ir.less(0, words), rest)
        else:

            def one_register(number: Size, at: Sequence[Ptr], load: Callable[[Ptr], Value]) -> None:
                if form.is_integer:
                    put_origins(number * self.groups)
                flush(register(at, list(start), load), number * self.groups)

            def body(number: I64, *at: Ptr) -> list[Any]:
                one_register(number, at, whole)
                return next_of(at)

            at = ir.loop(0, registers, 1, at, body)
            ir.if_(ir.less(0, words), lambda: one_register(registers, at, partial_))
        for c in range(cols):
            for i in range(rows):
                total = ir.tree_sum(totals[c][i].load(lanes))
                if form.factor != 1:
                    total = ir.multiply(total, ir.like(total, form.factor))
                y.at(i * cols + c).store(total)


@dataclass(frozen=True)
class Inner:
    """The inner products, and the loops around them."""

    module: ir.Module
    prefix: str
    form: Format
    target: Target
    rows: Rows

    def _products(self, rows: int) -> list[Products]:
        """By how many groups a register holds: 1, 2, 4, ..."""
        most = block(self.form) // CHUNK if self.form.is_integer else 1
        return [Products(self.form, self.target, rows, 1 << i) for i in range(most.bit_length())]

    def emit(self) -> None:
        """Adds all functions."""
        for rows in range(1, ROWS + 1):
            for products in self._products(rows):
                products.emit(self.module, self.prefix)
        self.module.function(
            f"{self.prefix}_inner_permute", ["float32", "float32", "i64", "i64"], self._permute, internal=True
        )

    def _permute(self, source: Ptr, to: Ptr, registers: I64, rows: I64) -> None:
        """A row of x in the order of fields, ``rows`` rows to a register."""
        lanes, count = self.form.lanes, field_count(self.form)

        def register(r: I64) -> None:
            natural = [source.at(r * (count * lanes) + j * lanes).load(lanes) for j in range(count)]
            for f, v in enumerate(self.form.permuted(natural)):
                to.at(r * rows * (count * lanes) + f * lanes).store(v)

        ir.loop(0, registers, 1, [], register)

    def nest(self, x: dict[str, Any]) -> None:
        """The product, given the fields of the arguments."""
        module, form, rows = self.module, self.form, self.rows
        width, lanes = block(form), form.lanes
        k, m, n = x["k"], x["m"], x["n"]
        registers = (k + (width - 1)) // width
        natural = x["x_pack"].at(registers * width * m)
        zero = ir.zeros(lanes, "float32")
        has_points = ir.negate(ir.equal(x["zero"], 0))

        def clear(p: Ptr, count: Size) -> None:
            ir.loop(0, count, lanes, [], lambda i: p.at(i).store(zero))

        def copy(i: I64) -> None:
            clear(natural, registers * width)
            rows.load(x["x"] + i * x["rsx"] * bytes_of(x["x_dtype"]), x["x_dtype"], natural, k, 1)
            to = x["x_pack"].at(i * width)
            module.call(f"{self.prefix}_inner_permute", [natural, to, registers, m])

        ir.loop(0, m, 1, [], copy)
        groups = (k + (x["group"] - 1)) // x["group"]
        # Behind the last group come those that fill up the last register.
        pitch = (groups + (2 * CHUNK - 1)) // CHUNK * CHUNK

        def of_rows(count: int) -> None:
            kinds = self._products(count)
            cols = kinds[0].cols

            def columns(j: I64) -> None:
                places = [ir.minimum(j + c, n - 1) for c in range(cols)]
                clear(x["scales"], pitch * cols)
                clear(x["zeros"], pitch * cols)
                for c, place in enumerate(places):
                    at = x["scale"] + place * x["rs_scale"] * bytes_of(x["scale_dtype"])
                    rows.load(at, x["scale_dtype"], x["scales"].at(c * pitch), groups)

                    def points(c: int = c, place: Size = place) -> None:
                        at = x["zero"] + place * x["rs_zero"] * bytes_of(x["zero_dtype"])
                        rows.load(at, x["zero_dtype"], x["zeros"].at(c * pitch), groups)

                    ir.if_(has_points, points)
                of_q = [x["q"].at(place * x["rsq"]) for place in (*places, *[places[0]] * (COLUMNS - cols))]
                found = x["sums"]
                work = found.at(64)

                def run(products: Products) -> None:
                    arguments = [*of_q, x["x_pack"], found, work, x["scales"], x["zeros"], pitch, k, x["group"]]
                    module.call(products.name(self.prefix), [*arguments, x["flip"]])

                # One group for all of K may be shorter than a register, and is no multiple of anything.
                whole = ir.both(ir.negate(ir.less(groups, 2)), ir.less(x["group"], width))
                kind = ir.select_size(whole, width // x["group"], 1)
                which: Size = 0
                for i, products in enumerate(kinds):
                    which = ir.select_size(ir.equal(kind, products.groups), i, which)
                ir.switch(which, [partial(run, products) for products in kinds])
                for i in range(count):
                    for c in range(cols):
                        x["y"].at(i * x["nc"] + j + c).store(found.at(i * cols + c).load())

            ir.loop(0, n, cols, [], columns)

        ir.switch(m, [partial(of_rows, count) for count in range(1, ROWS + 1)], first=1)

        def finish(i: I64) -> None:
            to = x["out"] + i * x["rs_out"] * bytes_of(x["out_dtype"])
            rows.store(x["y"].at(i * x["nc"]), to, x["out_dtype"], n)

        ir.loop(0, m, 1, [], finish)
