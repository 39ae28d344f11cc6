"""The inner-product path: both operands contiguous along K, and few rows or columns.

There a microkernel holds ``rows x cols`` accumulators that are vectors along K, reads every operand once where it
lies, and sums each accumulator's lanes at the end: a matrix-vector product with a row-major matrix or the scores of
one query against a cache of keys run at the speed of memory. The smaller operand may lie in any way: it is then copied
to the workspace, along K.

    for each product of the batch
      [copy A or B along K]
      for j in n by cols, or one by one   the longer side outside: its vectors are read once
        for i in m by rows                (or the other way round)
          microkernel: all of k

Sums are taken lane by lane, then over the lanes as a tree, whatever the split over m and n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from . import ir
from .epilogue import Epilogue
from .ir import I64, Ptr, Size, Value
from .microkernel import A_ROWS_PER_POINTER, RowOffsets
from .nanokernel import Corrected, Family
from .packing import void
from .target import Target
from .tile import Tile

ROWS, COLS = 4, 4  # 16 accumulators hide the latency of two pipes; with operands 24 of 32 registers
NARROW_ROWS, NARROW_COLS = 3, 3  # for 16 registers
SHIFTED_NARROW_COLS = 2  # with a sum and a constant more for each column's correction
# Vectors that lie in memory (Zen 4, one row): long ones as so many streams, the next ones fetched meanwhile, 33 GB/s,
# one after the other 24; short ones one after the other, as they lie, 29 to 32 GB/s, four side by side 11 to 18.
AHEAD, NARROW_AHEAD = 8, 4
SHORT_BYTES = 4096
SHORT_AHEAD = 16


@dataclass(frozen=True)
class InnerMicrokernel:
    """``rows`` rows of A against ``cols`` columns of B, over all of K.

    Attributes:
      rows, cols: the tile.
      lanes: units in a vector.
      family: the nanokernel's instructions.
      a, b, out: dtype names in the caller's buffers.
      masks: whether the target loads masked vectors of both.
      fetches: "a" or "b" if it fetches into L2 what that operand will be read of later, else empty.
      ahead: how many vectors later that is.
    """

    rows: int
    cols: int
    lanes: int
    family: Family
    a: str
    b: str
    out: str
    masks: bool
    fetches: str = ""
    ahead: int = 0

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold sums as they are."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    @property
    def params(self) -> tuple[str, ...]:
        """``sums``: where to leave them as they are, instead of rounding them to C."""
        return ("a", "b", "rsa", "csb", "k", "c", "rsc", *(("sums",) if self.narrow_out else ()))

    @property
    def tile(self) -> Tile:
        """Its accumulators as a register tile: a vector along K for each row and column.

        Where A's values are shifted, one more row of them is the columns' corrections.
        """
        return Tile(self.rows + self.family.column_sums, self.cols, self.lanes)

    def name(self, prefix: str) -> str:
        return f"{prefix}_inner_{self.rows}x{self.cols}{f'_ahead_in_{self.fetches}' if self.fetches else ''}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        pointers = {"a": self.a, "b": self.b, "c": self.out}
        name = self.name(prefix)
        module.function(name, [pointers.get(p, "i64") for p in self.params], self._body, internal=True)
        return name

    def _body(self, *args: Any) -> None:
        given: dict[str, Any] = dict(zip(self.params, args, strict=True))
        a, b, rsa, csb, k, c, rsc = (given[x] for x in ("a", "b", "rsa", "csb", "k", "c", "rsc"))
        family, chunk = self.family, self.lanes * self.family.kr
        a_rows, b_cols = _Vectors(a, rsa, self.rows), _Vectors(b, csb, self.cols)
        count, pointers = self.rows * self.cols, len(a_rows.first) + len(b_cols.first)

        def products(xs: Sequence[Ptr], ys: Sequence[Ptr], so_far: Sequence[Value], mask: Value | None) -> list[Value]:
            """One vector of K of every row and column, beyond ``mask`` zeros; behind the sums B's with the shift."""

            def units(p: Ptr, prepare: Callable[[Value, str, int], Value], source: str) -> Value:
                return ir.bitcast(prepare(p.load(chunk, mask), source, 0), self.lanes, family.unit)

            def sums_of(i: int, x: Value, j: int, y: Value) -> None:
                acc[i * self.cols + j] = family.product(x, y, acc[i * self.cols + j])

            acc = list(so_far)
            if self.cols > self.rows:
                held = [*(units(p, family.prepare_a, self.a) for p in xs), *shifts]
                for j, p in enumerate(ys):
                    streamed = units(p, family.prepare_b, self.b)
                    for i, x in enumerate(held):
                        sums_of(i, x, j, streamed)
            else:
                held = [units(p, family.prepare_b, self.b) for p in ys]
                for i in range(self.rows + len(shifts)):
                    streamed = units(xs[i], family.prepare_a, self.a) if i < self.rows else shifts[0]
                    for j, y in enumerate(held):
                        sums_of(i, streamed, j, y)
            return acc

        def step(_: I64, *carried: Any) -> list[Any]:
            """The pointers move, so that no index needs a register."""
            if self.fetches:
                of_a, of_b = vectors([p.at(behind) for p in carried[:pointers]])
                for p in of_a if self.fetches == "a" else of_b:
                    p.prefetch(level=2)
            return [*(p.at(chunk) for p in carried[:pointers]), *products(*vectors(carried), carried[pointers:], None)]

        def vectors(carried: Sequence[Any]) -> tuple[list[Ptr], list[Ptr]]:
            first = len(a_rows.first)
            return a_rows.all(carried[:first]), b_cols.all(carried[first:pointers])

        behind = (rsa if self.fetches == "a" else csb) * self.ahead
        shifts = [cast(Corrected, family).shift()] if family.column_sums else []
        zero = ir.zeros(self.lanes, family.acc)
        state = [*a_rows.first, *b_cols.first, *[zero] * self.tile.accumulators]
        out = ir.loop(0 - k // chunk, 0, 1, state, step)
        at, acc = out[:pointers], out[pointers:]
        rest = k % chunk
        if self.masks:
            mask = ir.lane_mask(rest, chunk)
            acc = ir.if_(ir.less(0, rest), lambda: products(*vectors(at), acc, mask), lambda: acc, like=acc)
        if shifts:
            acc = [ir.subtract(v, acc[count + n % self.cols]) for n, v in enumerate(acc[:count])]
        sums = [ir.tree_sum(v) for v in acc]

        def element(_: I64, *carried: Any) -> list[Any]:
            """What K leaves beyond whole vectors, one by one."""
            x, y = (
                [ir.convert(p.load(), source, family.acc) for p in ps]
                for ps, source in zip(vectors(carried), (self.a, self.b), strict=True)
            )
            sums = [ir.multiply_add(x[n // self.cols], y[n % self.cols], s) for n, s in enumerate(carried[pointers:])]
            return [*(p.at(1) for p in carried[:pointers]), *sums]

        if not self.masks:
            sums = ir.loop(0, rest, 1, [*at, *sums], element)[pointers:]

        def store(to: Ptr, stride: Size) -> None:
            for n, s in enumerate(sums):
                i, j = divmod(n, self.cols)
                to.at(i * stride + j).store(ir.convert(s, family.acc, to.elem))

        if self.narrow_out:
            whole_sums = Ptr.of_address(given["sums"], family.acc)
            ir.if_(ir.equal(given["sums"], 0), lambda: store(c, rsc), lambda: store(whole_sums, self.lanes))
        else:
            store(c, rsc)


@dataclass(frozen=True)
class InnerPath:
    """All inner-product microkernels of a kernel, and the loops around them."""

    target: Target
    lanes: int
    family: Family
    a: str
    b: str
    out: str

    @property
    def tile(self) -> tuple[int, int]:
        if self.target.vector_registers >= 32:
            return ROWS, COLS
        return NARROW_ROWS, SHIFTED_NARROW_COLS if self.family.column_sums else NARROW_COLS

    def microkernels(self) -> list[InnerMicrokernel]:
        rows, cols = self.tile
        return [*(self._micro(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1)), *self._ahead()]

    def _ahead(self) -> list[InnerMicrokernel]:
        """For vectors in memory against a single one: long columns, long rows, short columns, short rows."""
        long = AHEAD if self.target.vector_registers >= 32 else NARROW_AHEAD
        return [
            self._micro(1, long, "b", long),
            self._micro(long, 1, "a", long),
            self._micro(1, 1, "b", SHORT_AHEAD),
            self._micro(1, 1, "a", SHORT_AHEAD),
        ]

    def _micro(self, rows: int, cols: int, fetches: str = "", ahead: int = 0) -> InnerMicrokernel:
        masks = all(self.target.masks(ir.elem_bytes(x)) for x in (self.a, self.b))
        return InnerMicrokernel(rows, cols, self.lanes, self.family, self.a, self.b, self.out, masks, fetches, ahead)

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold sums as they are."""
        return self._micro(1, 1).narrow_out

    def room(self) -> Ptr:
        """Room for a tile of sums, in rows of whole vectors. Only at the top of a function."""
        return ir.alloca(max(m.rows for m in self.microkernels()) * self.lanes, self.family.acc)

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> Callable[[dict[str, Any]], None]:
        """Adds the microkernels and returns what emits the loops for one product.

        That wants the fields of GemmArgs, and room for a tile of sums as ``sums``.
        """
        *kernels, long_columns, long_rows, short_columns, short_rows = (
            k.emit(module, prefix) for k in self.microkernels()
        )
        rows, cols = self.tile
        params = self._micro(1, 1).params
        copies = {"a": f"{prefix}_a_along_k", "b": f"{prefix}_b_along_k"}
        for name, elem in ((copies["a"], self.a), (copies["b"], self.b)):
            module.function(name, [elem, elem, *["i64"] * 4], _copy_along_k, internal=True)

        def along_k(x: dict[str, Any], operand: str, size: Size, stride: str, along: str) -> dict[str, Any]:
            """The operand and the stride between its vectors along K, copied first if it is to be."""
            source: Ptr = x[operand]
            copy = Ptr(x[f"{operand}_pack"].value, source.elem)

            def copied() -> list[Any]:
                module.call(copies[operand], [source, copy, size, x["k"], x[stride], x[along]])
                return [copy, x["k"]]

            there = [source, x[stride]]
            pointer, step = ir.if_(ir.equal(x[f"pack_{operand}"], 0), lambda: there, copied, like=there)
            return {operand: pointer, stride: step}

        def nest(given: dict[str, Any]) -> None:
            x = {
                **given,
                **along_k(given, "a", given["m"], "rsa", "csa"),
                **along_k(given, "b", given["n"], "csb", "rsb"),
            }
            finishes = ir.negate(ir.equal(x["epilogue"], 0)) if epilogue else False
            like: list[Any] = [x["c"], 0, 0]

            def some(i: Size, j: Size, here_m: Size, here_n: Size, names: Sequence[str], which: Size) -> None:
                """The tile of here_m x here_n at (i, j), by one of some microkernels."""
                c, on_stack = x["c"].at(i * x["rsc"] + j), x["sums"]

                def in_c() -> list[Any]:
                    return [c, x["rsc"], 0]

                def for_epilogue() -> list[Any]:
                    if self.narrow_out:
                        return [c, x["rsc"], on_stack.address]
                    return [on_stack, self.lanes, 0]

                to, stride, sums = ir.if_(finishes, for_epilogue, in_c, like=like)
                given = {
                    **x,
                    "a": x["a"].at(i * x["rsa"]),
                    "b": x["b"].at(j * x["csb"]),
                    "c": to,
                    "rsc": stride,
                    "sums": sums,
                }
                calls = [partial(module.call, name, [given[p] for p in params]) for name in names]
                if len(calls) == 1:
                    calls[0]()
                else:
                    ir.switch(which, calls)
                if epilogue:
                    arguments = {
                        "sums": on_stack,
                        "ld": self.lanes,
                        "rows": here_m,
                        "cols": here_n,
                        "c": c,
                        "rsc": x["rsc"],
                        "old": on_stack,
                        "rs_old": 0,
                        "mode": 0,
                        "column": j,
                        "epilogue": x["epilogue"],
                    }
                    ir.if_(finishes, partial(module.call, epilogue, [arguments[p] for p in Epilogue.PARAMS]))

            from_memory = ir.negate(ir.equal(x["prefetch"], 0))
            are_short = ir.less(x["k"] * ir.elem_bytes(self.b), SHORT_BYTES)

            def vectors(
                size: str, most: int, other: str, tile: Callable[[Size, Size], None], long: str, short: str
            ) -> None:
                """Along the longer side: the operand of ``other`` vectors stays in L1."""
                n, wide = x[size], self._ahead()[0].cols

                def fetching(name: str, count: int, j: Size) -> None:
                    if size == "n":
                        some(0, j, 1, count, [name], 0)
                    else:
                        some(j, 0, count, 1, [name], 0)

                def fetched() -> list[Any]:
                    whole = ir.select_size(are_short, n, n // wide * wide)
                    ir.if_(
                        are_short,
                        lambda: void(ir.loop(0, n, 1, [], lambda j: fetching(short, 1, j))),
                        lambda: void(ir.loop(0, whole, wide, [], lambda j: fetching(long, wide, j))),
                    )
                    return [whole]

                (done,) = ir.if_(ir.both(from_memory, ir.equal(x[other], 1)), fetched, lambda: [0], like=[0])
                step = ir.select_size(ir.both(from_memory, are_short), 1, most)
                ir.loop(done, n, step, [], lambda j: tile(j, ir.minimum(n - j, step)))

            def of_columns(j: Size, here_n: Size) -> None:
                def at(i: Size) -> None:
                    here_m = ir.minimum(x["m"] - i, rows)
                    some(i, j, here_m, here_n, kernels, (here_m - 1) * cols + (here_n - 1))

                ir.loop(0, x["m"], rows, [], lambda i: at(i))

            def of_rows(i: Size, here_m: Size) -> None:
                def at(j: Size) -> None:
                    here_n = ir.minimum(x["n"] - j, cols)
                    some(i, j, here_m, here_n, kernels, (here_m - 1) * cols + (here_n - 1))

                ir.loop(0, x["n"], cols, [], lambda j: at(j))

            def columns_outside() -> None:
                vectors("n", cols, "m", of_columns, long_columns, short_columns)

            def rows_outside() -> None:
                vectors("m", rows, "n", of_rows, long_rows, short_rows)

            ir.if_(ir.less(x["m"], x["n"]), columns_outside, rows_outside)

        return nest


class _Vectors:
    """Some vectors along K, ``stride`` apart: a pointer for each, or, of many, one for several."""

    def __init__(self, first: Ptr, stride: Size, count: int):
        self._count, self._each = count, 1 if count <= max(ROWS, COLS) else A_ROWS_PER_POINTER
        self._offsets = RowOffsets(stride * ir.elem_bytes(first.elem))
        self.first = [first.at(i * stride) for i in range(0, count, self._each)]

    def all(self, pointers: Sequence[Ptr]) -> list[Ptr]:
        """Where each of them is when the first ones are there."""
        return [self._offsets.of(pointers[i // self._each], i % self._each) for i in range(self._count)]


def _copy_along_k(source: Ptr, target: Ptr, vectors: I64, k: I64, stride: I64, along: I64) -> None:
    """Vectors of k elements that are ``along`` apart, one dense vector after the other."""

    def element(kk: I64, j: I64) -> None:
        target.at(j * k + kk).store(source.at(kk * along + j * stride).load())

    ir.loop(0, k, 1, [], lambda kk: void(ir.loop(0, vectors, 1, [], lambda j: element(kk, j))))
