"""Inner products of a few rows of x with a few columns of weights that lie along K.

    for each group of k
      for each register of the group
        sums[cols, rows] += x[rows, fields] * (fields of the weights [- zero point])
      totals[cols, rows] += scale * sums                 lane by lane
    y = the sums of the totals' lanes

Where a register holds several groups, its lanes, or its fields, have scales and zero points of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import ir
from ..arguments import Given
from ..ir import I64, Ptr, Size, Value
from ..target import Target
from .formats import CHUNK, Format, block, fields_along_k, scaled
from .sweep import ROWS

FEW_COLUMNS, COLUMNS = 2, 4  # at once: as many streams, each element of x read once for all of them
FIELDS = 4  # of a register, made from one load
SUMS_IN_REGISTERS = 18  # of 32, beside tables and what is made with them
CHAINS = 8  # of dependent sums that keep the units for products busy

Load = Callable[[Ptr], Ptr | Value]
"""What is read of weights at an address: a whole register of them, where it lies, or a part."""


@dataclass(frozen=True)
class InnerProducts:
    """Inner products of ``rows`` rows of x with some columns, where ``groups`` of them fill a register, or one fills
    some.
    """

    form: Format
    target: Target
    rows: int
    groups: int
    points: bool

    PARAMS = {  # noqa: RUF012
        **dict.fromkeys(("q0", "q1", "q2", "q3"), "int8"),
        "prefetch": "i64",
        **dict.fromkeys(("x", "y", "work", "scales", "zeros"), "float32"),
        **dict.fromkeys(("pitch", "k", "group"), "i64"),
    }
    """``prefetch``: bytes from a column to the one that is read next. ``work``: room for what does not fit registers.
    ``pitch``: elements between the scales of two columns.
    """

    def name(self, prefix: str) -> str:
        return f"{prefix}_inner_{self.rows}x{self.cols}_{self.groups}{'_points' if self.points else ''}"

    @property
    def cols(self) -> int:
        return COLUMNS if self.rows == 1 else FEW_COLUMNS

    @property
    def chains(self) -> int:
        """Sums of one row and column: fields go to them in turn, or to that of their group."""
        return self.groups if self.by_field else max(CHAINS // (self.rows * self.cols), 1)

    @property
    def by_field(self) -> bool:
        """Whether a register's groups have fields of their own, not lanes."""
        return self.groups > 1 and self.form.by_field

    @property
    def keeps_totals(self) -> bool:
        """Whether totals stay in registers. Where a group is one register of weights, storing them takes as long as the
        products.
        """
        sums = self.rows * self.cols * (self.chains + 1)
        return self.target.vector_registers >= 32 and not self.points and sums <= SUMS_IN_REGISTERS

    @property
    def prefetch_level(self) -> int:
        """The cache to fetch the next columns into: that of Zen 4's cores which takes most lines at a time, or for AVX2
        as it was measured on Zen 3.
        """
        return 2 if self.form.lanes == CHUNK else 1

    def emit(self, module: ir.Module, prefix: str) -> None:
        """Adds the function."""
        module.function(self.name(prefix), self.PARAMS, self._body, internal=True)

    def _body(self, *values: Any) -> None:
        x = Given(dict(zip(self.PARAMS, values, strict=True)))
        form, lanes, rows, cols = self.form, self.form.lanes, self.rows, self.cols
        width = block(form)
        words = (x.k % width) * form.bits // 32
        mask = ir.lane_mask(words, lanes)
        totals = [[x.work.at((c * rows + i) * lanes) for i in range(rows)] for c in range(cols)]
        apart = self.groups if self.by_field else 1
        origins = [[x.work.at((cols * rows + c * apart + g) * lanes) for g in range(apart)] for c in range(cols)]
        zero = ir.zeros(lanes, "float32")
        for p in itertools.chain(*totals):
            p.store(zero)
        constants = form.constants()
        # With zero points registers are too few for constants too.
        kept = [x.work.at((cols * rows + cols * apart + i) * lanes).as_type("uint8") for i in range(len(constants))]
        if self.points and form.at_once > 1:
            for p, v in zip(kept, constants, strict=True):
                p.store(v)
        loops = _Loops(self, x, mask, totals, origins, constants, kept, [zero] * (cols * rows * self.chains))
        at = [*[x.q0, x.q1, x.q2, x.q3][:cols], x.x]
        if self.groups == 1:
            loops.registers_of_groups(at, x.k // width, words)
        else:
            loops.groups_of_registers(at, x.k // width, words)
        for c, i in itertools.product(range(cols), range(rows)):
            total = ir.tree_sum(totals[c][i].load(lanes))
            x.y.at(i * cols + c).store(scaled(total, form.factor))


@dataclass(frozen=True)
class _Loops:
    """The loops over K.

    Attributes:
      products: whose they are.
      x: the function's arguments.
      mask: of the words that are left beyond whole registers.
      totals: a vector for each column and row, in memory.
      origins: for each column, and each of its groups in a register, a vector of zero points, in memory.
      constants: what makes fields of a register.
      kept: these in memory.
      start: sums of nothing: a vector for each column, row and chain.
    """

    products: InnerProducts
    x: Given
    mask: Value
    totals: list[list[Ptr]]
    origins: list[list[Ptr]]
    constants: Sequence[Value]
    kept: list[Ptr]
    start: list[Value]

    def registers_of_groups(self, at: Sequence[Ptr], registers: Size, words: Size) -> None:
        """Where a group fills registers: a loop over groups, and one over the registers of each."""
        in_group = ir.ceil_div(self.x.group, block(self.products.form))
        pointers = len(at)

        def group(first: I64, *carried: Any) -> list[Any]:
            at, totals = carried[:pointers], carried[pointers:]
            number = first // in_group
            self._put_origins(number)
            here = ir.minimum(registers - first, in_group)

            def register(_: I64, *carried: Any) -> list[Any]:
                at, acc = carried[:pointers], carried[pointers:]
                return [*self._next(at), *self._register(at, acc, _whole)]

            carried = tuple(ir.loop(0, here, 1, [*at, *self.start], register))
            return [*carried[:pointers], *self._add_to_totals(carried[pointers:], number, totals)]

        at = self._with_totals(at, lambda carried: ir.loop(0, registers, in_group, carried, group))
        # What is left is of the only group: where there are several, whole registers fill each.
        for _ in ir.when(ir.less(0, words)):
            self._one_register(0, at, self._part)

    def groups_of_registers(self, at: Sequence[Ptr], registers: Size, words: Size) -> None:
        """Where a register holds groups: a loop over registers."""
        pointers = len(at)

        def register(number: I64, *carried: Any) -> list[Any]:
            at, totals = carried[:pointers], carried[pointers:]
            added = self._one_register(number, at, _whole, totals)
            return [*self._next(at), *added]

        at = self._with_totals(at, lambda carried: ir.loop(0, registers, 1, carried, register))
        for _ in ir.when(ir.less(0, words)):
            self._one_register(registers, at, self._part)

    def _with_totals(self, at: Sequence[Ptr], loop: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """A loop that carries pointers, and the totals if they stay in registers."""
        kept = [*itertools.chain(*self.totals)] if self.products.keeps_totals else []
        lanes, pointers = self.products.form.lanes, len(at)
        carried = loop([*at, *(p.load(lanes) for p in kept)])
        for p, v in zip(kept, carried[pointers:], strict=True):
            p.store(v)
        return carried[:pointers]

    def _one_register(
        self, number: Size, at: Sequence[Ptr], load: Load, totals: Sequence[Value] = ()
    ) -> Sequence[Value]:
        """The register of this number, by itself."""
        groups = self.products.groups
        self._put_origins(number * groups)
        return self._add_to_totals(self._register(at, self.start, load), number * groups, totals)

    def _next(self, at: Sequence[Ptr]) -> list[Ptr]:
        """Pointers to the columns, and to x, one register further on."""
        *columns, factors = at
        lanes = self.products.form.lanes
        step = self.products.rows * fields_along_k(self.products.form) * lanes
        return [*(p.at(lanes * 4) for p in columns), factors.at(step)]

    def _part(self, p: Ptr) -> Value:
        """The weights that are left beyond whole registers."""
        return p.as_type("int32").load(self.products.form.lanes, self.mask, alignment=1)

    def _register(self, at: Sequence[Ptr], so_far: Sequence[Value], load: Load) -> list[Value]:
        """The sums with a register of each column."""
        products, form, lanes = self.products, self.products.form, self.products.form.lanes
        rows, cols, chains = products.rows, products.cols, products.chains
        *columns, factors = at
        acc, count = list(so_far), fields_along_k(form)
        apart = products.groups if products.by_field else 1
        for c, first in itertools.product(range(cols), range(0, count, FIELDS)):
            if first == 0:
                columns[c].at(self.x.prefetch).prefetch(level=self.products.prefetch_level)
            # Or LLVM keeps what every register needs in registers, of which there are not enough.
            ir.keep_order()
            which = range(first, min(first + FIELDS, count))
            constants = self.constants
            if products.points and form.at_once > 1:
                constants = [p.load(4 * lanes) for p in self.kept]
            made = form.fields(load(columns[c]), which, constants)
            for f, v in zip(which, made, strict=True):
                w = ir.subtract(v, self.origins[c][f * apart // count].load(lanes)) if products.points else v
                for i in range(rows):
                    factor = factors.at((i * count + f) * lanes).load(lanes)
                    to = (c * rows + i) * chains + (f * chains // count if products.by_field else f % chains)
                    acc[to] = form.product(factor, w, acc[to])
        return acc

    def _put_origins(self, first: Size) -> None:
        """The zero points of the groups of a register, of which this is the first one."""
        if not self.products.points:
            return
        unit = self.products.form.unit
        for c, of_column in enumerate(self.origins):
            if not self.products.by_field:
                of_column[0].store(scaled(self._per_lane(self.x.zeros.at(c * self.x.pitch), first), unit))
                continue
            for g, p in enumerate(of_column):
                zero = self.x.zeros.at(c * self.x.pitch).at(first + g).load()
                p.store(scaled(ir.splat(zero, self.products.form.lanes), unit))

    def _per_lane(self, of_column: Ptr, first: Size) -> Value:
        """The numbers of a register's groups, each in the lanes of its group."""
        lanes, groups = self.products.form.lanes, self.products.groups
        values = [ir.splat(of_column.at(first + r).load(), lanes) for r in range(groups)]
        out = values[0]
        for r in range(1, groups):
            out = ir.select(ir.lane_mask(r * lanes // groups, lanes), out, values[r])
        return out

    def _add_to_totals(self, acc: Sequence[Value], first: Size, totals: Sequence[Value]) -> list[Value]:
        """The sums of the groups of a register, of which this is the first one, times their scales; added to
        ``totals``, or if there are none to those in memory.
        """
        added = []
        products, x, lanes, chains = self.products, self.x, self.products.form.lanes, self.products.chains
        for c, i in itertools.product(range(products.cols), range(products.rows)):
            p, kept = self.totals[c][i], totals[c * products.rows + i] if totals else None
            some = list(acc[(c * products.rows + i) * chains : (c * products.rows + i + 1) * chains])
            if products.by_field:
                total = p.load(lanes) if kept is None else kept
                for g, v in enumerate(some):
                    total = ir.fma(v, ir.splat(x.scales.at(c * x.pitch).at(first + g).load(), lanes), total)
            else:
                scale = self._per_lane(x.scales.at(c * x.pitch), first)
                while len(some) > 1:
                    some = [ir.add_vectors(a, b) for a, b in zip(some[::2], some[1::2], strict=True)]
                total = ir.fma(some[0], scale, p.load(lanes) if kept is None else kept)
            if kept is None:
                p.store(total)
            else:
                added.append(total)
        return added


def _whole(p: Ptr) -> Ptr:
    """A whole register is read where it lies."""
    return p


def least_group(form: Format) -> int:
    """Weights in a part of a register's lanes: smaller groups do not have lanes of their own."""
    return CHUNK * 8 // form.bits


def inner_products(form: Format, target: Target) -> list[InnerProducts]:
    """All of a kernel: by how many groups a register holds 1, 2, 4."""
    most = block(form) // least_group(form) if form.holds_groups else 1
    kinds = (False, True) if form.is_integer else (False,)
    groups = [1 << i for i in range(most.bit_length())]
    return [InnerProducts(form, target, m, g, p) for m in range(1, ROWS + 1) for p in kinds for g in groups]
