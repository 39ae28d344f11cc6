"""The backward half of attention in HLO: products of a training step that are gradients of an attention.

With weights p = e / t, where e are exponentials of scores and t their sums over the keys, and d = dout v^T, the
gradients that JAX computes are products of k, q and dout with

    dscores = p * (d - sum over the keys of p * d)    and with    p.

How that is written depends on the program: which quotient is a reciprocal, what is factored out of a sum, where a scale
stands. So an operand is not compared with an expression but brought into a normal form, as a polynomial in e, d, 1 / t
and the sum of e * d, and that is compared. What is zero in exact arithmetic, such as the gradient of the largest score,
which is subtracted from all of them, is zero then. Zeros that conditions put in the place of excluded scores must be
those of the forward half.

All products of one attention are replaced, or none: nothing else may read scores, weights or their cotangents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from jax_nano._core.hlo import Instruction
from jax_nano._programs.attention import (
    Condition,
    Gradient,
    Gradients,
    NotAttention,
    Search,
    both_ways,
    closure,
    made_of,
    note_rounding,
)
from jax_nano._programs.elements import Element, Unknown, constant

QUERIES, KEYS, VALUES = range(3)

_SAME: Final = 1e-5  # Numbers that differ by less, relative to their size, differ by roundings of constants


class _Monomial(NamedTuple):
    """Powers of what cotangents of scores are made of, and the conditions outside of which it is zero."""

    exponential: int = 0
    cotangent: int = 0  # of weights
    total: int = 0  # of exponentials
    inner: int = 0  # sum of exponentials times cotangents
    conditions: frozenset[int] = frozenset()

    def times(self, other: _Monomial) -> _Monomial:
        return _Monomial(
            self.exponential + other.exponential,
            self.cotangent + other.cotangent,
            self.total + other.total,
            self.inner + other.inner,
            self.conditions | other.conditions,
        )


_Polynomial: TypeAlias = dict[_Monomial, float]

_ONE: Final = _Monomial()
_WEIGHT: Final = _Monomial(exponential=1, total=-1)
_FIRST_TERM: Final = _Monomial(exponential=1, cotangent=1, total=-1)
_SECOND_TERM: Final = _Monomial(exponential=1, total=-2, inner=1)


class _Other(Exception):
    """An operand that is nothing of the kind."""


def find(search: Search) -> Gradients | None:
    """The backward half of an attention in the same computation; None if there is nothing similar.

    Raises:
      NotAttention: why its products stay.
    """
    return _Backward(search).found()


class _Backward:
    """The search for products that are gradients of an attention."""

    def __init__(self, search: Search) -> None:
        self._search, self._body, self._reader = search, search.body, search.reader
        self._since = self._reader.atoms.count()
        self._narrowed: set[np.dtype] = set()
        self._cotangent_of_weights: Element | None = None
        self._cotangent: Element | None = None  # of the result
        self._masked = True
        self._known: dict[tuple[int, tuple[tuple[int, ...], ...]], _Polynomial] = {}

    def found(self) -> Gradients | None:
        search, reader = self._search, self._reader
        of_weights = list[tuple[Element, Element, float]]()  # results, other operands and factors
        found = list[Gradient]()
        for instruction in self._candidates():
            self._known.clear()
            reader.begin()
            try:
                part = self._product(instruction)
            except (_Other, Unknown):
                continue
            if isinstance(part, Gradient):
                found.append(part)
            elif part is not None:
                of_weights.append(part)
        if self._cotangent is None:
            return None
        if not found:
            raise NotAttention("only the gradient of its values is computed")
        reader.begin()
        for result, other, factor in of_weights:
            scale = self._ratio(other, self._cotangent)
            self._require(result, self._search.values, "values")
            found.append(Gradient(VALUES, result, scale * factor))
        cotangent = self._cotangent
        rows = set(self._atoms(search.exponential)) - self._key_atoms
        width = set(self._atoms(search.values)) - set(self._atoms(search.exponential))
        atoms = self._atoms(cotangent)
        if set(atoms) != rows | width or len(atoms) != len(set(atoms)):
            raise NotAttention("the cotangent of its result has other dimensions than the result")
        self._check_readers([x.result.instruction for x in found])
        arrays = search.operands_of(cotangent)
        return Gradients(cotangent, arrays, found, self._masked, frozenset(self._narrowed))

    # --- products --------------------------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[Instruction]:
        """Products with an operand that has as many elements as there are scores."""
        search, module = self._search, self._body.module
        scores = self._reader.atoms.size(self._atoms(search.exponential))
        known = (search.first.instruction.id, search.second.instruction.id)
        for x in self._body.instructions:
            inner = module.computation(x.called_computation_ids[0]).instructions if x.opcode == "fusion" else [x]
            by_id = {y.id: y for y in inner} if x.opcode == "fusion" else {y.id: y for y in self._body.operands(x)}
            for y in inner:
                if y.opcode != "dot" or y.id in known:
                    continue
                if any(math.prod(by_id[number].shape.dimensions) == scores for number in y.operand_ids):
                    yield x

    def _product(self, instruction: Instruction) -> Gradient | tuple[Element, Element, float] | None:
        """What a product computes of this attention; of products with weights the result, the other operand, a factor.

        Raises:
          _Other: nothing.
        """
        reader, search = self._reader, self._search
        result = reader.element(instruction)
        dot = reader.unrounded(result, self._note)
        if dot.opcode != "dot":
            raise _Other
        over = reader.summed(dot.instruction, dot.scope)
        for operand, other in both_ways(reader.factors(dot, over)):
            if not self._is_over_scores(operand):
                continue
            polynomial = self._polynomial(operand)
            over_keys = set(reader.atoms.resolved(over)) == self._key_atoms
            if set(polynomial) == {_WEIGHT}:
                if over_keys:  # the attention's result, computed again
                    raise _Other
                return result, other, polynomial[_WEIGHT]
            factor = self._cotangent_of_scores(polynomial)
            if over_keys:
                scale = self._ratio(other, search.keys)
                self._require(result, search.queries, "queries")
                return Gradient(QUERIES, result, factor * scale)
            scale = self._ratio(other, search.queries)
            self._require(result, search.keys, "keys")
            return Gradient(KEYS, result, factor * scale)
        raise _Other

    def _is_over_scores(self, operand: Element) -> bool:
        """Whether an operand is made of this attention's exponentials; its atoms are then those of scores."""
        exponential = self._search.exponential
        for x in made_of(self._reader, operand, up_to="exponential"):
            if x.opcode == "exponential" and self._reader.identify(x, exponential, self._since):
                atoms = set(self._atoms(exponential))
                if self._reader.same(x, exponential, self._note) and set(self._atoms(operand)) == atoms:
                    return True
        return False

    def _cotangent_of_scores(self, x: _Polynomial) -> float:
        """The factor before the cotangents of scores."""
        conditions = {monomial.conditions for monomial in x}
        if len(conditions) != 1 or len(x) != 2:
            raise _Other
        (zeros,) = conditions
        first, second = (x.get(y._replace(conditions=zeros), 0) for y in (_FIRST_TERM, _SECOND_TERM))
        if first == 0 or abs(first + second) > _SAME * abs(first):
            raise _Other
        self._masked &= len(zeros) == len(self._search.selects)
        return first

    def _ratio(self, x: Element, known: Element) -> float:
        """By how much an element is larger than another one, from which it differs by a constant factor.

        Raises:
          NotAttention: it differs in another way.
        """
        (scale, x), (other, known) = self._unscaled(x), self._unscaled(known)
        if not self._reader.identify(x, known, self._since) or not self._reader.same(x, known, self._note):
            raise NotAttention("weights or their cotangents are multiplied by something else than in a gradient")
        return scale / other

    def _unscaled(self, element: Element) -> tuple[float, Element]:
        scale = 1.0
        while True:
            x = self._reader.unrounded(element, self._note)
            if x.opcode not in ("multiply", "divide"):
                return scale, x
            for source, factor in both_ways(self._reader.operands(x)):
                value = constant(self._reader.look_through(factor, "convert").instruction)
                if value is not None and math.isfinite(value) and value != 0:
                    scale = scale * value if x.opcode == "multiply" else scale / value
                    element = source
                    break
                if x.opcode == "divide":
                    return scale, x
            else:
                return scale, x

    def _require(self, result: Element, of: Element, name: str) -> None:
        """NotAttention unless a result has the dimensions of what it is the gradient of."""
        atoms, wanted = self._atoms(result), self._atoms(of)
        if set(atoms) != set(wanted) or len(atoms) != len(wanted):
            raise NotAttention(f"the gradient of its {name} is summed in more than one step")

    # --- normal form -----------------------------------------------------------------------------------------------

    def _polynomial(self, element: Element) -> _Polynomial:
        x = self._reader.unrounded(element, self._note)
        key = x.instruction.id, self._reader.logical(x)
        if key not in self._known:
            self._known[key] = self._computed(x)
        return self._known[key]

    def _computed(self, x: Element) -> _Polynomial:
        reader = self._reader
        value = constant(x.instruction)
        if value is not None:
            if not math.isfinite(value):
                raise _Other
            return {_ONE: value} if value else {}
        if x.opcode == "exponential":
            if not reader.same(x, self._search.exponential, self._note):
                raise _Other
            return {_Monomial(exponential=1): 1.0}
        if x.opcode == "dot":
            self._weights_cotangent(x)
            return {_Monomial(cotangent=1): 1.0}
        if x.opcode == "reduce":
            return self._sum(x)
        if x.opcode == "negate":
            return _scaled(self._polynomial(reader.operands(x)[0]), -1)
        if x.opcode in ("add", "subtract"):
            left, right = map(self._polynomial, reader.operands(x))
            return _sum(left, right if x.opcode == "add" else _scaled(right, -1))
        if x.opcode == "multiply":
            return self._multiplied(*reader.operands(x))
        if x.opcode == "divide":
            above, below = reader.operands(x)
            numerator = self._polynomial(above)
            return numerator and _multiplied(numerator, _inverse(self._polynomial(below)))
        if x.opcode == "select":
            return self._selected(*reader.operands(x))
        raise _Other

    def _multiplied(self, left: Element, right: Element) -> _Polynomial:
        """Zero if one is, whatever the other one is made of."""
        try:
            x = self._polynomial(left)
        except _Other:
            if self._polynomial(right):
                raise
            return {}
        return x and _multiplied(x, self._polynomial(right))

    def _selected(self, condition: Element, yes: Element, no: Element) -> _Polynomial:
        chosen, other = self._polynomial(yes), self._polynomial(no)
        if not chosen and not other:
            return {}
        if chosen and other:
            raise _Other
        wanted = self._stripped(Condition(condition, bool(chosen)))
        for i, known in enumerate(map(self._stripped, self._search.selects)):
            if known.positive == wanted.positive and self._reader.same(known.element, wanted.element):
                return _multiplied(chosen or other, {_Monomial(conditions=frozenset((i,))): 1.0})
        raise _Other

    def _stripped(self, condition: Condition) -> Condition:
        element, positive = self._reader.look(condition.element), condition.positive
        while element.opcode == "not":
            element, positive = self._reader.look(self._reader.operands(element)[0]), not positive
        return Condition(element, positive)

    def _sum(self, x: Element) -> _Polynomial:
        """A sum over the keys, in front of which stands what does not depend on them."""
        term = self._reader.reduced(x, self._search.key_atoms, "add", self._note)
        if term is None:
            raise _Other
        total: _Polynomial = {}
        for monomial, factor in self._polynomial(term).items():
            powers = monomial.exponential, monomial.cotangent
            if monomial.conditions or powers not in ((1, 0), (1, 1)):
                raise _Other
            of_sum = _Monomial(total=1) if powers == (1, 0) else _Monomial(inner=1)
            rest = _Monomial(total=monomial.total, inner=monomial.inner)
            total = _sum(total, {rest.times(of_sum): factor})
        return total

    def _weights_cotangent(self, dot: Element) -> None:
        """Takes a product as the cotangent of weights; _Other if it is none, or another one than the first."""
        reader, search = self._reader, self._search
        if self._cotangent_of_weights is not None:
            if not reader.same(dot, self._cotangent_of_weights, self._note):
                raise _Other
            return
        over = reader.summed(dot.instruction, dot.scope)
        width = set(self._atoms(search.values)) - set(self._atoms(search.exponential))
        for values, cotangent in both_ways(reader.factors(dot, over)):
            if (
                reader.identify(values, search.values, self._since)
                and reader.same(values, search.values, self._note)
                and set(reader.atoms.resolved(over)) == width
            ):
                self._cotangent_of_weights, self._cotangent = dot, cotangent
                return
        raise _Other

    # --- readers ---------------------------------------------------------------------------------------------------

    def _check_readers(self, results: Sequence[Instruction]) -> None:
        """NotAttention if a product of scores or of their cotangents is needed for more than the results."""
        assert self._cotangent_of_weights is not None
        assert self._cotangent is not None
        body, search = self._body, self._search
        second = search.root
        replaced = {second.id, *(x.id for x in results)}
        sources = (search.queries, search.keys, search.values, self._cotangent)
        inputs = {x.id for x in chain.from_iterable(map(self._inputs, sources))}
        inputs.update(chain.from_iterable(map(self._reader.arrays_of, search.extras())))
        gradients = {x.id for x in results}
        before = set[int]()
        for number in inputs:
            before |= closure(number, lambda x: body[x].operand_ids)
        if before & gradients:
            raise NotAttention("its operands depend on its gradients")
        needed = set[int]()
        waiting = [x.id for x in body.instructions if not body.users(x) or body.is_awaited(x)]
        while waiting:
            number = waiting.pop()
            if number in needed:
                continue
            needed.add(number)
            waiting += inputs if number in replaced else body[number].operand_ids
            waiting += body[number].control_predecessor_ids
        of_weights = self._cotangent_of_weights
        products = (search.first, of_weights)
        for x, name in zip(products, ("its scores or weights", "their cotangents"), strict=True):
            outside = x.scope.fusion if x.scope.fusion is not None else x.instruction
            if outside.id in needed:
                raise NotAttention(f"something else than its gradients reads {name}")

    def _inputs(self, element: Element) -> list[Instruction]:
        """The arrays that an element can be read from."""
        arrays = [x.element.instruction for x in self._search.operands_of(element)]
        return arrays[-1:] or [self._body[x] for x in self._reader.arrays_of(element)]

    # --- small things ----------------------------------------------------------------------------------------------

    @property
    def _key_atoms(self) -> set[int]:
        return set(self._reader.atoms.resolved(self._search.key_atoms))

    def _atoms(self, element: Element) -> tuple[int, ...]:
        return self._reader.atoms.resolved(chain.from_iterable(element.indices))

    @property
    def _note(self) -> partial[None]:
        return partial(note_rounding, self._narrowed)


def _sum(x: _Polynomial, y: _Polynomial) -> _Polynomial:
    found = dict(x)
    for monomial, factor in y.items():
        before = found.pop(monomial, 0.0)
        if abs(before + factor) > _SAME * max(abs(before), abs(factor)):
            found[monomial] = before + factor
    return found


def _scaled(x: _Polynomial, factor: float) -> _Polynomial:
    return {monomial: factor * y for monomial, y in x.items()}


def _multiplied(x: _Polynomial, y: _Polynomial) -> _Polynomial:
    found: _Polynomial = {}
    for one, factor in x.items():
        for other, second in y.items():
            found = _sum(found, {one.times(other): factor * second})
    return found


def _inverse(x: _Polynomial) -> _Polynomial:
    """The reciprocal of a single term."""
    if len(x) != 1:
        raise _Other
    ((monomial, factor),) = x.items()
    if monomial.conditions:
        raise _Other
    return {_Monomial(-monomial.exponential, -monomial.cotangent, -monomial.total, -monomial.inner): 1 / factor}
