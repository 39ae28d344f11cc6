"""The report: what became of each product that was compiled in this process, as an object that prints itself."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from jax_nano._core import cost, record

if TYPE_CHECKING:
    from jax_nano._dispatch.decision import Times


def clear_report() -> None:
    """Forget the products that were compiled so far."""
    record.clear()


@dataclass(frozen=True)
class Compiled:
    """A product, or an attention, of the programs that were compiled, and what became of it."""

    kind: str
    """ "product" or "attention"."""
    count: int
    """How often it was compiled."""
    program: str
    """XLA's name of the program, such as "jit_step"."""
    operation: str
    """What JAX calls the operation, such as "jit(step)/dot_general"."""
    file: str | None
    """The source file with the user's line; None if that is not known."""
    line: int | None
    """The line in it."""
    what: str
    """Of a product its dimensions in einsum's letters as they lie in memory, of an attention what masks its scores."""
    operands: tuple[str, ...]
    """Dtype and shape of each operand as it lies in memory, such as "float32[128,768]"."""
    result: str
    """Dtype and shape of the result."""
    epilogue: str
    """What the call does besides, such as "bias, relu"."""
    kernel: str | None
    """What computes it: target, kernel, blocking and threads; None if XLA does."""
    reason: str | None
    """Why XLA computes it; None if a kernel does."""
    flops: int | None
    """Operations, 2 for each multiply-add; None if a size is symbolic, and of an attention."""
    seconds: float | None
    """What the kernel takes on one core by prediction; None where prediction did not decide."""
    xla_seconds: float | None
    """The same of XLA."""


_COLUMNS: Final = ("count", "what", "operands", "result", "computed by", "predicted", "place")


class Report:
    """What became of each product of the programs that were compiled; `str` of it is text, as is its `repr`.

    Iterating over it gives `Compiled`. In notebooks it is a table. `"float16" in report` searches the text.
    """

    def __init__(self, found: list[tuple[record.Product | record.Attention, int]]) -> None:
        self._found = found

    @cached_property
    def products(self) -> tuple[Compiled, ...]:
        """All of them, in the order in which they were compiled."""
        return tuple(_compiled(x, count) for x, count in self._found)

    @property
    def ran(self) -> tuple[Compiled, ...]:
        """What kernels compute."""
        return tuple(x for x in self.products if x.reason is None)

    @property
    def left(self) -> tuple[Compiled, ...]:
        """What is left to XLA, each with its reason."""
        return tuple(x for x in self.products if x.reason is not None)

    def __iter__(self) -> Iterator[Compiled]:
        return iter(self.products)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, text: str) -> bool:
        return text in str(self)

    @property
    def summary(self) -> str:
        """One line: how many products were compiled, how many run on kernels, how many are left to XLA."""
        if not self._found:
            return "jax_nano: no product was compiled"
        products = [(x, count) for x, count in self._found if isinstance(x, record.Product)]
        total = sum(count for _, count in products)
        ours = sum(count for x, count in products if x.declined is None)
        line = f"jax_nano: {total} products compiled, {ours} run on kernels, {total - ours} are left to XLA"
        attentions = sum(count for x, count in self._found if isinstance(x, record.Attention) and x.declined is None)
        if attentions:
            line += f"; {attentions} attention{'s' if attentions > 1 else ''} run in one pass"
        return line

    def __str__(self) -> str:
        lines = [self.summary]
        for program in dict.fromkeys(x.program for x, _ in self._found):
            lines.append(program)
            lines += [
                f"  {count:3}x {record.line(x, str(_times(x) or ''))}"
                for x, count in self._found
                if x.program == program
            ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{x}</th>" for x in _COLUMNS)
        rows = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(x))}</tr>" for x in self.products]
        return f"<p>{html.escape(self.summary)}</p><table><tr>{head}</tr>{''.join(rows)}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as JSON takes them."""
        products = [{**asdict(x), "operands": list(x.operands)} for x in self.products]
        return {"summary": self.summary, "products": products}

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each product and the attributes of `Compiled` as columns.

        Raises:
          ImportError: pandas is not installed.
        """
        import pandas  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return pandas.DataFrame([asdict(x) for x in self.products], columns=list(Compiled.__dataclass_fields__))


def report() -> Report:
    """What became of each product of the programs that were compiled in this process since its start.

    As text it has a line for each product: how often it was compiled; its dimensions in einsum's letters as they lie in
    memory, so that `ba,bc->ac` has its left operand stored transposed; dtypes and shapes; then target, kernel, blocking
    and threads, and what both engines are predicted to take on one core, or why it was left to XLA; last the user's
    line of code and what JAX calls the operation. A line for each attention: queries x keys x values -> result, each as
    it lies in memory, and what masks its scores; the two products of one that runs in one pass have no lines of their
    own. `jax_nano.matmul` and its relatives are always listed, other products of JAX if `jax_nano.accelerate` was on.
    Of `dot_product_attention` that is its forward half; its gradients are what it is itself, a call or products.
    """
    return Report(record.everything())


def _compiled(x: record.Product | record.Attention, count: int) -> Compiled:
    is_product = isinstance(x, record.Product)
    *operands, out = (str(array) for array in x.arrays)
    place, times = x.source.place, _times(x)
    return Compiled(
        kind="product" if is_product else "attention",
        count=count,
        program=x.program,
        operation=x.source.operation,
        file=None if place is None else place.file,
        line=None if place is None else place.line,
        what=record.letters(x.labels) if isinstance(x, record.Product) else x.detail,
        operands=tuple(operands),
        result=out,
        epilogue=x.epilogue,
        kernel=record.fate(x) if x.declined is None else None,
        reason=x.declined,
        flops=_flops(x) if isinstance(x, record.Product) else None,
        seconds=None if times is None else times.kernel_ns * 1e-9,
        xla_seconds=None if times is None else times.xla_ns * 1e-9,
    )


def _times(product: record.Product | record.Attention) -> Times | None:
    """What a kernel and XLA are predicted to take for a product that a kernel computes, if that decided."""
    if isinstance(product, record.Attention) or product.declined is not None or product.kernel:
        return None
    import ml_dtypes
    import numpy as np

    from jax_nano._core.signatures import Signature
    from jax_nano._dispatch import decision  # imports JAX, which `run` leaves to the program

    left, right, out = (np.dtype(getattr(ml_dtypes, x.dtype, x.dtype)) for x in product.arrays)
    lhs, rhs, _ = (x.shape for x in product.arrays)
    asked = decision.Product(product.labels, lhs, rhs, (left, right, out), None, placed=True)
    signature = Signature(left, right, out, product.algorithm)
    return decision.between(asked, signature, decision.this_machine(), decision.policy).times


def _flops(product: record.Product) -> int | None:
    sizes = product.labels.sizes(*(x.shape for x in product.arrays[:2]))
    if not all(isinstance(size, int) for size in sizes.values()):
        return None
    return 2 * math.prod(sizes.values())


def _cells(x: Compiled) -> list[str]:
    predicted = "" if x.seconds is None else cost.duration(x.seconds * 1e9)
    computed = x.kernel if x.reason is None else f"XLA: {x.reason}"
    place = x.operation if x.file is None else f"{x.file}:{x.line}"
    return [str(x.count), x.what, " x ".join(x.operands), x.result, computed or "", predicted, place]
