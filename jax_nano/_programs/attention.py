"""Attention in HLO: which product is the second one of `softmax(scale * q k^T + bias, masked) v`, and what it reads.

What XLA compiled is read as the value of one element of the result, through fusions and whatever only moves elements
(`elements`), and compared with that formula. Accepted are

* the maximum subtracted or not; weights divided by their sum, multiplied by its reciprocal, or the product divided
  instead: these differ by rounding only (without the maximum also where exponentials overflow: XLA then gives NaN);
* a constant scale, on the scores or on an operand of the first product; arrays added to or subtracted from scores;
* `where(condition, scores, c)` with c of -1e9 or less, which no score reaches: conditions of positions become a window,
  keys before a number become lengths, all others a mask. With c = -inf, and without the maximum, a query that sees no
  key gives NaN, otherwise the mean of all values: what XLA computes too;
* heads that share keys and values, dimensions in any order, merged or split.

Roundings to bfloat16 or float16 on the way do not count where the result has that dtype, as in epilogues. Weights are
rounded where the program rounds them: if it does not, queries are read as float32.

It must be worth it: nothing else may read what is computed between the two products (the backward half of training
does), or that would have to be computed anyway. The rules of `aliasing` hold for all that the call reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, pairwise, product
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import hlo, native
from jax_nano._core.hlo import Body, Instruction
from jax_nano._programs import aliasing
from jax_nano._programs.elements import ELEMENTWISE, Element, Index, Reader, Unknown, constant

UNBOUNDED: Final = 2**40

BATCH, POSITION, HEAD, ELEMENT = range(4)
"""The dimensions of attention, as the call's attributes number them. Keys have positions too."""

_NO_SCORE: Final = -1e9  # or less: what stands for a score that a condition excludes
_MOST_ELEMENTS: Final = (
    1024  # of a query, key or value: longer ones do not fit the caches that attention is planned for
)
_MOST_USERS: Final = 4  # that a result is followed through

_FLOAT32: Final = np.dtype(np.float32)
_NARROW: Final = (hlo.BFLOAT16, np.dtype(np.float16))
_INT32: Final = 4  # PrimitiveType
_FLOATS: Final = frozenset(hlo.ELEMENT_TYPES[x] for x in (_FLOAT32, *_NARROW))


class NotAttention(Exception):
    """Why something that looks like attention is not, or stays."""


class Operand(NamedTuple):
    """An array that the first or second product could read."""

    element: Element
    dtype: np.dtype
    scale: float  # that it is multiplied by
    narrowed: frozenset[np.dtype]  # what it is rounded to after that


class Term(NamedTuple):
    """An array that is added to scores."""

    element: Element
    factor: float


class Condition(NamedTuple):
    """Where a score counts: where the element is `positive`."""

    element: Element
    positive: bool


class Length(NamedTuple):
    """How many keys count: an element of int32, and what is added to it."""

    element: Element
    more: int
    condition: Condition  # that says the same


class Layout(NamedTuple):
    """Which atoms make the dimensions of attention, and where arrays have them."""

    batch: Index
    heads: Index  # of keys and values
    group: Index  # of queries, inside of heads
    queries: Index
    keys: Index
    depth: Index
    width: Index
    orders: tuple[tuple[int, ...], ...]  # of the dimensions of q, k, v and the result in memory

    @property
    def scores(self) -> tuple[Index, Index, Index, Index]:
        """The dimensions of bias and mask."""
        return self.batch, self.heads + self.group, self.queries, self.keys


class Found(NamedTuple):
    """An attention, and what a call in its place reads."""

    reader: Reader
    result: Element  # of the root
    root: Instruction  # becomes the call
    second: Instruction  # the second product
    q: Operand
    k: Operand
    v: Operand
    layout: Layout
    dtype: np.dtype  # of the queries that the kernel reads, and of what it writes
    scale: float
    left: int
    right: int
    terms: Sequence[Term]
    conditions: Sequence[Condition]
    length: Length | None
    nan_rows: bool  # whether queries that see no key give NaN
    copied: bool  # whether the root has another order than the call

    def count_scores(self) -> int:
        """Of all batches and heads."""
        return self.reader.atoms.size(chain.from_iterable(self.layout.scores))

    def text(self) -> str:
        """What it does besides, for people."""
        causal = self.left == UNBOUNDED and self.right == 0
        parts = {
            "causal": causal,
            "window": not causal and min(self.left, self.right) < UNBOUNDED,
            "bias": bool(self.terms),
            "mask": bool(self.conditions),
            "lengths": self.length is not None,
        }
        return ", ".join(name for name, there in parts.items() if there)


def find(body: Body, instruction: Instruction) -> Found | str | None:
    """The attention whose second product an instruction is; why it is none if it looks like one.

    Args:
      body: where it is.
      instruction: a dot, or a fusion with one.
    """
    candidates = _results(body, instruction)
    reason: str | None = None
    # Where none is as the call writes it, one of them becomes a copy.
    for root, copied in [(x, copied) for copied in (False, True) for x in reversed(candidates)]:
        try:
            return _Search(body, root, instruction).found(copied=copied)
        except NotAttention as error:
            reason = reason or str(error)
        except Unknown:
            reason = reason or "its arrays are cut in more than one way"
        except _NoCandidate:
            continue
    try:
        return reason if reason is not None and _looks_like_attention(Reader(body), instruction) else None
    except Unknown:
        return None


class _NoCandidate(Exception):
    """An instruction that is not even similar."""


def _results(body: Body, instruction: Instruction) -> list[Instruction]:
    """An instruction, and what follows it alone, one after the other."""
    found = [instruction]
    while len(found) <= _MOST_USERS:
        here = found[-1]
        users = {x.id: x for x in body.users(here)}
        if len(users) != 1 or body.is_awaited(here):
            break
        (user,) = users.values()
        if user.opcode not in (*ELEMENTWISE, "bitcast", "copy", "fusion", "transpose") or user.control_predecessor_ids:
            break
        found.append(user)
    return found


def _looks_like_attention(reader: Reader, instruction: Instruction) -> bool:
    """Whether a product's operand is made of exponentials and of their sum, and these of another product."""
    second = reader.look(reader.element(instruction))
    if second.opcode != "dot" or "transpose(" in second.instruction.metadata.op_name:
        return False  # JAX's name for the backward half
    over = reader.summed(second.instruction, second.scope)
    return any(_is_softmax(reader, x) for x in reader.factors(second, over))


def _is_softmax(reader: Reader, weights: Element) -> bool:
    seen = list(_made_of(reader, weights, through=("reduce",), up_to="exponential"))
    exponentials = [x for x in seen if x.opcode == "exponential"]
    sums = [x for x in seen if x.opcode == "reduce"]
    if not sums or any(x.opcode == "dot" for x in seen):
        return False
    return any(y.opcode == "dot" for x in exponentials for y in _made_of(reader, reader.operands(x)[0]))


def _made_of(reader: Reader, element: Element, *, through: Sequence[str] = (), up_to: str = "") -> Iterator[Element]:
    """The operations that an element is made of, by whatever is elementwise and of `through`."""
    waiting, seen = [element], set[int]()
    while waiting:
        here = reader.look(waiting.pop())
        if here.instruction.id in seen:
            continue
        seen.add(here.instruction.id)
        yield here
        if here.opcode == up_to:
            continue
        if here.opcode in ELEMENTWISE:
            waiting += reader.operands(here)
        elif here.opcode in through:
            source = here.scope[here.instruction.operand_ids[0]]
            index = tuple(reader.atoms.new(size) for size in source.shape.dimensions)
            waiting.append(Element(here.scope, source, index))


class _Search:
    """The comparison of one result with the formula."""

    def __init__(self, body: Body, root: Instruction, second: Instruction) -> None:
        self._body, self._root, self._second = body, root, second
        self._reader = Reader(body)
        self._inner: set[np.dtype] = set()  # what is rounded to before the second product
        self._outer: set[np.dtype] = set()  # and after it
        self._rounds_weights = False
        self._subtracts_maximum = False
        self._scale = 1.0
        self._terms: list[Term] = []
        self._conditions: list[Condition] = []
        self._masked: set[float] = set()
        self._biased_when_masked = False
        self._length: Length | None = None
        self._left = self._right = UNBOUNDED
        self._positions: Index | None = None
        self._keys: Index = ()

    def found(self, *, copied: bool) -> Found:
        """The attention; with `copied`, the call may write its result in another order than the root has."""
        reader = self._reader
        dtype = hlo.array_of(self._root.shape)
        if dtype is None or 0 in dtype.dims:
            raise _NoCandidate
        result = reader.element(self._root)
        second, total = self._second_product(result)
        self._keys = reader.summed(second.instruction, second.scope)
        weights, values, total = self._factors(second, total)
        first = self._first_product(weights, total)
        over = reader.summed(first.instruction, first.scope)
        q, k = reader.factors(first, over)
        keys = set(reader.atoms.resolved(self._keys))
        if keys & set(self._atoms(q)):
            q, k = k, q
        self._check_users(first)
        return self._fitted(result, copied, *(self._operands(x) for x in (q, k, values)))

    # --- the formula, from the result on ---------------------------------------------------------------------------

    def _second_product(self, result: Element) -> tuple[Element, Element | None]:
        """The second product, and the sum that its result is divided by."""
        x = self._unrounded(result, self._outer)
        if x.opcode == "dot":
            return x, None
        if x.opcode == "divide":
            above, below = self._reader.operands(x)
            return self._dot(above), below
        if x.opcode == "multiply":
            for above, other in _both_ways(self._reader.operands(x)):
                below = self._reciprocal(other)
                if below is not None:
                    return self._dot(above), below
        raise _NoCandidate

    def _dot(self, element: Element) -> Element:
        x = self._unrounded(element, self._outer)
        if x.opcode != "dot":
            raise _NoCandidate
        return x

    def _reciprocal(self, element: Element) -> Element | None:
        """What an element is the reciprocal of."""
        x = self._unrounded(element, self._inner)
        if x.opcode != "divide":
            return None
        one, below = self._reader.operands(x)
        return below if constant(self._unrounded(one, self._inner).instruction) == 1 else None

    def _factors(self, second: Element, total: Element | None) -> tuple[Element, Element, Element]:
        """Exponentials, values and the sum of exponentials."""
        for weights, values in _both_ways(self._reader.factors(second, self._keys)):
            narrowed: set[np.dtype] = set()
            found = self._weights(weights, narrowed)
            if found is None:
                continue
            exponential, divisor = found
            if (divisor is None) == (total is None):
                raise NotAttention("its weights are not divided by their sum once")
            self._rounds_weights = bool(narrowed)
            self._inner |= narrowed
            divisor = divisor or total
            assert divisor is not None
            return exponential, values, divisor
        if any(_is_softmax(self._reader, x) for x in self._reader.factors(second, self._keys)):
            raise NotAttention("something stands between softmax and the second product")
        raise _NoCandidate

    def _weights(self, element: Element, narrowed: set[np.dtype]) -> tuple[Element, Element | None] | None:
        x = self._unrounded(element, narrowed)
        if x.opcode == "exponential":
            return x, None
        if x.opcode == "divide":
            above, below = self._reader.operands(x)
            exponential = self._unrounded(above, self._inner)
            return (exponential, below) if exponential.opcode == "exponential" else None
        if x.opcode == "multiply":
            for above, other in _both_ways(self._reader.operands(x)):
                exponential = self._unrounded(above, self._inner)
                if exponential.opcode == "exponential" and (below := self._reciprocal(other)) is not None:
                    return exponential, below
        return None

    def _first_product(self, exponential: Element, total: Element) -> Element:
        reader = self._reader
        total = self._unrounded(total, self._inner)
        summed = reader.reduced(total, self._keys, "add")
        if summed is None or not reader.same(exponential, summed, self._note):
            raise NotAttention("its weights are not divided by their sum over the keys")
        (exponent,) = reader.operands(exponential)
        scores = self._unrounded(exponent, self._inner)
        if scores.opcode == "subtract":
            above, below = reader.operands(scores)
            largest = reader.reduced(self._unrounded(below, self._inner), self._keys, "maximum")
            if largest is not None:
                if not reader.same(above, largest, self._note):
                    raise NotAttention("what is subtracted is not the largest score")
                self._subtracts_maximum, scores = True, above
        return self._scores(scores)

    def _scores(self, element: Element) -> Element:
        """The first product; what is done to it goes into the attributes."""
        x = self._unrounded(element, self._inner)
        reader = self._reader
        if x.opcode == "dot":
            return x
        if x.opcode == "select":
            condition, yes, no = reader.operands(x)
            for scores, other, positive in ((yes, no, True), (no, yes, False)):
                value = constant(self._unrounded(other, set()).instruction)
                if value is not None:
                    self._mask(condition, positive, value)
                    return self._scores(scores)
            raise NotAttention("a condition puts other values than one constant in the place of scores")
        if x.opcode in ("multiply", "divide"):
            for scores, other in _both_ways(reader.operands(x)):
                value = constant(self._unrounded(other, set()).instruction)
                if value is not None and math.isfinite(value) and value != 0:
                    if x.opcode == "multiply":
                        self._scale *= value
                    else:
                        self._scale /= value
                    return self._scores(scores)
                if x.opcode == "divide":
                    break
            raise NotAttention("scores are scaled by something that is not a constant")
        if x.opcode in ("add", "subtract"):
            pairs = _both_ways(reader.operands(x)) if x.opcode == "add" else [tuple(reader.operands(x))]
            for scores, other in pairs:
                if self._is_made_of_a_product(scores):
                    sign = 1 if x.opcode == "add" else -1
                    self._terms.append(Term(other, sign * self._scale))
                    return self._scores(scores)
        name = "what is computed elsewhere" if x.opcode not in ELEMENTWISE else f"the operation {x.opcode}"
        raise NotAttention(f"{name} stands between the first product and softmax")

    def _is_made_of_a_product(self, element: Element) -> bool:
        return any(x.opcode == "dot" for x in _made_of(self._reader, element))

    def _unrounded(self, element: Element, narrowed: set[np.dtype]) -> Element:
        """What an element is the conversion of, from a float to a float."""
        x = self._reader.look(element)
        while x.opcode == "convert" and _converts_floats(x):
            _note(x, narrowed)
            x = self._reader.look(self._reader.operands(x)[0])
        return x

    def _note(self, convert: Element) -> None:
        _note(convert, self._inner)

    # --- conditions ------------------------------------------------------------------------------------------------

    def _mask(self, condition: Element, positive: bool, value: float) -> None:
        value *= self._scale
        least = float(np.finfo(np.float16).min) if np.dtype(np.float16) in self._inner else _NO_SCORE
        if not value <= least:
            raise NotAttention(f"scores are replaced by {value:g}, which other scores may be less than")
        self._masked.add(value)
        self._biased_when_masked |= bool(self._terms)
        self._condition(condition, positive)

    def _condition(self, element: Element, positive: bool) -> None:
        reader = self._reader
        x = reader.look(element)
        if x.opcode == "not":
            return self._condition(reader.operands(x)[0], not positive)
        if x.opcode == ("and" if positive else "or"):
            for part in reader.operands(x):
                self._condition(part, positive)
            return None
        if constant(x.instruction) is not None:
            if bool(constant(x.instruction)) == positive:
                return None
        elif x.opcode == "compare" and self._comparison(x, positive):
            return None
        self._conditions.append(Condition(element, positive))
        return None

    def _comparison(self, x: Element, positive: bool) -> bool:
        """Takes a comparison of positions or with a length into the attributes; False if it is none."""
        direction = x.instruction.comparison_direction
        if not positive:
            direction = {"LT": "GE", "LE": "GT", "GT": "LE", "GE": "LT"}.get(direction, "")
        if direction not in ("LT", "LE", "GT", "GE"):
            return False
        left, right = (self._sum(y) for y in self._reader.operands(x))
        if left is None or right is None:
            return False
        if direction in ("LT", "LE"):
            left, right = right, left
        # left - right >= 0 now, or > 0.
        parts = left.minus(right)
        more = parts.constant - (direction in ("LT", "GT"))
        keys = self._reader.atoms.resolved(self._keys)
        sign = parts.positions.pop(keys, 0)
        if abs(sign) != 1 or not keys:
            return False
        if not parts.rest and len(parts.positions) == 1:
            ((positions, other),) = parts.positions.items()
            if other != -sign or self._positions not in (None, positions):
                return False
            self._positions = positions
            if sign < 0:
                self._right = min(self._right, more)
            else:
                self._left = min(self._left, more)
            return True
        if sign == -1 and not parts.positions and len(parts.rest) == 1 and self._length is None:
            ((element, factor),) = parts.rest
            if factor == 1 and not set(keys) & self._reader.atoms_of(element):
                self._length = Length(element, more + 1, Condition(x, positive))
                return True
        return False

    def _sum(self, element: Element) -> _Sum | None:
        """An int32 as a sum of positions, numbers and elements."""
        x = self._reader.look(element)
        if x.instruction.shape.element_type != _INT32:
            return None
        value = constant(x.instruction)
        if value is not None:
            return _Sum({}, int(value), ())
        if x.opcode == "iota":
            atoms = self._reader.atoms.resolved(x.index[x.instruction.dimensions[0]])
            return _Sum({atoms: 1} if atoms else {}, 0, ())
        if x.opcode == "constant":  # of an array: XLA computes positions with an offset when it compiles
            first = hlo.first_of_range(x.instruction)
            if first is not None:
                return _Sum({self._reader.atoms.resolved(x.index[0]): 1}, first, ())
        if x.opcode in ("add", "subtract"):
            left, right = (self._sum(y) for y in self._reader.operands(x))
            if left is not None and right is not None:
                return left.plus(right) if x.opcode == "add" else left.minus(right)
        return _Sum({}, 0, ((element, 1),))

    # --- operands, and how they lie in memory ----------------------------------------------------------------------

    def _atoms(self, element: Element) -> Index:
        return self._reader.atoms.resolved(chain.from_iterable(element.index))

    def _operands(self, element: Element) -> list[Operand]:
        """What a product's operand could be read from, the origin first."""
        found, scale, narrowed = [], 1.0, frozenset[np.dtype]()
        here: Element | None = element
        while here is not None:
            x = here.instruction
            if here.is_outside and x.opcode != "constant":
                array = hlo.array_of(x.shape)
                if (
                    array is not None
                    and array.dtype in (_FLOAT32, *_NARROW)
                    and aliasing.keeps_its_value(self._body, x)
                ):
                    found.append(Operand(here, array.dtype, scale, narrowed))
            before = self._reader.step(here)
            if before is None and x.opcode == "convert" and _converts_floats(here):
                taken = set(narrowed)
                _note(here, taken)
                narrowed = frozenset(taken)
                (before,) = self._reader.operands(here)
            elif before is None and x.opcode in ("multiply", "divide") and not here.is_outside:
                first, other = self._reader.operands(here)
                for source, factor in ((first, other), (other, first))[: 2 if x.opcode == "multiply" else 1]:
                    value = constant(self._reader.look_through(factor, "convert").instruction)
                    if value is not None and math.isfinite(value) and value != 0:
                        before = source
                        scale = scale * value if x.opcode == "multiply" else scale / value
                        break
            here = before
        return found[::-1]

    def _check_users(self, first: Element) -> None:
        """NotAttention if anything else reads what is computed between the products."""
        body = self._body
        start = first.scope.fusion if first.scope.fusion is not None else first.instruction
        after = _closure(start.id, lambda x: (y.id for y in body.users(body[x])))
        before = _closure(self._root.id, lambda x: body[x].operand_ids)
        self._between = after & before
        for number in self._between - {self._root.id}:
            x = body[number]
            if body.is_awaited(x) or x.control_predecessor_ids:
                raise NotAttention("something else waits for what is computed between its products")
            if any(user.id not in self._between for user in body.users(x)):
                what = "scores" if number == start.id else "what is computed between its products"
                raise NotAttention(f"something else reads {what}, as gradients do")

    def _fitted(self, result: Element, copied: bool, q: list[Operand], k: list[Operand], v: list[Operand]) -> Found:
        if not q or not k or not v:
            raise NotAttention("an operand is overwritten before the second product, or has a dtype without a kernel")
        reason = "its dimensions lie in memory in an order that no kernel reads"
        for operands in product(q, k, v):
            if any(x.element.instruction.id in self._between for x in operands):
                continue
            dtype = self._dtype(*operands)
            if dtype is None:
                reason = "no kernel for its dtypes and roundings"
                continue
            arrays = [self._reader.in_memory(x.element) for x in operands]
            arrays.append(self._reader.in_memory(result))
            keys, positions = self._reader.atoms.resolved(self._keys), self._resolved_positions()
            layouts = list(_layouts(*arrays, keys, positions, copied=copied))
            sizes = self._reader.atoms.size
            layouts = [x for x in layouts if max(sizes(x.depth), sizes(x.width)) <= _MOST_ELEMENTS]
            if not layouts:
                continue
            layout = min(layouts, key=self._extra_elements)
            if self._length is not None and not self._has_lengths(layout):
                self._conditions.append(self._length.condition)
                self._length = None
            return self._with_masks(result, copied, operands, layout, dtype)
        raise NotAttention(reason)

    def _resolved_positions(self) -> Index | None:
        return None if self._positions is None else self._reader.atoms.resolved(self._positions)

    def _has_lengths(self, layout: Layout) -> bool:
        """Whether lengths are the same for all heads and queries."""
        return self._length is None or self._reader.atoms_of(self._length.element) <= set(layout.batch)

    def _extra_elements(self, layout: Layout) -> tuple[bool, int]:
        """Whether lengths become a mask in a layout, and how many elements bias and mask have."""
        extras = [*(x.element for x in self._terms), *(x.element for x in self._conditions)]
        count = 0
        for x in extras:
            there = self._reader.atoms_of(x)
            dims = [dim for dim in layout.scores[:3] if there & set(dim)]
            count += math.prod(self._reader.atoms.size(dim) for dim in (*dims, layout.keys))
        return not self._has_lengths(layout), count

    def _dtype(self, q: Operand, k: Operand, v: Operand) -> np.dtype | None:
        """The dtype of the queries that a kernel is to read; None if none computes this."""
        result = hlo.dtype_of(self._root)
        inner = set(self._inner).union(*(x.narrowed for x in (q, k, v)))
        narrow = self._outer | inner
        if len(narrow) > 1 or (inner and not self._rounds_weights and result == _FLOAT32):
            return None
        if k.dtype != v.dtype or not self._outer <= {result}:
            return None
        if self._rounds_weights:
            (rounded,) = narrow
            if k.dtype not in (rounded, result, _FLOAT32) or (k.dtype == _FLOAT32 and result == _FLOAT32):
                return None
            dtype = rounded if q.dtype == k.dtype == rounded == result else _FLOAT32
        else:
            dtype = _FLOAT32
        names = hlo.NAMES[dtype], hlo.NAMES[k.dtype]
        return dtype if native.supports_attention(*names) else None

    def _with_masks(
        self, result: Element, copied: bool, operands: tuple[Operand, Operand, Operand], layout: Layout, dtype: np.dtype
    ) -> Found:
        q, k, v = operands
        queries, keys = self._reader.atoms.size(layout.queries), self._reader.atoms.size(layout.keys)
        all_see = not self._masked or (
            not self._conditions and self._length is None and _all_see(queries, keys, self._left, self._right)
        )
        nan_rows = False
        if not all_see:
            if len(self._masked) > 1:
                raise NotAttention("conditions put different numbers in the place of scores")
            (value,) = self._masked
            if self._terms and (self._biased_when_masked or math.isinf(value)):
                raise NotAttention("a bias is added to scores that a condition excludes")
            nan_rows = math.isinf(value) or not self._subtracts_maximum
        elif self._terms and self._masked and any(math.isinf(x) for x in self._masked):
            raise NotAttention("a bias is added to scores that a condition excludes")
        scale = self._scale * q.scale * k.scale
        if v.scale != 1:
            raise NotAttention("values are scaled")
        return Found(
            self._reader,
            result,
            self._root,
            self._second,
            q,
            k,
            v,
            layout,
            dtype,
            scale,
            self._left,
            self._right,
            self._terms,
            self._conditions,
            self._length,
            nan_rows,
            copied,
        )


class _Sum(NamedTuple):
    positions: dict[Index, int]
    constant: int
    rest: tuple[tuple[Element, int], ...]

    def plus(self, other: _Sum, sign: int = 1) -> _Sum:
        positions = dict(self.positions)
        for atoms, factor in other.positions.items():
            positions[atoms] = positions.get(atoms, 0) + sign * factor
        rest = (*self.rest, *((x, sign * factor) for x, factor in other.rest))
        return _Sum({x: y for x, y in positions.items() if y}, self.constant + sign * other.constant, rest)

    def minus(self, other: _Sum) -> _Sum:
        return self.plus(other, -1)


def _all_see(queries: int, keys: int, left: int, right: int) -> bool:
    """Whether each query sees a key."""
    return right >= 0 and left + right >= 0 and queries - 1 - left <= keys - 1


def _both_ways(pair: Sequence[Element]) -> Iterator[tuple[Element, Element]]:
    first, second = pair
    yield first, second
    yield second, first


def _closure(start: int, more: object) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for number in more(waiting.pop()):  # type: ignore[operator]
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found


def _converts_floats(x: Element) -> bool:
    before = x.scope[x.instruction.operand_ids[0]]
    return {before.shape.element_type, x.instruction.shape.element_type} <= _FLOATS


def _note(convert: Element, narrowed: set[np.dtype]) -> None:
    before = hlo.dtype_of(convert.scope[convert.instruction.operand_ids[0]])
    after = hlo.dtype_of(convert.instruction)
    if not np.can_cast(before, after, "safe"):
        narrowed.add(after)


# --- layouts ------------------------------------------------------------------------------------------------------


def _layouts(
    q: Index, k: Index, v: Index, out: Index, keys: Index, positions: Index | None, *, copied: bool
) -> Iterator[Layout]:
    """The ways to read arrays as those of attention, from their atoms in memory, or none.

    With `copied`, the result is one that is not there yet, in an order of its own.
    """
    in_q, in_k, in_v, in_out, of_keys = map(set, (q, k, v, out, keys))
    shared = in_q & in_k & in_v & in_out
    depth = (in_q & in_k) - in_v - in_out
    width = (in_v & in_out) - in_q - in_k
    rows = (in_q & in_out) - in_k - in_v
    fits = (
        in_q == shared | depth | rows
        and in_k == shared | of_keys | depth
        and in_v == shared | of_keys | width
        and in_out == shared | rows | width
        and all(len(x) == len(set(x)) for x in (q, k, v, out))
    )
    if not fits or (positions is not None and not set(positions) <= rows):
        return
    ordered = {name: tuple(a for a in q if a in part) for name, part in (("shared", shared), ("rows", rows))}
    for heads in _subsets(ordered["shared"]):
        for group in _subsets(ordered["rows"]):
            queries = rows - set(group)
            if positions is not None and queries != set(positions):
                continue
            roles = {
                **dict.fromkeys(shared, BATCH),
                **dict.fromkeys((*heads, *group), HEAD),
                **dict.fromkeys((*queries, *keys), POSITION),
                **dict.fromkeys((*depth, *width), ELEMENT),
            }
            if copied:
                of_queries = (tuple(a for a in q if roles.get(a) == role) for role in (BATCH, POSITION, HEAD))
                out = (*chain.from_iterable(of_queries), *(a for a in v if a in width))
            orders = []
            for array in (q, k, v, out):
                order = list(dict.fromkeys(roles[a] for a in array))
                runs = sum(roles[x] != roles[y] for x, y in pairwise(array)) + bool(array)
                if runs != len(order):
                    break
                missing = [x for x in (BATCH, POSITION, HEAD) if x not in order]
                orders.append((*missing, *order) if ELEMENT in order else (*missing, *order, ELEMENT))
            if len(orders) < 4 or orders[3][-1] != ELEMENT:
                continue
            parts = [
                [tuple(a for a in array if roles[a] == role) for role in (BATCH, POSITION, HEAD, ELEMENT)]
                for array in (q, k, v, out)
            ]
            of_heads = parts[1][HEAD]
            of_group = parts[0][HEAD][len(of_heads) :]
            consistent = (
                all(x[BATCH] == parts[0][BATCH] for x in parts)
                and parts[2][HEAD] == of_heads
                and parts[0][HEAD] == parts[3][HEAD] == of_heads + of_group
                and parts[1][POSITION] == parts[2][POSITION] == keys
                and parts[0][POSITION] == parts[3][POSITION]
                and (positions is None or parts[0][POSITION] == positions)
                and parts[0][ELEMENT] == parts[1][ELEMENT]
                and parts[2][ELEMENT] == parts[3][ELEMENT]
            )
            if consistent:
                yield Layout(
                    parts[0][BATCH],
                    of_heads,
                    of_group,
                    parts[0][POSITION],
                    keys,
                    parts[0][ELEMENT],
                    parts[2][ELEMENT],
                    tuple(orders),
                )


def _subsets(atoms: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(atoms, n) for n in range(len(atoms) + 1))
