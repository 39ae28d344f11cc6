"""Few rows of x and weights that lie along K: inner products of x with a few columns at a time.

x is copied once, into the order of fields, filled up with zeros to whole registers. Then

    for j in n by ``cols``
      [copy scales and zero points]                      where they cannot be read where they lie
      y[rows, cols] = inner products                     all of K (``inner_products``)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from .. import ir
from ..arguments import Given
from ..ir import I64, Ptr, Size, Value
from ..target import Target
from .formats import CHUNK, ELEMENT, Format, block, fields_along_k, scaled
from .inner_products import COLUMNS, InnerProducts, inner_products
from .rows import Rows, address
from .sweep import ROWS

FLOAT32 = 0  # in QUANTIZED_ROWS


@dataclass(frozen=True)
class _Product:
    """What belongs to all of a product.

    Attributes:
      x: the fields of QuantizedArgs.
      groups: how many there are.
      room: for the scales of a column: those of all groups, and of those that fill up the last register.
      kind: groups in a register, 1 if one fills registers.
      in_place: whether scales can be read where they lie.
      zero: a vector of zeros.
    """

    x: Given
    groups: Size
    room: Size
    kind: Size
    in_place: Value | bool
    zero: Value


@dataclass(frozen=True)
class _Columns:
    """Some columns. ``places`` are theirs; beyond the last one it is repeated."""

    j: I64
    places: list[Size]


@dataclass(frozen=True)
class _Scales:
    """Scales of some columns, ``pitch`` apart."""

    first: Ptr
    pitch: Size


@dataclass(frozen=True)
class Inner:
    """The inner products, and the loops around them.

    Attributes:
      module, prefix: where functions are, and what their names begin with.
      form, target: the weights, and the instruction set.
      rows: what converts rows to float32.
    """

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
        """A row of x in the order of fields, with the format's factor, ``rows`` rows to a register."""
        form, count = self.form, fields_along_k(self.form)
        lanes, elem = form.lanes * form.step, ELEMENT[form.step]
        source, to = source.as_type(elem), to.as_type(elem)
        for r in ir.range_(0, registers):
            natural = [source.at(r * (count * lanes) + j * lanes).load(lanes) for j in range(count)]
            for f, v in enumerate(form.permuted(natural)):
                to.at(r * rows * (count * lanes) + f * lanes).store(scaled(v, form.x_factor))

    def nest(self, x: Given) -> None:
        """The product, given the fields of the arguments: stored in y."""
        width = block(self.form)
        registers = ir.ceil_div(x.k, width)
        natural, zero = x.x_pack.at(registers * (width // self.form.step) * x.m), ir.zeros(self.form.lanes, "float32")
        for _ in ir.when(ir.equal(x.keep_x, 0)):
            self._copy_x(x, registers, natural, zero)
        groups = ir.ceil_div(x.k, x.group)
        # Behind the last group come those that fill up the last register.
        room = (groups + (2 * CHUNK - 1)) // CHUNK * CHUNK
        # One group for all of K may be shorter than a register, and is no multiple of anything.
        several = ir.both(ir.at_least(groups, 2), ir.less(x.group, width))
        kind = ir.select_size(several, width // x.group, 1)
        in_place = ir.both(ir.equal(x.scale_dtype, FLOAT32), ir.equal(kind, 1))
        product = _Product(x, groups, room, kind, in_place, zero)
        if not self.form.is_integer:
            self._by_rows(product, points=False)
            return
        for without_points in ir.branches(ir.equal(x.zero, 0)):
            self._by_rows(product, points=not without_points)

    def _copy_x(self, x: Given, registers: Size, natural: Ptr, zero: Value) -> None:
        """Copies x into the order of fields, row by row; ``natural`` is room for a row in its own order."""
        width = block(self.form)
        for i in ir.range_(0, x.m):
            step = self.form.step
            self._clear(natural, registers * (width // step), zero)
            self.rows.load(*self.rows.of_x(x, i, step), natural, x.k // step, 1)
            to = x.x_pack.at(i * (width // step))
            self.module.call(f"{self.prefix}_inner_permute", [natural, to, registers, x.m])

    def _clear(self, p: Ptr, count: Size, zero: Value) -> None:
        """Whole vectors of zeros."""
        for i in ir.range_(0, count, self.form.lanes):
            p.at(i).store(zero)

    def _by_rows(self, product: _Product, *, points: bool) -> None:
        """The loop over columns, for each number of rows."""
        cases = [partial(self._of_rows, product, count, points) for count in range(1, ROWS + 1)]
        ir.switch(product.x.m, cases, first=1)

    def _of_rows(self, product: _Product, count: int, points: bool) -> None:
        """The loop over columns for ``count`` rows of x."""
        kinds = [p for p in inner_products(self.form, self.target) if (p.rows, p.points) == (count, points)]
        for columns in self._some_columns(product, kinds[0].cols):
            scales = self._scales(product, columns, points)
            if points:
                self._copy_points(product, columns)
            self._multiply(product, columns, scales, kinds)

    def _some_columns(self, product: _Product, cols: int) -> Iterator[_Columns]:
        """A few columns at a time."""
        n = product.x.n
        for j in ir.range_(0, n, cols):
            yield _Columns(j, [ir.minimum(j + c, n - 1) for c in range(cols)])

    def _scales(self, product: _Product, columns: _Columns, points: bool) -> _Scales:
        """The scales of some columns where they lie, or copied as float32."""
        x, cols = product.x, len(columns.places)
        # Zero points are copied, so scales must lie like them.
        reads = False if points else ir.both(product.in_place, ir.at_least(x.n, columns.j + cols))
        for _ in ir.when(ir.negate(reads)):
            self._clear(x.scales, product.room * cols, product.zero)
            for c, place in enumerate(columns.places):
                source = address(x.scale, place, x.rs_scale, x.scale_dtype)
                self.rows.load(source, x.scale_dtype, x.scales.at(c * product.room), product.groups)
        given = Ptr.of_address(x.scale + columns.j * x.rs_scale * 4, "float32")
        first = ir.select_ptr(reads, given, x.scales)
        return _Scales(first, ir.select_size(reads, x.rs_scale, product.room))

    def _copy_points(self, product: _Product, columns: _Columns) -> None:
        """The zero points of some columns as float32."""
        x = product.x
        self._clear(x.zeros, product.room * len(columns.places), product.zero)
        for c, place in enumerate(columns.places):
            source = address(x.zero, place, x.rs_zero, x.zero_dtype)
            self.rows.load(source, x.zero_dtype, x.zeros.at(c * product.room), product.groups)

    def _multiply(self, product: _Product, columns: _Columns, scales: _Scales, kinds: list[InnerProducts]) -> None:
        """The inner products of some columns, by the kind for so many groups in a register."""
        x, places, cols = product.x, columns.places, len(columns.places)
        of_q = [x.q.at(place * x.rsq) for place in (*places, *[places[0]] * (COLUMNS - cols))]
        found = x.sums
        given = x.but(
            **{f"q{c}": q for c, q in enumerate(of_q)},
            x=x.x_pack,
            y=found,
            work=found.at(64),
            scales=scales.first,
            pitch=scales.pitch,
        )

        def run(products: InnerProducts) -> None:
            here = given.but(prefetch=x.rsq * cols)
            self.module.call_by_name(products.name(self.prefix), here.values)

        which: Size = 0
        for i, products in enumerate(kinds):
            which = ir.select_size(ir.equal(product.kind, products.groups), i, which)
        ir.switch(which, [partial(run, products) for products in kinds])
        for i in range(kinds[0].rows):
            for c in range(cols):
                x.y.at(i * x.nc + columns.j + c).store(found.at(i * cols + c).load())
