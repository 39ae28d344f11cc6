"""A block of weights for products that the plain kernels compute: float32, (q - zero point) * scale, rounded once; or
bfloat16, q - zero point, which must be exact, and the sums are scaled.

Columns that lie side by side stay so: ``out[kk, j]``. Weights along K stay along K: ``out[j, kk]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .. import ir
from ..arguments import Given
from ..ir import I64, Ptr, Size, Value
from .formats import CHUNK, Format
from .rows import Rows, address


@dataclass(frozen=True)
class _Group:
    """The part of a group that is in the block: K values begin <= kk < end."""

    number: I64
    begin: Size
    end: Size


@dataclass(frozen=True)
class Dequantize:
    """The loops of one kernel. Pointers are to the block's own parts; of its first group, ``first`` values of K come
    before it.
    """

    module: ir.Module
    prefix: str
    form: Format
    rows: Rows

    def _stretch(
        self,
        q: Ptr,
        out: Ptr,
        count: Size,
        finish: Callable[[Value, Size, int], Value],
        tail: tuple[Ptr, Ptr],
    ) -> None:
        """``count`` weights that lie side by side; ``finish(v, first, j)`` makes vector j, of those from ``first``."""
        form = self.form

        def chunk(source: Ptr, first: Size, to: Ptr) -> None:
            for j, v in enumerate(form.chunk(source)):
                to.at(j * form.lanes).store(finish(v, first, j))

        self._chunks(q, out, count, CHUNK, chunk, tail)

    def _chunks(
        self,
        q: Ptr,
        out: Ptr,
        count: Size,
        size: int,
        chunk: Callable[[Ptr, Size, Ptr], None],
        tail: tuple[Ptr, Ptr],
    ) -> None:
        """``chunk(source, first, to)`` for each ``size`` of ``count`` weights, the last ones by way of ``tail``."""
        form = self.form
        some, result = tail
        whole = count // size * size
        for i in ir.range_(0, whole, size):
            chunk(q.at(i * form.bits // 8), i, out.at(i))
        for _ in ir.when(ir.less(whole, count)):
            left = count - whole
            used = (left * form.bits + 7) // 8
            for i in ir.range_(0, used):
                some.at(i).store(q.at(whole * form.bits // 8 + i).load())
            chunk(some, whole, result)
            for i in ir.range_(0, left):
                out.at(whole + i).store(result.at(i).load())

    def by_columns(self, x: Given) -> None:
        """Of weights whose columns lie side by side. ``scales`` and ``zeros`` hold a row each."""
        form, rows, n = self.form, self.rows, x.n
        tail = ir.alloca(CHUNK, "int8"), ir.alloca(CHUNK, "float32")
        tail[0].store(ir.zeros(CHUNK, "int8"))
        scales, zeros, has_points = x.scales, x.zeros, ir.is_set(x.zero)
        zero = ir.zeros(form.lanes, "float32")
        for j in ir.range_(0, n, form.lanes):
            zeros.at(j).store(zero)

        def finish(v: Value, first: Size, j: int) -> Value:
            at = first + j * form.lanes
            return ir.multiply(ir.subtract(v, zeros.at(at).load(form.lanes)), scales.at(at).load(form.lanes))

        for group in self._groups(x):
            rows.load(address(x.scale, group.number, x.rs_scale, x.scale_dtype), x.scale_dtype, scales, n)
            for _ in ir.when(has_points):
                rows.load(address(x.zero, group.number, x.rs_zero, x.zero_dtype), x.zero_dtype, zeros, n)
            for kk in ir.range_(group.begin, group.end):
                self._stretch(x.q.at(kk * x.rsq), x.y.at(kk * x.nc), n, finish, tail)

    def along_k(self, x: Given) -> None:
        """Of weights that lie along K."""
        form, rows = self.form, self.rows
        tail = ir.alloca(CHUNK, "int8"), ir.alloca(CHUNK, "float32")
        tail[0].store(ir.zeros(CHUNK, "int8"))
        has_points = ir.is_set(x.zero)
        none = [ir.scalar_constant(0, "float32")]
        for j in ir.range_(0, x.n):
            for group in self._groups(x):
                scale = rows.scalar(x.scale, x.scale_dtype, j * x.rs_scale + group.number)
                (point,) = ir.if_(
                    has_points,
                    lambda: [rows.scalar(x.zero, x.zero_dtype, j * x.rs_zero + group.number)],
                    lambda: none,
                    like=none,
                )
                factor, zero = ir.splat(scale, form.lanes), ir.splat(point, form.lanes)
                source = x.q.at(j * x.rsq + group.begin * form.bits // 8)
                self._stretch(
                    source,
                    x.y.at(j * x.nc + group.begin),
                    group.end - group.begin,
                    lambda v, _first, _j: ir.multiply(ir.subtract(v, zero), factor),
                    tail,
                )

    def bfloat16_columns(self, x: Given) -> None:
        """Of weights whose columns lie side by side, less the zero points, of which ``zeros`` holds a row."""
        tail = self._tail()
        for no_points in ir.branches(ir.equal(x.zero, 0)) if self.form.is_integer else (True,):
            for group in self._groups(x):
                if not no_points:
                    source = address(x.zero, group.number, x.rs_zero, x.zero_dtype)
                    self.rows.load(source, x.zero_dtype, x.zeros, x.n)
                for kk in ir.range_(group.begin, group.end):
                    zeros = None if no_points else x.zeros
                    self._bfloat16(x.q.at(kk * x.rsq), x.y.as_type("bfloat16").at(kk * x.nc), x.n, zeros, None, tail)

    def bfloat16_along_k(self, x: Given) -> None:
        """Of weights along K, less the zero points."""
        tail = self._tail()
        for no_points in ir.branches(ir.equal(x.zero, 0)) if self.form.is_integer else (True,):
            for j in ir.range_(0, x.n):
                to = x.y.as_type("bfloat16").at(j * x.nc)
                if no_points:
                    self._bfloat16(x.q.at(j * x.rsq), to, x.k, None, None, tail)
                    continue
                for group in self._groups(x):
                    point = self.rows.scalar(x.zero, x.zero_dtype, j * x.rs_zero + group.number)
                    zero = ir.splat(point, self.form.lanes)
                    source = x.q.at(j * x.rsq + group.begin * self.form.bits // 8)
                    self._bfloat16(source, to.at(group.begin), group.end - group.begin, None, zero, tail)

    @staticmethod
    def _tail() -> tuple[Ptr, Ptr]:
        """Room for the last weights of a row, and for what is made of them."""
        tail = ir.alloca(2 * CHUNK, "int8"), ir.alloca(2 * CHUNK, "bfloat16")
        tail[0].store(ir.zeros(2 * CHUNK, "int8"))
        return tail

    def _bfloat16(
        self, q: Ptr, out: Ptr, count: Size, zeros: Ptr | None, zero: Value | None, tail: tuple[Ptr, Ptr]
    ) -> None:
        """``count`` weights that lie side by side, less zero points: a row of ``zeros``, a vector of equal ones, or
        none.
        """
        form = self.form

        def chunk(source: Ptr, first: Size, to: Ptr) -> None:
            if zeros is None and zero is None:
                to.store(form.bfloat16(source))
                return
            halves = []
            for i in range(2):
                (v,) = form.chunk(source.at(i * CHUNK * form.bits // 8))
                of_half = zero if zeros is None else zeros.at(first + i * CHUNK).load(form.lanes)
                assert of_half is not None
                halves.append(ir.subtract(v, of_half))
            to.store(ir.exactly_bfloat16(*halves))

        self._chunks(q, out, count, 2 * CHUNK, chunk, tail)

    def _groups(self, x: Given) -> Iterator[_Group]:
        """The loop over the groups that the block has a part of."""
        groups = (x.first + x.k + (x.group - 1)) // x.group
        for number in ir.range_(0, groups):
            begin = number * x.group - x.first
            yield _Group(number, ir.select_size(ir.less(begin, 0), 0, begin), ir.minimum(begin + x.group, x.k))
