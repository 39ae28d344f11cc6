"""`python -m jax_nano explain`: how a product would be computed, and why, in words and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from jax_nano._core import cost as _cost
from jax_nano._core import machine, spec
from jax_nano._core.contraction import Labels

if TYPE_CHECKING:
    from jax_nano._dispatch.decision import Decision, Machine, Policy

SHORT: Final = {x.short: x.name for x in spec.DTYPES.values()}
_NAMES: Final = {**SHORT, **{x.name: x.name for x in spec.DTYPES.values()}}
LAYOUTS: Final = ("NN", "NT", "TN", "TT")


class BadRequest(ValueError):
    """A request that cannot be understood; the message says what is expected."""


@dataclass(frozen=True)
class Request:
    """A product as the command line names it."""

    m: int
    n: int
    k: int
    batch: tuple[int, ...]
    layout: str
    dtypes: tuple[str, str, str]

    @property
    def labels(self) -> Labels:
        batch = tuple(range(len(self.batch)))
        m, n, k = (len(batch) + i for i in range(3))
        lhs = (m, k) if self.layout[0] == "N" else (k, m)
        rhs = (k, n) if self.layout[1] == "N" else (n, k)
        return Labels((*batch, *lhs), (*batch, *rhs), (*batch, m, n))

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        lhs = (self.m, self.k) if self.layout[0] == "N" else (self.k, self.m)
        rhs = (self.k, self.n) if self.layout[1] == "N" else (self.n, self.k)
        return (*self.batch, *lhs), (*self.batch, *rhs)

    def __str__(self) -> str:
        lhs, rhs, out = (
            f"{dtype}[{','.join(map(str, shape))}]"
            for dtype, shape in zip(self.dtypes, (*self.shapes, (*self.batch, self.m, self.n)), strict=True)
        )
        turned = [f"{side} transposed" for side, how in zip(("lhs", "rhs"), self.layout, strict=True) if how == "T"]
        sizes = f"M = {self.m}, N = {self.n}, K = {self.k}"
        return f"{lhs} x {rhs} -> {out}  ({', '.join([sizes, *turned])})"


def parse_sizes(text: str) -> tuple[int, ...]:
    """`4x1024x4096` as numbers."""
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise BadRequest(f"{text!r}: expected numbers with x between them, such as 4x1024x4096")
    return tuple(int(size) for size in text.split("x"))


def parse_dtypes(text: str) -> tuple[str, str, str]:
    """`bfloat16`, `bfloat16-float32`, `float32xbfloat16`, or in short `bf16`, `i8xu8-i32`: lhs, rhs and result.

    The result has the wider of the operands' types, and int32 for int8 and uint8, unless named.
    """
    operands, _, out = text.partition("-")
    lhs, _, rhs = operands.partition("x")
    return dtypes_of(lhs, rhs or lhs, out or None)


def dtypes_of(lhs: str, rhs: str, out: str | None) -> tuple[str, str, str]:
    """Names of dtypes, short or not, as NumPy's; that of the result by default as `parse_dtypes` says."""
    names = [x for x in (lhs, rhs, out) if x is not None]
    if unknown := [x for x in names if x not in _NAMES]:
        raise BadRequest(f"dtype {unknown[0]!r} is none of {', '.join(SHORT.values())}")
    left, right, *result = (_NAMES[x] for x in names)
    if result:
        return left, right, result[0]
    if spec.DTYPES[left].kind != "float":
        return left, right, spec.DTYPES[left].accumulator
    return left, right, max(left, right, key=_cost.element_bytes)


def parse_product(texts: Sequence[str]) -> tuple[int, int, int]:
    """M, N and K, from `4x4096x1024` (MxNxK) or from the operands as they are multiplied (`4x1024 1024x4096`)."""
    match [parse_sizes(text) for text in texts]:
        case [(m, n, k)]:
            return m, n, k
        case [(m, k), (rows, n)]:
            if k != rows:
                raise BadRequest(f"{' '.join(texts)}: the first has {k} columns and the second {rows} rows")
            return m, n, k
        case _:
            raise BadRequest(f"{' '.join(texts)!r}: expected MxNxK, or the two operands, MxK KxN")


def request(sizes: Sequence[str], dtype: str, layout: str, batch: str | None) -> Request:
    """What the arguments of the command line ask for."""
    m, n, k = parse_product(sizes)
    return Request(m, n, k, parse_sizes(batch) if batch else (), layout, parse_dtypes(dtype))


def decided(asked: Request, algorithm: str, having: Machine, policy: Policy) -> Decision:
    """The decision between XLA and a kernel of this algorithm for exactly these dtypes, if there is one."""
    import ml_dtypes
    import numpy as np

    from jax_nano._core.signatures import Signature
    from jax_nano._dispatch.decision import Product, between  # imports JAX, which `run` leaves to the program

    lhs, rhs, out = (np.dtype(getattr(ml_dtypes, x, x)) for x in asked.dtypes)
    product = Product(asked.labels, *asked.shapes, (lhs, rhs, out), None)
    return between(product, Signature(lhs, rhs, out, algorithm), having, policy)


def explain(
    runtime: Any, asked: Request, *, threads: int, algorithm: str, target: str | None, decided: Decision
) -> str:
    """The text.

    Args:
      runtime: the extension module.
      asked: the product.
      threads: how many share the work.
      algorithm: a DotAlgorithmPreset's name, or "default".
      target: explain the kernel of this target, whether it can run here or not; None: of the best one.
      decided: which engine computes the product, and the times that decided.
    """
    lhs_shape, rhs_shape = asked.shapes
    labels = asked.labels
    plan = runtime.plan(
        lhs_shape,
        rhs_shape,
        labels.lhs,
        labels.rhs,
        labels.out,
        *asked.dtypes,
        threads,
        algorithm=algorithm,
        target=target,
    )
    lines = [str(asked), "", *_rows("engine", _engine_lines(decided))]
    if plan["empty"]:
        return "\n".join([*lines, "nothing to do: the result has no elements"])
    kernel = next(k for k in runtime.kernels() if k["name"] == plan["kernel"])
    lines += _rows("kernel", _kernel_lines(runtime, plan, kernel, target))
    lines += _rows("A", [_operand_text("A", plan, kernel)])
    lines += _rows("B", [_operand_text("B", plan, kernel)])
    lines += _rows("blocking", _blocking_lines(plan))
    lines += _rows("split", [_split_text(plan, threads)])
    shared = f", and {size(plan['shared_bytes'])} that all share" if plan["shared_bytes"] else ""
    lines += _rows("workspace", [f"{size(plan['workspace_bytes'])} a thread{shared}"])
    considered = runtime.considered(
        lhs_shape,
        rhs_shape,
        labels.lhs,
        labels.rhs,
        labels.out,
        *asked.dtypes,
        algorithm=algorithm,
        target=target,
    )
    cpu = runtime.profile()
    lines += _rows("considered", _considered_lines(cpu, considered, measured=runtime.profile_is_measured(cpu)))
    lines += _rows("cost", _cost_lines(runtime, asked, kernel, algorithm))
    return "\n".join(lines)


def _rows(title: str, lines: list[str]) -> list[str]:
    return [f"{title if i == 0 else '':12}{line}" for i, line in enumerate(lines)]


def _engine_lines(decided: Decision) -> list[str]:
    """Which engine computes the product, why, and how long both would take."""
    from jax_nano._core import native  # which imports JAX: `run` must not, before its program does

    if decided.declined is None:
        lines = ["a kernel"]
    else:
        what = "Below is what a kernel would do (JAX_NANO_GATE=off sends it there)"
        lines = [f"left to XLA: {decided.declined}. {what}"]
    if (times := decided.times) is not None:
        lines.append(f"predicted for a program on one core of {times.cpu}: {times} ({times.form})")
        if times.cpu != native.measured_cpu():
            lines.append("of this CPU XLA's times are not known: both engines are compared by those of that one")
    return lines


def _kernel_lines(runtime: Any, plan: Mapping[str, Any], kernel: Mapping[str, Any], forced: str | None) -> list[str]:
    tile = f"register tile {plan['mr']} x {plan['nr']}"
    step = f", {kernel['kr']} values of K a step" if kernel["kr"] > 1 else ""
    lines = [plan["kernel"], f"target {plan['target']}, {tile}{step}, sums in {kernel['acc']}"]
    if plan["pack"]:
        lines.append(f"composed for this product, in {plan['pack']}: another tile and other blocks, the same results")
    if plan["transposed"]:
        lines.append(
            f"A is {'rhs' if plan['swapped'] else 'lhs'}, transposed: the result's transpose is computed first"
        )
    elif plan["swapped"]:
        lines.append("A is rhs and B is lhs, so that the result's rows are contiguous")
    if forced is not None:
        lines.append("the target was named on the command line")
        return lines
    return [*lines, *(f"{name}: {why}" for name, why in passed_over(runtime, kernel))]


def passed_over(runtime: Any, kernel: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Better targets that have a kernel for a kernel's signature too, and why they do not serve it here."""
    signature = ("lhs", "rhs", "out", "algorithm")
    has_kernel = {k["target"] for k in runtime.kernels() if all(k[x] == kernel[x] for x in signature)}
    selected = runtime.selected_target()
    reasons = []
    allowed = False  # from the target on that JAX_NANO_TARGET names
    for target in runtime.targets():
        name = target["name"]
        if name == kernel["target"]:
            break
        allowed = allowed or name == selected
        if name in has_kernel:
            why = "slower for these dtypes on this CPU" if allowed else "above what JAX_NANO_TARGET allows"
            reasons.append((name, target["why"] or why))
    return reasons


def _operand_text(operand: str, plan: Mapping[str, Any], kernel: Mapping[str, Any]) -> str:
    a = operand == "A"
    rows, columns = ("m", "k") if a else ("k", "n")
    row_stride, column_stride = (plan[s + operand.lower()] for s in ("rs", "cs"))
    shape = f"{plan[rows]} x {plan[columns]}, strides {row_stride} and {column_stride}"
    readers = _cost.tiles(plan["n"], plan["nr"]) if a else _cost.tiles(plan["m"], plan["mr"])
    read = f"{readers} register {'tile' if readers == 1 else 'tiles'} of {'columns' if a else 'rows'}"
    if plan["inner"]:
        copied = plan["pack_a" if a else "pack_b"]
        return f"{shape}; {'copied along K, as it is the smaller operand' if copied else 'read where it lies, along K'}"
    if plan["sweep"]:
        return f"{shape}; read where it lies, {'element by element' if a else 'a few rows at a time from end to end'}"
    if not plan["pack_a" if a else "pack_b"]:
        return f"{shape}; read where it lies, by {read}"
    in_units = column_stride == 1 and row_stride % kernel["kr"] == 0 == plan["k"] % kernel["kr"]
    if not kernel["direct_a" if a else "direct_b"] or (kernel["kr"] > 1 and not in_units):
        why = _why_never_direct(kernel)
    elif not a and column_stride != 1:
        why = "its columns are not contiguous"
    else:
        why = f"it is read by {read}"
    return f"{shape}; packed, as {why}"


def _why_never_direct(kernel: Mapping[str, Any]) -> str:
    if kernel["algorithm"] != "default":
        return "its elements are rounded to parts on the way"
    if kernel["kr"] > 1:
        return f"an instruction takes {kernel['kr']} values of K side by side"
    return f"its elements are widened to {kernel['acc']} once instead of at every use"


def _blocking_lines(plan: Mapping[str, Any]) -> list[str]:
    if plan["inner"]:
        lines = ["none: inner products along K, as few rows meet many columns, or many rows few columns"]
    elif plan["sweep"]:
        lines = ["none: sweeps over B that add to C, as few rows of A read all of it once"]
    else:
        parts = []
        for dimension, name in {"m": "M", "n": "N", "k": "K"}.items():
            block = plan[dimension + "c"]
            count = _cost.tiles(plan[dimension], block)
            parts.append(f"{name} by {block} ({count} {'block' if count == 1 else 'blocks'})")
        lines = [", ".join(parts)]
    products = [f"{loop[0]}" for loop in plan["outer"]] + ([str(plan["batch"])] if plan["batch"] > 1 else [])
    if products:
        inner = "; the last inside the kernel" if plan["batch"] > 1 else ""
        lines.append(f"{' x '.join(products)} products{inner}")
    if plan["k_outer"]:
        passes = " x ".join(str(loop[0]) for loop in plan["k_outer"])
        lines.append(f"{passes} passes that add to the result, as K is in several dimensions")
    if plan["split_k"] > 1:
        why = "as sums are long and the result has few tiles"
        lines.append(f"split-K: {plan['split_k']} slices on any number of threads, {why}; reduced in pairs")
    return lines


_MOST_CONSIDERED: Final = 6


def _considered_lines(cpu: str, considered: Sequence[Mapping[str, Any]], *, measured: bool) -> list[str]:
    """The schedules that the planner compared, each with its predicted time and how much slower it is than the best."""
    if not considered:
        return ["nothing: the costs of this kernel on this CPU are not known, so that thresholds decide"]
    best = considered[0]["ns"]
    lines = [f"predicted for one core of {cpu}:"]
    if not measured:
        lines = [f"predicted for one core of {cpu} from published numbers; thresholds decide, as none was measured:"]
    for x in considered[:_MOST_CONSIDERED]:
        why = ("chosen" if measured else "the least") if x is considered[0] else f"{x['ns'] / best:.2f} times as long"
        lines.append(f"{_cost.duration(x['ns']):>8}  {schedule_text(x)} ({why})")
    if (more := len(considered) - _MOST_CONSIDERED) > 0:
        lines.append(f"and {more} slower {'one' if more == 1 else 'ones'}")
    return lines


def schedule_text(x: Mapping[str, Any]) -> str:
    """One of `_runtime.considered` in words."""
    packed = [operand for operand in ("A", "B") if x[f"pack_{operand.lower()}"]]
    if x["inner"]:
        return " ".join(["inner products along K", *(f"with {operand} copied" for operand in packed)])
    if x["sweep"]:
        return "sweeps over B"
    what = f"{' and '.join(packed)} packed" if packed else "nothing packed"
    return f"register tiles, {what}, K by {x['kc']}"


def _split_text(plan: Mapping[str, Any], threads: int) -> str:
    items = math.prod(plan["split"]) * plan["split_k"]
    if items == 1:
        why = "one thread is asked for" if threads == 1 else "too little work to wake another thread"
        return f"one item: {why}"
    directions = zip((*plan["split"], plan["split_k"]), ("products", "M", "N", "K"), strict=True)
    pieces = " x ".join(f"{pieces} of {name}" for pieces, name in directions if pieces > 1)
    return f"{items} items ({pieces}) over {threads} threads; the bits do not depend on it"


def _cost_lines(runtime: Any, asked: Request, kernel: Mapping[str, Any], algorithm: str) -> list[str]:
    product = _cost.Product(asked.m, asked.n, asked.k, math.prod(asked.batch), *asked.dtypes, algorithm=algorithm)
    caches = dict(runtime.caches())
    halves = machine.splits_512_bit(machine.cpu_fields())
    cost = _cost.cost(product, kernel["target"], kernel["acc"], kernel["kr"], caches, halves=halves)
    moved = f"from {cost.level} at {_cost.BYTES_PER_CYCLE[cost.level]:g} bytes a cycle"
    work, computing, moving = (number(x) for x in (2 * product.multiply_adds, cost.compute_cycles, cost.memory_cycles))
    lines = [
        f"{work}flop; {size(product.bytes)} must move: {cost.flops_per_byte:.1f} flop a byte",
        f"one core: {computing}cycles at {cost.peak:g} multiply-adds a cycle, {moving}cycles {moved}",
        f"so {cost.share_of_peak:.0%} of the peak is what memory allows; the limit is {_limit(cost)}",
    ]
    parts = _cost.PARTS.get(algorithm, 1)
    if parts > 1:
        lines.append(f"{algorithm} computes {parts} products of parts for each product")
    return lines


def _limit(cost: _cost.Cost) -> str:
    return {"multiply-adds": "the multiply-add units", "memory": "memory"}.get(cost.bound, f"reading from {cost.bound}")


def number(x: float) -> str:
    """A count with a decimal prefix and a space, e.g. "33.6 M"."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= limit:
            return f"{x / limit:.1f} {prefix}"
    return f"{x:.0f} "


def size(count: int) -> str:
    """Bytes, e.g. "8.0 MiB"."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} bytes"
