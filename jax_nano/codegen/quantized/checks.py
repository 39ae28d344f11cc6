"""What the build demands of the machine code of kernels for quantised weights."""

from __future__ import annotations

from .. import inspect_asm
from ..checks import Checked, SpillError
from .formats import field_count, fields_along_k
from .kernel import QuantizedKernel

MOST_SCALARS = 4  # sizes that a loop of hundreds of instructions may fetch from the stack


def loops(kernel: QuantizedKernel, disassembly: str) -> list[Checked]:
    """The innermost loops with products of a kernel: sweeps of columns, inner products along K.

    Sweeps of a single row of weights are for the last rows and columns and may reload constants.

    Raises:
      SpillError: a loop touches the stack, or does not hold exactly the products of its rows and fields.
    """
    found = []
    code = dict(inspect_asm.functions(disassembly))
    expected = {}
    for x in kernel.sweeps():
        products = x.rows * x.depth // x.form.step * x.registers * field_count(x.form)
        expected[x.name(kernel.symbol)] = (products, x.depth == x.form.depth)
    for y in kernel.inner_products():
        expected[y.name(kernel.symbol)] = (y.rows * y.cols * fields_along_k(y.form), y.groups == 1)
    for name, (want, strict) in expected.items():
        assert kernel.form is not None
        product = "vfmadd" if kernel.form.step == 1 else "vdpbf16ps"
        busy = [x for x in inspect_asm.innermost_loops(name, code[name]) if x.count(product)]
        if not busy:
            raise SpillError(f"{name}: no loop with products found")
        loop = max(busy, key=lambda x: len(x.instructions))
        if strict and (loop.vector_spills or loop.scalar_reloads > MOST_SCALARS):
            raise SpillError(
                f"{name}: the loop touches the stack {loop.vector_spills} times with vectors and "
                f"{loop.scalar_reloads} times with scalars"
            )
        if strict and loop.count(product) != want:
            raise SpillError(f"{name}: the loop has {loop.count(product)} products, its rows and fields {want}")
        found.append(Checked(name, loop.count(product), want, loop))
    return found
