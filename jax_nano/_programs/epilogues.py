"""Epilogues in HLO: scale, bias, activation, residual, conversion, found in the loop that XLA fused after a product.

The loop is one expression for each element. It is compared with the expressions that XLA makes of JAX's own functions;
sums and products are compared in either order. What does not match exactly stays XLA's.

Where the result is bfloat16 or float16, XLA rounds to it after every operation. A call computes all of it in float32
and rounds once, so expressions are compared without intermediate roundings: each of them only adds to the error. In a
loop whose result is float32 roundings count: if there is one, the program asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from jax_nano._core import hlo, record
from jax_nano._core.hlo import BFLOAT16, Body, Instruction
from jax_nano._programs import aliasing, views
from jax_nano._programs.views import View

Expression: TypeAlias = int
"""The number of a node in a graph."""

_COMMUTATIVE: Final = ("add", "multiply", "maximum")
_ELEMENTWISE: Final = frozenset(
    ("abs", "add", "divide", "exponential", "logistic", "maximum", "multiply", "negate", "select", "subtract", "tanh")
)
_FLOAT32: Final = np.dtype(np.float32)
_NARROW: Final = (BFLOAT16, np.dtype(np.float16))


class Found(NamedTuple):
    """An epilogue: the instruction that computes it, and what a call needs to compute the same."""

    instruction: Instruction
    dtype: np.dtype  # of the result; where the instruction gives float32, it is converted to that
    activation: str
    scale: float
    bias: Instruction | None  # of any float dtype, to be converted to that of the result
    residual: Instruction | None
    columns: Instruction | None = None  # a scale for each column, of any float dtype

    @property
    def is_nothing(self) -> bool:
        """Whether it only converts the result."""
        return (
            (self.activation, self.scale) == ("none", 1)
            and self.bias is None
            and self.residual is None
            and self.columns is None
        )

    def __str__(self) -> str:
        there = {"bias": self.bias is not None, "residual": self.residual is not None}
        # Scales a column belong to the weights.
        return record.epilogue_text(self.activation, self.scale, **there)


class _Node(NamedTuple):
    """An operation on other nodes, by its opcode, or one of these names.

    "constant"; "array" and "vector", the loop's parameter of that number; "row", a vector that is broadcast along all
    dimensions but the last; "rounded", a parameter that the loop rounds.
    """

    name: str
    operands: tuple[int, ...] = ()
    value: float = 0.0


class _Graph:
    """Expressions without duplicates: the same operation on the same operands has the same number."""

    def __init__(self, narrow: np.dtype | None) -> None:
        self.narrow = narrow
        self._nodes: list[_Node] = []
        self._numbers: dict[_Node, Expression] = {}

    def node(self, number: Expression) -> _Node:
        return self._nodes[number]

    def add(self, name: str, *operands: int) -> Expression:
        return self._number(_Node(name, tuple(sorted(operands) if name in _COMMUTATIVE else operands)))

    def _number(self, node: _Node) -> Expression:
        if node not in self._numbers:
            self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return self._numbers[node]

    def constant(self, x: float, *, rounded: bool = True) -> Expression:
        """A constant of the program; not `rounded`: of an expansion that XLA always computes in float32."""
        dtype = self.narrow if rounded and self.narrow is not None else _FLOAT32
        return self.exactly(float(dtype.type(x)))

    def exactly(self, x: float) -> Expression:
        return self._number(_Node("constant", value=x))

    def polynomial(self, x: Expression, coefficients: Sequence[float]) -> Expression:
        """A polynomial by Horner's rule; coefficients from the highest power down."""
        y = self.constant(coefficients[0], rounded=False)
        for c in coefficients[1:]:
            y = self.add("add", self.add("multiply", y, x), self.constant(c, rounded=False))
        return y

    def __len__(self) -> int:
        return len(self._nodes)


def _gelu_tanh(g: _Graph, y: Expression) -> Expression:
    cube = g.add("multiply", g.add("multiply", y, y), y)
    inner = g.add("add", y, g.add("multiply", cube, g.constant(0.044715)))
    tanh = g.add("tanh", g.add("multiply", inner, g.constant(np.sqrt(2 / np.pi))))
    half = g.add("multiply", g.add("add", tanh, g.constant(1)), g.constant(0.5))
    return g.add("multiply", y, half)


def _gelu_erf(g: _Graph, y: Expression) -> Expression:
    minus = g.add("multiply", g.add("negate", y), g.constant(np.sqrt(0.5)))
    return g.add("multiply", g.add("multiply", y, g.constant(0.5)), _erfc(g, minus))


# Coefficients of float32's erf and erfc in Cephes, which XLA's expansion of erfc uses: of erf(x) / x in x^2 for
# |x| < 1, and of |x| exp(x^2) erfc(|x|) in 1 / x^2 for |x| < 2 and beyond.
# fmt: off
_ERF: Final = (
    7.853861353153693e-5, -8.010193625184903e-4, 5.188327685732524e-3, -2.685381193529856e-2, 1.128358514861418e-1,
    -3.761262582423300e-1, 1.128379165726710,
)
_ERFC_NEAR: Final = (
    2.326819970068386e-2, -1.387039388740657e-1, 3.687424674597105e-1, -5.824733027278666e-1, 6.210004621745983e-1,
    -4.944515323274145e-1, 3.404879937665872e-1, -2.741127028184656e-1, 5.638259427386472e-1,
)
_ERFC_FAR: Final = (
    -1.047766399936249e1, 1.297719955372516e1, -7.495518717768503, 2.921019019210786, -1.015265279202700,
    4.218463358204948e-1, -2.820767439740514e-1, 5.641895067754075e-1,
)
# fmt: on
_LEAST_EXPONENT: Final = -88.72283905206835  # minus the logarithm of the largest float32


def _erfc(g: _Graph, x: Expression) -> Expression:
    zero, one, two = (g.constant(v) for v in (0, 1, 2))
    size, square = g.add("abs", x), g.add("multiply", x, x)
    near_zero = g.add("subtract", one, g.add("multiply", x, g.polynomial(square, _ERF)))
    minus_square, inverse_square = g.add("negate", square), g.add("divide", one, square)
    factor = g.add("multiply", g.add("exponential", minus_square), g.add("divide", one, size))
    near, far = (g.polynomial(inverse_square, c) for c in (_ERFC_NEAR, _ERFC_FAR))
    tail = g.add("multiply", factor, g.add("select", g.add("LT", size, two), near, far))
    vanishes = g.add("LT", minus_square, g.constant(_LEAST_EXPONENT, rounded=False))
    tail = g.add("select", vanishes, zero, tail)
    tail = g.add("select", g.add("LT", x, zero), g.add("subtract", two, tail), tail)
    return g.add("select", g.add("LT", size, one), near_zero, tail)


def _sigmoid(g: _Graph, y: Expression) -> Expression:
    one = g.constant(1)
    return g.add("divide", one, g.add("add", g.add("exponential", g.add("negate", y)), one))


# What XLA makes of jax.nn's functions, by the last operation.
_ACTIVATIONS: Final[Mapping[str, Sequence[tuple[str, Callable[[_Graph, Expression], Expression]]]]] = {
    "maximum": (("relu", lambda g, y: g.add("maximum", y, g.constant(0))),),
    "tanh": (("tanh", lambda g, y: g.add("tanh", y)),),
    "divide": (("sigmoid", _sigmoid),),
    "logistic": (("sigmoid", lambda g, y: g.add("logistic", y)),),
    "multiply": (
        ("silu", lambda g, y: g.add("multiply", y, _sigmoid(g, y))),
        ("silu", lambda g, y: g.add("multiply", y, g.add("logistic", y))),
        ("gelu_tanh", _gelu_tanh),
        ("gelu_erf", _gelu_erf),
    ),
}


def epilogue_of(body: Body, out: View, *, columns: bool = False) -> Found | None:
    """The epilogue after a product that is summed in float32 and has no other user; None if no call can compute it.

    With `columns`, it may have a scale for each column, as calls for quantised weights have.
    """
    product = out.instruction
    if out.dtype not in (_FLOAT32, *_NARROW) or not out.is_its_shape:
        return None
    fusion = _only_user(body, product)
    while fusion is not None and fusion.opcode == "bitcast" and _rows(fusion) == _rows(product):
        product, fusion = fusion, _only_user(body, fusion)
    if fusion is None or fusion.opcode != "fusion" or fusion.fusion_kind != "kLoop" or fusion.output_operand_aliasing:
        return None
    array = hlo.array_of(fusion.shape)
    if array is None or _rows(fusion) is None or _rows(fusion) != _rows(product):
        return None
    if not aliasing.has_memory_of_its_own(body, fusion):
        return None
    ours = [n for n, x in enumerate(body.operands(fusion)) if x.id == product.id]
    dtype = views.before_conversion(body.module, fusion) or array.dtype
    if len(ours) != 1 or out.dtype not in (_FLOAT32, dtype) or dtype not in (_FLOAT32, *_NARROW):
        return None
    graph = _Graph(None if dtype == _FLOAT32 else dtype)
    loop = _Loop(graph, _rows(fusion), ours[0])
    expression = loop.result(body.module.computation(fusion.called_computation_ids[0]))
    if expression is None:
        return None
    found = Found(fusion, dtype, "none", 1.0, None, None)
    return _matched(body, graph, expression, graph.add("array", ours[0]), found, loop.is_one_row if columns else None)


def _only_user(body: Body, instruction: Instruction) -> Instruction | None:
    users = body.users(instruction)
    if len(users) != 1 or body.is_awaited(instruction) or instruction.control_predecessor_ids:
        return None
    return None if users[0].control_predecessor_ids else users[0]


def _rows(instruction: Instruction) -> tuple[int, int] | None:
    """Rows and columns of a row-major array; None for any other."""
    array = hlo.array_of(instruction.shape)
    if array is None or not array.dims or not array.is_row_major:
        return None
    return math.prod(array.dims[:-1]), array.dims[-1]


class _Loop:
    """A fused computation, read as an expression of its parameters."""

    def __init__(self, graph: _Graph, rows: tuple[int, int] | None, product: int) -> None:
        self._graph, self._rows, self._product = graph, rows, graph.add("array", product)

    @property
    def is_one_row(self) -> bool:
        return self._rows is not None and self._rows[0] == 1

    def result(self, computation: hlo.Computation) -> Expression | None:
        """What an element of the result is; None if some operation is not understood."""
        found: dict[int, Expression] = {}
        for x in computation.instructions:
            number = self._one(x, [found[operand] for operand in x.operand_ids])
            if number is None:
                return None
            found[x.id] = number
        return found[computation.root_id]

    def _one(self, x: Instruction, operands: list[Expression]) -> Expression | None:
        graph = self._graph
        if any(self._is_vector(operand) for operand in operands) and x.opcode not in ("broadcast", "convert"):
            return None
        if x.opcode == "compare":
            return graph.add("LT", *operands) if x.comparison_direction == "LT" else None
        array = hlo.array_of(x.shape)
        if array is None:
            return None
        if x.opcode == "parameter":
            return self._parameter(x, array)
        if array.dtype not in (_FLOAT32, graph.narrow):
            return None
        if x.opcode == "constant":
            return graph.exactly(hlo.scalar(x)) if not array.dims else None
        if x.opcode == "convert":
            return operands[0] if array.dtype == _FLOAT32 else self._rounded(operands[0])
        if _rows(x) != self._rows:
            return None
        if x.opcode == "broadcast":
            if graph.node(operands[0]).name == "constant":
                return operands[0]
            along_last = tuple(x.dimensions) == (len(array.dims) - 1,)
            return graph.add("row", operands[0]) if along_last and self._is_vector(operands[0]) else None
        if x.opcode == "bitcast":
            return operands[0]
        return graph.add(x.opcode, *operands) if x.opcode in _ELEMENTWISE else None

    def _parameter(self, x: Instruction, array: hlo.Array) -> Expression | None:
        if array.dtype not in (_FLOAT32, *_NARROW):
            return None
        if _rows(x) == self._rows:
            return self._graph.add("array", x.parameter_number)
        is_vector = self._rows is not None and array.dims == self._rows[1:]
        return self._graph.add("vector", x.parameter_number) if is_vector else None

    def _is_vector(self, number: Expression) -> bool:
        node = self._graph.node(number)
        return node.name == "vector" or (node.name == "rounded" and self._is_vector(node.operands[0]))

    def _rounded(self, number: Expression) -> Expression | None:
        """A value converted to the narrow dtype: computed values stay as they are, parameters become "rounded"."""
        node = self._graph.node(number)
        if node.name == "constant":
            return None
        if node.name == "row":
            vector = self._rounded(node.operands[0])
            return None if vector is None else self._graph.add("row", vector)
        is_given = node.name in ("array", "vector") and number != self._product
        return self._graph.add("rounded", number) if is_given else number


def _matched(
    body: Body, graph: _Graph, whole: Expression, product: Expression, found: Found, one_row: bool | None
) -> Found | None:
    """The epilogue whose value the whole expression is.

    Args:
      body, graph, whole, product, found: what is compared with what.
      one_row: whether an array is a scale for each column; None if there may be none of these.
    """
    operands = body.operands(found.instruction)
    candidates: list[tuple[Expression, Instruction | None]] = []
    node = graph.node(whole)
    if node.name == "add":
        for term, rest in (node.operands, node.operands[::-1]):
            if graph.node(term).name == "array" and term != product:
                (number,) = graph.node(term).operands
                residual = views.before_widening(body, operands[number], found.dtype)
                if residual is not None and (residual is operands[number] or aliasing.keeps_its_value(body, residual)):
                    candidates.append((rest, residual))
    candidates.append((whole, None))
    affine = [(y, *parts) for y in range(len(graph)) if (parts := _affine(graph, y, product)) is not None]
    for expression, residual in candidates:
        for y, scale, factor, row in affine:
            bias = None if row is None else _vector(graph, row, operands, found.dtype)
            columns = None
            if factor is not None and one_row is not None:
                columns = _columns(body, graph, factor, operands, found.dtype, one_row=one_row)
            if (row is not None and bias is None) or (factor is not None and columns is None):
                continue
            activation = _activation(graph, y, expression)
            if activation is not None:
                return found._replace(activation=activation, scale=scale, bias=bias, residual=residual, columns=columns)
    return None


def _activation(graph: _Graph, y: Expression, expression: Expression) -> str | None:
    """The name of the activation whose value at y is the expression."""
    if y == expression:
        return "none"
    forms = _ACTIVATIONS.get(graph.node(expression).name, ())
    return next((name for name, form in forms if form(graph, y) == expression), None)


class _Affine(NamedTuple):
    """scale * factor * product + row."""

    scale: float
    factor: Expression | None
    row: Expression | None


def _affine(graph: _Graph, y: Expression, product: Expression) -> _Affine | None:
    """What y is, if it is that."""
    row, node = None, graph.node(y)
    if node.name == "add":
        rows = [x for x in node.operands if graph.node(x).name == "row"]
        if len(rows) != 1:
            return None
        (row,) = rows
        (y,) = (x for x in node.operands if x != row)
        node = graph.node(y)
    if y == product:
        return _Affine(1.0, None, row)
    if node.name == "multiply" and product in node.operands:
        other = node.operands[node.operands[0] == product]
        factor = graph.node(other)
        if factor.name == "constant":
            return _Affine(factor.value, None, row)
        return _Affine(1.0, other, row) if other != product else None
    return None


def _columns(
    body: Body,
    graph: _Graph,
    factor: Expression,
    operands: Sequence[Instruction],
    dtype: np.dtype,
    *,
    one_row: bool,
) -> Instruction | None:
    """The vector that a factor is, if it has a number for each column."""
    node = graph.node(factor)
    found: Instruction | None = None
    if node.name == "row":
        found = _vector(graph, factor, operands, dtype)
    elif one_row and node.name in ("array", "rounded"):
        found = _vector(graph, graph.add("row", factor), operands, dtype)
    return found if found is not None and aliasing.keeps_its_value(body, found) else None


def _vector(graph: _Graph, row: Expression, operands: Sequence[Instruction], dtype: np.dtype) -> Instruction | None:
    """The vector of a row, if the loop takes it as one of this dtype."""
    node = graph.node(graph.node(row).operands[0])
    rounded = node.name == "rounded"
    (number,) = (graph.node(node.operands[0]) if rounded else node).operands
    vector = operands[number]
    given = hlo.array_of(vector.shape)
    if given is None:
        return None
    return vector if rounded or np.can_cast(given.dtype, dtype, "safe") else None
