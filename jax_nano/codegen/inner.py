"""The inner-product path: both operands contiguous along K, and few rows or columns.

There a microkernel holds ``rows x cols`` accumulators that are vectors along K, reads every operand once where it
lies, and sums each accumulator's lanes at the end: a matrix-vector product with a row-major matrix or the scores of
one query against a cache of keys run at the speed of memory. The smaller operand may lie in any way: it is then copied
to the workspace, along K.

    for each product of the batch
      [copy A or B along K]
      for j in n by cols                  the longer side outside: its rows are read once
        for i in m by rows                (or the other way round)
          microkernel: all of k

Sums are taken lane by lane, then over the lanes as a tree, whatever the split over m and n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import ir
from .epilogue import Epilogue
from .ir import I64, Ptr, Size, Value
from .nanokernel import Family
from .packing import void
from .tile import Tile

ROWS, COLS = 4, 4  # 16 accumulators hide the latency of two pipes; with operands 24 of 32 registers
NARROW_ROWS, NARROW_COLS = 3, 3  # for 16 registers


@dataclass(frozen=True)
class InnerMicrokernel:
    """``rows`` rows of A against ``cols`` columns of B, over all of K.

    Attributes:
      rows, cols: the tile.
      lanes: units in a vector.
      family: the nanokernel's instructions.
      a, b, out: dtype names in the caller's buffers.
    """

    rows: int
    cols: int
    lanes: int
    family: Family
    a: str
    b: str
    out: str

    @property
    def narrow(self) -> bool:
        """Whether C cannot hold sums as they are."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    @property
    def params(self) -> tuple[str, ...]:
        """``sums``: where to leave them as they are, instead of rounding them to C."""
        return ("a", "b", "rsa", "csb", "k", "c", "rsc", *(("sums",) if self.narrow else ()))

    @property
    def tile(self) -> Tile:
        """Its accumulators as a register tile: a vector along K for each row and column."""
        return Tile(self.rows, self.cols, self.lanes)

    def name(self, prefix: str) -> str:
        return f"{prefix}_inner_{self.rows}x{self.cols}"

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
        a_rows = [a.at(i * rsa) for i in range(self.rows)]
        b_cols = [b.at(j * csb) for j in range(self.cols)]

        def units(p: Ptr, prepare: Callable[[Value, str, int], Value], source: str) -> Value:
            return ir.bitcast(prepare(p.load(chunk), source, 0), self.lanes, family.unit)

        def step(_: I64, *carried: Any) -> list[Any]:
            """One vector of K of every row and column; the pointers move, so that no index needs a register."""
            pointers = carried[: self.rows + self.cols]
            acc = list(carried[self.rows + self.cols :])
            held = [units(p, family.prepare_b, self.b) for p in pointers[self.rows :]]
            for i, p in enumerate(pointers[: self.rows]):
                streamed = units(p, family.prepare_a, self.a)
                for j in range(self.cols):
                    acc[i * self.cols + j] = family.product(streamed, held[j], acc[i * self.cols + j])
            return [*(p.at(chunk) for p in pointers), *acc]

        zero = ir.zeros(self.lanes, family.acc)
        state = [*a_rows, *b_cols, *[zero] * (self.rows * self.cols)]
        out = ir.loop(0 - k // chunk, 0, 1, state, step)
        whole = k // chunk * chunk
        sums = [ir.tree_sum(v) for v in out[self.rows + self.cols :]]

        def element(kk: I64, *sums: Value) -> list[Value]:
            """What K leaves beyond whole vectors, one by one."""
            xs = [ir.convert(p.at(kk).load(), self.a, family.acc) for p in a_rows]
            ys = [ir.convert(p.at(kk).load(), self.b, family.acc) for p in b_cols]
            return [ir.multiply_add(xs[n // self.cols], ys[n % self.cols], s) for n, s in enumerate(sums)]

        sums = ir.loop(whole, k, 1, sums, element)

        def store(to: Ptr, stride: Size) -> None:
            for n, s in enumerate(sums):
                i, j = divmod(n, self.cols)
                to.at(i * stride + j).store(ir.convert(s, family.acc, to.elem))

        if self.narrow:
            whole_sums = Ptr.of_address(given["sums"], family.acc)
            ir.if_(ir.equal(given["sums"], 0), lambda: store(c, rsc), lambda: store(whole_sums, self.lanes))
        else:
            store(c, rsc)


@dataclass(frozen=True)
class InnerPath:
    """All inner-product microkernels of a kernel, and the loops around them."""

    lanes: int
    registers: int
    family: Family
    a: str
    b: str
    out: str

    @property
    def tile(self) -> tuple[int, int]:
        return (ROWS, COLS) if self.registers >= 32 else (NARROW_ROWS, NARROW_COLS)

    def microkernels(self) -> list[InnerMicrokernel]:
        rows, cols = self.tile
        return [
            InnerMicrokernel(r, c, self.lanes, self.family, self.a, self.b, self.out)
            for r in range(1, rows + 1)
            for c in range(1, cols + 1)
        ]

    @property
    def narrow(self) -> bool:
        """Whether C cannot hold sums as they are."""
        return self.microkernels()[0].narrow

    def room(self) -> Ptr:
        """Room for a tile of sums, in rows of whole vectors. Only at the top of a function."""
        return ir.alloca(self.tile[0] * self.lanes, self.family.acc)

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> Callable[[dict[str, Any]], None]:
        """Adds the microkernels and returns what emits the loops for one product.

        That wants the fields of GemmArgs, and room for a tile of sums as ``sums``.
        """
        kernels = [k.emit(module, prefix) for k in self.microkernels()]
        rows, cols = self.tile
        params = self.microkernels()[0].params
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

            def tile(i: Size, j: Size) -> None:
                here_m, here_n = ir.minimum(x["m"] - i, rows), ir.minimum(x["n"] - j, cols)
                c, on_stack = x["c"].at(i * x["rsc"] + j), x["sums"]

                def in_c() -> list[Any]:
                    return [c, x["rsc"], 0]

                def for_epilogue() -> list[Any]:
                    if self.narrow:
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
                calls = [partial(module.call, name, [given[p] for p in params]) for name in kernels]
                which = (here_m - 1) * cols + (here_n - 1)
                assert isinstance(which, I64)
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

            def columns_outside() -> None:
                ir.loop(0, x["n"], cols, [], lambda j: void(ir.loop(0, x["m"], rows, [], lambda i: tile(i, j))))

            def rows_outside() -> None:
                ir.loop(0, x["m"], rows, [], lambda i: void(ir.loop(0, x["n"], cols, [], lambda j: tile(i, j))))

            ir.if_(ir.less(x["m"], x["n"]), columns_outside, rows_outside)

        return nest


def _copy_along_k(source: Ptr, target: Ptr, vectors: I64, k: I64, stride: I64, along: I64) -> None:
    """Vectors of k elements that are ``along`` apart, one dense vector after the other."""

    def element(kk: I64, j: I64) -> None:
        target.at(j * k + kk).store(source.at(kk * along + j * stride).load())

    ir.loop(0, k, 1, [], lambda kk: void(ir.loop(0, vectors, 1, [], lambda j: element(kk, j))))
