"""Few rows of x and weights that lie along K: inner products of x with a few columns at a time.

x is copied once, into the order of fields, filled up with zeros to whole registers. Then

    for j in n by ``cols``
      for each group of k
        for each register of the group
          sums[cols, rows] += x[rows, fields] * (fields of the weights [- zero point])
        totals[cols, rows] += scale * sums               lane by lane
      y = the sums of the totals' lanes

Where a register holds several groups, its lanes, or its fields, have scales and zero points of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import ir
from ..ir import I64, Ptr, Size, Value
from ..target import Target
from .columns import ROWS, bytes_of
from .formats import CHUNK, Format, block, field_count, scaled
from .rows import Rows

FEW_COLUMNS, COLUMNS = 2, 4  # at once: as many streams, each element of x read once for all of them
FIELDS = 4  # of a register, made from one load
CHAINS = 8  # of dependent sums that keep the units for products busy
FLOAT32 = 0  # in QUANTIZED_ROWS


@dataclass(frozen=True)
class Products:
    """Inner products of ``rows`` rows of x with some columns, where ``groups`` of them fill a register, or one fills
    some.
    """

    form: Format
    target: Target
    rows: int
    groups: int
    points: bool

    PARAMS = ("q0", "q1", "q2", "q3", "ahead", "x", "y", "work", "scales", "zeros", "pitch", "k", "group")

    def name(self, prefix: str) -> str:
        return f"{prefix}_inner_{self.rows}x{self.cols}_{self.groups}{'_points' if self.points else ''}"

    @property
    def cols(self) -> int:
        return COLUMNS if self.rows == 1 else FEW_COLUMNS

    @property
    def chains(self) -> int:
        """Sums of one row and column: fields go to them in turn, or to that of their group."""
        return self.groups if self._by_field else max(CHAINS // (self.rows * self.cols), 1)

    @property
    def _by_field(self) -> bool:
        """Whether a register's groups have fields of their own, not lanes."""
        return self.groups > 1 and self.form.by_field

    def emit(self, module: ir.Module, prefix: str) -> None:
        pointers = dict.fromkeys(("q0", "q1", "q2", "q3"), "int8") | dict.fromkeys(
            ("x", "y", "work", "scales", "zeros"), "float32"
        )
        module.function(self.name(prefix), [pointers.get(p, "i64") for p in self.PARAMS], self._body, internal=True)

    def _body(self, *args: Any) -> None:
        q0, q1, q2, q3, ahead, x, y, work, scales, zeros, pitch, k, group = args
        of_q = [q0, q1, q2, q3][: self.cols]
        form, lanes, rows, cols, chains = self.form, self.form.lanes, self.rows, self.cols, self.chains
        count, width = field_count(form), block(form)
        words = (k % width) * form.bits // 32
        mask = ir.lane_mask(words, lanes)
        totals = [[work.at((c * rows + i) * lanes) for i in range(rows)] for c in range(cols)]
        apart = self.groups if self._by_field else 1
        origins = [[work.at((cols * rows + c * apart + g) * lanes) for g in range(apart)] for c in range(cols)]
        zero = ir.zeros(lanes, "float32")
        for of_column in totals:
            for p in of_column:
                p.store(zero)
        constants = form.constants()
        # With zero points registers are too few for constants too.
        kept = [work.at((cols * rows + cols * apart + i) * lanes).as_type("uint8") for i in range(len(constants))]
        if self.points and form.at_once > 1:
            for p, v in zip(kept, constants, strict=True):
                p.store(v)

        def per_lane(of_column: Ptr, first: Size) -> Value:
            """The numbers of a register's groups, each in the lanes of its group."""
            values = [ir.splat(of_column.at(first + r).load(), lanes) for r in range(self.groups)]
            out = values[0]
            for r in range(1, self.groups):
                out = ir.select(ir.lane_mask(r * lanes // self.groups, lanes), out, values[r])
            return out

        def put_origins(first: Size) -> None:
            if self.points:
                for c, of_column in enumerate(origins):
                    if not self._by_field:
                        of_column[0].store(scaled(per_lane(zeros.at(c * pitch), first), form.unit))
                        continue
                    for g, p in enumerate(of_column):
                        zero_point = ir.splat(zeros.at(c * pitch).at(first + g).load(), lanes)
                        p.store(scaled(zero_point, form.unit))

        def register(at: Sequence[Ptr], acc: list[Value], load: Callable[[Ptr], Ptr | Value]) -> list[Value]:
            *columns, factors = at
            for c, first in itertools.product(range(cols), range(0, count, FIELDS)):
                if first == 0:
                    columns[c].at(ahead).prefetch()
                # Or LLVM keeps what every register needs in registers, of which there are not enough.
                ir.keep_order()
                which = range(first, first + FIELDS)
                here = constants
                if self.points and form.at_once > 1:
                    here = [p.load(4 * lanes) for p in kept]
                made = form.fields(load(columns[c]), which, here)
                for f, v in zip(which, made, strict=True):
                    if self.points:
                        v = ir.subtract(v, origins[c][f * apart // count].load(lanes))
                    for i in range(rows):
                        factor = factors.at((i * count + f) * lanes).load(lanes)
                        to = (c * rows + i) * chains + (f * chains // count if self._by_field else f % chains)
                        acc[to] = ir.fma(factor, v, acc[to])
            return acc

        def whole(p: Ptr) -> Ptr:
            return p

        def partial_(p: Ptr) -> Value:
            return p.as_type("int32").load(lanes, mask, alignment=1)

        def next_of(at: Sequence[Ptr]) -> list[Ptr]:
            *columns, factors = at
            return [*(p.at(lanes * 4) for p in columns), factors.at(rows * count * lanes)]

        def flush(acc: Sequence[Value], first: Size) -> None:
            for c, i in itertools.product(range(cols), range(rows)):
                p = totals[c][i]
                some = list(acc[(c * rows + i) * chains : (c * rows + i + 1) * chains])
                if self._by_field:
                    total = p.load(lanes)
                    for g, v in enumerate(some):
                        total = ir.fma(v, ir.splat(scales.at(c * pitch).at(first + g).load(), lanes), total)
                    p.store(total)
                else:
                    scale = per_lane(scales.at(c * pitch), first)
                    while len(some) > 1:
                        some = [ir.add_vectors(a, b) for a, b in zip(some[::2], some[1::2], strict=True)]
                    p.store(ir.fma(some[0], scale, p.load(lanes)))

        start = [zero] * (cols * rows * chains)
        registers = k // width
        at: list[Any] = [*of_q, x]
        if self.groups == 1:
            in_group = (group + (width - 1)) // width

            def one_group(first: I64, *at: Ptr) -> list[Any]:
                number = first // in_group
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
                put_origins(0)
                flush(register(at, list(start), partial_), 0)

            ir.if_(ir.less(0, words), rest)
        else:

            def one_register(number: Size, at: Sequence[Ptr], load: Callable[[Ptr], Ptr | Value]) -> None:
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
                y.at(i * cols + c).store(scaled(total, form.factor))


def least_group(form: Format) -> int:
    """Weights in a part of a register's lanes: smaller groups do not have lanes of their own."""
    return CHUNK * 8 // form.bits


def inner_products(form: Format, target: Target) -> list[Products]:
    """All of a kernel: by how many groups a register holds 1, 2, 4."""
    most = block(form) // least_group(form) if form.is_integer else 1
    kinds = (False, True) if form.is_integer else (False,)
    groups = [1 << i for i in range(most.bit_length())]
    return [Products(form, target, m, g, p) for m in range(1, ROWS + 1) for p in kinds for g in groups]


@dataclass(frozen=True)
class Inner:
    """The inner products, and the loops around them."""

    module: ir.Module
    prefix: str
    form: Format
    target: Target
    rows: Rows

    def emit(self) -> None:
        """Adds all functions."""
        for products in inner_products(self.form, self.target):
            products.emit(self.module, self.prefix)
        self.module.function(
            f"{self.prefix}_inner_permute", ["float32", "float32", "i64", "i64"], self._permute, internal=True
        )

    def _permute(self, source: Ptr, to: Ptr, registers: I64, rows: I64) -> None:
        """A row of x in the order of fields, with the formats' factor, ``rows`` rows to a register."""
        lanes, count = self.form.lanes, field_count(self.form)

        def register(r: I64) -> None:
            natural = [source.at(r * (count * lanes) + j * lanes).load(lanes) for j in range(count)]
            for f, v in enumerate(self.form.permuted(natural)):
                to.at(r * rows * (count * lanes) + f * lanes).store(scaled(v, self.form.x_factor))

        ir.loop(0, registers, 1, [], register)

    def nest(self, x: dict[str, Any]) -> None:
        """The product, given the fields of the arguments: stored in y."""
        module, form, rows = self.module, self.form, self.rows
        width, lanes = block(form), form.lanes
        k, m, n = x["k"], x["m"], x["n"]
        registers = (k + (width - 1)) // width
        natural = x["x_pack"].at(registers * width * m)
        zero = ir.zeros(lanes, "float32")

        def clear(p: Ptr, count: Size) -> None:
            ir.loop(0, count, lanes, [], lambda i: p.at(i).store(zero))

        def copy(i: I64) -> None:
            clear(natural, registers * width)
            rows.load(x["x"] + i * x["rsx"] * bytes_of(x["x_dtype"]), x["x_dtype"], natural, k, 1)
            to = x["x_pack"].at(i * width)
            module.call(f"{self.prefix}_inner_permute", [natural, to, registers, m])

        ir.if_(ir.equal(x["keep_x"], 0), lambda: ir.loop(0, m, 1, [], copy) and None)
        groups = (k + (x["group"] - 1)) // x["group"]
        # Behind the last group come those that fill up the last register.
        room = (groups + (2 * CHUNK - 1)) // CHUNK * CHUNK
        # One group for all of K may be shorter than a register, and is no multiple of anything.
        several = ir.both(ir.negate(ir.less(groups, 2)), ir.less(x["group"], width))
        kind = ir.select_size(several, width // x["group"], 1)
        in_place = ir.both(ir.equal(x["scale_dtype"], FLOAT32), ir.equal(kind, 1))

        def of_rows(count: int, points: bool) -> None:
            kinds = [p for p in inner_products(form, self.target) if (p.rows, p.points) == (count, points)]
            cols = kinds[0].cols

            def columns(j: I64) -> None:
                places = [ir.minimum(j + c, n - 1) for c in range(cols)]
                # Zero points are copied, so scales must lie like them.
                reads = False if points else ir.both(in_place, ir.negate(ir.less(n, j + cols)))

                def copy_rows() -> None:
                    clear(x["scales"], room * cols)
                    for c, place in enumerate(places):
                        at = x["scale"] + place * x["rs_scale"] * bytes_of(x["scale_dtype"])
                        rows.load(at, x["scale_dtype"], x["scales"].at(c * room), groups)

                ir.if_(ir.negate(reads), copy_rows)
                given = Ptr.of_address(x["scale"] + j * x["rs_scale"] * 4, "float32")
                scales = ir.select_ptr(reads, given, x["scales"])
                pitch = ir.select_size(reads, x["rs_scale"], room)
                if points:
                    clear(x["zeros"], room * cols)
                    for c, place in enumerate(places):
                        at = x["zero"] + place * x["rs_zero"] * bytes_of(x["zero_dtype"])
                        rows.load(at, x["zero_dtype"], x["zeros"].at(c * room), groups)
                of_q = [x["q"].at(place * x["rsq"]) for place in (*places, *[places[0]] * (COLUMNS - cols))]
                found = x["sums"]
                work = found.at(64)

                def run(products: Products) -> None:
                    arguments = [
                        *of_q,
                        x["rsq"] * cols,
                        x["x_pack"],
                        found,
                        work,
                        scales,
                        x["zeros"],
                        pitch,
                        k,
                        x["group"],
                    ]
                    module.call(products.name(self.prefix), arguments)

                which: Size = 0
                for i, products in enumerate(kinds):
                    which = ir.select_size(ir.equal(kind, products.groups), i, which)
                ir.switch(which, [partial(run, products) for products in kinds])
                for i in range(count):
                    for c in range(cols):
                        x["y"].at(i * x["nc"] + j + c).store(found.at(i * cols + c).load())

            ir.loop(0, n, cols, [], columns)

        def by_rows(points: bool) -> None:
            ir.switch(m, [partial(of_rows, count, points) for count in range(1, ROWS + 1)], first=1)

        if form.is_integer:
            ir.if_(ir.equal(x["zero"], 0), partial(by_rows, False), partial(by_rows, True))
        else:
            by_rows(False)
