"""What XLA demands of a module, checked before a changed one is given back to it.

XLA rejects a wrong module when it is too late to keep the old one: the program does not compile. These are the rules of
XLA's parser and verifier that a rewrite can break. A violation raises `Invalid`, and the module stays as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from jax_nano._core import custom_calls, hlo, native
from jax_nano._core.hlo import Computation, Instruction, Module

# Operations whose result has the dimensions of their operand.
_SAME_SHAPE: Final = frozenset(("convert", "copy"))

# Arrays in the description of an untyped call.
_DESCRIBED: Final = re.compile(rb" (lhs|rhs|out)=(\w+)\[([0-9,]*)\]")


class Invalid(Exception):
    """XLA would not take this module."""


def check(module: Module, program_shape: Sequence[Any]) -> None:
    """Raises Invalid if XLA would reject a module, or its `program_shape()` is another one."""
    seen: dict[int, Computation] = {}
    names: set[str] = set()  # of the whole module's instructions
    for computation in module.computations:
        if computation.id in seen:
            raise Invalid(f"two computations have the id {computation.id}")
        _check_computation(computation, seen, names)
        seen[computation.id] = computation
    if module.entry_id not in seen:
        raise Invalid("there is no entry computation")
    for call_free in module.called_from(hlo.is_one_function):
        for instruction in seen[call_free].instructions:
            if instruction.opcode == "custom-call" and instruction.custom_call_target.startswith("jax_nano"):
                raise Invalid(f"{instruction.name} is a call in a computation that XLA compiles into a function")
    now = module.program_shape()
    if len(now) != len(program_shape) or not all(map(hlo.same_shape, now, program_shape)):
        raise Invalid("the program has other parameters or another result")


def _check_computation(computation: Computation, callees: Mapping[int, Computation], names: set[str]) -> None:
    by_id: dict[int, Instruction] = {}
    numbers = []
    for x in computation.instructions:
        if x.id in by_id or x.name in names:
            raise Invalid(f"another instruction than one of {computation.name} has the id {x.id} or the name {x.name}")
        for operand in (*x.operand_ids, *x.control_predecessor_ids):
            if operand not in by_id:
                raise Invalid(f"{x.name} stands before its operand {operand}, or has none of that id")
        for callee in x.called_computation_ids:
            if callee not in callees:
                raise Invalid(f"{x.name} calls {callee}, which does not stand before {computation.name}")
        _check_shapes(x, [by_id[i] for i in x.operand_ids], [callees[i] for i in x.called_computation_ids])
        by_id[x.id] = x
        names.add(x.name)
        if x.opcode == "parameter":
            numbers.append(x.parameter_number)
    if sorted(numbers) != list(range(len(numbers))):
        raise Invalid(f"the parameters of {computation.name} are {numbers}")
    if computation.root_id not in by_id:
        raise Invalid(f"{computation.name} has no root")


def _check_shapes(x: Instruction, operands: list[Instruction], callees: list[Computation]) -> None:
    if x.opcode == "fusion":
        (callee,) = callees
        _check_call(x, operands, callee)
        _must_be(x, x.shape, _by_id(callee, callee.root_id).shape, "the result of its computation")
    elif x.opcode == "while":
        for callee in callees:  # body and condition
            _check_call(x, operands, callee)
        _must_be(x, x.shape, operands[0].shape, operands[0].name)
    elif x.opcode == "call":
        _check_call(x, operands, callees[0])
    elif x.opcode == "tuple":
        if len(operands) != len(x.shape.tuple_shapes):
            raise Invalid(f"{x.name} has {len(operands)} operands")
        for shape, operand in zip(x.shape.tuple_shapes, operands, strict=True):
            _must_be(x, shape, operand.shape, operand.name)
    elif x.opcode == "get-tuple-element":
        _must_be(x, x.shape, operands[0].shape.tuple_shapes[x.tuple_index], "the element of its operand")
    elif x.opcode == "bitcast":
        if _bytes(x) != _bytes(operands[0]):
            raise Invalid(f"{x.name} has another size than its operand")
    elif x.opcode in _SAME_SHAPE:
        if x.shape.dimensions != operands[0].shape.dimensions:
            raise Invalid(f"{x.name} has other dimensions than its operand")
    elif x.opcode == "custom-call" and x.constrain_layout:
        if len(x.operand_shapes_with_layout) != len(operands):
            raise Invalid(f"{x.name} has {len(operands)} operands")
        for shape, operand in zip(x.operand_shapes_with_layout, operands, strict=True):
            _must_be(x, shape, operand.shape, operand.name)
        if x.custom_call_api_version == custom_calls.STATUS_RETURNING and x.custom_call_target in native.UNTYPED_CALLS:
            _check_description(x, operands)


def _check_description(x: Instruction, operands: list[Instruction]) -> None:
    """An untyped call sees nothing of its buffers when it runs, so its description must be that of its arrays."""
    described = {
        name.decode(): (dtype.decode(), tuple(map(int, dims.split(b",") if dims else ())))
        for name, dtype, dims in _DESCRIBED.findall(x.backend_config)
    }
    want = [described.get("lhs"), described.get("rhs")]
    if (out := described.get("out")) is not None:
        want += [(out[0], out[1][-1:])] * (b" bias=1 " in x.backend_config)
        want += [out] * (b" residual=1 " in x.backend_config)
    if [*map(_described, operands), _described(x)] != [*want, out]:
        raise Invalid(f"the description of {x.name} is not that of its arrays")


def _described(x: Instruction) -> tuple[str, tuple[int, ...]] | None:
    array = hlo.array_of(x.shape)
    return (hlo.NAMES[array.dtype], array.dims) if array is not None and array.is_row_major else None


def _check_call(x: Instruction, operands: list[Instruction], callee: Computation) -> None:
    parameters = {y.parameter_number: y for y in callee.instructions if y.opcode == "parameter"}
    if len(parameters) != len(operands):
        raise Invalid(f"{x.name} gives {len(operands)} operands to {callee.name}, which has {len(parameters)}")
    for number, operand in enumerate(operands):
        _must_be(x, parameters[number].shape, operand.shape, operand.name)


def _must_be(x: Instruction, shape: Any, expected: Any, what: str) -> None:
    if not hlo.same_shape(shape, expected):
        raise Invalid(f"{x.name} has another shape than {what}")


def _bytes(x: Instruction) -> int:
    array = hlo.array_of(x.shape)
    return -1 if array is None else array.dtype.itemsize * math.prod(array.dims)


def _by_id(computation: Computation, number: int) -> Instruction:
    return next(x for x in computation.instructions if x.id == number)
