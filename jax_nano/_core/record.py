"""The record of what became of each product that was compiled in this process; `_tools.report` makes text of it.

With `JAX_NANO_VERBOSE=1` in the environment (read at import) each product is also printed to the standard error stream
when it is compiled, and with 2 each call when it has run, with its time (csrc/xla/settings.h).
"""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from jax_nano._core import jax_compat as compat
from jax_nano._core import native, spec, thread_limit, verbosity
from jax_nano._core.contraction import Labels
from jax_nano._core.places import Place


class Array(NamedTuple):
    """An array as it lies in memory, its dimensions in row-major order."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Source(NamedTuple):
    """Where a product comes from."""

    operation: str  # what JAX calls it, e.g. "jit(loss)/dot_general"
    place: Place | None  # in the user's code; None if that is not known, as in exported programs

    def __str__(self) -> str:
        return self.operation if self.place is None else f"{self.place}, {self.operation}"


class Product(NamedTuple):
    """A product of a program, and what became of it."""

    program: str
    source: Source
    arrays: tuple[Array, Array, Array]  # lhs, rhs, result
    labels: Labels  # of the arrays' dimensions
    algorithm: str
    declined: str | None  # why XLA computes it; None: a kernel does
    epilogue: str = ""  # what the call does besides
    kernel: str = ""  # what computes it; "" if that is to be asked of the planner of plain products
    weights: str = ""  # why an operand that was made of quantised weights is read as floats


class Attention(NamedTuple):
    """An attention of a program: two products with softmax between them, and what became of it.

    Where a kernel computes it, its products are no others; where not, they are listed by themselves.
    """

    program: str
    source: Source
    arrays: tuple[Array, ...]  # queries, keys, values, result; what was declined may name the result alone
    detail: str  # "causal, bias"
    declined: str | None  # why it stays two products; None: a kernel computes it in one pass
    epilogue: str = ""

    @property
    def products(self) -> int:
        """How many products of the program it stands for: with its gradients they are six."""
        return 6 if self.has_gradients else 2

    @property
    def calls(self) -> int:
        """How many calls compute it: the gradients have one of their own."""
        return 2 if self.has_gradients else 1

    @property
    def has_gradients(self) -> bool:
        return "gradients" in self.detail


_lock = threading.Lock()
_products: Counter[Product | Attention] = Counter()
seen_again: Callable[[], bool] = bool
"""Whether the program that is lowered now will be rewritten when XLA compiles it, so that products that are left to XLA
are recorded then. False, unless `_programs.accelerate` replaces this function."""
verbose: bool = verbosity.verbosity() >= 1


def add(product: Product | Attention) -> None:
    """Remembers a product or attention of a program that is being compiled."""
    with _lock:
        _products[product] += 1
    if verbose:
        print(f"jax_nano: {line(product)}", file=sys.stderr, flush=True)


Recorded: TypeAlias = Counter[Product | Attention]
"""How often each product has been compiled."""


def recorded() -> Recorded:
    """What was compiled so far."""
    with _lock:
        return _products.copy()


def withdraw(program: str, before: Recorded, why: str) -> None:
    """Changes the record of a program's products since `before`: XLA computes them after all, for the reason `why`."""
    with _lock:
        for product, count in list(_products.items()):
            new = count - before[product]
            if product.program == program and product.declined is None and new > 0:
                _products[product] -= new
                _products[product._replace(declined=why, epilogue="")] += new
        for product in [x for x, count in _products.items() if count == 0]:
            del _products[product]


def products() -> list[tuple[Product, int]]:
    """Every product compiled so far, in order, and how often."""
    return [(x, count) for x, count in everything() if isinstance(x, Product)]


def attentions() -> list[tuple[Attention, int]]:
    """Every attention compiled so far, in order, and how often."""
    return [(x, count) for x, count in everything() if isinstance(x, Attention)]


def everything() -> list[tuple[Product | Attention, int]]:
    """Both, in order."""
    with _lock:
        return list(_products.items())


def epilogue_text(activation: str, scale: float, *, bias: bool, residual: bool) -> str:
    """An epilogue in words: "scale 0.25, bias, relu, residual"."""
    parts = {
        f"scale {scale:g}": scale != 1,
        "bias": bias,
        activation: activation != "none",
        "residual": residual,
    }
    return ", ".join(name for name, there in parts.items() if there)


def clear() -> None:
    """Forgets all products."""
    with _lock:
        _products.clear()


def line(product: Product | Attention, times: str = "") -> str:
    """A product or attention as text: labels and arrays, then its kernel and plan, or why XLA computes it.

    Args:
      product: what was compiled.
      times: what is predicted for it; nothing if "".
    """
    if isinstance(product, Attention):
        return _attention_line(product)
    lhs, rhs, out = product.arrays
    what = f"{letters(product.labels)}  {lhs} x {rhs} -> {out}"
    algorithm = "" if product.algorithm == "default" else f" ({product.algorithm})"
    algorithm += f", then {product.epilogue}" if product.epilogue else ""
    return f"{what}{algorithm}: {fate(product, times)}  [{product.source}]"


def fate(x: Product | Attention, times: str = "") -> str:
    """What computes it: target, kernel, blocking and threads, or XLA and why."""
    if isinstance(x, Attention):
        if x.declined is not None:
            return f"stays two products and softmax: {x.declined}"
        return f"{native.target()}, in one pass"
    text = x.kernel or _kernel(x) if x.declined is None else f"left to XLA: {x.declined}"
    text += f"; predicted {times}" if times else ""
    return f"{text}; its quantised weights are made floats first: {x.weights}" if x.weights else text


def quantized_text(weights: str, k: int, groups: int, *, zero: bool) -> str:
    """What computes a product with quantised weights, in words."""
    form = spec.WEIGHTS[weights].form if weights in spec.WEIGHTS else weights
    scales = f"scales of {groups} groups of {k // groups}" if groups > 1 else "scales of columns"
    return ", ".join([native.target(), f"quantized_{form}", scales, *(["zero points"] if zero else [])])


def _attention_line(attention: Attention) -> str:
    *operands, out = map(str, attention.arrays)
    what = " ".join(filter(None, ("attention ", " x ".join(operands), "->", out)))
    what += f", {attention.detail}" if attention.detail else ""
    return f"{what}: {fate(attention)}  [{attention.source}]"


def letters(labels: Labels) -> str:
    """Labels as einsum writes them: "ab,bc->ac"."""
    names: Final = {label: _letter(i) for i, label in enumerate(dict.fromkeys(labels.lhs + labels.rhs))}
    lhs, rhs, out = ("".join(names[x] for x in dims) for dims in labels)
    return f"{lhs},{rhs}->{out}"


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else f"({i})"


def _kernel(product: Product) -> str:
    runtime = native.runtime()
    assert runtime is not None  # or it would have been declined
    lhs, rhs, out = product.arrays
    if not all(isinstance(size, int) for size in lhs.shape + rhs.shape):
        return "a kernel, chosen when the sizes are known"
    threads = thread_limit.usable(compat.cpu_devices())
    dtypes = (lhs.dtype, rhs.dtype, out.dtype)
    finish = {"epilogue": bool(product.epilogue), "bias": "bias" in product.epilogue.split(", ")}
    plan = runtime.plan(lhs.shape, rhs.shape, *product.labels, *dtypes, threads, algorithm=product.algorithm, **finish)
    return _in_short(plan, threads)


def _in_short(plan: Mapping[str, Any], threads: int) -> str:
    """A plan in a line: target, kernel, blocking, threads."""
    if plan["empty"]:
        return "nothing to do"
    if plan["inner"]:
        blocking = "inner products"
    elif plan["sweep"]:
        blocking = "sweeps"
    else:
        packed = [operand.upper() for operand in ("a", "b") if plan[f"pack_{operand}"]]
        blocks = f"blocks {plan['mc']} x {plan['nc']} x {plan['kc']} of {plan['m']} x {plan['n']} x {plan['k']}"
        blocking = f"{blocks}, {' and '.join(packed) or 'nothing'} packed"
    used = min(math.prod(plan["split"]) * plan["split_k"], threads)
    products = f"{plan['products']} products, " if plan["products"] > 1 else ""
    pack = f", composed for it in {plan['pack']}" if plan["pack"] else ""
    return f"{plan['target']}, {plan['kernel']}{pack}, {products}{blocking}, {used} thread{'s' if used > 1 else ''}"
