"""Arrays in an HLO module as they lie in memory, and the ones that they are copies of.

XLA copies an operand of a product to bring its dimensions into the order that its own kernels read, and converts
bfloat16 to float32. A kernel of ours reads any order, and bfloat16: a view of the copy can be one of what was copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from jax_nano import _hlo, _shapes
from jax_nano._hlo import Body, Instruction, Module
from jax_nano._shapes import Dims

# Operations that change neither values nor which element is which.
_MOVES: Final = frozenset(("convert", "copy", "transpose"))

# Operations that read their operands, and neither overwrite them nor pass them on. Elementwise ones stand in fusions.
_READERS: Final = frozenset(
    (
        *("broadcast", "concatenate", "convert", "convolution", "copy", "dot", "dynamic-slice", "gather", "pad"),
        *("reduce", "reduce-window", "slice", "transpose"),
    )
)
_IN_PLACE: Final = frozenset(("dynamic-update-slice", "scatter"))


class View(NamedTuple):
    """An instruction's array in memory: row-major, with a label for each dimension."""

    instruction: Instruction
    dtype: np.dtype
    sizes: tuple[int, ...]
    labels: Dims

    @classmethod
    def of(cls, instruction: Instruction, labels: Dims) -> View | None:
        """A view, given labels of the dimensions as HLO counts them; None if it is not a plain array."""
        array = _hlo.array_of(instruction.shape)
        if array is None:
            return None
        return cls(instruction, array.dtype, array.physical, _shapes.permute(labels, array.major_to_minor))

    @property
    def is_its_shape(self) -> bool:
        """Whether the instruction's own shape is row-major and has these sizes."""
        array = _hlo.array_of(self.instruction.shape)
        rank = len(self.sizes)
        return array is not None and array.dims == self.sizes and array.major_to_minor == tuple(range(rank))

    def logical_labels(self) -> Dims | None:
        """Labels of the dimensions as HLO counts them; None if they are other ones than in memory."""
        array = _hlo.array_of(self.instruction.shape)
        if array is None or array.physical != self.sizes:
            return None
        return _shapes.permute(self.labels, _shapes.inverse(array.major_to_minor))


def sources(module: Module, body: Body, view: View) -> list[View]:
    """The view, what it is a copy of, what that is a copy of, and so on, as far as it can be told and is safe."""
    found = [view]
    while (source := _source(module, body, found[-1])) is not None:
        found.append(source)
    return found


def _source(module: Module, body: Body, view: View) -> View | None:
    instruction = view.instruction
    if len(instruction.operand_ids) != 1 or instruction.control_predecessor_ids:
        return None
    (operand,) = body.operands(instruction)
    if instruction.opcode == "bitcast":  # the same memory
        array = _hlo.array_of(operand.shape)
        same = array is not None and array.dtype == view.dtype
        return view._replace(instruction=operand) if same else None
    labels = view.logical_labels()
    moves = _moves(module, instruction)
    if labels is None or moves is None or not _stays(module, body, operand):
        return None
    for move in reversed(moves):
        if move.opcode == "transpose":
            labels = _shapes.before_transpose(labels, tuple(move.dimensions))
    source = View.of(operand, labels)
    return source if source is not None and np.can_cast(source.dtype, view.dtype, "safe") else None


def copy_of(module: Module, body: Body, view: View) -> View | None:
    """What nothing but a copy is made of; converted, if it is."""
    instruction = view.instruction
    users = body.users(instruction)
    if len(users) != 1 or instruction.control_predecessor_ids or body.is_awaited(instruction):
        return None
    (user,) = users
    if list(user.operand_ids) != [instruction.id] or user.control_predecessor_ids:
        return None
    labels, moves = view.logical_labels(), _moves(module, user)
    if labels is None or moves is None:
        return None
    for move in moves:
        if move.opcode == "transpose":
            labels = _shapes.permute(labels, tuple(move.dimensions))
    return View.of(user, labels)


def _moves(module: Module, instruction: Instruction) -> Sequence[Instruction] | None:
    """The operations on the way from an instruction's operand to its result, if it is a copy of some kind.

    Conversions are lossless, but for one at the end.
    """
    if instruction.opcode in _MOVES:
        return [instruction]
    if instruction.opcode != "fusion" or instruction.fusion_kind != "kLoop" or instruction.output_operand_aliasing:
        return None
    moves = _chain(module.computation(instruction.called_computation_ids[0]))
    if moves is None:
        return None
    arrays = [_hlo.array_of(x.shape) for x in moves[:-1]]
    for before, after in itertools.pairwise(arrays):
        if before is None or after is None or not np.can_cast(before.dtype, after.dtype, "safe"):
            return None
    return moves[1:]


def _chain(computation: _hlo.Computation) -> list[Instruction] | None:
    """A computation's instructions from its parameter to its root, if each but the first moves the one before."""
    by_id = {x.id: x for x in computation.instructions}
    chain = [by_id[computation.root_id]]
    while chain[-1].opcode in _MOVES:
        chain.append(by_id[chain[-1].operand_ids[0]])
    return chain[::-1] if chain[-1].opcode == "parameter" and len(chain) == len(by_id) else None


def _stays(module: Module, body: Body, instruction: Instruction) -> bool:
    """Whether an array may be read later than it is now: nothing writes another value into its buffer.

    XLA has settled already which operations work in place, and ordered them after all who read; a new reader has no
    place in that order. So an array qualifies that only readers use, and that is no loop's variable.
    """
    if not all(_reads(module, body, instruction, user) for user in body.users(instruction)):
        return False
    if instruction.opcode == "bitcast":
        return _stays(module, body, body.operands(instruction)[0])
    if instruction.opcode == "parameter":
        return body.is_entry
    if instruction.opcode != "get-tuple-element":
        return True
    (source,) = body.operands(instruction)
    index = instruction.tuple_index
    for other in body.users(source):  # other names of the same array
        if other.opcode != "get-tuple-element":
            return False
        if other.tuple_index == index and not all(_reads(module, body, other, user) for user in body.users(other)):
            return False
    if source.opcode != "parameter":
        return True
    root = body.root
    return body.is_entry or (
        root.opcode == "tuple" and index < len(root.operand_ids) and root.operand_ids[index] == instruction.id
    )


def _reads(module: Module, body: Body, instruction: Instruction, user: Instruction) -> bool:
    if user.opcode in _READERS:
        return True
    if user.opcode == "tuple":
        return user.id == body.root.id
    if user.opcode == "bitcast":
        return all(_reads(module, body, user, x) for x in body.users(user))
    if user.opcode == "custom-call":
        return not user.output_operand_aliasing
    if user.opcode != "fusion" or user.output_operand_aliasing:
        return False
    fused = module.computation(user.called_computation_ids[0])
    return not any(x.opcode in _IN_PLACE for x in fused.instructions)


def combinations(lhs: Sequence[View], rhs: Sequence[View], out: Sequence[View]) -> Iterator[tuple[View, View, View]]:
    """Ways to read and write, those that save most first."""
    for c in reversed(out):
        for a in reversed(lhs):
            for b in reversed(rhs):
                yield a, b, c
