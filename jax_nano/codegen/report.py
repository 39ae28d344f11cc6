"""``report``: what the machine code of every kernel says about itself, and what a CPU makes of its K loop."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import checks, measure
from .catalog import AttentionKernel, Kernel, kernels
from .nanokernel import amx
from .nanokernel.amx import AmxDot
from .target import CORES, Core
from .toolchain import Toolchain

HEAD = (
    *("kernel", "core", "instructions", "products", "spills"),
    *("cycles a step", "peak cycles", "llvm-mca", "ports", "measured"),
)


def _main_microkernel(kernel: Kernel | AttentionKernel) -> str:
    return f"{kernel.symbol}_{kernel.tile.mr}x{kernel.tile.nr}"


def _object_loops(kernel: Kernel | AttentionKernel, tools: Toolchain, optimized: str) -> dict[str, checks.Checked]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        tools.object_file(optimized, kernel.target, path)
        return {c.microkernel: c for c in checks.k_loops(kernel, tools.disassemble(path))}


def mca_text(kernel: Kernel | AttentionKernel, tools: Toolchain, optimized: str, function: str | None) -> str:
    """llvm-mca's reports for one microkernel's K loop, a CPU model after the other."""
    loops = _object_loops(kernel, tools, optimized)
    name = f"{kernel.symbol}_{function}" if function else _main_microkernel(kernel)
    if name not in loops:
        raise KeyError(f"no microkernel {name}; known: {', '.join(loops)}")
    asm = loops[name].loop.asm()
    return "\n".join(f"### {cpu}\n{tools.mca(asm, cpu)}" for cpu in kernel.target.cores)


def table(tools: Toolchain, objects: Callable[[Kernel, str], Path], jobs: int, *, markdown: bool = False) -> str:
    """One row per kernel and core: the K loop's instructions, spills, cycles and share of the unit's peak.

    Args:
      tools: LLVM's.
      objects: gives the object file of a kernel, made from this MLIR unless it exists already.
      jobs: objects and models that are worked on side by side. Measurements run alone.
      markdown: whether to write a Markdown table.
    """
    chosen = list(kernels())
    with ThreadPoolExecutor(jobs) as pool:
        # The bindings' contexts stay in this thread; the tools run side by side.
        work = [pool.submit(objects, kernel, kernel.mlir()) for kernel in chosen]
        loops = list(pool.map(lambda k, w: _judged(k, tools, w.result()), chosen, work))
        cells = list(pool.map(lambda x: x.cells(tools), (row for rows in loops for row in rows)))
    here = tools.host_cpu()
    measured = [row.measured() if row.core.name == here else "" for rows in loops for row in rows]
    rows = [[*row, share] for row, share in zip(cells, measured, strict=True)]
    if markdown:
        lines = ["| " + " | ".join(r) + " |" for r in [HEAD, ["---"] * len(HEAD), *rows]]
    else:
        widths = [max(len(r[i]) for r in [HEAD, *rows]) for i in range(len(HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [HEAD, *rows]]
    return "\n".join(
        [
            *lines,
            "",
            f"measured on: {measure.cpu_name()}"
            if any(measured)
            else "nothing measured: none of the cores above is this machine's",
        ]
    )


@dataclass(frozen=True)
class _Row:
    """A kernel's main K loop, for one core."""

    kernel: Kernel
    core: Core
    found: checks.Checked

    @property
    def steps(self) -> int:
        return self.found.products // self.found.expected_products

    @property
    def tiles(self) -> bool:
        return isinstance(self.kernel.family, AmxDot)

    def cells(self, tools: Toolchain) -> list[str]:
        loop = self.found.loop
        if self.tiles:
            best, cycles = self._tile_cycles()
            by_model, by_ports = "", min(best / cycles, 1)
        else:
            cycles = _cycles_per_iteration(tools, loop.asm(), self.core.name) / self.steps
            best = _cycles_per_iteration(tools, self._products_alone(), self.core.name)
            by_model, by_ports = f"{min(best / cycles, 1):.3f}", self._share_by_ports()
        numbers = (len(loop.instructions), self.found.products, loop.vector_spills)
        names = (self.kernel.name, self.core.name)
        return [*names, *map(str, numbers), f"{cycles:.2f}", f"{best:.2f}", by_model, f"{by_ports:.3f}"]

    def measured(self) -> str:
        """The share of the peak that this machine reaches."""
        if not measure.can_run(self.kernel.target):
            return ""
        share = _measured_share(self.found.loop, self.steps, self._products_alone())
        return f"{min(share, 1):.3f}"

    def _tile_cycles(self) -> tuple[float, float]:
        """Cycles of a step's products and of the whole step, for tiles: llvm-mca knows nothing of them."""
        products = self.found.products * amx.PRODUCT_CYCLES
        loads = self.found.loop.count("tileload") * amx.LOAD_CYCLES
        return products, max(products, loads)

    def _share_by_ports(self) -> float:
        """The products' cycles over those that the busiest of pipes, loads and front end need."""
        bits, core, loop = self.kernel.target.vector_bits, self.core, self.found.loop
        products = self.found.products
        operations = products * (1 + self.kernel.family.temporaries)  # a temporary is what is then added
        need = max(products / core.products[bits], operations / core.additions[bits])
        loads = sum("(" in i.operands and not i.mnemonic.startswith("lea") for i in loop.instructions)
        front_end = (len(loop.instructions) - 1) / core.slots  # a jump and what it asks are one operation
        return need / max(need, loads / core.loads[bits], front_end)

    def _products_alone(self) -> str:
        """The products of one K step and nothing else, as assembly: all operands are in registers, none waits."""
        pattern, _ = self.kernel.family.instructions
        product = next(i.mnemonic for i in self.found.loop.instructions if re.match(pattern, i.mnemonic))
        letter = {256: "y", 512: "z"}[self.kernel.target.vector_bits]
        *sums, a, b, temporary = (f"%{letter}mm{i}" for i in range(self.found.expected_products + 3))
        if self.kernel.family.temporaries:  # the product lands in a temporary, and is then added
            lines = [f"{product} {a}, {b}, {temporary}\nvpaddd {temporary}, {c}, {c}" for c in sums]
        else:
            lines = [f"{product} {a}, {b}, {c}" for c in sums]
        return "\n".join(lines) + "\n"


def _judged(kernel: Kernel, tools: Toolchain, path: Path) -> list[_Row]:
    loops = {c.microkernel: c for c in checks.k_loops(kernel, tools.disassemble(path))}
    return [_Row(kernel, CORES[core], loops[_main_microkernel(kernel)]) for core in kernel.target.cores]


# Kernels that differ in what they pack and store have the same loop.
_measured_share = functools.cache(measure.share_of_peak)


@functools.cache
def _cycles_per_iteration(tools: Toolchain, asm: str, cpu: str) -> float:
    mca = tools.mca(asm, cpu)
    iterations = re.search(r"Iterations:\s+(\d+)", mca)
    cycles = re.search(r"Total Cycles:\s+(\d+)", mca)
    if not iterations or not cycles:
        raise ValueError("llvm-mca's report has no cycle count")
    return int(cycles[1]) / int(iterations[1])
