"""What an element of an array in an HLO module is made of, whatever fusions the work was cut into.

An `Element` is an instruction with an index for each of its dimensions. An index is a sequence of atoms, the major one
first, each of which runs over a range of its own; a dimension of size 1 has an empty one. Bitcasts and reshapes merge
and split dimensions: where one splits an atom, it is split everywhere (`Atoms`). From an element to those that it is
made of, `Reader` walks through fusions and through everything that only moves elements, so that two programs that
compute the same look the same, in whatever layout XLA computes them and wherever it fused what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from jax_nano._core import hlo
from jax_nano._core.hlo import Body, Computation, Instruction

Index: TypeAlias = tuple[int, ...]
"""Atoms, the major one first."""

ELEMENTWISE: Final = frozenset(
    (
        *("abs", "add", "and", "ceil", "compare", "convert", "cosine", "divide", "erf", "exponential"),
        *("exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum", "minimum", "multiply"),
        *("negate", "not", "or", "power", "remainder", "rsqrt", "select", "sign", "sine", "sqrt", "subtract", "tan"),
        *("tanh", "xor"),
    )
)
SLICES: Final = frozenset(("dynamic-slice", "slice"))
_FLOATS: Final = frozenset((10, 11, 16))  # PrimitiveType: float16, float32, bfloat16

Rounding: TypeAlias = Callable[[Instruction, Instruction], None]
"""Is told of a conversion from a float to a float that is looked through: what is converted, and the conversion."""

# Steps of one search: what takes more is no pattern that is known here.
_MOST_STEPS: Final = 20000


class Unknown(Exception):
    """An element's origin is too involved, or splits a range in two ways that do not fit together."""


class Atoms:
    """Ranges of indices, which can be split in two later."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}

    def new(self, size: int) -> Index:
        if size == 1:
            return ()
        self._sizes.append(size)
        return (len(self._sizes) - 1,)

    def resolved(self, index: Iterable[int]) -> Index:
        """The same index in the smallest atoms known."""
        found: list[int] = []
        for atom in index:
            found += self.resolved(self._parts[atom]) if atom in self._parts else (atom,)
        return tuple(found)

    def size(self, index: Iterable[int]) -> int:
        return math.prod(self._sizes[atom] for atom in index)

    def count(self) -> int:
        """How many there are; newer ones get numbers from here on."""
        return len(self._sizes)

    def identify(self, index: Iterable[int], known: Iterable[int], since: int) -> bool:
        """Makes atoms of an index, as far as they are numbered from `since` on, the same as those of another one.

        False if the two are of different sizes or atoms that are not the same; some may have been identified then.
        """
        left, right = (list(self.resolved(x))[::-1] for x in (index, known))
        while left and right:
            a, b = left.pop(), right.pop()
            if a in self._parts or b in self._parts:  # split or identified meanwhile
                left += self.resolved((a,))[::-1]
                right += self.resolved((b,))[::-1]
                continue
            if a == b:
                continue
            m, n = self._sizes[a], self._sizes[b]
            if m != n:
                small, large, atom = (m, n, b) if m < n else (n, m, a)
                if large % small:
                    return False
                self.divided((atom,), (small, large // small))
                left.append(a)
                right.append(b)
            elif a < since:
                return False
            else:
                self._parts[a] = (b,)
        return not left and not right

    def divided(self, index: Iterable[int], sizes: Sequence[int]) -> list[Index]:
        """An index cut into indices of these sizes; Unknown where atoms would have to be cut in a second way."""
        waiting = list(self.resolved(index))[::-1]
        found = []
        for wanted in sizes:
            here: list[int] = []
            rest = wanted
            while rest > 1:
                if not waiting:
                    raise Unknown
                atom = waiting.pop()
                size = self._sizes[atom]
                if size > rest:
                    if size % rest:
                        raise Unknown
                    (first,), (second,) = self.new(rest), self.new(size // rest)
                    self._parts[atom] = first, second
                    waiting.append(second)
                    atom, size = first, rest
                if rest % size:
                    raise Unknown
                here.append(atom)
                rest //= size
            found.append(tuple(here))
        if waiting:
            raise Unknown
        return found


class Scope:
    """The instructions of a computation, or of one that a fusion in it calls."""

    def __init__(self, body: Body, fusion: Instruction | None = None) -> None:
        self.body, self.fusion = body, fusion
        self.computation: Computation = body.computation
        self._by_id: Mapping[int, Instruction] = {}
        if fusion is not None:
            self.computation = body.module.computation(fusion.called_computation_ids[0])
            self._by_id = {x.id: x for x in self.computation.instructions}

    def __getitem__(self, number: int) -> Instruction:
        return self.body[number] if self.fusion is None else self._by_id[number]

    def ancestors(self, value: Instruction) -> list[Instruction]:
        """The instructions of a fusion that compute a value, itself the last."""
        needed, waiting = {value.id}, [value]
        while waiting:
            for number in waiting.pop().operand_ids:
                if number not in needed:
                    needed.add(number)
                    waiting.append(self[number])
        return [x for x in self.computation.instructions if x.id in needed]

    def read_by(self, parts: Iterable[Instruction]) -> list[Instruction]:
        """What the parameters among a fusion's instructions stand for."""
        assert self.fusion is not None
        operands = self.body.operands(self.fusion)
        return [operands[x.parameter_number] for x in parts if x.opcode == "parameter"]


class Element(NamedTuple):
    """An element of what an instruction computes."""

    scope: Scope
    instruction: Instruction
    indices: tuple[Index, ...]  # one for each dimension

    @property
    def opcode(self) -> str:
        opcode: str = self.instruction.opcode
        return opcode

    @property
    def is_outside(self) -> bool:
        """Whether the instruction stands in no fusion: its result is an array."""
        return self.scope.fusion is None


class Reader:
    """Walks from elements to those that they are made of, in one computation."""

    def __init__(self, body: Body) -> None:
        self.body, self.atoms = body, Atoms()
        self._outside = Scope(body)
        self._scopes: dict[int, Scope] = {}
        self._layers: dict[int, Element | int] = {}
        self._steps = 0

    def begin(self) -> None:
        """Begins a search of its own: what was found before is kept, and it may take as many steps again."""
        self._steps = 0

    def element(self, instruction: Instruction) -> Element:
        """Any element of an array outside of fusions."""
        return Element(self._outside, instruction, tuple(self.atoms.new(n) for n in instruction.shape.dimensions))

    def inside(self, fusion: Instruction) -> Scope:
        if fusion.id not in self._scopes:
            self._scopes[fusion.id] = Scope(self.body, fusion)
        return self._scopes[fusion.id]

    def operands(self, element: Element) -> list[Element]:
        """Of an elementwise operation."""
        scope, x, index = element
        return [Element(scope, scope[number], index) for number in x.operand_ids]

    def look(self, element: Element, *, into_fusions: bool = True) -> Element:
        """What an element is a copy of: an operation that computes something, or an array of unknown origin."""
        while (before := self.step(element, into_fusions=into_fusions)) is not None:
            element = before
        return element

    def look_through(self, element: Element, *opcodes: str) -> Element:
        """As `look`, and through operations of one operand, such as conversions, too."""
        element = self.look(element)
        while element.opcode in opcodes:
            element = self.look(self.operands(element)[0])
        return element

    def step(self, element: Element, *, into_fusions: bool = True) -> Element | None:
        """The element that this one is a copy of, one step nearer to its origin."""
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise Unknown
        scope, x, index = element
        if scope.fusion is not None and x.opcode == "parameter":
            return Element(self._outside, self.body.operands(scope.fusion)[x.parameter_number], index)
        if x.opcode == "fusion":
            return self._result(x, None, index) if into_fusions else None
        if x.opcode == "get-tuple-element":
            source = scope[x.operand_ids[0]]
            if source.opcode == "opt-barrier":  # of jax.checkpoint, whose second computation is the same as the first
                source = scope[source.operand_ids[0]]
                there = source.opcode == "tuple"
                return Element(scope, scope[source.operand_ids[x.tuple_index]], index) if there else None
            is_fusion = source.opcode == "fusion" and into_fusions
            return self._result(source, x.tuple_index, index) if is_fusion else None
        if x.opcode not in ("bitcast", "broadcast", "copy", "reshape", "transpose"):
            return None
        (operand,) = (scope[number] for number in x.operand_ids)
        if x.opcode == "copy":
            return Element(scope, operand, index)
        if x.opcode == "broadcast":
            return Element(scope, operand, tuple(index[i] for i in x.dimensions))
        if x.opcode == "transpose":
            position = {dim: i for i, dim in enumerate(x.dimensions)}
            return Element(scope, operand, tuple(index[position[i]] for i in range(len(index))))
        if x.shape.element_type != operand.shape.element_type:
            return None
        sizes = list(operand.shape.dimensions)
        before: Sequence[int] = range(len(sizes))
        after: Sequence[int] = range(len(index))
        if x.opcode == "bitcast":
            before, after = memory_order(operand), memory_order(x)
        parts = self.atoms.divided([a for i in after for a in index[i]], [sizes[i] for i in before])
        found: list[Index] = [()] * len(sizes)
        for dim, part in zip(before, parts, strict=True):
            found[dim] = part
        return Element(scope, operand, tuple(found))

    # --- slices ----------------------------------------------------------------------------------------------------

    def sliced(self, element: Element) -> Element | None:
        """The element of a whole array that an element of a slice of it is; None if it is no slice that is known here.

        Known are slices of one index of some dimensions, layers of a stack, and of all of the others. A layer becomes
        an atom that does not run (`layer_of`).
        """
        scope, x, index = element
        if x.opcode not in SLICES:
            return None
        operand = scope[x.operand_ids[0]]
        found: list[Index] = []
        for dim, (size, whole) in enumerate(zip(x.shape.dimensions, operand.shape.dimensions, strict=True)):
            if size == whole:  # a dynamic slice is moved to where there is such
                found.append(index[dim])
            elif size != 1:
                return None
            elif x.opcode == "slice":
                found.append(self._layer(whole, x.slice_dimensions[dim].start))
            else:
                found.append(self._layer(whole, Element(scope, scope[x.operand_ids[1 + dim]], ())))
        return Element(scope, operand, tuple(found))

    def _layer(self, size: int, start: Element | int) -> Index:
        if isinstance(start, Element):
            origin = self.look(start)
            value = hlo.number(origin.instruction) if origin.opcode == "constant" else None
            start = start if value is None else int(value)
        for atom, known in self._layers.items():
            if self.atoms.size((atom,)) != size:
                continue
            if isinstance(start, int) or isinstance(known, int):
                is_same = start == known
            else:
                is_same = self.same(start, known)
            if is_same:
                return (atom,)
        (atom,) = self.atoms.new(size)
        self._layers[atom] = start
        return (atom,)

    def layer_of(self, atom: int) -> Element | int | None:
        """The number of the layer of a stack that an atom stands for; None if the atom runs over a range."""
        return self._layers.get(atom)

    def _result(self, fusion: Instruction, position: int | None, index: tuple[Index, ...]) -> Element | None:
        if fusion.output_operand_aliasing:
            return None
        scope = self.inside(fusion)
        root = scope[scope.computation.root_id]
        if (root.opcode == "tuple") != (position is not None):
            return None
        return Element(scope, root if position is None else scope[root.operand_ids[position]], index)

    def in_memory(self, element: Element) -> Index:
        """The atoms of an element in the order of memory."""
        return self.atoms.resolved(a for i in memory_order(element.instruction) for a in element.indices[i])

    def logical(self, element: Element) -> tuple[Index, ...]:
        return tuple(self.atoms.resolved(x) for x in element.indices)

    def atoms_of(self, element: Element) -> frozenset[int]:
        """The atoms that the value of an element depends on."""
        return self._origins(element)[0]

    def arrays_of(self, element: Element) -> frozenset[int]:
        """The ids of the arrays outside of fusions that an element is computed from."""
        return self._origins(element)[1]

    def _origins(self, element: Element) -> tuple[frozenset[int], frozenset[int]]:
        found: set[int] = set()
        arrays: set[int] = set()
        waiting, seen = [element], set[tuple[int, tuple[Index, ...]]]()
        while waiting:
            x = self.look(waiting.pop(), into_fusions=False)
            key = x.instruction.id, self.logical(x)
            if key in seen:
                continue
            seen.add(key)
            if x.opcode == "iota":
                found.update(self.atoms.resolved(x.indices[x.instruction.dimensions[0]]))
            elif x.opcode in ELEMENTWISE and not x.is_outside:
                waiting += self.operands(x)
            else:
                found.update(a for index in x.indices for a in self.atoms.resolved(index))
                if x.is_outside:
                    arrays.add(x.instruction.id)
                else:
                    arrays.update(y.id for y in x.scope.read_by(x.scope.ancestors(x.instruction)))
        return frozenset(found), frozenset(arrays)

    # --- sums and products ---------------------------------------------------------------------------------------

    def reduced(
        self, element: Element, over: Iterable[int], kind: str, rounding: Rounding | None = None
    ) -> Element | None:
        """What is reduced by an operation of a kind ("add", "maximum"), at `over` along what it is reduced over.

        XLA reduces in steps, windows first; that is one reduction. None if the element is no such reduction. With
        `rounding`, each step may round, as in `same`.
        """
        scope, x, index = element
        if x.opcode != "reduce" or len(x.operand_ids) != 2 or not self._applies(x, kind, rounding):
            return None
        if not self._starts_neutral(scope[x.operand_ids[1]], scope, kind):
            return None
        dims = list(x.dimensions)
        source = Element(scope, scope[x.operand_ids[0]], ())
        while (window := self._windows(source, dims, kind, rounding)) is not None:
            source = window
        sizes = list(source.instruction.shape.dimensions)
        if self.atoms.size(self.atoms.resolved(over)) != math.prod(sizes[i] for i in dims):
            return None
        parts = self.atoms.divided(over, [sizes[i] for i in dims])
        kept = iter(index)
        inner = tuple(parts[dims.index(i)] if i in dims else next(kept) for i in range(len(sizes)))
        return source._replace(indices=inner)

    def _windows(self, source: Element, dims: Sequence[int], kind: str, rounding: Rounding | None) -> Element | None:
        """What a reduction of windows reads, if each element is in one window, of `dims` alone."""
        while source.opcode in ("parameter", "fusion"):
            before = self.step(source)
            if before is None:
                return None
            source = before
        scope, x, _ = source
        if x.opcode != "reduce-window" or len(x.operand_ids) != 2 or not self._applies(x, kind, rounding):
            return None
        if not self._starts_neutral(scope[x.operand_ids[1]], scope, kind):
            return None
        for i, window in enumerate(x.window.dimensions):
            plain = window.window_dilation <= 1 and window.base_dilation <= 1 and not window.window_reversal
            if not plain or window.stride != window.size or min(window.padding_low, window.padding_high) < 0:
                return None
            if i not in dims and (window.size != 1 or window.padding_low or window.padding_high):
                return None
        return Element(scope, scope[x.operand_ids[0]], ())

    def _applies(self, x: Instruction, kind: str, rounding: Rounding | None) -> bool:
        computation = self.body.module.computation(x.called_computation_ids[0])
        by_id = {y.id: y for y in computation.instructions}

        def unrounded(here: Instruction) -> Instruction:
            while rounding is not None and here.opcode == "convert":
                before = by_id[here.operand_ids[0]]
                if not converts_floats(before, here):
                    break
                rounding(before, here)
                here = before
            return here

        here = unrounded(by_id[computation.root_id])
        if here.opcode != kind:
            return False
        parameters = [unrounded(by_id[number]) for number in here.operand_ids]
        return all(y.opcode == "parameter" for y in parameters) and len({y.id for y in parameters}) == 2

    def _starts_neutral(self, start: Instruction, scope: Scope, kind: str) -> bool:
        origin = self.look_through(Element(scope, start, ()), "convert")
        value = constant(origin.instruction)
        return value is not None and (value == 0 if kind == "add" else value == -math.inf)

    def factors(self, element: Element, over: Index) -> tuple[Element, Element]:
        """The operands of a dot, at `over` along what is summed."""
        scope, x, index = element
        numbers = x.dot_dimension_numbers
        lhs, rhs = (scope[number] for number in x.operand_ids)
        summed = numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions
        batch = numbers.lhs_batch_dimensions, numbers.rhs_batch_dimensions
        sizes = [lhs.shape.dimensions[i] for i in summed[0]]
        parts = self.atoms.divided(over, sizes)
        free = iter(index[len(batch[0]) :])
        found = []
        for side, operand in enumerate((lhs, rhs)):
            known = dict(zip(summed[side], parts, strict=True)) | dict(zip(batch[side], index, strict=False))
            rank = len(operand.shape.dimensions)
            found.append(Element(scope, operand, tuple(known[i] if i in known else next(free) for i in range(rank))))
        return found[0], found[1]

    def summed(self, dot: Instruction, scope: Scope) -> Index:
        """New atoms for what a dot sums over."""
        lhs = scope[dot.operand_ids[0]]
        return tuple(
            a
            for i in dot.dot_dimension_numbers.lhs_contracting_dimensions
            for a in self.atoms.new(lhs.shape.dimensions[i])
        )

    def identify(self, x: Element, y: Element, since: int) -> bool:
        """Makes atoms of an element, numbered from `since` on, those that make it the same as another one.

        Follows both to the arrays that they are made of, through the same operations: whether they are the same then
        is left to `same`. False if they are not made in the same way.
        """
        x, y = (self.unrounded(z, _ignore) for z in (x, y))
        a, b = x.instruction, y.instruction
        if a is b:
            return all(self.atoms.identify(i, j, since) for i, j in zip(x.indices, y.indices, strict=True))
        if a.opcode != b.opcode:
            return False
        if a.opcode in ("constant", "reduce"):  # the atoms of a sum are those of what else its row is made of
            return True
        if a.opcode == "iota":
            return self.atoms.identify(x.indices[a.dimensions[0]], y.indices[b.dimensions[0]], since)
        if a.opcode in ELEMENTWISE and len(a.operand_ids) == len(b.operand_ids):
            pairs = zip(self.operands(x), self.operands(y), strict=True)
        elif a.opcode == "dot":
            over, other = self.summed(a, x.scope), self.summed(b, y.scope)
            if self.atoms.size(over) != self.atoms.size(other):
                return False
            pairs = zip(self.factors(x, over), self.factors(y, other), strict=True)
        else:
            return False
        return all(self.identify(left, right, since) for left, right in pairs)

    # --- comparisons ---------------------------------------------------------------------------------------------

    def unrounded(self, element: Element, rounding: Rounding) -> Element:
        """What an element is the conversion of, from a float to a float."""
        x = self.look(element)
        while x.opcode == "convert":
            (before,) = self.operands(x)
            if not converts_floats(before.instruction, x.instruction):
                break
            rounding(before.instruction, x.instruction)
            x = self.look(before)
        return x

    def same(self, x: Element, y: Element, rounding: Rounding | None = None) -> bool:
        """Whether two elements have the same value, computed in the same way wherever.

        With `rounding`, conversions between floats are looked through, and given to it: what is converted, and the
        conversion.
        """
        x, y = (self.look(z) if rounding is None else self.unrounded(z, rounding) for z in (x, y))
        if x.instruction is y.instruction and self.logical(x) == self.logical(y):
            return True
        a, b = x.instruction, y.instruction
        if a.opcode != b.opcode or a.shape.element_type != b.shape.element_type:
            return False
        if a.opcode == "constant":
            return self.logical(x) == self.logical(y) and bool(a.literal == b.literal)
        if a.opcode == "iota":
            i, j = a.dimensions[0], b.dimensions[0]
            return self.atoms.resolved(x.indices[i]) == self.atoms.resolved(y.indices[j])
        if a.opcode in ELEMENTWISE:
            if a.comparison_direction != b.comparison_direction:
                return False
            pairs = zip(self.operands(x), self.operands(y), strict=True)
            return all(self.same(*pair, rounding) for pair in pairs)
        if a.opcode == "dynamic-slice":
            if self.logical(x) != self.logical(y) or list(a.shape.dimensions) != list(b.shape.dimensions):
                return False
            whole = tuple(self.atoms.new(size) for size in x.scope[a.operand_ids[0]].shape.dimensions)
            starts = ((),) * (len(a.operand_ids) - 1)
            of_x, of_y = (
                [Element(z.scope, z.scope[number], at) for number, at in zip(ids, (whole, *starts), strict=True)]
                for z, ids in ((x, a.operand_ids), (y, b.operand_ids))
            )
            return all(self.same(*pair) for pair in zip(of_x, of_y, strict=True))
        if a.opcode == "reduce":
            sizes = [x.scope[a.operand_ids[0]].shape.dimensions[i] for i in a.dimensions]
            over = tuple(atom for size in sizes for atom in self.atoms.new(size))
            for kind in ("add", "maximum"):
                left, right = (self.reduced(z, over, kind, rounding) for z in (x, y))
                if left is not None and right is not None:
                    return self.same(left, right, rounding)
            return False
        if a.opcode == "dot":
            if a.precision_config.algorithm != b.precision_config.algorithm:
                return False
            over, other = self.summed(a, x.scope), self.summed(b, y.scope)
            if self.atoms.size(over) != self.atoms.size(other):
                return False
            pairs = zip(self.factors(x, over), self.factors(y, over), strict=True)
            return all(self.same(*pair) for pair in pairs)
        return False


def _ignore(before: Instruction, convert: Instruction) -> None:
    """A rounding of no interest."""


def converts_floats(before: Instruction, convert: Instruction) -> bool:
    return {before.shape.element_type, convert.shape.element_type} <= _FLOATS


def memory_order(x: Instruction) -> Sequence[int]:
    """The dimensions of an array, the major one in memory first."""
    return list(x.shape.layout.minor_to_major)[::-1]


def constant(x: Instruction) -> float | None:
    """The value of a number without dimensions."""
    return hlo.number(x) if x.opcode == "constant" and not x.shape.dimensions else None
