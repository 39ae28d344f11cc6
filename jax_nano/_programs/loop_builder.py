"""Loops that XLA is to compile, made of elements: arrays in another order, dtype or size, and what is computed of them.

A loop has one index for each atom of its result, in the order of memory. Arrays are brought into that order inside of
it, where XLA reads them element by element, so that nothing but the result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from jax_nano._core import hlo
from jax_nano._core.hlo import Body, Computation, Instruction
from jax_nano._programs import aliasing, fusions
from jax_nano._programs.elements import ELEMENTWISE, Element, Index, Reader, constant

# What is too much work to compute once more, or does not compute a value of its own.
_NOT_TWICE: Final = frozenset((*fusions.COSTLY, *fusions.IN_PLACE, "fusion", "get-tuple-element", "tuple"))


class CannotBuild(Exception):
    """Why a loop cannot compute an element."""


class LoopBuilder:
    """A loop in the making. Numbers stand for its operations."""

    def __init__(self, body: Body, reader: Reader, atoms: Index) -> None:
        self._body, self._reader = body, reader
        self._atoms = atoms
        self._dims = tuple(reader.atoms.size((a,)) for a in atoms)
        self._parts: list[Instruction] = []
        self._operands: list[Instruction | Callable[[], Instruction]] = []
        self._known: dict[tuple[int, tuple[Index, ...]], int] = {}

    # --- operations ------------------------------------------------------------------------------------------------

    def array(self, instruction: Instruction, in_memory: Index) -> int:
        """An array that other instructions compute, given the atoms of its dimensions in the order of memory."""
        return self._read(instruction, instruction, in_memory)

    def _read(self, like: Instruction, operand: Instruction | Callable[[], Instruction], in_memory: Index) -> int:
        """An array of the shape of `like`, which may be made only when the loop is."""
        layers = [self._reader.layer_of(a) for a in in_memory]
        runs = [a for a, layer in zip(in_memory, layers, strict=True) if layer is None]
        if len(set(in_memory)) != len(in_memory) or not set(runs) <= set(self._atoms):
            raise CannotBuild("it is read along a diagonal or where the loop does not go")
        parameter = self._add("parameter", like.shape.element_type, ())
        part = self._parts[parameter]
        part.shape.CopyFrom(like.shape)
        part.parameter_number = len(self._operands)
        self._operands.append(operand)
        kind = like.shape.element_type
        sizes = [self._reader.atoms.size((a,)) for a in in_memory]
        number = self._add("bitcast", kind, [parameter], sizes)
        if len(runs) != len(in_memory):
            starts = [self._scalar(0 if layer is None else layer) for layer in layers]
            cut = [size if layer is None else 1 for size, layer in zip(sizes, layers, strict=True)]
            number = self._add("dynamic-slice", kind, [number, *starts], cut)
            self._parts[number].dynamic_slice_sizes.extend(cut)
            sizes = [size for size, layer in zip(sizes, layers, strict=True) if layer is None]
            number = self._add("bitcast", kind, [number], sizes)
        order = sorted(range(len(runs)), key=lambda i: self._atoms.index(runs[i]))
        if order != list(range(len(order))):
            number = self._add("transpose", kind, [number], [sizes[i] for i in order])
            self._parts[number].dimensions.extend(order)
        return self._broadcast(number, [self._atoms.index(runs[i]) for i in order])

    def _scalar(self, value: Element | int) -> int:
        """A number of int32 or int64 that the whole loop shares."""
        if isinstance(value, int):
            number = self._add("constant", hlo.S32, (), ())
            hlo.set_number(self._parts[number], value)
            return number
        parameter = self._add("parameter", value.instruction.shape.element_type, (), ())
        self._parts[parameter].parameter_number = len(self._operands)
        self._operands.append(lambda: scalar(self._body, self._reader, value, hlo.S32))
        return parameter

    def constant(self, value: float, kind: int) -> int:
        number = self._add("constant", kind, (), ())
        hlo.set_number(self._parts[number], value)
        return self._broadcast(number, ())

    def operation(self, opcode: str, kind: int, *operands: int) -> int:
        """An elementwise operation that needs nothing but its operands."""
        return self._add(opcode, kind, operands)

    def compare(self, direction: str, *operands: int) -> int:
        number = self._add("compare", hlo.PRED, operands)
        self._parts[number].comparison_direction = direction
        return number

    def converted(self, number: int, kind: int) -> int:
        return number if self._parts[number].shape.element_type == kind else self._add("convert", kind, [number])

    def sum(self, number: int, count: int) -> int:
        """The sum over the last `count` dimensions of the loop, whose result has the others."""
        if not count:
            return number
        kind = self._parts[number].shape.element_type
        start = self._add("constant", kind, (), ())
        hlo.set_number(self._parts[start], 0)
        rank = len(self._dims) - count
        total = self._add("reduce", kind, [number, start], self._dims[:rank])
        part = self._parts[total]
        part.dimensions.extend(range(rank, len(self._dims)))
        part.called_computation_ids.append(self._body.module.add_region("add", kind, self._body.computation).id)
        return total

    def element(self, element: Element) -> int:
        """What an element is, computed anew from the arrays outside of fusions."""
        x = self._origin(element)
        key = x.instruction.id, self._reader.logical(x)
        if key not in self._known:
            self._known[key] = self._element(x)
        return self._known[key]

    def _origin(self, element: Element) -> Element:
        """What an element is a copy of, or the last array on the way there that keeps its value."""
        found: Element | None = None
        here: Element | None = element
        while here is not None:
            element = here
            is_array = here.is_outside and here.opcode != "constant"
            if is_array and aliasing.keeps_its_value(self._body, here.instruction):
                found = here
            here = self._reader.step(here, into_fusions=False)
        is_array = element.is_outside and element.opcode != "constant"
        return found if found is not None and is_array else element

    def _element(self, x: Element) -> int:
        instruction, kind = x.instruction, x.instruction.shape.element_type
        value = constant(instruction)
        if value is not None:
            return self.constant(value, kind)
        if x.is_outside:
            if not aliasing.keeps_its_value(self._body, instruction):
                raise CannotBuild("an array that it is made of is overwritten")
            return self.array(instruction, self._reader.in_memory(x))
        if x.opcode == "iota":
            return self._iota(self._reader.logical(x)[instruction.dimensions[0]], kind)
        if x.opcode not in ELEMENTWISE:
            return self._read(instruction, self._taken_out(x), self._reader.in_memory(x))
        operands = [self.element(y) for y in self._reader.operands(x)]
        number = self._add(x.opcode, kind, operands)
        part = self._parts[number]
        shape = type(part.shape)()
        shape.CopyFrom(part.shape)
        part.CopyFrom(instruction)
        part.ClearField("operand_ids")
        part.operand_ids.extend(operands)
        part.shape.CopyFrom(shape)
        return number

    def _taken_out(self, x: Element) -> Callable[[], Instruction]:
        """How to make an array of what an operation inside of a fusion computes."""
        parts = x.scope.ancestors(x.instruction)
        for part in parts:
            if part.opcode in _NOT_TWICE:
                raise CannotBuild(f"it is computed by {part.opcode}")
        operands = x.scope.read_by(parts)
        if not all(aliasing.keeps_its_value(self._body, y) for y in operands):
            raise CannotBuild("an array that it is made of is overwritten")

        def make() -> Instruction:
            computation, _ = self._body.module.copy_of(x.scope.computation, parts, x.instruction)
            return self._body.loop(computation, operands, fusions.loop_config(x.instruction.shape))

        return make

    def _iota(self, index: Index, kind: int) -> int:
        if not set(index) <= set(self._atoms):
            raise CannotBuild("it counts along where the loop does not go")
        total: int | None = None
        for i, atom in enumerate(index):
            number = self._add("iota", kind, ())
            self._parts[number].dimensions.append(self._atoms.index(atom))
            stride = self._reader.atoms.size(index[i + 1 :])
            if stride != 1:
                number = self.operation("multiply", kind, number, self.constant(stride, kind))
            total = number if total is None else self.operation("add", kind, total, number)
        return self.constant(0, kind) if total is None else total

    def _broadcast(self, number: int, dims: Sequence[int]) -> int:
        if len(dims) == len(self._dims) and dims:
            return number
        if not dims and not self._dims:
            return number
        kind = self._parts[number].shape.element_type
        broadcast = self._add("broadcast", kind, [number])
        self._parts[broadcast].dimensions.extend(dims)
        return broadcast

    def _add(self, opcode: str, kind: int, operands: Sequence[int], dims: Sequence[int] | None = None) -> int:
        part = hlo.new_instruction(opcode)
        hlo.set_shape(part.shape, kind, self._dims if dims is None else dims)
        part.operand_ids.extend(operands)
        self._parts.append(part)
        return len(self._parts) - 1

    # --- the loop --------------------------------------------------------------------------------------------------

    def build(self, result: int, dims: Sequence[int]) -> Instruction:
        """A new instruction of the body: the loop, whose result has these row-major sizes."""
        shape = hlo.new_instruction("bitcast").shape
        hlo.set_shape(shape, self._parts[result].shape.element_type, dims)
        return self._body.loop(self._fused(result, shape), self._read_arrays(), fusions.loop_config(shape))

    def read_as_it_is(self, result: int) -> Instruction | None:
        """The array without dimensions that a result is, if nothing is computed of it."""
        part = self._parts[result]
        while part.opcode == "bitcast":
            part = self._parts[part.operand_ids[0]]
        if part.opcode != "parameter" or part.shape.dimensions:
            return None
        operand = self._operands[part.parameter_number]
        return None if callable(operand) else operand

    def become(self, result: int, instruction: Instruction) -> None:
        """Makes an instruction of the body the loop; its shape stays."""
        shape = instruction.shape
        config = fusions.loop_config(shape)
        self._body.become_loop(instruction, self._fused(result, shape), self._read_arrays(), config)

    def _read_arrays(self) -> list[Instruction]:
        return [x() if callable(x) else x for x in self._operands]

    def _fused(self, result: int, shape: Any) -> Computation:
        root = hlo.new_instruction("bitcast")
        root.shape.CopyFrom(shape)
        root.operand_ids.append(result)
        return self._body.module.add_fused(self._body.computation, [*self._parts, root])


def scalar(body: Body, reader: Reader, value: Element | int | None, kind: int) -> Instruction:
    """An instruction of a body whose result is a number: an element of its own dtype, or a number of dtype `kind`.

    Raises:
      CannotBuild: as `LoopBuilder.element`.
    """
    loop = LoopBuilder(body, reader, ())
    if not isinstance(value, Element):
        return loop.build(loop.constant(value or 0, kind), ())
    result = loop.element(value)
    array = loop.read_as_it_is(result)
    return loop.build(result, ()) if array is None else array


def can_build(body: Body, reader: Reader, value: Element) -> bool:
    """Whether `scalar` can make an instruction for an element."""
    try:
        LoopBuilder(body, reader, ()).element(value)
    except CannotBuild:
        return False
    return True
