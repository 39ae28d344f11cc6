"""The generator's parts that are data or arithmetic: register tiles, names, the contract with csrc, checks."""

from __future__ import annotations

import re

import numpy as np
import pytest

from jax_nano import _runtime
from jax_nano._core import spec
from jax_nano.codegen import checks, ir, manifest, tile, walks
from jax_nano.codegen.catalog import Kernel, find, kernels
from jax_nano.codegen.microkernel import walks_of
from jax_nano.codegen.target import TARGETS
from jax_nano.codegen.transpose import transpose

KERNELS = list(kernels())
VECTOR_KERNELS = [k for k in KERNELS if not k.target.tiles]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=[k.name for k in KERNELS])


class TestTiles:
    @pytest.mark.parametrize(("mr", "nv", "registers"), [(6, 2, 15), (14, 2, 31), (1, 1, 3), (2, 6, 15), (3, 4, 16)])
    def test_rule(self, mr, nv, registers):
        """Accumulators, the smaller side, and one more."""
        assert tile.Tile(mr, nv, 8).registers == registers == mr * nv + min(mr, nv) + 1

    def test_the_smaller_side_is_held(self):
        assert tile.Tile(6, 2, 8).holds_b
        assert not tile.Tile(2, 6, 8).holds_b

    def test_what_does_not_fit_is_an_error_with_both_numbers(self):
        with pytest.raises(ValueError, match=r"^7x16 needs 17 vector registers, x86-64-v3 has 16$"):
            tile.check(tile.Tile(7, 2, 8), TARGETS["x86-64-v3"])
        with pytest.raises(ValueError, match="6x16 needs 17 vector registers, x86-64-v3 has 16"):
            tile.check(tile.Tile(6, 2, 8), TARGETS["x86-64-v3"], 2)

    def test_every_tile_of_the_catalog_fits(self):
        for kernel in VECTOR_KERNELS:
            assert tile.check(kernel.tile, kernel.target, kernel.family.temporaries) is kernel.tile
            assert kernel.tile.lanes == kernel.target.lanes(ir.elem_bytes(kernel.family.acc))
            for micro in kernel.microkernels().values():
                assert micro.tile.accumulators + kernel.family.temporaries < kernel.target.vector_registers, micro

    @pytest.mark.parametrize("temporaries", [0, 1, 2])
    def test_no_better_tile_exists(self, temporaries):
        """No tile that fits and is not bound by loads has more rows."""
        for target in TARGETS.values():
            best = tile.packed_tile(target, 4, temporaries)
            assert best.registers + temporaries <= target.vector_registers
            for nv in range(1, 16):
                taller = tile.Tile(best.mr + 1, nv, best.lanes)
                fits = taller.registers + temporaries <= target.vector_registers
                loads = (taller.mr + taller.nv) / taller.accumulators * target.fma_per_cycle / target.loads_per_cycle
                assert not (fits and loads <= 0.75), taller

    def test_known_tiles(self):
        assert [tile.packed_tile(TARGETS[t], 4).mr for t in ("x86-64-v3", "x86-64-v4")] == [6, 14]


class TestContract:
    @every_kernel
    def test_manifest_entries_are_the_specs(self, kernel):
        symbol, *names = manifest.entry(kernel)
        assert symbol == "symbol"
        *fields, last = spec.KERNEL_INFO
        assert names == [x.name for x in fields]
        assert (last.c_type, last.name) == ("GemmFn", "fn")
        types = {"const char*": str, "int32_t": int, "bool": bool}
        for x in fields:
            assert type(manifest.entry(kernel)[x.name]) is types[x.c_type], x.name

    def test_the_build_contains_the_catalog(self):
        built = {k["name"]: k for k in _runtime.kernels()}
        for kernel in KERNELS:
            entry = manifest.entry(kernel)
            del entry["symbol"]
            assert built[kernel.name] == entry
        assert len(built) == len(KERNELS)

    def test_names(self):
        assert len({k.name for k in KERNELS}) == len({k.symbol for k in KERNELS}) == len(KERNELS)
        for kernel in KERNELS:
            assert re.fullmatch(r"[a-z_]\w*", kernel.symbol)
            assert kernel.name.endswith(kernel.target.name)
            assert kernel.why

    def test_no_signature_twice(self):
        """The runtime takes the first of a target: a second one would never run."""
        signatures = [(k.target.name, k.a, k.b, k.out, k.algorithm) for k in KERNELS]
        assert len(set(signatures)) == len(signatures)

    def test_both_orders_of_operands(self):
        """Roles of lhs and rhs may be swapped by the planner."""
        signatures = {(k.target.name, k.a, k.b, k.out, k.algorithm) for k in KERNELS if "x86-64" in k.target.name}
        assert {(t, b, a, out, algorithm) for t, a, b, out, algorithm in signatures} == signatures

    def test_manifest_files(self, tmp_path):
        some = KERNELS[:2]
        objects = [tmp_path / f"{k.symbol}.o" for k in some]
        manifest.write(some, [], [], objects, tmp_path)
        lines = (tmp_path / "manifest.inc").read_text().splitlines()
        assert lines[1].startswith(f'JAX_NANO_KERNEL({some[0].symbol}, "{some[0].name}", ')
        assert len(lines) == 3
        assert f"/{objects[1].name}" in (tmp_path / "kernels.cmake").read_text()
        before = (tmp_path / "manifest.inc").stat().st_mtime_ns
        manifest.write(some, [], [], objects, tmp_path)
        assert (tmp_path / "manifest.inc").stat().st_mtime_ns == before  # nothing is rebuilt in vain


@every_kernel
def test_the_composed_module_is_valid(kernel):
    """MLIR's verifier accepts it; the whole kernel is one public function."""
    text = kernel.mlir()
    public = re.findall(r"func\.func @(\w+)\([^)]*\) \{", text)
    assert public == [kernel.symbol]
    for name in kernel.microkernels():
        assert f"@{name}(" in text


def disassembly(kernel: Kernel, spoil: str = "", *, extra_products: int = 0, loop: bool = True) -> str:
    """objdump's text of a kernel as it should be, or with the main microkernel's K loop spoiled."""
    lines = []
    main = f"{kernel.symbol}_{kernel.tile.mr}x{kernel.tile.nr}"
    for number, (name, micro) in enumerate(kernel.microkernels().items()):
        address = (number + 1) << 16
        lines.append(f"{address:016x} <{name}>:")
        steps = micro.unroll if getattr(micro, "main", False) else 1
        products = micro.tile.accumulators * micro.family.instructions[1] * steps
        body = ["movq\t%rsi, 0x8(%rsp)"]  # before the loop the stack is fine
        body += ["vfmadd231ps\t%ymm0, %ymm1, %ymm2"] * (products + extra_products * (name == main))
        body += [spoil] if spoil and name == main else []
        body += ["incq\t%rax", f"jne\t0x{address + 4:x} <{name}+0x4>"] if loop or name != main else []
        lines += [f"    {address + 4 * i:x}:\t{text}" for i, text in enumerate([*body, "retq"])]
    return "\n".join(lines) + "\n"


class TestWalks:
    def test_a_table_takes_no_more_than_it_has_room_for(self):
        def body(p):
            walk = walks.Walk(p, 64, 14, 128)
            table = walks.Walks(1, walks.Walks(1, p, 4).room(), 4)
            table.put([walk], False)
            with pytest.raises(ValueError, match="2 walks for a table of 1"):
                table.put([walk, walk], False)

        with ir.new_module() as module:
            module.function("f", ["int8"], body, internal=False)

    @pytest.mark.parametrize("kernel", VECTOR_KERNELS, ids=[k.name for k in VECTOR_KERNELS])
    def test_a_table_has_room_for_all_that_a_kernel_fetches(self, kernel):
        """Lines of C, four walks along A where it lies, one where it is packed, one for each line of B's columns."""
        gemm = kernel.gemm
        lines = [-(-gemm.tile.nr * ir.elem_bytes(x) // 64) for x in (gemm.out, gemm.b)]
        assert lines[0] + 4 + 1 + lines[1] <= walks_of(gemm.tile, gemm.out, None).size


class TestChecks:
    KERNEL = find("gemm_f32_f32_f32_f32_6x16_x86-64-v3")

    def test_good_code_passes(self):
        found = {x.microkernel: x for x in checks.k_loops(self.KERNEL, disassembly(self.KERNEL))}
        assert found.keys() == self.KERNEL.microkernels().keys()
        main = found[f"{self.KERNEL.symbol}_6x16"]
        assert (main.products, main.expected_products) == (48, 12)

    @pytest.mark.parametrize(
        ("instruction", "vectors", "scalars"),
        [
            ("vmovaps\t%ymm3, 0x20(%rsp)", 1, 0),
            ("vmovups\t0x40(%rsp), %ymm15", 1, 0),
            ("vfmadd231ps\t0x40(%rsp), %ymm15, %ymm2", 1, 0),
            ("movq\t0x8(%rsp), %rax", 0, 1),
            ("addq\t(%rsp), %rcx", 0, 1),
        ],
    )
    def test_a_spill_is_an_error(self, instruction, vectors, scalars):
        message = f"_6x16: the K loop touches the stack {vectors} times with vectors and {scalars} times with scalars"
        with pytest.raises(checks.SpillError, match=message):
            checks.k_loops(self.KERNEL, disassembly(self.KERNEL, instruction))

    @pytest.mark.parametrize("extra", [-1, 1])
    def test_a_wrong_number_of_products_is_an_error(self, extra):
        with pytest.raises(checks.SpillError, match=f"_6x16: the K loop has {48 + extra} products, its tile 12"):
            checks.k_loops(self.KERNEL, disassembly(self.KERNEL, extra_products=extra))

    def test_a_step_of_the_main_loop_taken_apart_is_an_error(self):
        """As LLVM did with vpdpwssd: whole tiles of products, but fewer steps than were emitted."""
        with pytest.raises(checks.SpillError, match=r"_6x16: the main loop has 36 products, 4 steps .* have 48"):
            checks.k_loops(self.KERNEL, disassembly(self.KERNEL, extra_products=-12))

    def test_a_missing_loop_is_an_error(self):
        with pytest.raises(checks.SpillError, match="_6x16: no K loop with vfmadd"):
            checks.k_loops(self.KERNEL, disassembly(self.KERNEL, loop=False))


@pytest.mark.parametrize(
    ("lanes", "elem"), [(4, "float64"), (8, "float64"), (8, "float32"), (16, "float32"), (16, "int32")]
)
def test_transpose(monkeypatch, lanes, elem):
    """The shuffles, interpreted in NumPy."""

    def shuffle(a, b, picks):
        assert len(picks) == lanes
        return np.concatenate([a, b])[picks]

    monkeypatch.setattr(ir, "shuffle", shuffle)
    block = np.arange(lanes * lanes).reshape(lanes, lanes)
    assert np.array_equal(np.array(transpose(list(block), elem)), block.T)
