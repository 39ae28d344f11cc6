"""What the build demands of the machine code of kernels for quantised weights."""

from __future__ import annotations

from .. import inspect_asm
from ..checks import Checked, SpillError
from .formats import field_count
from .kernel import QuantizedKernel

MOST_SCALARS = 2  # sizes that a loop of hundreds of instructions may fetch from the stack


def sweeps(kernel: QuantizedKernel, disassembly: str) -> list[Checked]:
    """The loops over columns of a kernel for quantised weights.

    Raises:
      SpillError: a loop touches the stack, or does not hold exactly the products of its rows and fields.
    """
    found = []
    code = dict(inspect_asm.functions(disassembly))
    for sweep in kernel.sweeps():
        name = sweep.name(kernel.symbol)
        want = sweep.rows * sweep.depth * field_count(sweep.form)
        loops = [x for x in inspect_asm.innermost_loops(name, code[name]) if x.count("vfmadd")]
        if not loops:
            raise SpillError(f"{name}: no loop with products found")
        for loop in loops:
            products = loop.count("vfmadd")
            if loop.vector_spills or loop.scalar_reloads > MOST_SCALARS:
                raise SpillError(
                    f"{name}: the loop touches the stack {loop.vector_spills} times with vectors and "
                    f"{loop.scalar_reloads} times with scalars"
                )
            if products % want:
                raise SpillError(f"{name}: the loop has {products} products, its sweep {want}")
        loop = max(loops, key=lambda x: len(x.instructions))
        found.append(Checked(name, loop.count("vfmadd"), want, loop))
    return found
