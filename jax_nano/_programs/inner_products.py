"""Turns XLA's products of two vectors into dots again.

XLA writes the product of two vectors as an elementwise multiplication and several reductions, each of 32 elements to
one. For bytes that are summed in 32 bits that takes 80 times as long as a kernel (10^7 of them on two cores: 39 ms
against 0.5). Where there is a kernel for such a product, the last reduction becomes a fusion of a dot with moves of its
operands, as XLA's own dots are; the reductions before it then have no user and are removed.

Only integers: their sum does not depend on the order of additions. Floats YNNPACK sums in one pass, at the speed of
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import hlo
from jax_nano._core.hlo import Body, Instruction, Module
from jax_nano._programs import aliasing, fusions
from jax_nano._programs.fusions import Source

_SUMS: Final = ("reduce", "reduce-window")


class _Operation(NamedTuple):
    """An operation that stands alone, or alone in a loop but for constants and bitcasts of its result."""

    instruction: Instruction
    operands: Sequence[Instruction]  # in the computation around it; those that are constants may be in the loop


def restore(module: Module, declines: fusions.Declines) -> None:
    """Makes dots of those products of vectors for which there are kernels."""
    for body in module.bodies("reduce", "fusion"):
        candidates = [x for x in body.instructions if x.opcode in ("reduce", "fusion") and _is_integer(x)]
        for instruction in candidates:
            last = _sum(body, instruction)
            if last is not None and last.instruction.opcode == "reduce":
                _restore(body, instruction, last, partial(declines, body.computation))
        if candidates:
            body.commit()


def _restore(
    body: Body,
    instruction: Instruction,
    last: _Operation,
    declines: Callable[[Instruction, Sequence[Source]], str | None],
) -> None:
    summed = set(last.instruction.dimensions)
    here = last.operands[0]
    while (step := _sum(body, here)) is not None:
        if step.instruction.opcode != "reduce-window" or not _adds_up(step.instruction, summed):
            return
        here = step.operands[0]
    if here.opcode != "fusion" or here.fusion_kind != "kLoop" or here.output_operand_aliasing:
        return
    inner = body.module.computation(here.called_computation_ids[0])
    by_id = {x.id: x for x in inner.instructions}
    product = by_id[inner.root_id]
    if product.opcode != "multiply":
        return
    dot = _dot(product, last.instruction, summed)
    sources = [fusions.before_moves(by_id, by_id[number])[0] for number in product.operand_ids]
    operands = body.operands(here)
    if any(x.instruction.opcode != "parameter" for x in sources) or declines(dot, sources) is not None:
        return
    # The operands are now read at the last reduction, later than the multiplication was.
    if not all(aliasing.keeps_its_value(body, x) for x in operands):
        return
    new, _ = body.module.copy_of(inner, list(inner.instructions), product)
    root = next(x for x in new.instructions if x.id == new.root_id)
    number, name, read = root.id, root.name, list(root.operand_ids)
    root.CopyFrom(dot)
    root.id, root.name = number, name
    root.operand_ids[:] = read
    body.module.set_parameters(new)
    parameters = [x.parameter_number for x in inner.instructions if x.opcode == "parameter"]
    call = body.fusion(new, [operands[i] for i in parameters], dot)
    call.fusion_kind = "kLoop"
    body.set_operands(instruction, [call])
    hlo.become_bitcast(instruction)


def _dot(product: Instruction, total: Instruction, summed: set[int]) -> Instruction:
    """The dot that equals the sum of an elementwise product."""
    dot = type(product)()
    dot.CopyFrom(total)
    for field in ("dimensions", "called_computation_ids"):
        dot.ClearField(field)
    dot.opcode = "dot"
    dot.operand_ids[:] = product.operand_ids
    numbers = dot.dot_dimension_numbers
    for i in range(len(product.shape.dimensions)):
        sides = (
            (numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions)
            if i in summed
            else (numbers.lhs_batch_dimensions, numbers.rhs_batch_dimensions)
        )
        for side in sides:
            side.append(i)
    dot.precision_config.operand_precision.extend((0, 0))
    return dot


def _sum(body: Body, instruction: Instruction) -> _Operation | None:
    """The reduction of an instruction, if it is a sum that starts from zero."""
    operation = _alone(body, instruction)
    if operation is None or operation.instruction.opcode not in _SUMS or len(operation.operands) != 2:
        return None
    start = operation.operands[1]
    if start.opcode != "constant" or not _is_integer(start) or hlo.integer(start) != 0:
        return None
    applied = body.module.computation(operation.instruction.called_computation_ids[0]).instructions
    return operation if [x.opcode for x in applied] == ["parameter", "parameter", "add"] else None


def _alone(body: Body, instruction: Instruction) -> _Operation | None:
    if instruction.opcode != "fusion":
        return _Operation(instruction, body.operands(instruction))
    if instruction.fusion_kind != "kLoop" or instruction.output_operand_aliasing:
        return None
    computation = body.module.computation(instruction.called_computation_ids[0])
    by_id = {x.id: x for x in computation.instructions}
    root = by_id[computation.root_id]
    while root.opcode == "bitcast":
        root = by_id[root.operand_ids[0]]
    outer, operands = body.operands(instruction), []
    for number in root.operand_ids:
        x = by_id[number]
        if x.opcode not in ("parameter", "constant"):
            return None
        operands.append(outer[x.parameter_number] if x.opcode == "parameter" else x)
    return _Operation(root, operands)


def _adds_up(step: Instruction, summed: set[int]) -> bool:
    """Whether every element is in exactly one window, and windows extend only along dimensions that are summed over."""
    for i, window in enumerate(step.window.dimensions):
        plain = window.window_dilation <= 1 and window.base_dilation <= 1 and not window.window_reversal
        if not plain or window.stride != window.size or min(window.padding_low, window.padding_high) < 0:
            return False
        if i not in summed and (window.size != 1 or window.padding_low or window.padding_high):
            return False
    sizes = [x.size for x in step.window.dimensions]
    return math.prod(sizes) > 1


def _is_integer(instruction: Instruction) -> bool:
    dtype = hlo.DTYPES.get(instruction.shape.element_type)
    return dtype is not None and np.issubdtype(dtype, np.integer)
