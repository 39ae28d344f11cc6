"""``report``: what the machine code of every kernel says about itself, and llvm-mca about its K loop."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from . import checks
from .catalog import Kernel, kernels
from .nanokernel import amx
from .nanokernel.amx import AmxDot
from .toolchain import Toolchain


def _object_loops(kernel: Kernel, tools: Toolchain, optimized: str) -> dict[str, checks.Checked]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        tools.object_file(optimized, kernel.target, path)
        return {c.microkernel: c for c in checks.k_loops(kernel, tools.disassemble(path))}


def _main_microkernel(kernel: Kernel) -> str:
    return f"{kernel.symbol}_{kernel.tile.mr}x{kernel.tile.nr}"


def mca_text(kernel: Kernel, tools: Toolchain, optimized: str, function: str | None) -> str:
    """llvm-mca's reports for one microkernel's K loop, a CPU model after the other."""
    loops = _object_loops(kernel, tools, optimized)
    name = f"{kernel.symbol}_{function}" if function else _main_microkernel(kernel)
    if name not in loops:
        raise KeyError(f"no microkernel {name}; known: {', '.join(loops)}")
    asm = loops[name].loop.asm()
    return "\n".join(f"### {cpu}\n{tools.mca(asm, cpu)}" for cpu in kernel.target.mca_cpus)


def table(tools: Toolchain, *, markdown: bool = False) -> str:
    """One row per kernel and CPU model: the K loop's instructions, spills, cycles and share of the unit's peak."""
    head = ["kernel", "model", "instructions", "products", "spills", "cycles a step", "peak cycles", "share of peak"]
    rows = []
    for kernel in kernels():
        optimized = tools.optimized(tools.llvm_ir(kernel.mlir()), kernel.target)
        found = _object_loops(kernel, tools, optimized)[_main_microkernel(kernel)]
        steps = found.products // found.expected_products
        for cpu in kernel.target.mca_cpus:
            if isinstance(kernel.family, AmxDot):
                best, cycles = _tile_cycles(found)
            else:
                cycles = _cycles_per_iteration(tools.mca(found.loop.asm(), cpu)) / steps
                best = _cycles_per_iteration(tools.mca(_products_alone(kernel, found), cpu))
            rows.append(
                [
                    kernel.name,
                    cpu,
                    str(len(found.loop.instructions)),
                    str(found.products),
                    str(found.loop.vector_spills),
                    f"{cycles:.2f}",
                    f"{best:.2f}",
                    f"{min(best / cycles, 1):.3f}",
                ]
            )
    if markdown:
        lines = ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]
    else:
        widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]]
    return "\n".join(lines)


def _tile_cycles(found: checks.Checked) -> tuple[float, float]:
    """Cycles of a step's products and of the whole step, for tiles: llvm-mca knows nothing of them."""
    products = found.products * amx.PRODUCT_CYCLES
    loads = found.loop.count("tileload") * amx.LOAD_CYCLES
    return products, max(products, loads)


def _products_alone(kernel: Kernel, found: checks.Checked) -> str:
    """The products of one K step and nothing else, as assembly: all operands are in registers, none waits."""
    pattern, _ = kernel.family.instructions
    product = next(i.mnemonic for i in found.loop.instructions if re.match(pattern, i.mnemonic))
    letter = {256: "y", 512: "z"}[kernel.target.vector_bits]
    *sums, a, b, temporary = (f"%{letter}mm{i}" for i in range(found.expected_products + 3))
    if kernel.family.temporaries:  # the product lands in a temporary, and is then added
        lines = [f"{product} {a}, {b}, {temporary}\nvpaddd {temporary}, {c}, {c}" for c in sums]
    else:
        lines = [f"{product} {a}, {b}, {c}" for c in sums]
    return "\n".join(lines) + "\n"


def _cycles_per_iteration(mca: str) -> float:
    iterations = re.search(r"Iterations:\s+(\d+)", mca)
    cycles = re.search(r"Total Cycles:\s+(\d+)", mca)
    if not iterations or not cycles:
        raise ValueError("llvm-mca's report has no cycle count")
    return int(cycles[1]) / int(iterations[1])
