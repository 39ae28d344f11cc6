"""Which values of an HLO module share memory, and what a rewrite may therefore do.

XLA has inserted its copies before it calls the hook, and assigns buffers after it. But what must share a buffer is
settled when the hook is called:

* an operation that works in place has its result in the buffer of the operand that it updates: `dynamic-update-slice`,
  `scatter`, and a fusion that ends in one of them and updates one of the fusion's own parameters;
* a `while` keeps each element of its state in one buffer: the initial value, the body's parameter, the body's root and
  the result; `call` and `conditional` pass buffers on in the same way;
* a donated parameter of the program and the result that takes it over, and a custom call's `output_operand_aliasing`.

Where two values of one buffer were alive at the same time, XLA has inserted a copy. It has *not* done so for readers
and updates that a rewrite adds. All other sharing is decided afterwards, from how long values live in the module that
the hook returns, and is safe. So there are three rules, each with a function here that must allow a rewrite:

1. `keeps_its_value`, if an array is read later than the program read it, or by a new reader: nothing writes to the
   array's buffer as long as the program may run.
2. `has_memory_of_its_own`, if a call writes a result that the program computed after it had read the call's operands:
   no operand may lie in the result's buffer.
3. `updated_operands`, if a fusion is made to end earlier: if it then ends in an update in place, it must update a copy,
   as others may still read the array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from jax_nano._core.hlo import Body, Instruction, Module

# Operations that read their operands, and neither overwrite them nor pass them on. Elementwise ones stand in fusions.
_READERS: Final = frozenset(
    (
        *("broadcast", "concatenate", "convert", "convolution", "copy", "dot", "dynamic-slice", "gather", "pad"),
        *("reduce", "reduce-window", "slice", "transpose"),
    )
)
_IN_PLACE: Final = frozenset(("dynamic-update-slice", "scatter"))
_SAME_MEMORY: Final = frozenset(("bitcast", "reshape"))
# What their results share memory with is decided in the computations that they call, or by who started them.
_OF_UNKNOWN_MEMORY: Final = frozenset(
    ("call", "conditional", "while", "async-done", "copy-done", "optimization-barrier")
)


def keeps_its_value(body: Body, instruction: Instruction) -> bool:
    """Whether an array may be read later than it is now: nothing writes another value into its buffer.

    XLA has ordered operations that work in place after all readers of what they overwrite; a new reader is not in that
    order. So all users of the array must only read it, and where its buffer is that of a loop's variable or of a
    donated argument, the array must be what is left in it.
    """
    if not all(only_reads(body, instruction, user) for user in body.users(instruction)):
        return False
    if instruction.opcode == "bitcast":
        return keeps_its_value(body, body.operands(instruction)[0])
    if instruction.opcode == "get-tuple-element":
        (source,) = body.operands(instruction)
        for other in body.users(source):  # other names of the same array
            if other.opcode != "get-tuple-element":
                return False
            if _is_same(body, other, instruction) and not all(only_reads(body, other, x) for x in body.users(other)):
                return False
    return _is_left_in(body, instruction, instruction)


def _is_left_in(body: Body, place: Instruction, value: Instruction) -> bool:
    """Whether no array but `value` is stored in the memory of `place`, which is `value` or what `value` updates."""
    if place.opcode in _SAME_MEMORY:
        return _is_left_in(body, body.operands(place)[0], value)
    if place.opcode == "parameter":
        paths = body.module.results_in(place.parameter_number) if body.is_entry else [()]
        return paths is not None and all(_is_result(body, path, value) for path in paths)
    if place.opcode == "get-tuple-element":
        (source,) = body.operands(place)
        if source.opcode == "parameter":
            if body.is_entry:
                return source.parameter_number not in body.module.donated
            return _is_result(body, (place.tuple_index,), value)
        if source.opcode == "while":
            (state,) = body.operands(source)
            return state.opcode == "tuple" and _is_left_in(body, body.operands(state)[place.tuple_index], value)
        operands = _operands_updated_by(body, source, place.tuple_index)
    else:
        operands = _operands_updated_by(body, place, 0)
    return operands is not None and all(_is_left_in(body, x, value) for x in operands)


def _operands_updated_by(body: Body, instruction: Instruction, index: int) -> list[Instruction] | None:
    """The operands in whose memory an instruction stores its result, or an element of it; None: any of them."""
    operands = body.operands(instruction)
    if instruction.opcode == "scatter":
        return operands[index : index + 1]
    if instruction.opcode == "dynamic-update-slice":
        return operands[:1]
    if instruction.opcode == "custom-call":
        return None if instruction.output_operand_aliasing else []
    if instruction.opcode in _OF_UNKNOWN_MEMORY:
        return None
    if instruction.opcode != "fusion":
        return []
    if instruction.output_operand_aliasing:
        return None
    by_id, ends = _ends(body.module, instruction)
    return [operands[i] for i in _updated_parameters(by_id, ends[index])]


def _is_result(body: Body, path: Sequence[int], value: Instruction) -> bool:
    """Whether an element of a computation's result is an array of it."""
    result = body.root
    for index in path:
        if result.opcode != "tuple" or index >= len(result.operand_ids):
            return False  # also of a branch, which is given what it reads and not what it returns
        result = body.operands(result)[index]
    while result.opcode in _SAME_MEMORY:
        (result,) = body.operands(result)
    return _is_same(body, result, value)


def _is_same(body: Body, first: Instruction, second: Instruction) -> bool:
    """Whether two instructions are one, or are the same element of one tuple."""
    if first.id == second.id:
        return True
    both = first, second
    if any(x.opcode != "get-tuple-element" for x in both) or first.tuple_index != second.tuple_index:
        return False
    return first.operand_ids[0] == second.operand_ids[0]


def has_memory_of_its_own(body: Body, instruction: Instruction) -> bool:
    """Whether no other value lies in an instruction's buffer, so that a call may write it while it reads its operands.

    A loop's variable and its next value have one buffer, and so have a donated argument and the result that is stored
    in it. For XLA the old value was dead when the new one is computed; but a call that also does what follows a product
    reads the product's operands at that time.
    """
    users = body.users(instruction)
    is_result = instruction.id == body.root.id or any(user.opcode == "tuple" for user in users)
    if is_result and not (body.is_entry and not body.module.donated):
        return False
    return all(
        has_memory_of_its_own(body, user) if user.opcode == "bitcast" else only_reads(body, instruction, user)
        for user in users
    )


def updated_operands(module: Module, fusion: Instruction, end: Instruction) -> list[int] | None:
    """Positions of the operands that a fusion would update in place if it ended with `end`, an instruction of its own.

    None if it could not work in place correctly: if it also reads the updated array in another way, when some elements
    have been overwritten already, or updates it in a way that is not known here.
    """
    computation = module.computation(fusion.called_computation_ids[0])
    by_id = {x.id: x for x in computation.instructions}
    updated = _updated_parameters(by_id, end)
    if len(updated) > 1:
        return None  # a scatter
    parameters = {x.id for x in computation.instructions if x.opcode == "parameter" and x.parameter_number in updated}
    readers = [x for x in computation.instructions for operand in x.operand_ids if operand in parameters]
    return updated if len(readers) <= 1 else None


def _behind_views(by_id: Mapping[int, Instruction], instruction: Instruction) -> Instruction:
    while instruction.opcode in _SAME_MEMORY:
        instruction = by_id[instruction.operand_ids[0]]
    return instruction


def only_reads(body: Body, instruction: Instruction, user: Instruction) -> bool:
    """Whether a user only reads an array."""
    if user.opcode in _READERS:
        return True
    if user.opcode == "tuple":
        return user.id == body.root.id or _is_only_carried(body, instruction, user)
    if user.opcode == "bitcast":
        return all(only_reads(body, user, x) for x in body.users(user))
    if user.opcode == "custom-call":
        return not user.output_operand_aliasing
    if user.opcode != "fusion" or user.output_operand_aliasing:
        return False
    by_id, ends = _ends(body.module, user)
    return all(user.operand_ids[i] != instruction.id for end in ends for i in _updated_parameters(by_id, end))


def _ends(module: Module, fusion: Instruction) -> tuple[dict[int, Instruction], list[Instruction]]:
    """A fusion's instructions by id, and those among them that compute its results."""
    fused = module.computation(fusion.called_computation_ids[0])
    by_id = {x.id: x for x in fused.instructions}
    root = by_id[fused.root_id]
    return by_id, [by_id[i] for i in root.operand_ids] if root.opcode == "tuple" else [root]


def _updated_parameters(by_id: Mapping[int, Instruction], end: Instruction) -> list[int]:
    """Numbers of the parameters in whose memory a fused computation stores the result `end`."""
    end = _behind_views(by_id, end)
    if end.opcode not in _IN_PLACE:
        return []
    # A scatter of several arrays has them first.
    updated = [_behind_views(by_id, by_id[i]) for i in end.operand_ids]
    updated = updated[:1] if end.opcode == "dynamic-update-slice" else updated
    return [x.parameter_number for x in updated if x.opcode == "parameter"]


def _is_only_carried(body: Body, instruction: Instruction, state: Instruction) -> bool:
    """Whether a tuple is only used as the initial state of loops that do not write an instruction's result in it."""
    held = {i for i, number in enumerate(state.operand_ids) if number == instruction.id}
    loops = body.users(state)
    return bool(loops) and all(
        loop.opcode == "while" and held <= body.module.only_read.get(loop.id, frozenset()) for loop in loops
    )
