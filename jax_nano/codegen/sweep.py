"""The sweep path: few rows of A against a large row-major B, which is read once, where it lies, from end to end.

A sweep goes through the columns of a few rows of B that lie side by side, as that many streams which the hardware
prefetches, and adds their products to sums in memory; A's elements for these rows are held in registers meanwhile.
Where B lies in memory, not in a cache, it also fetches the rows that come next.
Nothing is packed: what an instruction wants side by side along K is interleaved on its way into registers.

    for each product of the batch
      for i in m by ROWS
        for jc in n by as many columns as L1 holds sums of
          for kk in k by steps              one sweep: steps * kr rows of B
            for j in columns by vectors     sums[rows, j] += A[rows, kk...] B[kk..., j]
      [round the sums]                      where C is narrower than they are, or apply the epilogue

A sum is taken in the order of k from its beginning to its end, one rounding a product, whatever the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import ir
from .epilogue import Epilogue
from .ir import I64, Ptr, Size, Value
from .microkernel import A_ROWS_PER_POINTER, ADD, RowOffsets
from .nanokernel import Family
from .nanokernel.int8_dot import Int8Vnni, Int8Widened
from .target import Target
from .tile import Tile

ROWS = 4  # of A at once: with more of them products, not memory, are the limit
STREAMS = (
    4  # steps side by side, each a row of B or an interleaved pair. Of 8 rows that share their sets in L1, float32
)
# reads 77 GB/s from L3, of 4 of them 87; of 8 pairs bfloat16 reads more than of 4 (Zen 4)
AHEAD_ROWS = 8  # of B where the next ones are fetched from memory: 30 GB/s; 4 rows: 27
SUMS_BYTES = 16 << 10  # what is added to stays in half of L1
FINISHED_VECTORS = 8  # of a row that one call of the epilogue takes


def family_of(family: Family) -> Family:
    """The instructions of a sweep. Bytes are widened: vpdpbusd would need the sums over B's columns, which nobody has
    taken.
    """
    return Int8Widened(family.bits, vnni=True) if isinstance(family, Int8Vnni) else family


@dataclass(frozen=True)
class SweepMicrokernel:
    """One sweep of ``rows`` rows of A over a block of columns of B.

    Attributes:
      rows: of A.
      depth: values of K, each a row of B; where it is no multiple of the nanokernel's kr, the last step is padded.
      lanes: accumulators in a vector.
      family: the nanokernel's instructions.
      a, b: dtype names in the caller's buffers.
      masks_b: whether the target loads masked vectors of B's elements.
      ahead: whether it fetches the rows of B behind these, which lie in memory, into L2. (Of an operand that L3 holds
        it would fetch each line twice as often: 66 instead of 77 GB/s.)
    """

    rows: int
    depth: int
    lanes: int
    family: Family
    a: str
    b: str
    masks_b: bool
    ahead: bool = False

    PARAMS = ("a", "b", "rsa", "csa", "rsb", "sums", "rs_sums", "cols")

    @property
    def tile(self) -> Tile:
        """The sums that one step adds to: as many vectors of columns as interleaved rows of B give."""
        return Tile(self.rows, self.family.kr, self.lanes)

    def name(self, prefix: str) -> str:
        return f"{prefix}_sweep_{self.rows}x{self.depth}{'_ahead' if self.ahead else ''}"

    def emit(self, module: ir.Module, prefix: str) -> str:
        """Adds the microkernel to the module (once) and returns its name."""
        pointers = {"a": self.a, "b": self.b, "sums": self.family.acc}
        name = self.name(prefix)
        module.function(name, [pointers.get(p, "i64") for p in self.PARAMS], self._body, internal=True)
        return name

    def _body(self, *args: Any) -> None:
        a, b, rsa, csa, rsb, sums, rs_sums, cols = args
        family, kr, lanes = self.family, self.family.kr, self.lanes
        group = lanes * kr
        rest = cols % group
        load_rest = self._rest_loader(rest)
        masks = [ir.lane_mask(rest - g * lanes, lanes) for g in range(kr)]
        row_of_sums = RowOffsets(rs_sums * ir.elem_bytes(family.acc))
        row_of_b = RowOffsets(rsb * ir.elem_bytes(self.b))
        behind = rsb * self.depth
        steps = [range(kk, min(kk + kr, self.depth)) for kk in range(0, self.depth, kr)]
        units = [[self._unit(a.at(i * rsa), csa, step) for i in range(self.rows)] for step in steps]

        def columns(at: Sequence[Ptr], partly: bool) -> None:
            """Adds to the sums of the group of columns that the pointers point to."""
            load = load_rest if partly else (lambda p: p.load(group))
            places = [
                (row_of_sums.of(at[0], i).at(g * lanes), masks[g] if partly else None)
                for i in range(self.rows)
                for g in range(kr)
            ]
            acc = [p.load(lanes, mask) for p, mask in places]
            for step, of_a in zip(steps, units, strict=True):
                rows_of_b = [row_of_b.of(at[1 + r // A_ROWS_PER_POINTER], r % A_ROWS_PER_POINTER) for r in step]
                for p in rows_of_b if self.ahead and not partly else ():
                    p.at(behind).prefetch(level=2)
                raw = [load(p) for p in rows_of_b]
                vectors = self._interleaved([family.prepare_b(v, self.b, 0) for v in raw])
                for i, unit in enumerate(of_a):
                    for g, v in enumerate(vectors):
                        acc[i * kr + g] = family.product(unit, v, acc[i * kr + g])
            for (p, mask), v in zip(places, acc, strict=True):
                p.store(v, mask)

        def whole_group(_: I64, *at: Ptr) -> list[Ptr]:
            columns(at, False)
            return [p.at(group) for p in at]

        first = [sums, *(b.at(r * rsb) for r in range(0, self.depth, A_ROWS_PER_POINTER))]
        at = ir.loop(0 - cols // group, 0, 1, first, whole_group)
        ir.if_(ir.less(0, rest), lambda: columns(at, True))

    def _unit(self, p: Ptr, csa: Size, step: Iterable[int]) -> Value:
        """A's values of one step in every lane, zero where there is none."""
        values = [self.family.prepare_a(p.at(kk * csa).load(), self.a, 0) for kk in step]
        values += [ir.zeros_like(values[0])] * (self.family.kr - len(values))
        return ir.splat(values[0] if len(values) == 1 else ir.pair(*values), self.lanes)

    def _interleaved(self, rows: Sequence[Value]) -> list[Value]:
        """One step's rows as vectors of units, each of ``lanes`` columns. A row that does not exist is zero."""
        kr, lanes = self.family.kr, self.lanes
        if kr == 1:
            return list(rows)
        first, second = (*rows, ir.zeros_like(rows[0]))[:2]
        wide = kr * lanes
        order = [[r * wide + g * lanes + lane for lane in range(lanes) for r in range(kr)] for g in range(kr)]
        return [ir.shuffle(first, second, x) for x in order]

    def _rest_loader(self, rest: Size) -> Callable[[Ptr], Value]:
        """What loads the columns of B that are left of a group."""
        group = self.lanes * self.family.kr
        if self.masks_b:
            mask = ir.lane_mask(rest, group)
            return lambda p: p.load(group, mask)
        scratch = ir.alloca(group, self.b)
        scratch.store(ir.zeros(group, self.b))

        def load(p: Ptr) -> Value:
            ir.loop(0, rest, 1, [], lambda lane: scratch.at(lane).store(p.at(lane).load()))
            return scratch.load(group)

        return load


@dataclass(frozen=True)
class SweepPath:
    """All sweep microkernels of a kernel, and the loops around them."""

    target: Target
    lanes: int
    family: Family
    a: str
    b: str
    out: str

    @property
    def narrow_out(self) -> bool:
        """Whether C cannot hold unfinished sums."""
        return ir.elem_bytes(self.out) < ir.elem_bytes(self.family.acc)

    def depth(self, rows: int, most: int) -> int:
        """Values of K that a sweep takes of at most this many: as many as the registers hold of A."""
        kr = self.family.kr
        steps = most // kr
        while steps > 1 and steps * rows > self._room(rows):
            steps //= 2
        return steps * kr

    @property
    def rows(self) -> int:
        """Rows of A at once."""
        return max(rows for rows in range(1, ROWS + 1) if rows <= self._room(rows))

    def _room(self, rows: int) -> int:
        """Registers for units of A beside the sums and B's rows, twice where they are interleaved."""
        kr = self.family.kr
        return self.target.vector_registers - (rows + (2 if kr > 1 else 1)) * kr - self.family.temporaries

    def microkernels(self) -> list[SweepMicrokernel]:
        return [m for rows in range(1, self.rows + 1) for m in self._of(rows)]

    def _of(self, rows: int) -> list[SweepMicrokernel]:
        """Those for so many rows in the order in which they go through K: the first one if B lies in memory."""
        kr = self.family.kr
        masks_b = self.target.masks(ir.elem_bytes(self.b))
        micro = partial(
            SweepMicrokernel, rows, lanes=self.lanes, family=self.family, a=self.a, b=self.b, masks_b=masks_b
        )
        depths = dict.fromkeys((self.depth(rows, STREAMS * kr), *range(kr, 0, -1)))
        return [micro(self.depth(rows, AHEAD_ROWS), ahead=True), *(micro(depth) for depth in depths)]

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> Callable[[dict[str, Any]], None]:
        """Adds the microkernels and returns what emits the loops for one product, given the fields of GemmArgs."""
        acc = self.family.acc
        for m in self.microkernels():
            m.emit(module, prefix)
        clear, finish, apply = (f"{prefix}_sweep_{what}" for what in ("clear", "round", "epilogue"))
        module.function(clear, [acc, "i64"], self._clear, internal=True)
        if self.narrow_out:
            module.function(finish, [acc, self.out, "i64"], self._round, internal=True)
        if epilogue:
            parameters = [self.out, "i64", acc, "i64", "i64", "i64", "i64"]
            module.function(apply, parameters, partial(self._apply, module, epilogue), internal=True)

        def nest(x: dict[str, Any]) -> None:
            sums, rs_sums = (x["partial"], x["rs_partial"]) if self.narrow_out else (x["c"], x["rsc"])

            def each_row(body: Callable[[I64], None]) -> None:
                ir.loop(0, x["m"], 1, [], lambda i: body(i))

            def block(i: I64, rows: int, jc: I64, cols: Size) -> None:
                def call(m: SweepMicrokernel, kk: Size) -> None:
                    given = {
                        **x,
                        "a": x["a"].at(i * x["rsa"] + kk * x["csa"]),
                        "b": x["b"].at(kk * x["rsb"] + jc),
                        "sums": sums.at(i * rs_sums + jc),
                        "rs_sums": rs_sums,
                        "cols": cols,
                    }
                    module.call(m.name(prefix), [given[p] for p in m.PARAMS])

                done: Size = 0
                for m in self._of(rows):
                    end = done + (x["k"] - done) // m.depth * m.depth
                    if m.ahead:
                        end = ir.select_size(ir.equal(x["prefetch"], 0), 0, end)
                    ir.loop(done, end, m.depth, [], partial(call, m))
                    done = end

            def blocks(i: I64, rows: int) -> None:
                width = SUMS_BYTES // ir.elem_bytes(acc) // rows
                n = x["n"]
                ir.loop(0, n, width, [], lambda jc: block(i, rows, jc, ir.minimum(n - jc, width)))

            def group(i: I64) -> None:
                by_rows = [partial(blocks, i, rows) for rows in range(1, self.rows + 1)]
                ir.switch(ir.minimum(x["m"] - i, self.rows), by_rows, first=1)

            def round_all() -> None:
                each_row(lambda i: module.call(finish, [sums.at(i * rs_sums), x["c"].at(i * x["rsc"]), x["n"]]))

            def clear_all() -> None:
                each_row(lambda i: module.call(clear, [sums.at(i * rs_sums), x["n"]]))

            def end() -> None:
                plain = round_all if self.narrow_out else (lambda: None)
                if not epilogue:
                    plain()
                    return
                fields = [x["c"], x["rsc"], sums, rs_sums, x["m"], x["n"], x["epilogue"]]
                ir.if_(ir.equal(x["epilogue"], 0), plain, partial(module.call, apply, fields))

            ir.if_(ir.equal(x["accumulate"], 0), clear_all)
            ir.loop(0, x["m"], self.rows, [], lambda i: group(i))
            ir.if_(ir.equal(x["more"], 0), end)

        return nest

    def _clear(self, sums: Ptr, cols: I64) -> None:
        lanes = self.lanes
        zero, mask = ir.zeros(lanes, self.family.acc), ir.lane_mask(cols % lanes, lanes)
        whole = cols // lanes * lanes
        ir.loop(0, whole, lanes, [], lambda j: sums.at(j).store(zero))
        sums.at(whole).store(zero, mask)

    def _round(self, sums: Ptr, c: Ptr, cols: I64) -> None:
        """A row of C from its sums, rounded once."""
        lanes, acc = self.lanes, self.family.acc
        whole = cols // lanes * lanes

        def put(j: Size, lanes: int | None = None) -> None:
            c.at(j).store(ir.convert(sums.at(j).load(lanes), acc, self.out))

        ir.loop(0, whole, lanes, [], lambda j: put(j, lanes))
        ir.loop(whole, cols, 1, [], lambda j: put(j))

    def _apply(
        self, module: ir.Module, epilogue: str, c: Ptr, rsc: I64, sums: Ptr, rs_sums: I64, m: I64, n: I64, given: I64
    ) -> None:
        """The epilogue on all of C.

        It reads whole vectors of sums, which C has none of at the end of its rows: sums that lie in C are the old ones,
        of which it reads what exists, and are added to -0.0, which changes nothing.
        """
        width = FINISHED_VECTORS * self.lanes
        nothing = ir.alloca(width, self.family.acc)
        for j in range(0, width, self.lanes):
            nothing.at(j).store(ir.constant_vector(-0.0, self.lanes, self.family.acc))

        def block(j: I64) -> None:
            fields = {
                "sums": sums.at(j) if self.narrow_out else nothing,
                "ld": rs_sums if self.narrow_out else 0,
                "rows": m,
                "cols": ir.minimum(n - j, width),
                "c": c.at(j),
                "rsc": rsc,
                "old": sums.at(j),
                "rs_old": rs_sums,
                "mode": 0 if self.narrow_out else ADD,
                "column": j,
                "epilogue": given,
            }
            module.call(epilogue, [fields[p] for p in Epilogue.PARAMS])

        ir.loop(0, n, width, [], lambda j: block(j))
