"""Attention in HLO: which product is the second one of `softmax(scale * q k^T + bias, masked) v`, and what it reads.

What XLA compiled is read as the value of one element of the result, through fusions and whatever only moves elements
(`elements`), and compared with that formula. Accepted are

* the maximum subtracted or not; weights divided by their sum, multiplied by its reciprocal, or the product divided
  instead: these differ by rounding only (without the maximum also where exponentials overflow: XLA then gives NaN);
* a constant scale, on the scores or on an operand of the first product; arrays added to or subtracted from scores;
* `where(condition, scores, c)`: conditions of positions become a window, keys before a number become lengths, all
  others a mask, and what they exclude has the score c. With c = -inf a query that sees no key gives NaN, and so it does
  without the maximum, where c must be -1e9 or less, which no score reaches; otherwise the mean of all values: what XLA
  computes too. With c above -1000 conditions of positions become masks as well, as windows are for keys that weigh
  nothing beside others;
* heads that share keys and values, dimensions in any order, merged or split.

Roundings to bfloat16 or float16 on the way do not count where the result has that dtype, as in epilogues. Weights are
rounded where the program rounds them: if it does not, queries are read as float32.

It must be worth it: nothing else may read what is computed between the two products (the backward half of training
does), or that would have to be computed anyway. The rules of `aliasing` hold for all that the call reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations, pairwise, product
from typing import Any, Final, NamedTuple

import numpy as np

from jax_nano._core import hlo, native
from jax_nano._core.hlo import Body, Instruction
from jax_nano._dispatch.decision import MOST_ATTENTION_ELEMENTS
from jax_nano._programs import aliasing
from jax_nano._programs.elements import ELEMENTWISE, Element, Index, Reader, Unknown, constant, converts_floats

UNBOUNDED: Final = 2**40

BATCH, POSITION, HEAD, ELEMENT = range(4)
"""The dimensions of attention, as the call's attributes number them. Keys have positions too."""

MASKED: Final = float(np.float32(-0.7) * np.finfo(np.float32).max)
"""jax.nn's score of what is excluded, which the call has unless the program has another one."""

_NO_SCORE: Final = -9.9e8  # or less: what stands for a score that a condition excludes; -1e9 is -9.98e8 in bfloat16
_NO_WEIGHT: Final = -1e3  # or less: a score that excludes, unless others of its query are as low
_MOST_USERS: Final = 4  # that a result is followed through

_ABSORBING: Final = -1e30  # or less: added to a score in float32, it stays what it is

_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}

_FLOAT32: Final = np.dtype(np.float32)
_NARROW: Final = (hlo.BFLOAT16, np.dtype(np.float16))
_INT32: Final = 4  # PrimitiveType
_LEAST_INT32: Final = -(2**31)
_MOST_INT32: Final = 2**31 - 1
_MOVES: Final = frozenset(("bitcast", "broadcast", "copy", "reshape", "transpose"))


class NotAttention(Exception):
    """Why something that looks like attention is not, or stays."""


class Operand(NamedTuple):
    """An array that the first or second product could read."""

    element: Element
    dtype: np.dtype
    scale: float  # that it is multiplied by
    narrowed: frozenset[np.dtype]  # what it is rounded to after that
    exact: np.dtype  # in which its values lose nothing: perhaps narrower than its own


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

    def gradient(self, of: int) -> Index:
        """The dimensions of an operand's gradient, which are in jax.nn's order."""
        queries = *self.batch, *self.queries, *self.heads, *self.group
        keys = *self.batch, *self.keys, *self.heads
        return ((*queries, *self.depth), (*keys, *self.depth), (*keys, *self.width))[of]


class Gradient(NamedTuple):
    """A product of the backward half, and what it computes."""

    of: int  # 0: queries, 1: keys, 2: values
    result: Element  # of an instruction outside of fusions
    factor: float  # times the gradient that the kernel computes


class Gradients(NamedTuple):
    """The backward half of an attention."""

    cotangent: Element  # of its result
    arrays: Sequence[Operand]  # that hold the cotangent, the origin first
    products: Sequence[Gradient]
    masked: bool  # whether all conditions put zeros in the place of the scores' cotangents too
    narrowed: frozenset[np.dtype]  # what is rounded to on the way


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
    kv_dtype: np.dtype  # of the keys and values that it reads
    scale: float
    left: int
    right: int
    terms: Sequence[Term]
    conditions: Sequence[Condition]
    length: Length | None
    masked: float  # the score of what is excluded
    nan_rows: bool  # whether queries that see no key give NaN
    copied: bool  # whether the root has another order than the call
    gradients: Gradients | None = None

    def resolved(self) -> Found:
        """With its layout in atoms as they are split by now."""
        x, now = self.layout, self.reader.atoms.resolved
        dims = (now(x.batch), now(x.heads), now(x.group), now(x.queries), now(x.keys), now(x.depth), now(x.width))
        return self._replace(layout=Layout(*dims, x.orders))

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
            "gradients": self.gradients is not None,
        }
        return ", ".join(name for name, there in parts.items() if there)


def find(
    body: Body, instruction: Instruction, gradients: Callable[[Search], Gradients | None] | None = None
) -> Found | str | None:
    """The attention whose second product an instruction is; why it is none if it looks like one.

    Args:
      body: where it is.
      instruction: a dot, or a fusion with one.
      gradients: finds the backward half of an attention, for which its weights may be read.
    """
    candidates = _results(body, instruction)
    reason: str | None = None
    # Where none is as the call writes it, one of them becomes a copy.
    for root, copied in [(x, copied) for copied in (False, True) for x in reversed(candidates)]:
        # If what is added to scores is no mask that a kernel can apply, it is a bias.
        for added_masks in (True, False):
            search = Search(body, root, instruction, added_masks=added_masks)
            try:
                return search.found(copied=copied, gradients=gradients)
            except NotAttention as error:
                reason = reason or str(error)
            except Unknown:
                reason = reason or "its arrays are cut in more than one way"
            except _NoCandidate:
                pass
            if not search.has_added_masks:
                break
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


def why_gradients_alone_stay(body: Body, instructions: Sequence[Instruction]) -> tuple[Instruction, str] | None:
    """A product of an attention's backward half among these, and why it stays, where the attention has no result."""
    for instruction in instructions:
        if hlo.array_of(instruction.shape) is None:
            continue
        try:
            if _looks_like_attention(Reader(body), instruction, backward=True):
                return instruction, "only its gradients are computed, not its result"
        except Unknown:
            pass
    return None


def _looks_like_attention(reader: Reader, instruction: Instruction, *, backward: bool = False) -> bool:
    """Whether a product's operand is made of exponentials and of their sum, and these of another product."""
    second = reader.look(reader.element(instruction))
    if second.opcode != "dot" or ("transpose(" in second.instruction.metadata.op_name) != backward:
        return False  # JAX's name for the backward half
    over = reader.summed(second.instruction, second.scope)
    factors = [x for x in reader.factors(second, over) if not backward or _is_quotient_of_exponentials(reader, x)]
    return any(_is_softmax(reader, x) for x in factors)


def _is_quotient_of_exponentials(reader: Reader, weights: Element) -> bool:
    """Whether it is softmax itself: gradients of losses of a softmax are made of it too."""

    def look(element: Element) -> Element:
        return reader.unrounded(element, partial(note_rounding, set[np.dtype]()))

    def is_sum(element: Element) -> bool:
        return look(element).opcode == "reduce"

    def is_reciprocal(element: Element) -> bool:
        x = look(element)
        return (
            x.opcode == "divide"
            and is_sum(reader.operands(x)[1])
            and constant(look(reader.operands(x)[0]).instruction) == 1
        )

    x = look(weights)
    if x.opcode not in ("divide", "multiply"):
        return False
    is_right = is_sum if x.opcode == "divide" else is_reciprocal
    return any(
        look(above).opcode == "exponential" and is_right(other) for above, other in both_ways(reader.operands(x))
    )


def _is_softmax(reader: Reader, weights: Element) -> bool:
    seen = list(made_of(reader, weights, through=("reduce",), up_to="exponential"))
    exponentials = [x for x in seen if x.opcode == "exponential"]
    sums = [x for x in seen if x.opcode == "reduce"]
    if not sums or any(x.opcode == "dot" for x in seen):
        return False
    return any(y.opcode == "dot" for x in exponentials for y in made_of(reader, reader.operands(x)[0]))


def made_of(reader: Reader, element: Element, *, through: Sequence[str] = (), up_to: str = "") -> Iterator[Element]:
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


class Search:
    """The comparison of one result with the formula.

    Attributes, once it has been compared:
      first, second: the two products.
      exponential: numerator of the weights, before they are rounded.
      queries, keys, values: the factors of the two products.
      key_atoms: the atoms that the second product sums over.
      selects: the conditions that put a number in the place of scores, in the order of `where`, and whether each holds
        where scores stay.
    """

    first: Element
    second: Element
    exponential: Element
    queries: Element
    keys: Element
    values: Element

    def __init__(self, body: Body, root: Instruction, second: Instruction, *, added_masks: bool) -> None:
        self.body, self.root, self._second = body, root, second
        self._added_masks = added_masks
        self.has_added_masks = False
        self.reader = Reader(body)
        self.selects: list[Condition] = []
        self._inner: set[np.dtype] = set()  # what is rounded to before the second product
        self._outer: set[np.dtype] = set()  # and after it
        self._rounds_weights = False
        self._subtracts_maximum = False
        self._scale = 1.0
        self._terms: list[Term] = []
        self._conditions: list[Condition] = []
        self._masked: set[float] = set()
        self._masks = 0
        self._biased_when_masked = False
        self._length: Length | None = None
        self._left = self._right = UNBOUNDED
        self._positions: Index | None = None
        self.key_atoms: Index = ()
        self._gradients: Gradients | None = None

    def found(self, *, copied: bool, gradients: Callable[[Search], Gradients | None] | None) -> Found:
        """The attention; with `copied`, the call may write its result in another order than the root has."""
        result = self._compare()
        why: NotAttention | None = None
        if gradients is not None:
            try:
                self._gradients = gradients(self)
            except NotAttention as error:
                why = error
        if self._gradients is None:
            try:
                self._check_users()
            except NotAttention as error:
                raise why or error from None
        operands = (self.operands_of(x) for x in (self.queries, self.keys, self.values))
        return self._fitted(result, copied, *operands)

    def _compare(self) -> Element:
        """Compares, and keeps what was found; the element of the root."""
        reader = self.reader
        dtype = hlo.array_of(self.root.shape)
        if dtype is None or 0 in dtype.dims:
            raise _NoCandidate
        result = reader.element(self.root)
        second, total = self._second_product(result)
        self.key_atoms = reader.summed(second.instruction, second.scope)
        weights, values, total = self._factors(second, total)
        first = self._first_product(weights, total)
        over = reader.summed(first.instruction, first.scope)
        q, k = reader.factors(first, over)
        keys = set(reader.atoms.resolved(self.key_atoms))
        if keys & set(self._atoms(q)):
            q, k = k, q
        self.first, self.second, self.exponential = first, second, weights
        self.queries, self.keys, self.values = q, k, values
        start, body = self.first_instruction, self.body
        after = closure(start.id, lambda x: (y.id for y in body.users(body[x])))
        before = closure(self.root.id, lambda x: body[x].operand_ids)
        self._between = after & before
        return result

    @property
    def first_instruction(self) -> Instruction:
        """The first product, or the fusion that it is in."""
        return self.first.scope.fusion if self.first.scope.fusion is not None else self.first.instruction

    # --- the formula, from the result on ---------------------------------------------------------------------------

    def _second_product(self, result: Element) -> tuple[Element, Element | None]:
        """The second product, and the sum that its result is divided by."""
        x = self._unrounded(result, self._outer)
        if x.opcode == "dot":
            return x, None
        if x.opcode == "divide":
            above, below = self.reader.operands(x)
            return self._dot(above), below
        if x.opcode == "multiply":
            for above, other in both_ways(self.reader.operands(x)):
                total = self._reciprocal(other)
                if total is not None:
                    return self._dot(above), total
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
        one, below = self.reader.operands(x)
        return below if constant(self._unrounded(one, self._inner).instruction) == 1 else None

    def _factors(self, second: Element, total: Element | None) -> tuple[Element, Element, Element]:
        """Exponentials, values and the sum of exponentials."""
        for weights, values in both_ways(self.reader.factors(second, self.key_atoms)):
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
        if any(_is_softmax(self.reader, x) for x in self.reader.factors(second, self.key_atoms)):
            raise NotAttention("something stands between softmax and the second product")
        raise _NoCandidate

    def _weights(self, element: Element, narrowed: set[np.dtype]) -> tuple[Element, Element | None] | None:
        x = self._unrounded(element, narrowed)
        if x.opcode == "exponential":
            return x, None
        if x.opcode == "divide":
            above, below = self.reader.operands(x)
            exponential = self._unrounded(above, self._inner)
            return (exponential, below) if exponential.opcode == "exponential" else None
        if x.opcode == "multiply":
            for above, other in both_ways(self.reader.operands(x)):
                exponential = self._unrounded(above, self._inner)
                if exponential.opcode == "exponential" and (total := self._reciprocal(other)) is not None:
                    return exponential, total
        return None

    def _first_product(self, exponential: Element, total: Element) -> Element:
        reader = self.reader
        total = self._unrounded(total, self._inner)
        summed = reader.reduced(total, self.key_atoms, "add", self.note)
        if summed is None or not reader.same(exponential, summed, self.note):
            raise NotAttention("its weights are not divided by their sum over the keys")
        (exponent,) = reader.operands(exponential)
        scores = self._unrounded(exponent, self._inner)
        if scores.opcode == "subtract":
            above, below = reader.operands(scores)
            largest = reader.reduced(self._unrounded(below, self._inner), self.key_atoms, "maximum", self.note)
            if largest is not None:
                if not reader.same(above, largest, self.note):
                    raise NotAttention("what is subtracted is not the largest score")
                self._subtracts_maximum, scores = True, above
        return self._scores(scores)

    def _scores(self, element: Element) -> Element:
        """The first product; what is done to it goes into the attributes."""
        x = self._unrounded(element, self._inner)
        reader = self.reader
        if x.opcode == "dot":
            return x
        if x.opcode == "select":
            condition, yes, no = reader.operands(x)
            for scores, other, positive in ((yes, no, True), (no, yes, False)):
                value = constant(self._unrounded(other, set()).instruction)
                if value is not None:
                    self._mask(condition, positive, value)
                    self.selects.append(Condition(condition, positive))
                    return self._scores(scores)
            raise NotAttention("a condition puts other values than one constant in the place of scores")
        if x.opcode in ("multiply", "divide"):
            for scores, other in both_ways(reader.operands(x)):
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
            pairs = both_ways(reader.operands(x)) if x.opcode == "add" else [tuple(reader.operands(x))]
            for scores, other in pairs:
                if self._is_from_a_product(scores):
                    sign = 1 if x.opcode == "add" else -1
                    if not self._added_masks or not self._added_mask(other, sign):
                        self._terms.append(Term(other, sign * self._scale))
                    return self._scores(scores)
        name = "what is computed elsewhere" if x.opcode not in ELEMENTWISE else f"the operation {x.opcode}"
        raise NotAttention(f"{name} stands between the first product and softmax")

    def _is_from_a_product(self, element: Element) -> bool:
        return any(x.opcode == "dot" for x in made_of(self.reader, element))

    def _unrounded(self, element: Element, narrowed: set[np.dtype]) -> Element:
        """What an element is the conversion of, from a float to a float."""
        return self.reader.unrounded(element, partial(note_rounding, narrowed))

    def note(self, before: Instruction, convert: Instruction) -> None:
        note_rounding(self._inner, before, convert)

    # --- conditions ------------------------------------------------------------------------------------------------

    def _added_mask(self, element: Element, sign: int) -> bool:
        """Takes what is added to scores as a condition, if it is 0 where it holds, and else excludes; False if not.

        An excluded score must weigh nothing beside others, and be the same as all others where a query sees no key.
        """
        mask = self._numbers(element)
        if mask is None or 0 not in (mask.yes, mask.no):
            return False
        value = sign * self._scale * (mask.no if mask.yes == 0 else mask.yes)
        if not value <= _NO_SCORE or np.dtype(np.float16) in self._inner:
            return False
        before = self._left, self._right, self._positions, list(self._conditions), self._length
        self._condition(mask.condition, mask.yes == 0)
        size = self.reader.atoms.size
        is_window = len(self._conditions) == len(before[3]) and self._length == before[4]
        all_see = is_window and (
            self._positions is None or _all_see(size(self._positions), size(self.key_atoms), self._left, self._right)
        )
        if all_see or value <= _ABSORBING:
            self._masked.add(value)
            self._masks += 1
            self.has_added_masks = True
            return True
        self._left, self._right, self._positions, self._conditions, self._length = before
        return False

    def _mask(self, condition: Element, positive: bool, value: float) -> None:
        value *= self._scale
        least = float(np.finfo(np.float16).min) if np.dtype(np.float16) in self._inner else _NO_SCORE
        if not value <= least and not (self._subtracts_maximum and math.isfinite(value)):
            raise NotAttention(f"scores are replaced by {value:g}, which other scores may be less than")
        self._masked.add(value)
        self._masks += 1
        self._biased_when_masked |= bool(self._terms)
        if value > _NO_WEIGHT:
            self._conditions.append(Condition(condition, positive))
        else:
            self._condition(condition, positive)

    def _condition(self, element: Element, positive: bool) -> None:
        reader = self.reader
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
        elif x.opcode == "constant":
            if self._band(x, hlo.values(x.instruction), positive):
                return None
        elif x.opcode == "compare" and (self._comparison(x, positive) or self._comparison_of_mask(x, positive)):
            return None
        self._conditions.append(Condition(element, positive))
        return None

    def _comparison_of_mask(self, x: Element, positive: bool) -> bool:
        """Takes a comparison of a mask of numbers with a number; False if it is none.

        flax's `make_causal_mask` and haiku's masks are arrays of 0 and 1 in a float, which are compared with 0.
        """
        numbers, other = self.reader.operands(x)
        direction = x.instruction.comparison_direction
        value = constant(self.reader.look_through(other, "convert").instruction)
        if value is None:
            numbers, other = other, numbers
            value = constant(self.reader.look_through(other, "convert").instruction)
            direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
        compare = _COMPARISONS.get(direction)
        if value is None or compare is None:
            return False
        y = self.reader.look_through(numbers, "convert")
        if y.opcode == "constant":
            stored = hlo.values(y.instruction)
            return stored is not None and self._band(y, compare(stored.astype(np.float64), value), positive)
        mask = self._numbers(numbers)
        if mask is not None:
            yes, no = bool(compare(mask.yes, value)), bool(compare(mask.no, value))
            if yes == no:
                return yes == positive
            self._condition(mask.condition, positive == yes)
            return True
        if y.opcode in ("multiply", "minimum") and positive and value == 0 and direction in ("NE", "GT"):
            masks = [self._numbers(z) for z in self.reader.operands(y)]
            if all(z is not None and (z.yes, z.no) == (1, 0) for z in masks):
                for z in masks:
                    assert z is not None
                    self._condition(z.condition, positive)
                return True
        return False

    def _numbers(self, element: Element) -> _Numbers | None:
        """One of two numbers, chosen by a condition."""
        reader = self.reader
        x = reader.look(element)
        if x.opcode == "convert":
            (source,) = reader.operands(x)
            if source.instruction.shape.element_type == hlo.PRED:
                return _Numbers(source, 1, 0)
            found = self._numbers(source)
            if found is None or {found.yes, found.no} <= {0, 1}:
                return found
            if not converts_floats(source.instruction, x.instruction):
                return None
            dtype = hlo.dtype_of(x.instruction)
            rounded = [float(np.asarray(number, dtype)) for number in (found.yes, found.no)]
            return _Numbers(found.condition, *rounded)
        if x.opcode == "select":
            condition, *choices = reader.operands(x)
            yes, no = (constant(reader.look_through(y, "convert").instruction) for y in choices)
            return None if yes is None or no is None else _Numbers(condition, yes, no)
        return None

    def _band(self, x: Element, mask: np.ndarray | None, positive: bool) -> bool:
        """Takes a constant mask that is a window of positions into the attributes; False if it is none."""
        atoms = self.reader.atoms
        index, keys = atoms.resolved(chain.from_iterable(x.indices)), atoms.resolved(self.key_atoms)
        positions = tuple(a for a in index if a not in keys)
        if mask is None or not keys or len(set(index)) != len(index) or not set(keys) <= set(index):
            return False
        if not positions or self._resolved_positions() not in (None, positions):
            return False
        order = [index.index(a) for a in (*positions, *keys)]
        seen = mask.reshape([atoms.size((a,)) for a in index]).transpose(order) == positive
        window = _window_of(seen.reshape(atoms.size(positions), atoms.size(keys)))
        if window is None:
            return False
        self._positions = positions
        self._left, self._right = min(self._left, window[0]), min(self._right, window[1])
        return True

    def _comparison(self, x: Element, positive: bool) -> bool:
        """Takes a comparison of positions or with a length into the attributes; False if it is none."""
        direction = x.instruction.comparison_direction
        if not positive:
            direction = {"LT": "GE", "LE": "GT", "GT": "LE", "GE": "LT"}.get(direction, "")
        if direction not in ("LT", "LE", "GT", "GE"):
            return False
        left, right = (self._sum(y) for y in self.reader.operands(x))
        if left is None or right is None:
            return False
        if direction in ("LT", "LE"):
            left, right = right, left
        # left - right >= 0 now, or > 0.
        parts = left.minus(right)
        more = parts.constant - (direction in ("LT", "GT"))
        keys = self.reader.atoms.resolved(self.key_atoms)
        sign = parts.positions.pop(keys, 0)
        if abs(sign) != 1 or not keys:
            return False
        if not parts.rest and len(parts.positions) == 1:
            ((positions, other),) = parts.positions.items()
            if other != -sign or self._resolved_positions() not in (None, positions):
                return False
            self._positions = positions
            if sign < 0:
                self._right = min(self._right, more)
            else:
                self._left = min(self._left, more)
            return True
        if sign == -1 and not parts.positions and len(parts.rest) == 1 and self._length is None:
            ((element, factor),) = parts.rest
            more_fits = self.reader.atoms.size(keys) - _MOST_INT32 <= more + 1 <= _MOST_INT32
            if factor == 1 and more_fits and not set(keys) & self.reader.atoms_of(element):
                self._length = Length(element, more + 1, Condition(x, positive))
                return True
        return False

    def _sum(self, element: Element) -> _Sum | None:
        """An int32 as a sum of positions, numbers and elements."""
        x = self.reader.look(element)
        if x.instruction.shape.element_type != _INT32:
            return None
        value = constant(x.instruction)
        if value is not None:
            return _Sum({}, int(value), ())
        if x.opcode == "iota":
            atoms = self.reader.atoms.resolved(x.indices[x.instruction.dimensions[0]])
            return _Sum({atoms: 1} if atoms else {}, 0, ())
        if x.opcode == "constant":  # of an array: XLA computes positions with an offset when it compiles
            first = hlo.first_of_range(x.instruction)
            if first is not None:
                return _Sum({self.reader.atoms.resolved(x.indices[0]): 1}, first, ())
        if x.opcode in ("add", "subtract"):
            left, right = (self._sum(y) for y in self.reader.operands(x))
            if left is not None and right is not None:
                total = left.plus(right) if x.opcode == "add" else left.minus(right)
                if self._is_exact(total):
                    return total
        return _Sum({}, 0, ((element, 1),))

    def _is_exact(self, x: _Sum) -> bool:
        """Whether a sum in int32 is that of integers: it wraps around nowhere."""
        if x.rest:
            return False
        ends = [factor * (self.reader.atoms.size(atoms) - 1) for atoms, factor in x.positions.items()]
        least, most = (x.constant + sum(f(0, end) for end in ends) for f in (min, max))
        return least >= _LEAST_INT32 and most <= _MOST_INT32

    # --- operands, and how they lie in memory ----------------------------------------------------------------------

    def _atoms(self, element: Element) -> Index:
        return self.reader.atoms.resolved(chain.from_iterable(element.indices))

    def operands_of(self, element: Element) -> list[Operand]:
        """What a product's operand could be read from, the origin first."""
        found, scale, narrowed = list[Operand](), 1.0, frozenset[np.dtype]()
        moved = 0  # the first one that is only moved from here on
        here: Element | None = element
        while here is not None:
            x = here.instruction
            if here.is_outside and x.opcode != "constant":
                array = hlo.array_of(x.shape)
                if array is not None and array.dtype in (_FLOAT32, *_NARROW) and aliasing.keeps_its_value(self.body, x):
                    found.append(Operand(here, array.dtype, scale, narrowed, array.dtype))
            before = self.reader.step(here)
            if before is None and x.opcode == "convert":
                (source,) = self.reader.operands(here)
                if converts_floats(source.instruction, x):
                    exact = hlo.dtype_of(source.instruction)
                    found[moved:] = [
                        y._replace(exact=exact) if np.can_cast(exact, y.dtype, "safe") else y for y in found[moved:]
                    ]
                    moved = len(found)
                    taken = set(narrowed)
                    note_rounding(taken, source.instruction, x)
                    narrowed, before = frozenset(taken), source
            elif before is None and x.opcode in ("multiply", "divide") and not here.is_outside:
                first, other = self.reader.operands(here)
                for source, factor in ((first, other), (other, first))[: 2 if x.opcode == "multiply" else 1]:
                    value = constant(self.reader.look_through(factor, "convert").instruction)
                    if value is not None and math.isfinite(value) and value != 0:
                        before, moved = source, len(found)
                        scale = scale * value if x.opcode == "multiply" else scale / value
                        break
            here = before
        return found[::-1]

    def _check_users(self) -> None:
        """NotAttention if anything else reads what is computed between the products."""
        body = self.body
        for number in self._between - {self.root.id}:
            x = body[number]
            if body.is_awaited(x) or x.control_predecessor_ids:
                raise NotAttention("something else waits for what is computed between its products")
            if any(user.id not in self._between for user in body.users(x)):
                what = "scores" if number == self.first_instruction.id else "what is computed between its products"
                raise NotAttention(f"something else reads {what}, as gradients do")

    def _fitted(self, result: Element, copied: bool, q: list[Operand], k: list[Operand], v: list[Operand]) -> Found:
        if not q or not k or not v:
            raise NotAttention("an operand is overwritten before the second product, or has a dtype without a kernel")
        if any(self.reader.arrays_of(x) & self._between for x in self.extras()):
            raise NotAttention("its bias or mask is computed from scores")
        reason = "its dimensions lie in memory in an order that no kernel reads"
        for operands in product(q, k, v):
            if any(x.element.instruction.id in self._between for x in operands):
                continue
            dtypes = self._dtypes(*operands)
            if dtypes is None:
                reason = "no kernel for its dtypes and roundings"
                continue
            in_q, in_k, in_v = (self.reader.in_memory(x.element) for x in operands)
            keys, positions = self.reader.atoms.resolved(self.key_atoms), self._resolved_positions()
            in_result = self.reader.in_memory(result)
            layouts = list(_layouts(in_q, in_k, in_v, in_result, keys, positions, copied=copied))
            sizes = self.reader.atoms.size
            layouts = [x for x in layouts if max(sizes(x.depth), sizes(x.width)) <= MOST_ATTENTION_ELEMENTS]
            if layouts and self._gradients is not None:
                layouts = [x for x in layouts if self._has_gradients(x)]
                reason = "the gradients of shared keys and values are summed in more than one step"
            if not layouts:
                continue
            layout = min(layouts, key=self._extra_elements)
            if self._length is not None and not self._has_lengths(layout):
                self._conditions.append(self._length.condition)
                self._length = None
            return self._with_masks(result, copied, operands, layout, *dtypes)
        raise NotAttention(reason)

    def _has_gradients(self, layout: Layout) -> bool:
        """Whether the products of the backward half have the dimensions of what they are the gradients of."""
        assert self._gradients is not None
        return all(
            sorted(self._atoms(x.result)) == sorted(self.reader.atoms.resolved(layout.gradient(x.of)))
            for x in self._gradients.products
        )

    def _resolved_positions(self) -> Index | None:
        return None if self._positions is None else self.reader.atoms.resolved(self._positions)

    def _has_lengths(self, layout: Layout) -> bool:
        """Whether lengths are the same for all heads and queries."""
        return self._length is None or self.reader.atoms_of(self._length.element) <= set(layout.batch)

    def extras(self) -> list[Element]:
        """What bias, mask and lengths are made of."""
        length = [] if self._length is None else [self._length.element]
        return [*(x.element for x in self._terms), *(x.element for x in self._conditions), *length]

    def _extra_elements(self, layout: Layout) -> tuple[bool, int]:
        """Whether lengths become a mask in a layout, and how many elements bias and mask have."""
        count = 0
        for x in self.extras():
            there = self.reader.atoms_of(x)
            dims = [dim for dim in layout.scores[:3] if there & set(dim)]
            count += math.prod(self.reader.atoms.size(dim) for dim in (*dims, layout.keys))
        return not self._has_lengths(layout), count

    def _dtypes(self, q: Operand, k: Operand, v: Operand) -> tuple[np.dtype, np.dtype] | None:
        """The dtypes of queries, and of keys and values, that a kernel is to read; None if none computes this."""
        inner = set(self._inner).union(*(x.narrowed for x in (q, k, v)))
        narrow = self._outer | inner
        if len(narrow) > 1:
            return None
        kv = k.dtype
        if k.dtype != v.dtype:
            kv = next((x for x in (k.dtype, v.dtype) if x != _FLOAT32 and k.exact == v.exact == x), _FLOAT32)
        # What the result is rounded to, even if it is stored as something wider.
        (result,) = self._outer or {hlo.dtype_of(self.root)}
        if inner and not self._rounds_weights and result == _FLOAT32:
            return None
        if self._rounds_weights:
            (rounded,) = narrow
            if kv not in (rounded, result, _FLOAT32) or (kv == _FLOAT32 and result == _FLOAT32):
                return None
            dtype = rounded if q.dtype == kv == rounded == result else _FLOAT32
        else:
            dtype = _FLOAT32
        return (dtype, kv) if native.supports_attention(hlo.NAMES[dtype], hlo.NAMES[kv]) else None

    def _with_masks(
        self,
        result: Element,
        copied: bool,
        operands: tuple[Operand, Operand, Operand],
        layout: Layout,
        dtype: np.dtype,
        kv_dtype: np.dtype,
    ) -> Found:
        q, k, v = operands
        queries, keys = self.reader.atoms.size(layout.queries), self.reader.atoms.size(layout.keys)
        all_see = not self._masked or (
            not self._conditions and self._length is None and _all_see(queries, keys, self._left, self._right)
        )
        nan_rows = False
        exact = len(self._masked) == 1 and all(map(math.isfinite, self._masked))
        exact &= self._subtracts_maximum and not self.has_added_masks
        may_weigh = self._subtracts_maximum and any(x > _NO_SCORE for x in self._masked)
        if self._terms and self._masked:  # a bias may be as low as what excludes keys: padding in a causal attention
            if self._biased_when_masked or any(map(math.isinf, self._masked)):
                raise NotAttention("a bias is added to scores that a condition excludes")
            if not exact:
                raise NotAttention("a bias may be as low as the numbers that conditions put in the place of scores")
        if may_weigh or not all_see:
            if len(self._masked) > 1:
                raise NotAttention("conditions put different numbers in the place of scores")
            (value,) = self._masked
            alone = self._masks == 1 and not self._terms and value <= _ABSORBING
            if self.has_added_masks and not math.isinf(value) and not alone:
                raise NotAttention("a mask is added to scores that are no more alike where it excludes them all")
            nan_rows = math.isinf(value) or not self._subtracts_maximum
            if self._gradients is not None and (self.has_added_masks or not self._gradients.masked):
                raise NotAttention("a query that sees no key, if there is one, has gradients")
        scale = self._scale * q.scale * k.scale
        if v.scale != 1:
            raise NotAttention("values are scaled")
        if self._gradients is not None:
            self._gradients = self._scaled(self._gradients, (k.scale / scale, q.scale / scale, 1), (dtype, kv_dtype))
        return Found(
            self.reader,
            result,
            self.root,
            self._second,
            q,
            k,
            v,
            layout,
            dtype,
            kv_dtype,
            scale,
            self._left,
            self._right,
            self._terms,
            self._conditions,
            self._length,
            next(iter(self._masked)) if exact and not nan_rows else MASKED,
            nan_rows,
            copied,
            self._gradients,
        )

    def _scaled(
        self, gradients: Gradients, factors: tuple[float, float, float], dtypes: tuple[np.dtype, np.dtype]
    ) -> Gradients:
        """With factors of what the kernel computes, if it rounds where the program does."""
        products = []
        for x in gradients.products:
            dtype = dtypes[min(x.of, 1)]
            rounded = dtype if dtype != _FLOAT32 else next(iter(gradients.narrowed), None)
            if len(gradients.narrowed) > 1 or not self._is_rounded(x.result.instruction, rounded):
                raise NotAttention("its gradients are read in another precision than that of its arrays")
            products.append(x._replace(factor=x.factor * factors[x.of]))
        return gradients._replace(products=products)

    def _is_rounded(self, x: Instruction, dtype: np.dtype | None) -> bool:
        """Whether an array is read only rounded to a dtype, or has it."""
        if dtype is None or hlo.dtype_of(x) == dtype:
            return True
        return not self.body.is_awaited(x) and all(self._rounds(x, user, dtype) for user in self.body.users(x))

    def _rounds(self, x: Instruction, user: Instruction, dtype: np.dtype) -> bool:
        if user.opcode == "convert":
            return hlo.dtype_of(user) == dtype
        if user.opcode in _MOVES:
            return self._is_rounded(user, dtype)
        if user.opcode != "fusion":
            return False
        computation = self.reader.inside(user).computation
        waiting = [
            y.id
            for y in computation.instructions
            if y.opcode == "parameter" and user.operand_ids[y.parameter_number] == x.id
        ]
        while waiting:
            here = waiting.pop()
            if here == computation.root_id:
                return self._is_rounded(user, dtype)
            for y in computation.instructions:
                if here not in y.operand_ids:
                    continue
                if y.opcode in _MOVES:
                    waiting.append(y.id)
                elif y.opcode != "convert" or hlo.dtype_of(y) != dtype:
                    return False
        return True


class _Numbers(NamedTuple):
    """A mask of numbers: `yes` where a condition holds, or else `no`."""

    condition: Element
    yes: float
    no: float


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


def _window_of(mask: np.ndarray) -> tuple[int, int] | None:
    """How many keys before and after its own position each query sees, if a mask [queries, keys] says nothing else."""
    queries, keys = mask.shape
    # One element for each distance of a key, from the last query's first key to the first query's last.
    distances = np.concatenate((mask[::-1, 0], mask[0, 1:]))
    rows = np.lib.stride_tricks.sliding_window_view(distances, keys)[::-1]
    (seen,) = np.nonzero(distances)
    if seen.size == 0 or seen[-1] - seen[0] + 1 != seen.size or not np.array_equal(mask, rows):
        return None
    first, last = seen[0] - (queries - 1), seen[-1] - (queries - 1)
    left = UNBOUNDED if seen[0] == 0 else int(-first)
    return left, UNBOUNDED if seen[-1] == distances.size - 1 else int(last)


def _all_see(queries: int, keys: int, left: int, right: int) -> bool:
    """Whether each query sees a key."""
    return right >= 0 and left + right >= 0 and queries - 1 - left <= keys - 1


def both_ways(pair: Sequence[Element]) -> Iterator[tuple[Element, Element]]:
    first, second = pair
    yield first, second
    yield second, first


def closure(start: int, more: object) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for number in more(waiting.pop()):  # type: ignore[operator]
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found


def note_rounding(narrowed: set[np.dtype], before: Instruction, convert: Instruction) -> None:
    after = hlo.dtype_of(convert)
    if not np.can_cast(hlo.dtype_of(before), after, "safe"):
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
