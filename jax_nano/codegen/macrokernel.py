"""The macrokernel: a whole matrix product, cache-blocked, from generated microkernels and packing.

    for each product of the batch
      for ic in m by mc
        for pc in k by kc                 partial sums over K are added in this order, whatever the split over m, n
          for jc in n by nc
            [pack B(kc x nc)]             stays in L2 while A's panels pass
            for ir in mc by tile_rows     one panel of A, of mr rows or fewer, stays in L1
              [pack A(panel x kc)]        the first time
              for jr in nc by nr          microkernel, which fetches what comes next: its tile of C, A's next panel,
                                          and for each panel of A a share of B's next block; of a B that is not
                                          packed the first panel fetches the tiles that come next

Sizes, strides, blocking and whether an operand is packed are fields of ``GemmArgs`` (``csrc/plan/kernel_abi.h``).
An element of C depends on K and kc alone, so any split of m and n over threads gives the same bits.

Products that need no block, no packing and no fetching ahead, as batches of small ones, have two loops instead: over
products, and over panels of A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax_nano._core import spec
from jax_nano._core.spec import names

from . import ir
from .amx_microkernel import AmxMicrokernel, AmxTileRow
from .epilogue import Epilogue, Landing
from .inner import InnerMicrokernel, InnerPath
from .ir import I64, Ptr, Size, Value
from .microkernel import (
    ADD,
    MORE,
    ROW_PARAMS,
    STREAM_TILES_AHEAD,
    Microkernel,
    lines_of_a_row,
    walks_min_steps,
    walks_of,
)
from .nanokernel import Family
from .nanokernel.amx import ROWS, AmxDot
from .packing import Packing
from .sweep import SweepMicrokernel, SweepPath, family_of
from .target import Target
from .tile import Tile, stream_tile
from .walks import A_WALKS, LINE, Walk

GEMM_ARGS = names(spec.GEMM_ARGS)


UNHURRIED_STEPS = 256
"""Of so many K steps one in four is enough to fetch what a tile needs and its share of what comes next."""

NEAR_STEPS, NEAR_BYTES = 168, 256 << 10
"""With fewer K steps and no more bytes of B nothing is worth fetching: planning walks takes longer than it saves."""

SHORT_ROWS, SHORT_WIDE_ROWS, WIDE_VECTORS = 4, 8, 4
"""Rows of tiles that are stored often; the latter where a row of C is longer than so many vectors, and B read by more
tiles."""


@dataclass(frozen=True)
class Gemm:
    """A generated matrix product for one signature.

    Attributes:
      target: the instruction set.
      a, b, out: dtype names of A, B and C in the caller's buffers.
      family: the nanokernel's instructions.
      tile: the register tile for packed operands.
    """

    target: Target
    a: str
    b: str
    out: str
    family: Family
    tile: Tile

    @property
    def direct_a(self) -> bool:
        """Whether A can be read where it lies: kr of its elements, side by side, are what microkernels broadcast."""
        return self.a == self.family.a_elem and self.family.steps_at_once == 1 and not self._splits

    @property
    def direct_b(self) -> bool:
        """Whether B can be read where it lies, widened on the way into registers if need be."""
        return self.family.kr == 1 and not self._splits

    @property
    def inner(self) -> InnerPath | None:
        """The inner-product path, where the nanokernel can take both operands as they lie along K."""
        if not self._takes_operands_as_they_are:
            return None
        return InnerPath(self.target, self.tile.lanes, self.family, self.a, self.b, self.out)

    @property
    def sweep(self) -> SweepPath | None:
        """The path for few rows of A and a row-major B, where the nanokernel can take both as they lie."""
        if not self._takes_operands_as_they_are:
            return None
        return SweepPath(self.target, self.tile.lanes, family_of(self.family), self.a, self.b, self.out)

    @property
    def _takes_operands_as_they_are(self) -> bool:
        family = self.family
        rounds = any(ir.elem_bytes(x) > ir.elem_bytes(y) for x, y in ((self.a, family.a_elem), (self.b, family.b_elem)))
        return not self._splits and not rounds and family.steps_at_once == 1

    @property
    def epilogue(self) -> Epilogue | None:
        """What it can do to finished sums."""
        masks = self.target.masks(1)
        return Epilogue(self.out, self.family.acc, self.tile.lanes, masks) if self.family.acc == "float32" else None

    @property
    def _splits(self) -> bool:
        return getattr(self.family, "splits", False)

    def microkernels(self) -> Iterator[Microkernel | AmxMicrokernel | InnerMicrokernel | SweepMicrokernel]:
        """Every microkernel of this product."""
        for rows in self._tile_rows():
            yield from rows.microkernels()
        for path in (self.inner, self.sweep):
            if path is not None:
                yield from path.microkernels()

    def emit(self, module: ir.Module, symbol: str) -> None:
        """Adds ``void symbol(const GemmArgs*)`` and everything behind it to the module."""
        masks = all(self.target.masks(ir.elem_bytes(x)) for x in (self.a, self.b))
        packing = Packing(self.tile, self.family, self.a, self.b, masks)
        pack_a, pack_b = packing.emit(module, symbol)
        epilogue = self.epilogue.emit(module, symbol) if self.epilogue else None
        names: dict[bool, list[str]] = {stream: [] for stream in (False, True)}
        for rows in self._tile_rows():
            names[rows.stream].append(rows.emit(module, symbol, epilogue))
        # The paths beside the blocked one, by the field of GemmArgs that asks for them.
        paths = {"inner": self.inner, "sweep": self.sweep}
        others = {field: path.emit(module, symbol, epilogue) for field, path in paths.items() if path is not None}
        nest = _LoopNest(self, module, packing, pack_a, pack_b, names[False], names[True], others)
        module.function(symbol, ["int64"], nest.emit, internal=False)

    def _tile_rows(self) -> Iterator[_TileRow | AmxTileRow]:
        """For each number of rows 1..mr, or of rows of tiles, against packed panels of B and B where it lies."""
        if isinstance(self.family, AmxDot):
            for tiles in range(1, self.tile.mr // ROWS + 1):
                yield AmxTileRow(tiles, self.family, self.out)
            return
        for stream in (False, True) if self.direct_b else (False,):
            for m in range(1, self.tile.mr + 1):
                tile = Tile(m, self.tile.nv, self.tile.lanes)
                if stream:
                    tile = stream_tile(self.tile, m, self.target, self.family.temporaries)
                whole = [self._micro(Tile(m, nv, tile.lanes), stream) for nv in range(1, tile.nv + 1)]
                yield _TileRow(whole, self._micro(Tile(m, 1, tile.lanes), stream, masked=True))

    def _micro(self, tile: Tile, stream: bool, *, masked: bool = False) -> Microkernel:
        b = self.b if stream else self.family.unit
        return Microkernel(
            tile=tile,
            family=self.family,
            b=b,
            out=self.out,
            main=tile.mr == self.tile.mr and tile.nv == self.tile.nv,
            masked=masked,
            stream=stream,
            masks_b=self.target.masks(ir.elem_bytes(b)),
            masks_c=self.target.masks(ir.elem_bytes(self.out)),
        )


@dataclass(frozen=True)
class _Given:
    """The arguments of a generated function by name: addresses, and sizes, strides and flags."""

    ptr: Mapping[str, Ptr]
    size: Mapping[str, Size]

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[Ptr | I64]) -> _Given:
        named = list(zip(names, values, strict=True))
        return cls(
            {name: value for name, value in named if isinstance(value, Ptr)},
            {name: value for name, value in named if isinstance(value, I64)},
        )


@dataclass(frozen=True)
class _TileRow:
    """All tiles from left to right against one panel of A: full ones, one of the whole vectors left, one masked."""

    whole: list[Microkernel]  # by number of vectors, from 1
    masked: Microkernel

    @property
    def full(self) -> Microkernel:
        return self.whole[-1]

    @property
    def stream(self) -> bool:
        return self.full.stream

    def microkernels(self) -> Sequence[Microkernel]:
        return [*self.whole, self.masked]

    def emit(self, module: ir.Module, prefix: str, epilogue: str | None) -> str:
        kernels = [k.emit(module, prefix) for k in self.whole]
        masked = self.masked.emit(module, prefix)
        unit = self.full.family.unit
        pointers = {"a": unit, "walks": "int64", "b": self.full.b, "c": self.full.out, "partial": self.full.family.acc}
        name = f"{prefix}_row{self.full.tile.mr}{'_stream' if self.full.stream else ''}"

        def body(*args: Ptr | I64) -> None:
            x = _Given.of(ROW_PARAMS, args)
            nr, lanes = self.full.tile.nr, self.full.tile.lanes
            cols = x.size["cols"]
            landing = Landing(module, epilogue, self.full.narrow_out, (self.full.tile.mr, nr), {**x.ptr, **x.size})

            def tile_at(j: Size, kernel: str, active: Size, panel: Size | None = None) -> None:
                """The tile at column j, in the panel of B that begins at column ``panel`` if not at j itself."""
                panel = j if panel is None else panel
                beside = nr * STREAM_TILES_AHEAD
                wraps = ir.select_size(ir.less(j + beside, cols), 0, x.size["wrap"])
                here: dict[str, Ptr | Size] = {
                    **x.ptr,
                    **x.size,
                    "b": x.ptr["b"].at(panel * x.size["b_step"] + (j - panel)),
                    "cols": active,
                    "later": ir.select_size(ir.equal(x.size["fetch"], 0), 0, wraps + beside),
                    **landing.at(j),
                }
                module.call(kernel, [here[p] for p in self.full.params])
                landing.finish(j, self.full.tile.mr, active)

            tiles = cols // nr * nr
            vectors = cols // lanes * lanes
            ir.loop(0, tiles, nr, [], lambda j: tile_at(j, kernels[-1], nr))
            if len(kernels) > 1:
                rests: list[Callable[[], None]] = [
                    lambda: None,
                    *(partial(tile_at, tiles, k, n * lanes) for n, k in enumerate(kernels[:-1], 1)),
                ]
                ir.switch((vectors - tiles) // lanes, rests)
            ir.if_(ir.less(vectors, cols), lambda: tile_at(vectors, masked, cols - vectors, tiles))

        module.function(name, [pointers.get(p, "i64") for p in ROW_PARAMS], body, internal=True)
        return name


@dataclass(frozen=True)
class _LoopNest:
    """The generated function itself: five loops around rows of tiles."""

    gemm: Gemm
    module: ir.Module
    packing: Packing
    pack_a: str
    pack_b: str
    panel_rows: list[str]
    stream_rows: list[str]
    others: Mapping[str, Callable[[dict[str, Any]], None]]

    def emit(self, args: Ptr) -> None:
        gemm, family = self.gemm, self.gemm.family
        pointers = {
            "a": gemm.a,
            "b": gemm.b,
            "c": gemm.out,
            "a_pack": family.unit,
            "b_pack": family.unit,
            "partial": family.acc,
        }

        def field(name: str) -> Ptr | I64:
            at = args.at(GEMM_ARGS.index(name))
            return Ptr(at.as_type("ptr").load(), pointers[name]) if name in pointers else I64(at.load())

        table = walks_of(gemm.tile, gemm.out, args).room()
        walks_of(gemm.tile, gemm.out, table).begin(args)
        x = _Given.of((*GEMM_ARGS, "walks"), [*(field(name) for name in GEMM_ARGS), table])
        sums = gemm.inner.room() if gemm.inner is not None else None

        def product(index: Size) -> None:
            moved = {p: x.ptr[p].at(index * x.size[s]) for p, s in (("a", "bsa"), ("b", "bsb"), ("c", "bsc"))}
            more = ir.less(index + 1, x.size["batch"])
            strides = {f"next_{p}": ir.select_size(more, x.size[s], 0) for p, s in (("a", "bsa"), ("b", "bsb"))}
            here = _Given({**x.ptr, **moved}, {**x.size, **strides})

            def blocked() -> None:
                ir.loop(0, x.size["m"], x.size["mc"], [], lambda ic: self._block_m(here, ic))

            chosen: Callable[[], Sequence[Any] | None] = blocked
            for field, path in self.others.items():
                otherwise, run = chosen, partial(path, {**here.ptr, **here.size, "sums": sums})
                chosen = partial(ir.if_, ir.equal(x.size[field], 0), otherwise, run)
            chosen()

        def all_products() -> None:
            ir.loop(0, x.size["batch"], 1, [], product)

        if gemm.direct_a and gemm.direct_b:
            ir.if_(self._is_unblocked(x), partial(self._unblocked, x), all_products)
        else:
            all_products()

    def _is_unblocked(self, x: _Given) -> Value | bool:
        """Whether products have one block each, nothing is packed, and sums are too short to fetch anything."""
        gemm = self.gemm
        asked_for = x.size["inner"] | x.size["sweep"] | x.size["pack_a"] | x.size["pack_b"]
        whole = ir.both(ir.negate(ir.less(x.size["kc"], x.size["k"])), ir.negate(ir.less(x.size["nc"], x.size["n"])))
        depth = self.packing.depth(x.size["k"])
        most = ir.select_size(self._b_is_near(x), NEAR_STEPS, walks_min_steps(gemm.tile, gemm.out))
        return ir.both(ir.equal(asked_for, 0), ir.both(whole, ir.less(depth, most)))

    def _b_is_near(self, x: _Given) -> Value | bool:
        """Whether B stays in L2 while all panels of A pass."""
        return ir.negate(ir.less(NEAR_BYTES, x.size["k"] * x.size["n"] * ir.elem_bytes(self.gemm.b)))

    def _unblocked(self, x: _Given) -> None:
        """The loops around rows of tiles for such products: all that they need is known before the first."""
        m, most = x.size["m"], ir.minimum(x.size["tile_rows"], self._rows_at_once(x.size["n"]))
        panels = (m + (most - 1)) // most
        # Of equal height, so that none is so low that its loads take longer than its products.
        height = (m + (panels - 1)) // ir.select_size(ir.equal(m, 0), 1, panels)
        more = x.size["more"]
        given: dict[str, Ptr | Size] = {
            **x.ptr,
            **x.size,
            "walks": walks_of(self.gemm.tile, self.gemm.out, x.ptr["walks"]).rest,
            "k": self.packing.depth(x.size["k"]),
            "cols": x.size["n"],
            "b_step": 1,
            "fetch": ir.select_size(self._b_is_near(x), 0, 1),
            "wrap": 0,
            "mode": x.size["accumulate"] * ADD + more * MORE,
            "column": 0,
            "epilogue": ir.select_size(ir.equal(more, 0), x.size["epilogue"], 0),
        }

        def product(index: Size) -> None:
            a, b, c = (x.ptr[p].at(index * x.size[s]) for p, s in (("a", "bsa"), ("b", "bsb"), ("c", "bsc")))

            def panel(i: Size) -> None:
                here = {
                    "a": a.at(i * x.size["rsa"]),
                    "b": b,
                    "c": c.at(i * x.size["rsc"]),
                    "partial": x.ptr["partial"].at(i * x.size["rs_partial"]),
                    "rows": ir.minimum(m - i, height),
                }
                self._row_of_tiles(self.stream_rows, {**given, **here})

            ir.loop(0, m, height, [], panel)

        ir.loop(0, x.size["batch"], 1, [], product)

    def _rows_at_once(self, n: Size) -> Size:
        """The most rows of a panel of A, where the sums are so short that the stores of a tile count.

        A core takes a store of 512 bits in two cycles, and soon waits with all else where it gets many at a time:
        beside its K loop a 14x32 tile of 32 steps cost 51 to 85 cycles, an 8x32 one 3 to 29, without stores both 0
        (Zen 4). Only where the lower tiles are wider: else what calling them costs is more.
        """
        tile, target = self.gemm.tile, self.gemm.target
        if target.vector_bits < 512:
            return tile.mr
        wide = ir.select_size(ir.less(WIDE_VECTORS * tile.lanes, n), SHORT_WIDE_ROWS, SHORT_ROWS)
        return ir.select_size(ir.less(tile.nr, n), wide, tile.mr)

    def _row_of_tiles(self, tile_rows: list[str], given: Mapping[str, Ptr | Size]) -> None:
        """Calls the one for as many rows as there are."""
        calls = [partial(self.module.call, name, [given[p] for p in ROW_PARAMS]) for name in tile_rows]
        each = self.gemm.tile.mr // len(tile_rows)  # rows that one of them stands for: 1, or those of a tile
        rows = given["rows"]
        assert isinstance(rows, I64)
        ir.switch((rows + (each - 1)) // each, calls, first=1)

    def _block_m(self, x: _Given, ic: Size) -> None:
        k = x.size["k"]
        rows = ir.minimum(x.size["m"] - ic, x.size["mc"])
        # k == 0 still runs one block of depth 0, which stores zeros.
        once = k + ir.select_size(ir.equal(k, 0), 1, 0)
        ir.loop(0, once, x.size["kc"], [], lambda pc: self._block_k(x, ic, rows, pc))

    def _block_k(self, x: _Given, ic: Size, rows: Size, pc: Size) -> None:
        depth = ir.minimum(x.size["k"] - pc, x.size["kc"])
        adds = ir.select_size(ir.equal(x.size["accumulate"] | pc, 0), 0, ADD)
        goes_on = ir.select_size(ir.less(pc + depth, x.size["k"]), MORE, x.size["more"] * MORE)
        block = _Block(
            ic=ic,
            rows=rows,
            pc=pc,
            depth=depth,
            is_last_of_m=ir.negate(ir.less(ic + rows, x.size["m"])),
            is_last_of_k=ir.negate(ir.less(pc + depth, x.size["k"])),
            mode=adds + goes_on,
            epilogue=ir.select_size(ir.equal(goes_on, 0), x.size["epilogue"], 0),
            a=x.ptr["a"].at(ic * x.size["rsa"] + pc * x.size["csa"]),
            a_strides=self.packing.a_strides(x.size["rsa"], x.size["csa"], depth),
        )
        ir.loop(0, x.size["n"], x.size["nc"], [], lambda jc: self._block_n(x, block, jc))

    def _block_n(self, x: _Given, block: _Block, jc: Size) -> None:
        gemm = self.gemm
        cols = ir.minimum(x.size["n"] - jc, x.size["nc"])
        b = x.ptr["b"].at(block.pc * x.size["rsb"] + jc * x.size["csb"])

        def packed() -> None:
            self.module.call(self.pack_b, [b, x.ptr["b_pack"], block.depth, cols, x.size["rsb"], x.size["csb"]])
            height = self.packing.b_panel_rows(block.depth)
            following = self._following(x, block, jc, packed=True)
            step = (gemm.tile.nr, height)
            self._panels_of_a(x, block, jc, cols, self.panel_rows, x.ptr["b_pack"], step, 0, following)

        def where_it_lies() -> None:
            following = self._following(x, block, jc, packed=False)
            # Behind the last column comes the first one of the next kc rows.
            ends = ir.negate(ir.less(jc + cols, x.size["n"]))
            goes_on = ir.both(ends, ir.negate(block.is_last_of_k))
            wrap = ir.select_size(goes_on, x.size["kc"] * x.size["rsb"] - x.size["n"], 0)
            self._panels_of_a(x, block, jc, cols, self.stream_rows, b, (x.size["rsb"], 1), wrap, following)

        if gemm.direct_b:
            ir.if_(ir.equal(x.size["pack_b"], 0), where_it_lies, packed)
        else:
            packed()

    def _following(self, x: _Given, block: _Block, jc: Size, *, packed: bool) -> _BlockOfB:
        """The block of B to fetch meanwhile: the one beside that at jc, or the first of the next kc rows, or the first
        of the next product. B where it lies is fetched by its own microkernels, so only for the next product.
        """
        k, kc = x.size["k"], x.size["kc"]
        beside = ir.less(jc + x.size["nc"], x.size["n"])
        pc = block.pc + ir.select_size(beside, 0, kc)
        inside = ir.less(pc, k)
        here = pc * x.size["rsb"] + ir.select_size(beside, (jc + x.size["nc"]) * x.size["csb"], 0)
        next_b = ir.select_size(block.is_last_of_m, x.size["next_b"], 0)
        depth_of_next = ir.select_size(ir.equal(next_b, 0), 0, ir.minimum(k, kc))
        return _BlockOfB(
            x.ptr["b"].at(ir.select_size(inside, here, next_b)),
            ir.select_size(inside, ir.minimum(k - pc, kc) if packed else 0, depth_of_next),
        )

    def _panels_of_a(
        self,
        x: _Given,
        block: _Block,
        jc: Size,
        cols: Size,
        tile_rows: list[str],
        b: Ptr,
        b_strides: tuple[Size, Size],
        wrap: Size,
        following: _BlockOfB,
    ) -> None:
        """All panels of A against one block of B.

        Args:
          b, b_strides: the block, elements between its rows, and between its panels for each of their columns.
          wrap: of a B where it lies, elements from what stands beside the block to what comes after it.
        """
        gemm, mr, nr = self.gemm, self.gemm.tile.mr, self.gemm.tile.nr
        rows_at_once = x.size["tile_rows"]
        panel_depth, a_row = self.packing.depth(block.depth), self.packing.a_row(block.depth)
        unit = gemm.family.unit
        walking = ir.both(
            ir.negate(ir.less(panel_depth, walks_min_steps(gemm.tile, gemm.out))), ir.negate(ir.less(cols, nr))
        )
        walks = ir.select_ptr(walking, x.ptr["walks"], walks_of(gemm.tile, gemm.out, x.ptr["walks"]).rest)

        def panel(ir_: Size) -> None:
            here = ir.minimum(block.rows - ir_, rows_at_once)
            source = block.a.at(ir_ * x.size["rsa"])
            room = x.ptr["a_pack"].at(ir_ * a_row)
            kr = gemm.family.kr
            step = x.size["csa"] if kr == 1 else 1
            where_it_lies = [Ptr(source.value, unit), x.size["rsa"] // kr, step]

            def packed() -> list[Ptr | Size]:
                def pack() -> None:
                    self.module.call(self.pack_a, [source, room, here, block.depth, x.size["rsa"], x.size["csa"]])

                ir.if_(ir.equal(jc, 0), pack)
                return [room, *block.a_strides]

            if gemm.direct_a:
                a, rsa, csa = ir.if_(ir.equal(x.size["pack_a"], 0), lambda: where_it_lies, packed, like=where_it_lies)
            else:
                a, rsa, csa = packed()

            def plan_walks() -> None:
                walks = [
                    *self._walks_along_c(x, block.ic + ir_, jc),
                    *self._walks_along_a(x, block, ir_ + rows_at_once, jc, cols, a_row),
                    *self._walks_along_b(x, following, ir_, ir_ + here, block.rows),
                    self._walk_along_room(x, block, ir_ + rows_at_once, cols, a_row),
                ]
                walks_of(gemm.tile, gemm.out, x.ptr["walks"]).put(walks, ir.less(panel_depth, UNHURRIED_STEPS))

            if not isinstance(gemm.family, AmxDot):
                ir.if_(ir.both(walking, ir.equal(here, mr)), plan_walks)
            c_row = block.ic + ir_
            given: dict[str, Ptr | Size] = {
                "a": a,
                "b": b,
                "walks": walks,
                "rsa": rsa,
                "csa": csa,
                "rsb": b_strides[0],
                "k": panel_depth,
                "c": x.ptr["c"].at(c_row * x.size["rsc"] + jc),
                "rsc": x.size["rsc"],
                "rows": here,
                "cols": cols,
                "b_step": b_strides[1],
                "fetch": ir.select_size(ir.equal(ir_, 0), 1, 0),
                "wrap": wrap,
                "mode": block.mode,
                "partial": x.ptr["partial"].at(c_row * x.size["rs_partial"] + jc),
                "rs_partial": x.size["rs_partial"],
                "column": jc,
                "epilogue": block.epilogue,
            }
            self._row_of_tiles(tile_rows, given)

        ir.loop(0, block.rows, rows_at_once, [], panel)

    def _walks_along_c(self, x: _Given, row: Size, jc: Size) -> list[Walk]:
        """Down the lines of each tile itself."""
        tile, out = self.gemm.tile, self.gemm.out
        c = x.ptr["c"].at(row * x.size["rsc"] + jc).as_type("int8")
        size = ir.elem_bytes(out)
        lines = range(lines_of_a_row(tile, out))
        return [Walk(c.at(i * LINE), x.size["rsc"] * size, tile.mr, tile.nr * size) for i in lines]

    def _walks_along_a(self, x: _Given, block: _Block, row: Size, jc: Size, cols: Size, a_row: Size) -> list[Walk]:
        """Along the panel that begins at ``row`` of the block, a share in each tile of ``cols`` columns: down its rows,
        or along its steps where these lie one behind the other. After the last panel of a product the first one of the
        next, after that of another block the first one again.
        """
        mr, rsa, csa = self.gemm.tile.mr, x.size["rsa"], x.size["csa"]
        size, tiles = ir.elem_bytes(self.gemm.a), cols // self.gemm.tile.nr
        further = ir.less(row, block.rows)
        finished = ir.both(block.is_last_of_m, block.is_last_of_k)
        finished = ir.both(finished, ir.negate(ir.less(jc + cols, x.size["n"])))
        leaves = ir.both(ir.negate(further), finished)
        source = ir.select_ptr(
            leaves, x.ptr["a"].at(x.size["next_a"]), block.a.at(ir.select_size(further, row, 0) * rsa)
        ).as_type("int8")
        by_steps = ir.equal(rsa, 1)
        lies_packed = ir.both(ir.negate(ir.equal(x.size["pack_a"], 0)), ir.negate(ir.equal(jc, 0)))
        lies_packed = ir.both(lies_packed, ir.negate(leaves))
        steps = (block.depth + (tiles - 1)) // tiles
        lines = (block.depth * size + (LINE - 1)) // LINE
        lines = (lines + (tiles - 1)) // tiles
        walks = []
        for i in range(A_WALKS):
            # Steps may begin and end in two lines.
            count = ir.select_size(by_steps, steps if i < 2 else 0, ir.select_size(ir.less(i, lines), mr, 0))
            offset = ir.select_size(by_steps, (mr - 1) * size, LINE) if i == 1 else i * LINE
            step = ir.select_size(by_steps, csa, rsa) * size
            per_tile = ir.select_size(by_steps, steps * csa * size, lines * LINE)
            walks.append(Walk(source.at(offset), step, ir.select_size(lies_packed, 0, count), per_tile))
        return walks

    def _walk_along_room(self, x: _Given, block: _Block, row: Size, cols: Size, a_row: Size) -> Walk:
        """Along the room in the packed block of the panel that begins at ``row``, if it is still to be filled."""
        mr, tiles = self.gemm.tile.mr, cols // self.gemm.tile.nr
        panel_bytes = mr * a_row * ir.elem_bytes(self.gemm.family.unit)
        lines = (panel_bytes + (tiles * LINE - 1)) // (tiles * LINE)
        row = ir.select_size(ir.less(row, block.rows), row, 0)
        room = x.ptr["a_pack"].at(row * a_row).as_type("int8")
        return Walk(room, LINE, ir.select_size(ir.equal(x.size["pack_a"], 0), 0, lines), lines * LINE)

    def _walks_along_b(self, x: _Given, block: _BlockOfB, begin: Size, end: Size, rows: Size) -> list[Walk]:
        """Along B's next block, each tile the columns beneath it: each panel of A brings its share of the K rows, or,
        where columns are contiguous, of their lines, first lines first.
        """
        nr, rsb, csb = self.gemm.tile.nr, x.size["rsb"], x.size["csb"]
        size = ir.elem_bytes(self.gemm.b)
        contiguous = ir.equal(csb, 1)
        transposed = ir.both(ir.equal(rsb, 1), ir.negate(contiguous))
        lines = (block.depth * size + (LINE - 1)) // LINE * nr
        units = ir.select_size(contiguous, block.depth, ir.select_size(transposed, lines, 0))
        first, last = (i * units // rows for i in (begin, end))
        count = last - first
        per_tile = nr * csb * size
        b = block.start.as_type("int8")
        down = b.at(first * rsb * size)
        step = csb * size
        across = b.at(first // nr * LINE)
        until_edge = ir.minimum(count, nr - first % nr)

        def either(by_rows: tuple[Ptr, Size], by_columns: tuple[Ptr, Size]) -> Walk:
            start = ir.select_ptr(contiguous, by_rows[0], by_columns[0])
            walked = ir.select_size(contiguous, by_rows[1], by_columns[1])
            return Walk(start, ir.select_size(contiguous, rsb * size, step), walked, per_tile)

        return [
            either((down, count), (across.at(first % nr * step), until_edge)),
            either((down.at(LINE), count if nr * size > LINE else 0), (across.at(LINE), count - until_edge)),
        ]


@dataclass(frozen=True)
class _BlockOfB:
    """A block of B where it lies; none if it has no depth."""

    start: Ptr
    depth: Size


@dataclass(frozen=True)
class _Block:
    """One mc x kc block of A and where it stands in the product."""

    ic: Size
    rows: Size
    pc: Size
    depth: Size
    is_last_of_m: Value | bool
    is_last_of_k: Value | bool
    mode: Size
    epilogue: Size  # the address of one if the sums are finished here, else 0
    a: Ptr
    a_strides: tuple[Size, Size]  # inside a packed panel
