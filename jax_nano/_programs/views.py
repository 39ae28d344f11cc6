"""Arrays in an HLO module as they lie in memory, and the arrays that they are copies of.

XLA copies an operand of a product to bring its dimensions into the order that its own kernels read, and converts
bfloat16 to float32. A kernel of ours reads any order, and bfloat16: a view of the copy can be replaced by one of the
original. Where XLA fused the conversion to the end of a loop that computes something, the loop can be made to end
before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import contraction, hlo
from jax_nano._core.contraction import Dims
from jax_nano._core.hlo import Body, Instruction, Module
from jax_nano._programs import aliasing

# Operations that change neither values, but for rounding them, nor which element is which.
MOVES: Final = frozenset(("bitcast", "convert", "copy", "transpose"))


class View(NamedTuple):
    """An instruction's array in memory: row-major, with a label for each dimension.

    Its dtype may be one that the instruction's result was converted from at the end: `Body.narrow` makes it so.
    """

    instruction: Instruction
    dtype: np.dtype
    sizes: tuple[int, ...]
    labels: Dims

    @classmethod
    def of(cls, instruction: Instruction, labels: Dims) -> View | None:
        """A view, given labels of the dimensions as HLO counts them; None if it is not a plain array."""
        array = hlo.array_of(instruction.shape)
        if array is None:
            return None
        return cls(instruction, array.dtype, array.physical, contraction.permute(labels, array.major_to_minor))

    @property
    def is_its_shape(self) -> bool:
        """Whether the instruction's own shape is row-major and has these sizes."""
        array = hlo.array_of(self.instruction.shape)
        return array is not None and array.dims == self.sizes and array.is_row_major

    def logical_labels(self) -> Dims | None:
        """Labels of the dimensions as HLO counts them; None if they are other ones than in memory."""
        array = hlo.array_of(self.instruction.shape)
        if array is None or array.physical != self.sizes:
            return None
        return contraction.permute(self.labels, contraction.inverse(array.major_to_minor))


def sources(body: Body, view: View, products: Collection[int]) -> list[View]:
    """The view, then what it is a copy of, what that is a copy of, and so on, as far as this is known and safe.

    Args:
      body: where it is.
      view: of an operand of one of the products.
      products: ids of the instructions that may become calls.
    """
    found: list[View] = []
    here: View | None = view
    while here is not None:
        found.append(here)
        dtype = _narrower(body, here.instruction, products)
        if dtype is not None:
            found.append(here._replace(dtype=dtype))
        here = _source(body, here)
    return found


def _narrower(body: Body, loop: Instruction, products: Collection[int]) -> np.dtype | None:
    """The dtype of a loop that ends before its last conversion, if it can."""
    can_end = ends_by_widening(body, loop) and _only_for(products, body, loop)
    return before_conversion(body.module, loop) if can_end else None


def ends_by_widening(body: Body, instruction: Instruction) -> bool:
    """Whether an instruction is a loop that `narrow` can let end before its last operation."""
    if before_conversion(body.module, instruction) is None or body.is_awaited(instruction):
        return False
    return (
        aliasing.updated_operands(body.module, instruction, _end_before_conversion(body.module, instruction))
        is not None
    )


def narrow(body: Body, fusion: Instruction) -> Instruction:
    """Makes a loop end before its last operation, a conversion, which its users get; returns the loop.

    Where it then updates an operand in place, that is a copy: others may still read the operand.
    """
    updated = aliasing.updated_operands(body.module, fusion, _end_before_conversion(body.module, fusion))
    assert updated is not None  # `sources` has made sure
    for position in updated:
        body.copy_operand(fusion, position)
    return body.narrow(fusion)


def convert_last(body: Body) -> None:
    """Lets loops that widen integers and then see them as another shape, for products, do the first of these last.

    XLA writes vectors of bytes, as a program's quantised activations are, so before it multiplies them as int32.
    """
    for fusion in body.instructions:
        if fusion.opcode != "fusion" or fusion.fusion_kind != "kLoop" or fusion.output_operand_aliasing:
            continue
        if not any(user.opcode == "dot" for user in body.users(fusion)):
            continue
        computation = body.module.computation(fusion.called_computation_ids[0])
        by_id = {x.id: x for x in computation.instructions}
        steps = [by_id[computation.root_id]]
        while steps[-1].opcode == "bitcast":
            steps.append(by_id[steps[-1].operand_ids[0]])
        convert = steps[-1]
        if len(steps) < 2 or convert.opcode != "convert":
            continue
        narrow, wide = (hlo.DTYPES.get(x.shape.element_type) for x in (by_id[convert.operand_ids[0]], convert))
        read = [number for x in computation.instructions for number in x.operand_ids]
        if narrow is None or wide is None or any(read.count(x.id) != 1 for x in steps[1:]):
            continue
        if not (np.issubdtype(narrow, np.integer) and np.can_cast(narrow, wide, "safe") and narrow != wide):
            continue
        if any(x.shape.element_type != convert.shape.element_type for x in steps):
            continue
        # Each place gets the operation of the one after it; names and operands stay.
        for here, after in zip(steps[:0:-1], steps[-2::-1], strict=True):
            here.opcode = "bitcast"
            here.shape.CopyFrom(after.shape)
            here.shape.element_type = hlo.ELEMENT_TYPES[narrow]
        steps[0].opcode = "convert"
        body.module.is_changed = True


def _end_before_conversion(module: Module, fusion: Instruction) -> Instruction:
    computation = module.computation(fusion.called_computation_ids[0])
    by_id = {x.id: x for x in computation.instructions}
    return by_id[by_id[computation.root_id].operand_ids[0]]


def before_conversion(module: Module, instruction: Instruction) -> np.dtype | None:
    """The dtype that a loop's result has before its last operation, if that converts it to a wider one."""
    if instruction.opcode != "fusion" or instruction.fusion_kind != "kLoop" or instruction.output_operand_aliasing:
        return None
    computation = module.computation(instruction.called_computation_ids[0])
    by_id = {x.id: x for x in computation.instructions}
    root = by_id[computation.root_id]
    if root.opcode != "convert":
        return None
    before = by_id[root.operand_ids[0]]
    source, result = hlo.array_of(before.shape), hlo.array_of(root.shape)
    if source is None or result is None or before.opcode == "parameter":
        return None
    is_widening = source.dtype != result.dtype and np.can_cast(source.dtype, result.dtype, "safe")
    return source.dtype if is_widening and _keeps_memory_order(root, source, result) else None


def _only_for(products: Collection[int], body: Body, instruction: Instruction) -> bool:
    return all(
        user.id in products or (user.opcode == "bitcast" and _only_for(products, body, user))
        for user in body.users(instruction)
    )


def before_widening(body: Body, instruction: Instruction, dtype: np.dtype) -> Instruction | None:
    """An array of this dtype: the instruction's, or one from which it was converted without loss."""
    array = hlo.array_of(instruction.shape)
    if array is not None and array.dtype == dtype:
        return instruction
    if array is None or instruction.opcode != "convert" or not np.can_cast(dtype, array.dtype, "safe"):
        return None
    (source,) = body.operands(instruction)
    before = hlo.array_of(source.shape)
    return source if before is not None and before == array._replace(dtype=dtype) else None


def _source(body: Body, view: View) -> View | None:
    instruction = view.instruction
    if len(instruction.operand_ids) != 1 or instruction.control_predecessor_ids:
        return None
    (operand,) = body.operands(instruction)
    moves = moves_of(body.module, instruction)
    if moves is None or (instruction.opcode != "bitcast" and not aliasing.keeps_its_value(body, operand)):
        return None
    return through(moves, view, operand)


def through(moves: Sequence[Instruction], view: View, operand: Instruction) -> View | None:
    """The view of the first move's operand for `view`, which is of the last move's result; None if there is none.

    Args:
      moves: operations, each on the result of the one before; conversions must be lossless.
      view: of the last one's result, or of `operand` if there are none.
      operand: the first one's operand, which may stand outside the fusion that the moves are in.
    """
    here: View | None = view
    for i in reversed(range(len(moves))):
        before = moves[i - 1] if i else operand
        here = None if here is None else _before(moves[i], before, here._replace(instruction=moves[i]))
    return None if here is None else here._replace(instruction=operand)


def _before(move: Instruction, operand: Instruction, view: View) -> View | None:
    result, source = hlo.array_of(move.shape), hlo.array_of(operand.shape)
    if result is None or source is None or not np.can_cast(source.dtype, result.dtype, "safe"):
        return None
    if _keeps_memory_order(move, source, result):
        return view._replace(instruction=operand, dtype=source.dtype)
    dims = tuple(move.dimensions) if move.opcode == "transpose" else tuple(range(len(result.dims)))
    return _reordered(view, operand, contraction.inverse(dims))


def _after(move: Instruction, view: View) -> View | None:
    source, result = hlo.array_of(view.instruction.shape), hlo.array_of(move.shape)
    if source is None or result is None:
        return None
    if _keeps_memory_order(move, source, result):
        return view._replace(instruction=move, dtype=result.dtype)
    return _reordered(view, move, tuple(move.dimensions if move.opcode == "transpose" else range(len(source.dims))))


def _reordered(view: View, instruction: Instruction, order: Dims) -> View | None:
    """The view of another array with the same elements; None if there is none.

    A dimension of the view may be several dimensions of the arrays: attention's heads and their width are one dimension
    of a product. They must then be adjacent in both, in the same order.

    Args:
      view: of an array.
      instruction: makes the other array, whose dimension i is dimension order[i] of the first one.
      order: of the dimensions as HLO counts them.
    """
    labels = view.logical_labels()
    if labels is not None:
        return View.of(instruction, contraction.permute(labels, order))
    before, after = hlo.array_of(view.instruction.shape), hlo.array_of(instruction.shape)
    parts = None if before is None else _parts(view.sizes, before.physical)
    if before is None or after is None or parts is None:
        return None
    position = contraction.inverse(before.major_to_minor)  # in memory, of each dimension as HLO counts them
    rest = [x for i in after.major_to_minor if (x := position[order[i]]) in parts]
    found = [i for i, size in enumerate(view.sizes) if size == 1]
    while rest:
        dim = parts[rest[0]]
        together = [x for x in parts if parts[x] == dim]
        if rest[: len(together)] != together:
            return None
        found.append(dim)
        del rest[: len(together)]
    sizes, labels = (contraction.permute(x, tuple(found)) for x in (view.sizes, view.labels))
    return View(instruction, after.dtype, sizes, labels)


def _parts(sizes: Dims, physical: Dims) -> dict[int, int] | None:
    """For each dimension in memory that is longer than 1, the dimension of a view of these sizes that it is a part of.

    None if one of them is a part of several.
    """
    parts: dict[int, int] = {}
    dims = (i for i, size in enumerate(sizes) if size != 1)
    dim, rest = -1, 1
    for i, size in enumerate(physical):
        if size == 1:
            continue
        if rest == 1:
            dim = next(dims)
            rest = sizes[dim]
        if size == 0 or rest % size:
            return None
        rest //= size
        parts[i] = dim
    return parts


def _keeps_memory_order(move: Instruction, source: hlo.Array, result: hlo.Array) -> bool:
    if move.opcode == "bitcast":
        return source.dtype == result.dtype
    return move.opcode == "convert" and source.major_to_minor == result.major_to_minor


def copies(body: Body, view: View) -> list[View]:
    """The view, then the copy or conversion that is its only user, then the only one of that, and so on.

    A copy that is rounded and then converted back counts as one of the dtype that it was rounded to.
    """
    found, here = [view], view
    while (after := _copy(body, here)) is not None:
        here = after
        if here.instruction.opcode != "bitcast":
            found.append(here)
    return found


def _copy(body: Body, view: View) -> View | None:
    instruction = view.instruction
    users = body.users(instruction)
    if len(users) != 1 or instruction.control_predecessor_ids or body.is_awaited(instruction):
        return None
    (user,) = users
    moves = moves_of(body.module, user)
    if moves is None or list(user.operand_ids) != [instruction.id] or user.control_predecessor_ids:
        return None
    if user.opcode != "bitcast" and not aliasing.has_memory_of_its_own(body, user):
        return None
    here, values = view, view.dtype
    for move in moves:
        after = _after(move, here)
        if after is None:
            return None
        if not np.can_cast(values, after.dtype, "safe"):
            if values != view.dtype or values != hlo.dtype_of(view.instruction):
                return None  # rounded twice
            values = after.dtype
        here = after
    return here._replace(instruction=user, dtype=values)


def moves_of(module: Module, instruction: Instruction) -> Sequence[Instruction] | None:
    """The moves from an instruction's operand to its result, if it is nothing else."""
    if instruction.opcode in MOVES:
        return [instruction]
    if instruction.opcode != "fusion" or instruction.fusion_kind != "kLoop" or instruction.output_operand_aliasing:
        return None
    computation = module.computation(instruction.called_computation_ids[0])
    by_id = {x.id: x for x in computation.instructions}
    parameter, moves = chain(by_id, by_id[computation.root_id])
    return moves if parameter.opcode == "parameter" and len(moves) + 1 == len(by_id) else None


def chain(by_id: Mapping[int, Instruction], last: Instruction) -> tuple[Instruction, list[Instruction]]:
    """The instruction that the moves ending with `last` begin with, and these moves in order."""
    moves = []
    while last.opcode in MOVES:
        moves.append(last)
        last = by_id[last.operand_ids[0]]
    return last, moves[::-1]
