"""Few rows of x and weights whose columns lie side by side, which are read once, where they lie.

      for each group of k
        [zero points of the group]              in the order of fields
        for kk in the group by steps            sweeps (``sweep``), each of a few rows of weights and all columns
        y += scales * sums                      in natural order; the sums are zero again

The caller cuts columns so that sums and what belongs to columns stay in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import ir
from ..arguments import Given
from ..ir import I64, Ptr, Size
from ..target import Target
from .formats import Format, block, field_count, scaled
from .rows import Rows, address
from .sweep import ROWS, Sweep, sweeps


@dataclass(frozen=True)
class _Group:
    """Values of K begin <= kk < end that share scales."""

    number: Size
    begin: I64
    end: Size


@dataclass(frozen=True)
class Columns:
    """The sweeps, and the loops around them."""

    module: ir.Module
    prefix: str
    form: Format
    target: Target
    rows: Rows

    def emit(self) -> None:
        """Adds all functions."""
        module, name = self.module, self._name
        for sweep in sweeps(self.form, self.target):
            sweep.emit(module, self.prefix)
        module.function(name("flush"), ["float32"] * 3 + ["i64"] * 3, self._flush, internal=True)
        module.function(name("clear"), ["float32", "i64"], self._clear, internal=True)
        if self.form.x_factor != 1:
            module.function(name("scale"), ["float32", "i64"], self._scale, internal=True)
        module.function(name("zeros"), ["float32", "float32", "i64"], self._zeros, internal=True)

    def _name(self, what: str) -> str:
        return f"{self.prefix}_columns_{what}"

    def _clear(self, p: Ptr, count: I64) -> None:
        """Whole vectors of zeros."""
        zero = ir.zeros(self.form.lanes, "float32")
        for i in ir.range_(0, count, self.form.lanes):
            p.at(i).store(zero)

    def _scale(self, p: Ptr, count: I64) -> None:
        """Numbers of x, with the format's factor."""
        lanes, factor = self.form.lanes, self.form.x_factor
        whole = count // lanes * lanes
        for i in ir.range_(0, whole, lanes):
            p.at(i).store(scaled(p.at(i).load(lanes), factor))
        for i in ir.range_(whole, count):
            p.at(i).store(scaled(p.at(i).load(), factor))

    def _zeros(self, points: Ptr, to: Ptr, registers: I64) -> None:
        """Zero points in the order and the unit of fields; whole registers of float32 are given."""
        form, lanes, count = self.form, self.form.lanes, field_count(self.form)

        def register(_: I64, source: Ptr, target: Ptr) -> list[Any]:
            natural = [source.at(j * lanes).load(lanes) for j in range(count)]
            for f, v in enumerate(form.permuted(natural)):
                target.at(f * lanes).store(scaled(v, form.unit))
            return [source.at(count * lanes), target.at(count * lanes)]

        ir.loop(0, registers, 1, [points, to], register)

    def _flush(self, sums: Ptr, y: Ptr, scales: Ptr, rs_y: I64, registers: I64, rows: I64) -> None:
        """``y += scales * sums`` for whole registers of columns; the sums are zero afterwards."""
        form, lanes, count = self.form, self.form.lanes, field_count(self.form)
        zero = ir.zeros(lanes, "float32")

        for j in ir.range_(0, registers):
            for i in ir.range_(0, rows):
                source, target = sums.at((j * rows + i) * (count * lanes)), y.at(i * rs_y + j * (count * lanes))
                fields = [source.at(f * lanes).load(lanes) for f in range(count)]
                for f, v in enumerate(form.natural(fields)):
                    p, factor = target.at(f * lanes), scales.at(j * (count * lanes) + f * lanes).load(lanes)
                    p.store(ir.fma(scaled(v, form.factor), factor, p.load(lanes)))
                for f in range(count):
                    source.at(f * lanes).store(zero)

    def nest(self, x: Given) -> None:
        """The product, given the fields of the arguments: added to y."""
        for i in ir.range_(0, x.m):
            self.rows.load(*self.rows.of_x(x, i, self.form.step), x.x_pack.at(i), x.k // self.form.step, x.m)
        if self.form.x_factor != 1:
            self.module.call(self._name("scale"), [x.x_pack, x.k * x.m])
        width = block(self.form)
        registers = ir.ceil_div(x.n, width)
        self.module.call(self._name("clear"), [x.sums, registers * width * x.m])
        for group in self._groups(x):
            if self.form.is_integer:
                for without_points in ir.branches(ir.equal(x.zero, 0)):
                    if not without_points:
                        self._copy_points(x, group, registers)
                    self._by_rows(x, group, points=not without_points)
            else:
                self._by_rows(x, group, points=False)
            self._load_row(x, "scale", group)
            self.module.call(self._name("flush"), [x.sums, x.y, x.scales, x.nc, registers, x.m])

    def _groups(self, x: Given) -> Iterator[_Group]:
        """The loop over groups of K."""
        for begin in ir.range_(0, x.k, x.group):
            yield _Group(begin // x.group, begin, ir.minimum(begin + x.group, x.k))

    def _load_row(self, x: Given, what: str, group: _Group) -> None:
        """A group's row of scales or zero points as float32, to the workspace for scales."""
        dtype = x.values[f"{what}_dtype"]
        source = address(x.values[what], group.number, x.values[f"rs_{what}"], dtype)
        self.rows.load(source, dtype, x.scales, x.n)

    def _copy_points(self, x: Given, group: _Group, registers: Size) -> None:
        """A group's zero points, in the order of fields."""
        self._load_row(x, "zero", group)
        self.module.call(self._name("zeros"), [x.scales, x.zeros, registers])

    def _by_rows(self, x: Given, group: _Group, *, points: bool) -> None:
        """All sweeps of a group, for each number of rows."""
        cases = [partial(self._sweeps, x, group, count, points) for count in range(1, ROWS + 1)]
        ir.switch(x.m, cases, first=1)

    def _sweeps(self, x: Given, group: _Group, rows: int, points: bool) -> None:
        """The loops over K: deep sweeps over whole steps of columns, then flat ones over what is left in K, and over
        what is left in columns.
        """
        form = self.form
        deep, flat = (Sweep(form, self.target, rows, depth, points) for depth in (form.depth, form.step))
        last = group.begin + (group.end - group.begin) // form.depth * form.depth
        at_once = deep.registers * block(form)
        whole = x.n // at_once * at_once
        for kk in ir.range_(group.begin, last, form.depth):
            self._sweep(x, deep, kk, 0, whole)
        for kk in ir.range_(last, group.end, form.step):
            self._sweep(x, flat, kk, 0, x.n)
        for _ in ir.when(ir.less(whole, x.n)):
            for kk in ir.range_(group.begin, last, form.step):
                self._sweep(x, flat, kk, whole, x.n - whole)

    def _sweep(self, x: Given, kind: Sweep, kk: I64, first: Size, count: Size) -> None:
        """One call, for ``count`` columns from ``first`` on."""
        given = x.but(
            q=x.q.at(kk * x.rsq + first * self.form.bits // 8),
            sums=x.sums.at(first * kind.rows),
            zeros=x.zeros.at(first),
            x=x.x_pack.at(kk // kind.form.step * kind.rows),
            cols=count,
        )
        self.module.call_by_name(kind.name(self.prefix), given.values)
