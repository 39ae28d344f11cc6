"""Epilogues in HLO: bias, activation, residual, found in the loop that XLA fused after a product.

The loop is one expression for each element. It is compared with what JAX's own functions become, written as
expressions too; sums and products are compared in either order. What does not match exactly stays XLA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from jax_nano import _hlo, _report
from jax_nano._hlo import Body, Instruction, Module
from jax_nano._views import View

Expression: TypeAlias = tuple[Any, ...]
"""An operation's name and its operands; ("constant", x), ("array", n), ("row", n): a parameter as it is, or its vector
along the last dimension."""

_LARGEST: Final = 200  # gelu of a product with scale, bias and residual has fewer than 100
_COMMUTATIVE: Final = ("add", "multiply", "maximum")


class Found(NamedTuple):
    """An epilogue: the instruction that computes it, and what a call needs to do the same."""

    instruction: Instruction
    activation: str
    scale: float
    bias: Instruction | None
    residual: Instruction | None

    def __str__(self) -> str:
        there = {"bias": self.bias is not None, "residual": self.residual is not None}
        return _report.epilogue_text(self.activation, self.scale, **there)


def _make(name: str, *operands: Expression) -> Expression:
    return (name, *sorted(operands, key=repr)) if name in _COMMUTATIVE else (name, *operands)


def _constant(x: float) -> Expression:
    return ("constant", float(np.float32(x)))


def _gelu_tanh(y: Expression) -> Expression:
    cube = _make("multiply", _make("multiply", y, y), y)
    inner = _make("add", y, _make("multiply", cube, _constant(0.044715)))
    tanh = _make("tanh", _make("multiply", inner, _constant(np.sqrt(2 / np.pi))))
    return _make("multiply", y, _make("multiply", _make("add", tanh, _constant(1)), _constant(0.5)))


def _sigmoid(y: Expression) -> Expression:
    return ("divide", _constant(1), _make("add", ("exponential", ("negate", y)), _constant(1)))


# What XLA makes of jax.nn's functions. The other form of gelu is a polynomial of dozens of operations by now.
_ACTIVATIONS: Final[Mapping[str, tuple[Callable[[Expression], Expression], ...]]] = {
    "relu": (lambda y: _make("maximum", y, _constant(0)),),
    "tanh": (lambda y: ("tanh", y),),
    "sigmoid": (_sigmoid, lambda y: ("logistic", y)),
    "silu": (lambda y: _make("multiply", y, _sigmoid(y)), lambda y: _make("multiply", y, ("logistic", y))),
    "gelu_tanh": (_gelu_tanh,),
    "none": (lambda y: y,),
}


def epilogue_of(module: Module, body: Body, out: View) -> Found | None:
    """What follows a product of float32 that nothing else uses, if a call can do it."""
    product = out.instruction
    if out.dtype != np.float32 or not out.is_its_shape:
        return None
    fusion = _only_user(body, product)
    while fusion is not None and fusion.opcode == "bitcast" and _rows(fusion) == _rows(product):
        product, fusion = fusion, _only_user(body, fusion)
    if fusion is None or fusion.opcode != "fusion" or fusion.fusion_kind != "kLoop" or fusion.output_operand_aliasing:
        return None
    array = _hlo.array_of(fusion.shape)
    if array is None or array.dtype != np.float32 or _rows(fusion) != _rows(product) or _rows(fusion) is None:
        return None
    computation = module.computation(fusion.called_computation_ids[0])
    expression = _expression(computation, _rows(fusion))
    operands = body.operands(fusion)
    ours = [n for n, x in enumerate(operands) if x.id == product.id]
    if expression is None or len(ours) != 1:
        return None
    return _matched(expression, ("array", ours[0]), fusion, operands)


def _only_user(body: Body, instruction: Instruction) -> Instruction | None:
    users = body.users(instruction)
    if len(users) != 1 or body.is_awaited(instruction) or instruction.control_predecessor_ids:
        return None
    return None if users[0].control_predecessor_ids else users[0]


def _rows(instruction: Instruction) -> tuple[int, int] | None:
    """Rows and columns of a row-major array; None for any other."""
    array = _hlo.array_of(instruction.shape)
    if array is None or not array.dims or array.major_to_minor != tuple(range(len(array.dims))):
        return None
    return int(np.prod(array.dims[:-1])), array.dims[-1]


def _expression(computation: _hlo.Computation, rows: tuple[int, int] | None) -> Expression | None:
    """What an element of the result is; None if some operation is not understood."""
    found: dict[int, Expression] = {}
    sizes: dict[int, int] = {}  # what is used twice is written twice: not to grow without bounds
    for x in computation.instructions:
        operands = [found.get(number) for number in x.operand_ids]
        if any(operand is None for operand in operands):
            return None
        expression = _one(x, [operand for operand in operands if operand is not None], rows)
        if expression is None:
            return None
        found[x.id] = expression
        sizes[x.id] = 1 + sum(sizes[number] for number in x.operand_ids)
        if sizes[x.id] > _LARGEST:
            return None
    return found[computation.root_id]


def _one(x: Instruction, operands: list[Expression], rows: tuple[int, int] | None) -> Expression | None:
    array = _hlo.array_of(x.shape)
    if array is None or array.dtype != np.float32:
        return None
    if x.opcode == "parameter":
        if _rows(x) == rows:
            return ("array", x.parameter_number)
        return ("vector", x.parameter_number) if rows is not None and array.dims == rows[1:] else None
    if x.opcode == "constant":
        return _constant(_hlo.scalar(x)) if not array.dims else None
    if _rows(x) != rows:
        return None
    if x.opcode == "broadcast":
        (operand,) = operands
        if operand[0] == "constant":
            return operand
        along_last = tuple(x.dimensions) == (len(array.dims) - 1,)
        return ("row", operand[1]) if operand[0] == "vector" and along_last else None
    if any(operand[0] == "vector" for operand in operands):
        return None
    if x.opcode == "bitcast":
        return operands[0]
    elementwise = ("add", "divide", "exponential", "logistic", "maximum", "multiply", "negate", "tanh")
    return _make(x.opcode, *operands) if x.opcode in elementwise else None


def _matched(whole: Expression, product: Expression, fusion: Instruction, operands: list[Instruction]) -> Found | None:
    candidates: list[tuple[Expression, Instruction | None]] = [(whole, None)]
    if whole[0] == "add":
        for residual, rest in ((whole[1], whole[2]), (whole[2], whole[1])):
            if residual[0] == "array" and residual != product:
                candidates.insert(0, (rest, operands[residual[1]]))
    for expression, residual in candidates:
        for y in sorted(set(_inner(expression)), key=repr):
            affine = _affine(y, product)
            if affine is None:
                continue
            for name, forms in _ACTIVATIONS.items():
                if any(form(y) == expression for form in forms):
                    scale, bias = affine
                    return Found(fusion, name, scale, None if bias is None else operands[bias], residual)
    return None


def _inner(expression: Expression) -> Iterator[Expression]:
    yield expression
    for x in expression[1:]:
        if isinstance(x, tuple):
            yield from _inner(x)


def _affine(y: Expression, product: Expression) -> tuple[float, int | None] | None:
    """Scale and bias if y is scale * product + bias."""
    bias = None
    if y[0] == "add":
        rows = [x for x in y[1:] if x[0] == "row"]
        if len(rows) != 1:
            return None
        bias = rows[0][1]
        y = y[1] if y[2] == rows[0] else y[2]
    if y == product:
        return 1.0, bias
    if y[0] == "multiply" and product in y[1:]:
        (factor,) = (x for x in y[1:] if x != product) if y[1] != y[2] else (y[1],)
        return (factor[1], bias) if factor[0] == "constant" else None
    return None
