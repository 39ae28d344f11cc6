"""Loops of an HLO module, and which elements of their state nothing writes.

If the body of a `while` returns an element of its state unchanged, that element is one value in one buffer: the initial
value, what body and condition read, and what is read after the loop. XLA makes no copy of it. So such an element may be
replaced, and its array read elsewhere, as long as everything that uses it in the loop and after it only reads it.
Elements that other computations pass on (a `call`, a `conditional`, the result of an outer loop) do not count as only
read, because their readers are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax_nano._core.hlo import Body, Computation, Instruction, Module

OnlyReads = Callable[[Body, Instruction, Instruction], bool]
"""Whether, in a computation, an instruction's result is only read by one of its users."""


class Loop(NamedTuple):
    """A `while`, and the computations that it repeats."""

    instruction: Instruction
    body: Computation
    condition: Computation

    @classmethod
    def of(cls, module: Module, instruction: Instruction) -> Loop | None:
        """The loop that an instruction is, if it has a state and a body of the usual form; None if not."""
        if instruction.opcode != "while" or len(instruction.called_computation_ids) != 2:
            return None
        loop = cls(instruction, *(module.computation(x) for x in instruction.called_computation_ids))
        elements = len(instruction.shape.tuple_shapes)
        roots = [x for x in loop.body.instructions if x.id == loop.body.root_id]
        if not elements or [(x.opcode, len(x.operand_ids)) for x in roots] != [("tuple", elements)]:
            return None
        return loop


def state_of(body: Body) -> Instruction:
    """The parameter of a loop's body or condition."""
    (parameter,) = body.parameters
    return parameter


def elements_of(body: Body, state: Instruction, index: int) -> list[Instruction]:
    """The instructions that take an element out of a tuple in a computation."""
    return [x for x in body.users(state) if x.opcode == "get-tuple-element" and x.tuple_index == index]


def unchanged(body: Body) -> set[int]:
    """The elements of its state that a loop's body returns unchanged."""
    state = state_of(body)
    found = set()
    for index, x in enumerate(body.operands(body.root)):
        if x.opcode == "get-tuple-element" and x.tuple_index == index and list(x.operand_ids) == [state.id]:
            found.add(index)
    return found


def only_read(module: Module, bodies: Mapping[int, Body], reads: OnlyReads) -> dict[int, frozenset[int]]:
    """Of each loop of a module, by its id: the elements that nothing writes.

    Args:
      module: the module.
      bodies: its computations by id, but for those of fusions. Its `only_read` is filled on the way.
      reads: decides about all users but the states of inner loops.
    """
    found = module.only_read
    for computation in module.computations:  # loops inside come before the loop around them
        body = bodies.get(computation.id)
        for instruction in computation.instructions if body is not None else ():
            loop = Loop.of(module, instruction)
            if body is not None and loop is not None:
                found[instruction.id] = frozenset(_elements(body, loop, bodies, reads))
    return found


def _elements(around: Body, loop: Loop, bodies: Mapping[int, Body], reads: OnlyReads) -> set[int]:
    body, condition = bodies[loop.body.id], bodies[loop.condition.id]
    places = [(around, loop.instruction), (body, state_of(body)), (condition, state_of(condition))]
    if any(x.opcode != "get-tuple-element" for where, state in places for x in where.users(state)):
        return set()  # the state as a whole goes somewhere else

    def is_read(where: Body, state: Instruction, index: int) -> bool:
        for element in elements_of(where, state, index):
            for user in where.users(element):
                if user.id == where.root.id and where is body:
                    if any(x == element.id and i != index for i, x in enumerate(user.operand_ids)):
                        return False
                elif (user.id == where.root.id and not where.is_entry) or not reads(where, element, user):
                    return False
        return True

    return {i for i in unchanged(body) if all(is_read(where, state, i) for where, state in places)}
