"""Control flow: loops, branches, and calls of intrinsics and fences that order it.

A loop that carries values takes its body as a function (``loop``); one that carries none is a Python loop, whose body
is run once and emits what the generated loop repeats (``range_``). ``when`` and ``branches`` are the same for one and
for two alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from .memory import Ptr
from .sizes import I64, Size, Value, as_value, minimum
from .types import operation, type_of


def unwrap(x: Any) -> Value:
    if isinstance(x, int):
        return as_value(x)
    return x.value if isinstance(x, (I64, Ptr)) else x


def _rewrap(like: Any, value: Value) -> Any:
    if isinstance(like, Ptr):
        return Ptr(value, like.elem)
    return I64(value) if isinstance(like, (I64, int)) else value


def loop(lo: Size, hi: Size, step: Size, init: Sequence[Any], body: Callable[..., Sequence[Any] | None]) -> list[Any]:
    """``for iv in range(lo, hi, step): carried = body(iv, *carried)``; returns what is carried out."""
    op = scf.ForOp(as_value(lo), as_value(hi), as_value(step), [unwrap(x) for x in init])
    with ir.InsertionPoint(op.body):
        carried = [_rewrap(like, v) for like, v in zip(init, op.inner_iter_args, strict=True)]
        out = body(I64(op.induction_variable), *carried) or []
        scf.yield_([unwrap(x) for x in out])
    return [_rewrap(like, v) for like, v in zip(init, op.results, strict=True)]


def if_(
    condition: Value | bool,
    then: Callable[[], Sequence[Any] | None],
    otherwise: Callable[[], Sequence[Any] | None] | None = None,
    like: Sequence[Any] = (),
) -> list[Any]:
    """Runs one of two bodies, each returning values of the kinds of ``like``. A Python bool decides right here."""
    if isinstance(condition, bool):
        chosen = then if condition else otherwise
        return list((chosen() if chosen else None) or [])
    op = operation("scf.if", [unwrap(x).type for x in like], [condition], regions=2)
    for region, body in zip(op.regions, (then, otherwise), strict=True):
        if body is not None:
            with ir.InsertionPoint(region.blocks.append()):
                scf.yield_([unwrap(x) for x in (body() or [])])
    return [_rewrap(x, v) for x, v in zip(like, op.results, strict=True)]


def switch(
    value: Size, cases: Sequence[Callable[[], Sequence[Any] | None]], first: int = 0, like: Sequence[Any] = ()
) -> list[Any]:
    """Runs ``cases[value - first]``; a value outside the cases runs the last one. Results as in ``if_``."""
    index = arith.index_cast(ir.IndexType.get(), as_value(value))
    labels = [first + i for i in range(len(cases) - 1)]
    types = [unwrap(x).type for x in like]
    op = operation("scf.index_switch", types, [index], regions=len(cases), cases=ir.DenseI64ArrayAttr.get(labels))
    for region, case in zip(op.regions, [cases[-1], *cases[:-1]], strict=True):
        with ir.InsertionPoint(region.blocks.append()):
            scf.yield_([unwrap(x) for x in (case() or [])])
    return [_rewrap(x, v) for x, v in zip(like, op.results, strict=True)]


def range_(lo: Size, hi: Size, step: Size = 1) -> Iterator[I64]:
    """A loop that carries nothing, as a Python loop: ``for i in ir.range_(...)``. The body must not leave it early."""
    op = scf.ForOp(as_value(lo), as_value(hi), as_value(step), [])
    with ir.InsertionPoint(op.body):
        yield I64(op.induction_variable)
        scf.yield_([])


def each(count: Size) -> Iterator[Size]:
    """``range_(0, count)``; a constant single time without a loop."""
    if isinstance(count, int) and count == 1:
        yield 0
        return
    yield from range_(0, count)


def blocks(total: Size, step: Size, end: Size | None = None) -> Iterator[tuple[Size, Size]]:
    """A loop over blocks as a Python loop: ``for begin, size in ir.blocks(total, step)``.

    Args:
      total, step: so many, so many at a time.
      end: where a loop of sizes that are not constants ends, if not at ``total``.
    """
    for i, size in starts_of_blocks(total, step, end):
        yield i, minimum(total - i, step) if size is None else size


def starts_of_blocks(total: Size, step: Size, end: Size | None = None) -> Iterator[tuple[Size, int | None]]:
    """The same with the size of a block only where that is a constant, else None.

    Where total and step are constants the body is emitted once for the whole blocks and once for the smaller one that
    is left, if there is one; a single block has no loop.
    """
    if not isinstance(total, int) or not isinstance(step, int):
        for i in range_(0, total if end is None else end, step):
            yield i, None
        return
    whole = total // step * step
    if whole == step:
        yield 0, step
    elif whole:
        for i in range_(0, whole, step):
            yield i, step
    if whole < total:
        yield whole, total - whole


def when(condition: Value | bool) -> Iterator[None]:
    """One branch, as a Python loop: ``for _ in ir.when(...)`` emits its body for where the condition holds.

    A Python bool decides right here: then it is emitted, or not. The body must not leave the loop early.
    """
    if isinstance(condition, bool):
        yield from [None] if condition else []
        return
    op = operation("scf.if", [], [condition], regions=2)
    with ir.InsertionPoint(op.regions[0].blocks.append()):
        yield
        scf.yield_([])


def branches(condition: Value | bool) -> Iterator[bool]:
    """Both branches, as a Python loop: ``for holds in ir.branches(...)`` emits its body for each of them.

    A Python bool decides right here: then it is emitted once. The body must not leave the loop early.
    """
    if isinstance(condition, bool):
        yield condition
        return
    op = operation("scf.if", [], [condition], regions=2)
    for region, holds in zip(op.regions, (True, False), strict=True):
        with ir.InsertionPoint(region.blocks.append()):
            yield holds
            scf.yield_([])


def keep_order() -> None:
    """No load or store moves past this point; no instruction is made of it."""
    acquire_release = ir.IntegerAttr.get(type_of("int64"), 6)
    operation("llvm.fence", [], [], ordering=acquire_release, syncscope=ir.StringAttr.get("singlethread"))
