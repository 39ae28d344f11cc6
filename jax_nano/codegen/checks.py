"""What the build demands of every generated kernel's machine code."""

from __future__ import annotations

from dataclasses import dataclass

from . import inspect_asm
from .amx_microkernel import AmxMicrokernel
from .catalog import AttentionKernel, Kernel
from .microkernel import Microkernel


class SpillError(RuntimeError):
    """A generated inner loop does not keep its tile in registers."""


@dataclass(frozen=True)
class Checked:
    """The K loop of one microkernel, as found in the object file."""

    microkernel: str
    products: int
    expected_products: int
    loop: inspect_asm.Loop


def k_loops(kernel: Kernel | AttentionKernel, disassembly: str) -> list[Checked]:
    """The K loops of all microkernels of a kernel.

    Raises:
      SpillError: a loop touches the stack, or does not hold exactly the products of its register tile.
    """
    found = []
    expected = kernel.microkernels()
    code = dict(inspect_asm.functions(disassembly))
    for name, micro in expected.items():
        pattern, per_product = micro.family.instructions
        want = micro.tile.accumulators * per_product
        loops = [x for x in inspect_asm.innermost_loops(name, code[name]) if x.count(pattern)]
        if not loops:
            raise SpillError(f"{name}: no K loop with {pattern} found")
        for loop in loops:
            products = loop.count(pattern)
            if loop.vector_spills or loop.scalar_reloads:
                raise SpillError(
                    f"{name}: the K loop touches the stack {loop.vector_spills} times with vectors and "
                    f"{loop.scalar_reloads} times with scalars"
                )
            if products % want:
                raise SpillError(f"{name}: the K loop has {products} products, its tile {want}")
            if isinstance(micro, AmxMicrokernel) and loop.count("tileload") != micro.loads:
                raise SpillError(f"{name}: the K loop loads {loop.count('tileload')} tiles, its block {micro.loads}")
        # LLVM may unroll the loop and leave a remainder loop behind it: the busy one counts.
        loop = max(loops, key=lambda x: len(x.instructions))
        if isinstance(micro, Microkernel) and micro.main and loop.count(pattern) != want * micro.unroll:
            raise SpillError(
                f"{name}: the main loop has {loop.count(pattern)} products, {micro.unroll} steps of its tile have "
                f"{want * micro.unroll}: LLVM has taken some apart"
            )
        found.append(Checked(name, loop.count(pattern), want, loop))
    return found
