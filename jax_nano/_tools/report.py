"""The report: what became of each product that was compiled in this process, as text."""

from __future__ import annotations

from jax_nano._core import record


def clear_report() -> None:
    """Forget the products that were compiled so far."""
    record.clear()


def report() -> str:
    """What became of each product of the programs that were compiled in this process since its start.

    A line for each product: how often it was compiled; its dimensions in einsum's letters as they lie in memory, so
    that `ba,bc->ac` has its left operand stored transposed; dtypes and shapes; then target, kernel, blocking and
    threads, and what both engines are predicted to take on one core; or why it was left to XLA. A line for each
    attention: queries x keys x values -> result, each as it lies in memory, and what masks its scores; the two products
    of one that runs in one pass have no lines of their own.
    `jax_nano.matmul` and its relatives are always listed, other products of JAX if `jax_nano.accelerate` was on.
    """
    found = record.everything()
    if not found:
        return "jax_nano: no product was compiled"
    products = record.products()
    total = sum(count for _, count in products)
    ours = sum(count for product, count in products if product.declined is None)
    lines = [f"jax_nano: {total} products compiled, {ours} run on kernels, {total - ours} are left to XLA"]
    attentions = sum(count for attention, count in record.attentions() if attention.declined is None)
    if attentions:
        lines[0] += f"; {attentions} attention{'s' if attentions > 1 else ''} run in one pass"
    programs = dict.fromkeys(product.program for product, _ in found)
    for program in programs:
        lines.append(program)
        lines += [
            f"  {count:3}x {record.line(product, _times(product))}"
            for product, count in found
            if product.program == program
        ]
    return "\n".join(lines)


def _times(product: record.Product | record.Attention) -> str:
    """What a kernel and XLA are predicted to take for a product that a kernel computes, if that decided."""
    if isinstance(product, record.Attention) or product.declined is not None or product.kernel:
        return ""
    import ml_dtypes
    import numpy as np

    from jax_nano._core.signatures import Signature
    from jax_nano._dispatch import decision  # imports JAX, which `run` leaves to the program

    left, right, out = (np.dtype(getattr(ml_dtypes, x.dtype, x.dtype)) for x in product.arrays)
    lhs, rhs, _ = (x.shape for x in product.arrays)
    asked = decision.Product(product.labels, lhs, rhs, (left, right, out), None, placed=True)
    signature = Signature(left, right, out, product.algorithm)
    times = decision.between(asked, signature, decision.this_machine(), decision.policy).times
    return "" if times is None else str(times)
