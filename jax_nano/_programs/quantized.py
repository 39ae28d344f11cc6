"""Products with quantised weights in HLO: which dot is one of `(q - zero) * scale`, and what a call reads instead.

XLA makes a float matrix of weights of 8 or 4 bits, in a loop of its own or in the one that multiplies. The operand of a
dot is read as the value of one of its elements, through fusions and whatever only moves elements (`elements`), and
compared with that formula. Accepted are

* q of a dtype in the spec's WEIGHTS, converted to floats without loss, stored along K or along columns;
* a zero point that is subtracted from integers before they are scaled: integers of 8 or 4 bits, or a constant;
* any number of scales, multiplied or divided by, that are the same for all of K or for groups of neighbours in K;
* slices of such arrays, with one index of the major dimension: layers of a stack, of which the call reads one where it
  lies. A slice of the float matrix is one of weights and scales;
* no scales: then the product is scaled afterwards, and a scale a column becomes a part of the call, as an
  epilogue does (`epilogues`).

Scales are what the program multiplies with, roundings included. The matrix itself is not rounded: a program of bfloat16
or float16 rounds it, which counts as little as other roundings on the way to such a result. Where x and the result have
more digits, a rounding of the matrix is one that the program asked for, and the product stays.

It must be worth it: a matrix that something else reads has to be made anyway. The rules of `aliasing` hold for all that
a call reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import hlo, spec
from jax_nano._core.hlo import Body, Instruction
from jax_nano._ops.quantized_lowering import has_kernel
from jax_nano._programs import aliasing, epilogues
from jax_nano._programs.elements import SLICES, Element, Index, Reader, Unknown, constant, converts_floats
from jax_nano._programs.loop_builder import can_build
from jax_nano._programs.views import View

_FLOAT32: Final = np.dtype(np.float32)
_NARROW: Final = (hlo.BFLOAT16, np.dtype(np.float16))
_FLOATS: Final = (_FLOAT32, *_NARROW)
_MOST_USERS: Final = 3  # that a result is followed through

# PrimitiveTypes.
_S8: Final = 2
_U8: Final = 6
_S16: Final = 3
_S32: Final = hlo.S32
_S64: Final = 5
_S4: Final = 21
_U4: Final = 22

# In which integers q may be held, and a zero point subtracted, without wrapping around.
_WIDER: Final = {_S4: (_S8, _S16, _S32), _U4: (_S8, _U8, _S16, _S32), _S8: (_S16, _S32), _U8: (_S16, _S32)}
_INTEGERS: Final = (_S16, _S32)
_BYTES: Final = (_S8, _U8, _S4, _U4)
_FLOAT_KINDS: Final = tuple(hlo.ELEMENT_TYPES[x] for x in _FLOATS)
_NAMES: Final = {x.number: name for name, x in spec.WEIGHTS.items()}

# PrecisionConfig.Algorithm: unset, and float32's.
_ALGORITHMS: Final = (0, 11)


class NotQuantized(Exception):
    """Why a product with weights that look quantised stays as it is."""


class NotSimilar(Exception):
    """Something that does not even look like weights or a product of them."""


class Scale(NamedTuple):
    """A factor of the weights."""

    element: Element
    divides: bool


class Zero(NamedTuple):
    """A zero point: an element of integers of 8 or 4 bits, or a number."""

    element: Element | None
    number: int


class Weights(NamedTuple):
    """A float matrix as `(q - zero) * scales`."""

    q: Element  # of an array outside of fusions
    name: str  # of q's dtype
    scales: tuple[Scale, ...]
    zero: Zero | None
    narrowed: frozenset[np.dtype]  # what the matrix is rounded to on the way


class Found(NamedTuple):
    """A product with quantised weights, and what a call in its place reads."""

    reader: Reader
    dot: Instruction  # the instruction that the dot is, or is in
    root: Instruction  # becomes the call
    result: Element  # of what the call writes, before an epilogue
    x: Element
    weights: Weights
    rows: Index
    k: Index
    layer: Index  # the atom of weights in a stack, or none
    groups: Index  # the first ones of k
    columns: Index
    along_k: bool
    dtype: np.dtype  # of the result
    epilogue: epilogues.Found | None
    between: frozenset[int]  # ids of what makes the float matrix, outside of fusions

    @property
    def copied(self) -> bool:
        """Whether the result has another order in memory than the call's."""
        return self.reader.in_memory(self.result) != self.rows + self.columns

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, K, groups and columns."""
        m, k, groups, n = (self.reader.atoms.size(x) for x in (self.rows, self.k, self.groups, self.columns))
        return m, k, groups, n

    @property
    def of_scales(self) -> Index:
        """The atoms of scales and zero points in the order that the call reads."""
        return self.columns + self.groups if self.along_k else self.groups + self.columns


def find(body: Body, instruction: Instruction) -> Found | str | None:
    """The product with quantised weights that a dot, or a fusion with one, is; why it stays if it looks like one."""
    reason: str | None = None
    for root in reversed(_results(body, instruction)):
        for with_epilogue in (True, False):
            search = _Search(body, root, instruction, with_epilogue=with_epilogue)
            try:
                return search.found()
            except NotQuantized as error:
                reason = reason or str(error)
            except Unknown:
                reason = reason or "its arrays are cut in more than one way"
            except NotSimilar:
                pass
            if search.epilogue is None:
                break
    return reason


def _results(body: Body, instruction: Instruction) -> list[Instruction]:
    """An instruction, and what follows it alone without computing anything else but a rounding."""
    found = [instruction]
    while len(found) <= _MOST_USERS:
        here = found[-1]
        users = body.users(here)
        if len(users) != 1 or body.is_awaited(here):
            break
        (user,) = users
        if user.opcode not in ("bitcast", "convert", "copy", "fusion", "transpose") or user.control_predecessor_ids:
            break
        found.append(user)
    return found


class _Search:
    """The comparison of one result with the formula."""

    def __init__(self, body: Body, root: Instruction, instruction: Instruction, *, with_epilogue: bool) -> None:
        self._body, self._root, self._instruction = body, root, instruction
        self._reader = Reader(body)
        self._exact = _FLOAT32  # a dtype in which x's values lose nothing
        self.epilogue = _epilogue_after(body, root) if with_epilogue else None

    def found(self) -> Found:
        reader, root = self._reader, self._root
        array = hlo.array_of(root.shape)
        if array is None or array.dtype not in _FLOATS or 0 in array.dims or root.output_operand_aliasing:
            raise NotSimilar
        result = reader.element(root)
        narrowed: set[np.dtype] = set()
        dot = reader.unrounded(result, lambda before, after: _note(narrowed, before, after))
        where = dot.instruction if dot.scope.fusion is None else dot.scope.fusion
        if dot.opcode != "dot" or where.id != self._instruction.id or not narrowed <= {array.dtype}:
            raise NotSimilar
        over = reader.summed(dot.instruction, dot.scope)
        x, weights = self._operands(dot, over)
        if dot.instruction.precision_config.algorithm not in _ALGORITHMS or dot.instruction.dot_sparsity:
            raise NotQuantized("the product asks for an algorithm of its own")
        arrays = self._arrays(x)
        if any(y.instruction.id == weights.q.instruction.id for y in arrays):
            raise NotQuantized("x and the weights are one array")
        # Everything has been walked through: atoms are as small as they will be.
        in_q, k = reader.in_memory(weights.q), set(reader.atoms.resolved(over))
        layer, in_q = _layer_first(reader, in_q)
        columns = tuple(a for a in in_q if a not in k)
        of_k = tuple(a for a in in_q if a in k)
        in_result = reader.in_memory(result)
        if set(of_k) != k or len(set(in_q)) != len(in_q) or not of_k or not set(columns) <= set(in_result):
            raise NotQuantized("its weights are no matrix of the product's dimensions")
        along_k = in_q == columns + of_k
        if not along_k and in_q != of_k + columns:
            raise NotQuantized("its weights lie in memory in an order that no kernel reads")
        rows = tuple(a for a in in_result if a not in columns)
        if set(rows) & k or len(set(in_result)) != len(in_result):
            raise NotSimilar
        groups = self._groups(weights, of_k, columns)
        x = self._first(arrays, rows, of_k)
        epilogue = self.epilogue
        if epilogue is not None and epilogue.columns is not None and weights.scales:
            raise NotQuantized("its weights have scales, and so has the result")
        found = Found(
            *(reader, self._instruction, root if epilogue is None else epilogue.instruction, result, x, weights, rows),
            *(of_k, layer, groups, columns, along_k, array.dtype if epilogue is None else epilogue.dtype, epilogue),
            self._between(x, weights),
        )
        if weights.narrowed and self._exact not in _NARROW and found.dtype not in _NARROW:
            (dtype, *_) = sorted(map(str, weights.narrowed))
            raise NotQuantized(f"its weights are rounded to {dtype}")
        self._check_kernel(found)
        return found

    # --- operands ------------------------------------------------------------------------------------------------

    def _operands(self, dot: Element, over: Index) -> tuple[Element, Weights]:
        """What is multiplied, and the weights."""
        factors = self._reader.factors(dot, over)
        reason: NotQuantized | None = None
        found = []
        for i in (1, 0):
            try:
                found.append((factors[1 - i], weights_of(self._reader, factors[i])))
            except NotQuantized as error:
                reason = error
            except NotSimilar:
                pass
        if not found:
            raise reason or NotSimilar
        if len(found) == 2:  # both are quantised: the larger one's bytes count
            size = [_count(weights.q.instruction) for _, weights in found]
            return found[0] if size[0] >= size[1] else found[1]
        return found[0]

    def _arrays(self, element: Element) -> list[Element]:
        """The arrays that x can be read from without loss, the origin first."""
        found: list[Element] = []
        here: Element | None = element
        self._exact = hlo.DTYPES.get(element.instruction.shape.element_type, _FLOAT32)
        while here is not None:
            x = here.instruction
            if here.is_outside and x.opcode != "constant":
                array = hlo.array_of(x.shape)
                if array is not None and array.dtype in _FLOATS and self._may_read(x):
                    found.append(here)
            before = self._reader.step(here)
            if before is None and x.opcode == "convert":
                (source,) = self._reader.operands(here)
                if converts_floats(source.instruction, x) and np.can_cast(
                    hlo.dtype_of(source.instruction), hlo.dtype_of(x), "safe"
                ):
                    before, self._exact = source, hlo.dtype_of(source.instruction)
            here = before
        if not found:
            raise NotQuantized("x may be overwritten before it is read, or is no array of floats")
        return found[::-1]

    def _may_read(self, x: Instruction) -> bool:
        """Whether the call may read an array that the dot's instruction may have read before."""
        direct = x.id in self._instruction.operand_ids
        at_once = self._root.id == self._instruction.id and self.epilogue is None
        return (direct and at_once) or aliasing.keeps_its_value(self._body, x)

    def _first(self, arrays: Sequence[Element], rows: Index, k: Index) -> Element:
        """The array to read x from: one that lies in the call's order, if there is one."""
        for x in arrays:
            index = self._reader.in_memory(x)
            if len(set(index)) != len(index) or not set(index) <= {*rows, *k}:
                raise NotQuantized("x has dimensions of the weights")
        ordered = [x for x in arrays if self._reader.in_memory(x) == rows + k]
        return (ordered or arrays)[0]

    def _groups(self, weights: Weights, k: Index, columns: Index) -> Index:
        reader = self._reader
        elements = [x.element for x in weights.scales]
        if weights.zero is not None and weights.zero.element is not None:
            elements.append(weights.zero.element)
        atoms = frozenset[int]().union(*(reader.atoms_of(x) for x in elements))
        atoms = frozenset(a for a in atoms if reader.layer_of(a) is None)
        if not atoms <= {*k, *columns}:
            raise NotQuantized("its scales have dimensions that its weights have not")
        if any(weights.q.instruction.id in reader.arrays_of(x) for x in elements):
            raise NotQuantized("its scales are computed from its weights")
        count = max((i + 1 for i, a in enumerate(k) if a in atoms), default=0)
        return k[:count]

    def _between(self, x: Element, weights: Weights) -> frozenset[int]:
        """What is computed from the weights on the way to the dot, outside of fusions."""
        q, known = weights.q.instruction.id, {x.instruction.id: False, weights.q.instruction.id: True}

        def depends(number: int, depth: int) -> bool:
            if number not in known:
                known[number] = False
                if depth < 12:
                    parts = [depends(y, depth + 1) for y in self._body[number].operand_ids]
                    known[number] = any(parts)
            return known[number]

        for number in self._instruction.operand_ids:
            depends(number, 0)
        return frozenset(number for number, yes in known.items() if yes and number != q)

    def _check_kernel(self, found: Found) -> None:
        m, k, groups, n = found.sizes
        bits = spec.WEIGHTS[found.weights.name].bits
        if min(m, k, n) < 1 or k < 2:
            raise NotQuantized("it is an outer product" if k == 1 else "it is empty")
        if bits < 8 and (k % 2 or n % 2):
            raise NotQuantized("rows of weights end inside a byte")
        if found.weights.zero is not None and not found.weights.name.startswith(("int", "uint")):
            raise NotQuantized("zero points are subtracted from weights that are no integers")
        if found.epilogue is not None and (
            found.copied or not self._is_last_column(found) or found.epilogue.dtype not in _FLOATS
        ):
            raise NotQuantized("what follows has another order than its result")
        x = hlo.NAMES[hlo.dtype_of(found.x.instruction)]
        zero = "" if found.weights.zero is None else "int8"
        names = (x, found.weights.name, "float32", zero, hlo.NAMES[found.dtype])
        if not has_kernel(n, k, groups, found.along_k, *names):
            size = k // groups
            raise NotQuantized(f"no kernel for {', '.join(names[:2])} and groups of {size}")

    def _is_last_column(self, found: Found) -> bool:
        """Whether the columns are the last dimension of the result, along which an epilogue's vectors lie."""
        dims = list(self._root.shape.dimensions)
        return bool(dims) and dims[-1] == self._reader.atoms.size(found.columns)


def _epilogue_after(body: Body, root: Instruction) -> epilogues.Found | None:
    array = hlo.array_of(root.shape)
    if array is None or not array.is_row_major or not array.dims:
        return None
    view = View(root, array.dtype, array.dims, tuple(range(len(array.dims))))
    return epilogues.epilogue_of(body, view, columns=True)


# --- weights ------------------------------------------------------------------------------------------------------


def weights_of(reader: Reader, element: Element) -> Weights:
    """A float element as one of quantised weights.

    Raises:
      NotSimilar, NotQuantized: it is none, or its array of weights cannot be read.
    """
    scales: list[Scale] = []
    narrowed: set[np.dtype] = set()
    zero: Zero | None = None
    refusal: NotQuantized | None = None  # to be raised if these are weights at all
    here = reader.look(element)
    while True:
        kind = here.instruction.shape.element_type
        if here.opcode == "convert":
            (before,) = reader.operands(here)
            source = before.instruction.shape.element_type
            if source in _NAMES:
                if kind not in (*_FLOAT_KINDS, *_WIDER.get(source, ())):
                    raise NotSimilar
                q = _array_of(reader, before)
                if refusal is not None:
                    raise refusal
                return Weights(q, _NAMES[q.instruction.shape.element_type], tuple(scales), zero, frozenset(narrowed))
            if source in _FLOAT_KINDS and kind in _FLOAT_KINDS:
                _note(narrowed, before.instruction, here.instruction)
            elif source in _INTEGERS and kind in _FLOAT_KINDS:
                narrowed |= {hlo.BFLOAT16} & {hlo.dtype_of(here.instruction)}  # differences have up to 9 bits
            elif (source, kind) != (_S16, _S32):
                raise NotSimilar
            here = reader.look(before)
        elif here.opcode in ("multiply", "divide") and kind in _FLOAT_KINDS:
            if zero is not None:
                refusal = NotQuantized("something is added to its weights after they are scaled")
            inner, other = _larger(reader, here)
            scales.append(Scale(other, here.opcode == "divide"))
            here = reader.look(inner)
        elif here.opcode in ("add", "subtract") and kind in (*_FLOAT_KINDS, *_INTEGERS):
            inner, other = _larger(reader, here)
            if zero is not None:
                refusal = NotQuantized("more than one zero point is subtracted from its weights")
            zero = Zero(None, 0)
            try:
                zero = _zero(reader, other, adds=here.opcode == "add")
            except NotQuantized as error:
                refusal = error
            here = reader.look(inner)
        elif here.opcode in SLICES and (whole := reader.sliced(here)) is not None:
            here = reader.look(whole)
        else:
            raise NotSimilar


def _layer_first(reader: Reader, in_memory: Index) -> tuple[Index, Index]:
    """The atom of a layer that comes first in memory, if there is one, and the others."""
    count = 1 if in_memory and reader.layer_of(in_memory[0]) is not None else 0
    return in_memory[:count], in_memory[count:]


def _is_layer(reader: Reader, x: Element) -> bool:
    """Whether an element is of a stack whose layers lie in memory one by one, and which one can be told in time."""
    layer, others = _layer_first(reader, reader.in_memory(x))
    if not layer or any(reader.layer_of(a) is not None for a in others):
        return False
    number = reader.layer_of(layer[0])
    if not isinstance(number, Element):
        return True
    return number.instruction.shape.element_type in (_S32, _S64) and can_build(reader.body, reader, number)


def _larger(reader: Reader, operation: Element) -> tuple[Element, Element]:
    """The operand of an operation that depends on more, then the other one."""
    first, other = reader.operands(operation)
    sizes = [reader.atoms.size(reader.atoms_of(x)) for x in (first, other)]
    if sizes[0] >= sizes[1]:
        return first, other
    if operation.opcode in ("divide", "subtract"):
        raise NotSimilar
    return other, first


def _zero(reader: Reader, element: Element, *, adds: bool) -> Zero:
    number = constant(reader.look_through(element, "convert").instruction)
    if number is not None:  # XLA adds minus a constant
        number = -number if adds else number
        if number != round(number) or not -128 <= number <= 255:
            raise NotQuantized("its zero points are no integers of 8 bits")
        return Zero(None, int(number))
    here = reader.look(element)
    while here.opcode == "convert" and not adds:
        (before,) = reader.operands(here)
        source = before.instruction.shape.element_type
        if source in _BYTES:  # which all wider dtypes hold exactly
            return Zero(before, 0)
        if source not in (*_FLOAT_KINDS, *_INTEGERS):
            break
        here = reader.look(before)
    raise NotQuantized("its zero points are no integers of 8 bits")


def _array_of(reader: Reader, element: Element) -> Element:
    """The array outside of fusions that holds an element of weights, as narrow as it is anywhere."""
    found: Element | None = None
    is_there = is_layer = False
    here: Element | None = element
    while here is not None:
        far = reader.look(here)
        for x in (reader.look(here, into_fusions=False), far):
            if x.is_outside and x.opcode != "constant" and _is_readable(x.instruction):
                is_there = True
                can_be_read = aliasing.keeps_its_value(reader.body, x.instruction)
                found = x if can_be_read and (not is_layer or _is_layer(reader, x)) else found
        if far.opcode in SLICES:
            is_layer, here = True, reader.sliced(far)
        elif far.opcode == "convert":
            here = _before_conversion(reader, far)
        else:
            break
    if found is None:
        raise NotQuantized(
            "its weights may be overwritten before they are read" if is_there else "its weights are computed on the way"
        )
    return found


def _before_conversion(reader: Reader, convert: Element) -> Element | None:
    """What weights were before a conversion to a dtype that can hold them, or to what they were before such a one."""
    kind = convert.instruction.shape.element_type
    (here,) = reader.operands(convert)
    source = here.instruction.shape.element_type
    if kind in _WIDER.get(source, ()):
        return here
    if source not in _WIDER.get(kind, _FLOAT_KINDS if kind in _NAMES else ()):
        return None
    while True:  # XLA widens int4 and float8 in front of a loop, and narrows a slice of them in the loop
        here = reader.look(here)
        if here.opcode == "convert":
            (before,) = reader.operands(here)
            return before if before.instruction.shape.element_type == kind else None
        whole = reader.sliced(here)
        if whole is None:
            return None
        here = whole


def _is_readable(x: Instruction) -> bool:
    """Whether an array is a dense one of quantised weights."""
    if x.shape.element_type not in _NAMES:
        return False
    shape, bits = x.shape, spec.WEIGHTS[_NAMES[x.shape.element_type]].bits
    if any(shape.is_dynamic_dimension) or shape.layout.tiles or shape.layout.memory_space:
        return False
    if shape.layout.element_size_in_bits not in ((bits,) if bits < 8 else (0, bits)):
        return False
    return len(shape.layout.minor_to_major) == len(shape.dimensions) and 0 not in shape.dimensions


def _count(x: Instruction) -> int:
    return math.prod(x.shape.dimensions)


def _note(narrowed: set[np.dtype], before: Instruction, convert: Instruction) -> None:
    after = hlo.dtype_of(convert)
    if not np.can_cast(hlo.dtype_of(before), after, "safe"):
        narrowed.add(after)


class Origin(NamedTuple):
    """How an array is made of quantised weights, outside of fusions."""

    q: Instruction
    others: tuple[Instruction, ...]  # what is read besides
    steps: tuple[Instruction, ...]  # operands before their users; the last one is the array


_STEPS: Final = ("bitcast", "convert", "copy", "transpose")
_MOST_STEPS: Final = 6


def origin_of(body: Body, matrix: Instruction) -> Origin | None:
    """The origin of a float matrix or stack of them, or of integers that were wider than weights, if everything that it
    is made of keeps its value.
    """
    reader = Reader(body)
    try:
        array = hlo.array_of(matrix.shape)
        if array is None:
            return None
        element = reader.element(matrix)
        if array.dtype in _FLOATS:
            q = weights_of(reader, element).q.instruction
        elif matrix.shape.element_type in (_S8, _U8):
            q = _array_of(reader, element).instruction
        else:
            return None
    except (NotSimilar, NotQuantized, Unknown):
        return None
    steps: list[Instruction] = []

    def depends(x: Instruction) -> bool:
        """Whether x is made of q; appends what makes it to the steps."""
        if x.id == q.id or any(x.id == y.id for y in steps):
            return True
        is_step = x.opcode in _STEPS or (x.opcode == "fusion" and x.fusion_kind == "kLoop")
        if not is_step or math.prod(x.shape.dimensions) != math.prod(matrix.shape.dimensions):
            return False
        made = [depends(y) for y in body.operands(x)]  # all of them: each appends its steps
        if not any(made):
            return False
        steps.append(x)
        return True

    if not depends(matrix) or not 1 <= len(steps) <= _MOST_STEPS:
        return None
    if any(x.control_predecessor_ids or x.output_operand_aliasing for x in steps):
        return None
    inside = {q.id, *(x.id for x in steps)}
    others = {y.id: y for x in steps for y in body.operands(x) if y.id not in inside}
    if any(x.opcode == "constant" or hlo.array_of(x.shape) is None for x in others.values()):
        return None
    if not all(aliasing.keeps_its_value(body, x) for x in (q, *others.values())):
        return None
    return Origin(q, tuple(others.values()), tuple(steps))


def made_again(body: Body, origin: Origin, arrays: Sequence[Instruction]) -> Instruction:
    """The matrix, made by new instructions of a body from arrays in the place of q and the others."""
    (_, first), *_ = found = list(zip((origin.q, *origin.others), arrays, strict=True))
    known = {x.id: array for x, array in found}
    made = first
    for step in origin.steps:
        made = body.like(step, [known[number] for number in step.operand_ids], near=first)
        known[step.id] = made
        if step.opcode == "fusion":
            computation = body.module.computation(step.called_computation_ids[0])
            made.called_computation_ids[:] = [body.module.copy_for(body.computation, computation).id]
    return made


def arrays_to_read(found: Found) -> Iterator[Element]:
    """The arrays that scales could be read from as they are, the nearest first; none if there are several scales."""
    if len(found.weights.scales) != 1 or found.weights.scales[0].divides:
        return
    reader = found.reader
    here: Element | None = found.weights.scales[0].element
    while here is not None:
        x = here.instruction
        if here.is_outside and x.opcode != "constant":
            yield here
        before = reader.step(here)
        if before is None and x.opcode in SLICES:
            before = reader.sliced(here)
        if before is None and x.opcode == "convert":
            (source,) = reader.operands(here)
            if converts_floats(source.instruction, x) and np.can_cast(
                hlo.dtype_of(source.instruction), hlo.dtype_of(x), "safe"
            ):
                before = source
        here = before
