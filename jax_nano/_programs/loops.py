"""Loops that carry an array which XLA widened before them (bfloat16 to float32) are made to carry the original.

XLA multiplies bfloat16 and float16 as float32, and hoists the conversion of arrays that do not change out of a loop: a
decoding loop then reads four bytes of each weight in every step. Where kernels can read the original array, the loop is
made to carry that, without the conversion. This is done before products are rewritten. It puts the operations from
before the loop in front of their readers in the loop, and each product then skips them as it skips any conversion.

An element of a loop's state is replaced by the original array if

* the body returns the element unchanged, and the condition does not read it;
* its initial value comes from the original by lossless conversions, and copies in any order of dimensions;
* the original keeps its value as long as the loop may run (`aliasing.keeps_its_value`): no operation updates it in
  place, no result is stored in its memory, and if it is an element of another loop's state, that loop does not change
  it either. It is then one value in one buffer with more readers, as every element that never changes, so no copy is
  missing. No reader of the initial value has to come before the loop;
* something is gained: all readers of the element in the loop are products, each of which becomes a call that reads the
  original, or inner loops that carry it and of which the same is true. Otherwise each trip would convert it.

Readers of the element after the loop get a conversion there.

XLA also makes float matrices of quantised weights in front of a loop. The loop is made to carry the weights instead,
and in elements of its own their scales and zero points, under the same conditions; what makes the matrix stands in the
loop then, where products with quantised weights are recognised as anywhere.

Some loops XLA (seen in jaxlib 0.12) wraps into a call and compiles into one function, if it can compile everything in
them itself, as it can products with vectors of any size. Such a function cannot contain custom calls
(`rewrite._SMALL`). The wrapper is removed, which makes each operation of the loop a task of the runtime, if the
products that become calls are large enough to make up for that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import hlo
from jax_nano._core.hlo import Body, Computation, Instruction, Module
from jax_nano._dispatch import xla
from jax_nano._dispatch.decision import Policy
from jax_nano._programs import aliasing, quantized, views
from jax_nano._programs import carried as _carried
from jax_nano._programs.carried import Loop

_NO_TASK: Final = frozenset(("bitcast", "constant", "get-tuple-element", "parameter", "tuple"))


class Call(NamedTuple):
    """A call that a product would become."""

    reads: set[int]  # ids of what it would read
    work: int  # multiply-adds
    is_vector: bool  # whether an operand is one, and there is no batch
    is_narrow: bool  # whether an operand has less than four bytes an element
    between: frozenset[int] = frozenset()  # ids of what makes its operands, and is left out as it becomes a call
    is_layer: bool = False  # whether it reads one layer of a stack of weights


Calls = Callable[[Module, Computation], Mapping[int, Call]]
"""The products of a computation that would become calls, by id."""


class _Element(NamedTuple):
    """An element of a loop's state, in any copy of a module."""

    loop: int
    position: int
    of_weights: bool = False  # carried as quantised weights, not as what was widened


class _Narrowed(NamedTuple):
    """An element that was replaced; by their ids, the array in the loop's body and what its readers get instead."""

    what: _Element
    body: int
    carried: int
    widened: int
    wide_bytes: int

    def gains(self, module: Module, calls_in: Calls, wide_bytes: Mapping[int, int], policy: Policy) -> bool:
        """Whether no trip converts the element any more, and the calls that read it are faster."""
        computation = module.computation(self.body)
        if all(x.id != self.widened for x in computation.instructions):  # inner loops carry the narrow array
            return True
        body, calls = Body(module, computation), calls_in(module, computation)
        readers = [call for call in calls.values() if self.carried in call.reads]
        has_vectors = policy.declines and any(x.is_vector and not x.is_layer for x in readers)
        if has_vectors and xla.reads_wide_as_fast(wide_bytes[self.what.loop]):
            return False
        return _is_read_past(body, self.carried, body[self.widened], calls)


class _Opened(NamedTuple):
    """A loop that is no longer compiled into one function: the id of the call that it replaced."""

    what: int

    def gains(self, module: Module, calls_in: Calls, _: Mapping[int, int], policy: Policy) -> bool:
        """Whether calls save more than it costs to run every other operation as a task of its own."""
        inside = [module.computation(x) for x in module.called_from(lambda x: x.id == self.what)]
        fused = module.called_from(lambda x: x.opcode == "fusion")
        bodies = [x for x in inside if x.id not in fused]
        calls = [call for x in bodies for call in calls_in(module, x).values()]
        if not policy.declines:
            return bool(calls)
        work = sum(call.work for call in calls if call.is_narrow or not call.is_vector)
        tasks = sum(y.opcode not in _NO_TASK for x in bodies for y in x.instructions)
        return not xla.keeps_loop_whole(work, tasks)


def _is_read_past(body: Body, carried: int, made: Instruction, calls: Mapping[int, Call]) -> bool:
    """Whether all users of a value, or of moves of it, are calls that read the array it comes from instead."""
    between = {x for call in calls.values() if carried in call.reads for x in call.between}
    for user in body.users(made):
        if user.id in between and user.id not in calls and user.id != body.root.id:
            continue
        if user.id in calls:
            reads = calls[user.id].reads
            if carried not in reads or made.id in reads:
                return False
        elif (
            user.id == body.root.id
            or views.moves_of(body.module, user) is None
            or not _is_read_past(body, carried, user, calls)
        ):
            return False
    return True


def carry_narrow_arrays(module: Module, fused: Collection[int], calls_in: Calls, policy: Policy) -> None:
    """Changes the loops of a module where that gains.

    Args:
      module: changed in place. Its `only_read` is filled in any case.
      fused: ids of the computations of fusions.
      calls_in: tells which products gain.
      policy: of the program.
    """
    if not any(x.opcode in ("call", "while") for y in module.computations for x in y.instructions):
        return
    refused: set[_Element | int] = set()
    while True:  # a refusal can make other changes useless: those of outer loops, of a product's other operand
        trial = module.copy()
        changes = _change(trial, fused, refused)
        wide_bytes: Counter[int] = Counter()
        for x in changes:
            if isinstance(x, _Narrowed):
                wide_bytes[x.what.loop] += x.wide_bytes
        losing = {x.what for x in changes if not x.gains(trial, calls_in, wide_bytes, policy)}
        if not losing:
            break
        refused |= losing
    if changes:
        _change(module, fused, refused)
    else:
        module.only_read = trial.only_read


def _change(module: Module, fused: Collection[int], refused: Collection[_Element | int]) -> list[_Narrowed | _Opened]:
    """Makes all possible changes but those refused, and returns them."""
    changes: list[_Narrowed | _Opened] = [*_open_calls(module, refused)]
    bodies = {x.id: Body(module, x) for x in module.computations if x.id not in fused}
    _carried.only_read(module, bodies, aliasing.only_reads)
    for computation in list(reversed(module.computations)):  # loops around others before those inside
        if computation.id not in bodies:
            continue
        for instruction in list(computation.instructions):
            loop = Loop.of(module, instruction)
            if loop is not None and not instruction.control_predecessor_ids:
                changes += _change_loop(module, bodies, bodies[computation.id], loop, refused)
    for body in bodies.values() if changes else ():
        body.commit()
    return changes


def _open_calls(module: Module, refused: Collection[_Element | int]) -> Iterator[_Opened]:
    """Replaces calls of computations that hold nothing but a loop by the loop."""
    calls = [x for y in module.computations for x in y.instructions if hlo.is_one_function(x)]
    for call in calls:
        if call.id in refused or call.control_predecessor_ids:
            continue
        (called,) = (module.computation(x) for x in call.called_computation_ids)
        if sorted(x.opcode for x in called.instructions) != ["parameter", "while"]:
            continue
        number, name, operands = call.id, call.name, list(call.operand_ids)
        call.CopyFrom(next(x for x in called.instructions if x.opcode == "while"))
        call.id, call.name, call.operand_ids[:] = number, name, operands
        module.remove(called)
        yield _Opened(number)


def _change_loop(
    module: Module, bodies: dict[int, Body], around: Body, loop: Loop, refused: Collection[_Element | int]
) -> Iterator[_Narrowed]:
    body, condition = bodies[loop.body.id], bodies[loop.condition.id]
    (state,) = around.operands(loop.instruction)
    if state.opcode != "tuple" or any(x.opcode != "get-tuple-element" for x in around.users(loop.instruction)):
        return
    for index in sorted(_carried.unchanged(body)):
        names = _carried.elements_of(body, _carried.state_of(body), index)
        readers = [x for name in names for x in body.users(name) if x.id != body.root.id]
        if len(names) != 1 or not readers or _carried.elements_of(condition, _carried.state_of(condition), index):
            continue
        if _Element(loop.instruction.id, index, of_weights=True) not in refused:
            origin = quantized.origin_of(around, around.operands(state)[index])
            if origin is not None:
                state = _own_state(around, loop, state)
                yield _carry_weights(module, bodies, around, loop, state, index, origin)
                continue
        if _Element(loop.instruction.id, index) in refused:
            continue
        found = _narrow_source(around, around.operands(state)[index])
        if found is None:
            continue
        narrow, moves = found
        state = _own_state(around, loop, state)
        operands = around.operands(state)
        array = hlo.array_of(operands[index].shape)
        assert array is not None
        wide_bytes = array.dtype.itemsize * math.prod(array.dims)
        operands[index] = narrow
        around.set_operands(state, operands)
        (carried,) = names
        widened = _widen(body, carried, body.root, narrow, moves)
        for name in _carried.elements_of(around, loop.instruction, index):
            _widen(around, name, None, narrow, moves)
        for tuple_ in (state, loop.instruction, _carried.state_of(body), body.root, _carried.state_of(condition)):
            tuple_.shape.tuple_shapes[index].CopyFrom(narrow.shape)
        module.only_read[loop.instruction.id] |= {index}
        yield _Narrowed(_Element(loop.instruction.id, index), loop.body.id, carried.id, widened.id, wide_bytes)


def _own_state(around: Body, loop: Loop, state: Instruction) -> Instruction:
    """The initial state of a loop, as one that nothing else reads."""
    if len(around.users(state)) > 1:
        state = around.like(state, around.operands(state), near=state)
        around.set_operands(loop.instruction, [state])
    return state


def _carry_weights(
    module: Module,
    bodies: Mapping[int, Body],
    around: Body,
    loop: Loop,
    state: Instruction,
    index: int,
    origin: quantized.Origin,
) -> _Narrowed:
    """Carries quantised weights in the place of the float matrix made of them, and their scales besides."""
    body, condition = bodies[loop.body.id], bodies[loop.condition.id]
    tuples = (state, loop.instruction, _carried.state_of(body), body.root, _carried.state_of(condition))
    operands = around.operands(state)
    array = hlo.array_of(operands[index].shape)
    assert array is not None
    wide_bytes = array.dtype.itemsize * math.prod(array.dims)
    (carried,) = _carried.elements_of(body, _carried.state_of(body), index)
    names = _carried.elements_of(around, loop.instruction, index)
    operands[index] = origin.q
    for x in tuples:
        x.shape.tuple_shapes[index].CopyFrom(origin.q.shape)
    inside = [carried]
    for other in origin.others:
        position = len(operands)
        operands.append(other)
        for x in tuples:
            x.shape.tuple_shapes.add().CopyFrom(other.shape)
        element = body.get(_carried.state_of(body), position)
        body.set_operands(body.root, [*body.operands(body.root), element])
        inside.append(element)
        module.only_read[loop.instruction.id] |= {position}
    around.set_operands(state, operands)
    widened = _made_for_readers(body, origin, inside, keeper=body.root)
    for name in names:
        _made_for_readers(around, origin, [name, *origin.others], keeper=None)
    module.only_read[loop.instruction.id] |= {index}
    what = _Element(loop.instruction.id, index, of_weights=True)
    return _Narrowed(what, loop.body.id, carried.id, widened.id, wide_bytes)


def _made_for_readers(
    body: Body, origin: quantized.Origin, arrays: Sequence[Instruction], keeper: Instruction | None
) -> Instruction:
    """As `_widen`, for weights, the first one of the arrays."""
    name = arrays[0]
    readers = {x.id: x for x in body.users(name) if keeper is None or x.id != keeper.id}
    name.shape.CopyFrom(origin.q.shape)
    made = quantized.made_again(body, origin, arrays)
    for user in readers.values():
        body.set_operands(user, [made if x.id == name.id else x for x in body.operands(user)])
    return made


def _narrow_source(body: Body, wide: Instruction) -> tuple[Instruction, list[Instruction]] | None:
    """The array that another one was widened from, if it may be read later, and the moves from it in order."""
    moves: list[Instruction] = []
    found, here = None, wide
    before = hlo.array_of(wide.shape)
    if before is None:
        return None
    while not here.control_predecessor_ids:
        step = views.moves_of(body.module, here)
        if step is None and _ends_by_widening_state(body, here):
            views.narrow(body, here)
            step = [here]  # the conversion that was the loop's last operation
        if step is None:
            break
        (source,) = body.operands(here)
        if not _is_lossless(source, step):
            break
        moves, here = [*step, *moves], source
        array = hlo.array_of(here.shape)
        assert array is not None  # as it is converted without loss
        is_narrow = array.dtype.itemsize < before.dtype.itemsize and here.opcode != "constant"
        if is_narrow and aliasing.keeps_its_value(body, here):
            found = here, moves
    return found


def _ends_by_widening_state(body: Body, fusion: Instruction) -> bool:
    """Whether a fusion ends with a lossless conversion, and its result is only used in states of loops."""
    users = body.users(fusion)
    return views.ends_by_widening(body, fusion) and all(x.opcode == "tuple" for x in users)


def _is_lossless(source: Instruction, moves: Sequence[Instruction]) -> bool:
    arrays = [hlo.array_of(x.shape) for x in (source, *moves)]
    dtypes = [x.dtype for x in arrays if x is not None]
    return len(dtypes) == len(arrays) and all(np.can_cast(a, b, "safe") for a, b in pairwise(dtypes))


def _widen(
    body: Body, name: Instruction, keeper: Instruction | None, narrow: Instruction, moves: Sequence[Instruction]
) -> Instruction:
    """Gives an element the shape of a narrow array; its readers get the moves from before the loop."""
    readers = {x.id: x for x in body.users(name) if keeper is None or x.id != keeper.id}
    name.shape.CopyFrom(narrow.shape)
    here = name
    for move in moves:
        here = body.like(move, [here], near=name)
    for user in readers.values():
        body.set_operands(user, [here if x.id == name.id else x for x in body.operands(user)])
    return here
