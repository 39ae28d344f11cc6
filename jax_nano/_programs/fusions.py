"""Takes products out of fusions with other operations.

XLA's libraries compute more than a product in one fusion: YNNPACK takes `dot -> elementwise -> reduce` (softmax, a mean
squared error, a norm), a chain of products, a convolution and the dense layer behind it. A kernel computes only the
product, so before products are rewritten, each one for which there is a kernel is taken out: it becomes a fusion of its
own in front of the rest, with nothing else but moves of its operands. If the fusion computes an operand of the product,
that computation is taken out first, in the same way. The rest reads one array more. If it still contains an operation
that a library computes better than XLA's loops (a sum, a convolution, a product without a kernel) it stays the
library's; otherwise it becomes a loop.

All that changes is that values between operations of one fusion are stored in memory. New instructions come before the
fusion and read what it read, so nothing is read later than before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from jax_nano._core import hlo, machine
from jax_nano._core import jax_compat as compat
from jax_nano._core.hlo import Body, Computation, Instruction, Module
from jax_nano._dispatch import xla
from jax_nano._dispatch.decision import Policy

# Operations that change neither values nor which element is which; a conversion is one if it loses nothing.
_MOVES: Final = frozenset(("bitcast", "convert", "copy", "transpose"))
# Operations too costly to be computed twice, which XLA's libraries compute faster than its loops.
_COSTLY: Final = frozenset(
    (
        *("cholesky", "convolution", "custom-call", "dot", "fft", "reduce", "reduce-window", "select-and-scatter"),
        *("sort", "triangular-solve"),
    )
)
# A fusion with one of these stays as it is: with fewer operations it could become one that XLA runs in place, over an
# array that others still read, after XLA has decided which arrays need a copy.
_IN_PLACE: Final = frozenset(("dynamic-update-slice", "scatter"))

# Elements of a loop for which one more thread pays. XLA has split its own loops over threads before the hook.
_ELEMENTS_PER_THREAD: Final = 1 << 15

# The size of a dimension up to which YNNPACK's results are right where it is faulty.
_MOST_COUNTED: Final = 1 << 15


class Source(NamedTuple):
    """Where an operand of a product comes from in its fusion: an instruction, and the lossless moves after it."""

    instruction: Instruction
    moves: Sequence[Instruction]


Declines: TypeAlias = Callable[[Computation, Instruction, Sequence[Source]], str | None]
"""Why no kernel takes a dot with these operands, in a fusion of that computation, or None."""
_DeclinesHere: TypeAlias = Callable[[Instruction, Sequence[Source]], str | None]


def take_out(module: Module, declines: Declines, policy: Policy) -> dict[int, str]:
    """Takes products out of fusions; returns the reasons why others stay, by the ids of their dots.

    Products that are alone in their fusion, with moves of their operands, stay without a reason.
    """
    why: dict[int, str] = {}
    for body in module.bodies("fusion"):
        with_dots = [(x, dots) for x in body.instructions if (dots := _dots_in(module, x))]
        for instruction, dots in with_dots:
            _Fusion(body, instruction, why, policy).take_out(dots, partial(declines, body.computation))
        if with_dots:
            body.commit()
    return why


def _dots_in(module: Module, instruction: Instruction) -> list[Instruction]:
    if instruction.opcode != "fusion":
        return []
    return [x for x in module.computation(instruction.called_computation_ids[0]).instructions if x.opcode == "dot"]


class _Fusion:
    """A fusion that holds products."""

    def __init__(self, body: Body, instruction: Instruction, why: dict[int, str], policy: Policy) -> None:
        self._body, self._instruction, self._why, self._policy = body, instruction, why, policy
        self._computation: Computation = body.module.computation(instruction.called_computation_ids[0])
        self._by_id: dict[int, Instruction] = {x.id: x for x in self._computation.instructions}
        self._root: Instruction = self._by_id[self._computation.root_id]
        self._is_changed = False

    def take_out(self, dots: Sequence[Instruction], declines: _DeclinesHere) -> None:
        """Takes out those of its dots that it can; says why for each of the others."""
        fixed = self._why_fixed()
        for dot in dots:  # operands come before their users
            if dot.id not in self._by_id:  # it was taken out with a value that another one reads
                continue
            sources, reason = self._sources(dot, declines)
            reason = reason or fixed or self._why_not_worth(dot)
            if reason is None and self._root.opcode == "tuple" and dot.id in self._root.operand_ids:
                reason = "its fusion returns it beside other results"
            if reason is not None and not (fixed is None and self._is_computed_wrongly(dot)):
                if self._has_more_than(dot):
                    self._why[dot.id] = reason
                continue
            for source in sources:
                if source.instruction.opcode != "parameter":
                    self._cut(source.instruction)
            if dot.id != self._root.id:
                self._cut(dot)
                self._cut_conversions(self._by_id[dot.id])
        if self._is_changed:
            self._settle()

    def _why_fixed(self) -> str | None:
        if self._instruction.output_operand_aliasing or any(x.opcode in _IN_PLACE for x in self._by_id.values()):
            return "its fusion updates an array in place"
        return None

    def _why_not_worth(self, dot: Instruction) -> str | None:
        """Why a product is better left where it is though there is a kernel for it."""
        if not self._policy.declines or dot.id == self._root.id:
            return None
        lhs = self._by_id[dot.operand_ids[0]]
        terms = math.prod(lhs.shape.dimensions[i] for i in dot.dot_dimension_numbers.lhs_contracting_dimensions)
        size = math.prod(dot.shape.dimensions) * hlo.DTYPES[dot.shape.element_type].itemsize
        return xla.keeps_fused(size, terms)

    def _is_computed_wrongly(self, dot: Instruction) -> bool:
        """Whether XLA's library may compute wrong values from a dot in the same fusion."""
        return (
            compat.MISCOUNTS_LARGE_FUSED_DOTS
            and self._instruction.fusion_kind == "kCustom"
            and self._has_more_than(dot)
            and max(dot.shape.dimensions, default=0) > _MOST_COUNTED
        )

    def _has_more_than(self, dot: Instruction) -> bool:
        """Whether a dot is not alone in the fusion with moves of its operands."""
        others = (x for x in self._by_id.values() if x.id != dot.id)
        return dot.id != self._root.id or any(x.opcode not in (*_MOVES, "parameter") for x in others)

    def _sources(self, dot: Instruction, declines: _DeclinesHere) -> tuple[Sequence[Source], str | None]:
        """The sources from which to compute a dot's operands, or why not to take it out."""
        candidates = [before_moves(self._by_id, self._by_id[number]) for number in dot.operand_ids]
        reasons = []
        for sources in product(*candidates):
            reason = declines(dot, sources)
            if reason is None:
                return sources, None
            reasons.append(reason)
        return (), reasons[0]

    def _cut(self, value: Instruction) -> Instruction:
        """Takes the computation of a value out: another fusion computes it, and this one reads it."""
        while (shared := self._shared(value)) is not None:
            self._cut(shared)
        parts = self._ancestors(value)
        operands = self._body.operands(self._instruction)
        new, ids = self._body.module.copy_of(self._computation, parts, value)
        self._why.update({ids[number]: self._why[number] for number in ids if number in self._why})
        read = [operands[x.parameter_number] for x in parts if x.opcode == "parameter"]
        before = self._body.fusion(new, read, value)
        _set_kind(before, new.instructions, value, self._instruction)
        parameter_number = len(operands)
        hlo.become_parameter(value, parameter_number)
        self._root = self._by_id[self._root.id]
        self._remove_dead([*operands, before])
        self._is_changed = True
        return before

    def _shared(self, value: Instruction) -> Instruction | None:
        """The first operation on the way to a value that is costly, and that the rest of the fusion needs as well."""
        rest = {x.id for x in self._ancestors(self._root, without=value)}
        return next(
            (x for x in self._ancestors(value) if x.opcode in _COSTLY and x.id in rest and x.id != value.id), None
        )

    def _ancestors(self, value: Instruction, without: Instruction | None = None) -> list[Instruction]:
        """The instructions that compute a value, itself the last; none that only `without` needs."""
        needed, waiting = {value.id}, [value]
        while waiting:
            here = waiting.pop()
            if without is not None and here.id == without.id:
                continue
            for number in here.operand_ids:
                if number not in needed:
                    needed.add(number)
                    waiting.append(self._by_id[number])
        return [x for x in self._computation.instructions if x.id in needed]

    def _cut_conversions(self, value: Instruction) -> None:
        """Takes the rounding of a product's result out as well: a kernel can do it."""
        users = [x for x in self._by_id.values() if value.id in x.operand_ids]
        if len(users) != 1 or users[0].opcode != "convert" or users[0].id == self._root.id:
            return
        if users[0].shape.element_type != value.shape.element_type and not _loses_nothing(value, users[0]):
            self._cut(users[0])

    def _remove_dead(self, operands: Sequence[Instruction]) -> None:
        """Removes what the root does not need, and the operands that nothing reads."""
        needed = self._ancestors(self._root)
        ids = {x.id for x in needed}
        instructions = self._computation.instructions
        for i in reversed(range(len(instructions))):
            if instructions[i].id not in ids:
                del instructions[i]
        self._by_id = {x.id: x for x in instructions}
        parameters = sorted((x for x in instructions if x.opcode == "parameter"), key=lambda x: x.parameter_number)
        kept = [operands[x.parameter_number] for x in parameters]
        for i, x in enumerate(parameters):
            x.parameter_number = i
        self._body.module.set_parameters(self._computation)
        self._body.set_operands(self._instruction, kept)

    def _settle(self) -> None:
        """Makes the rest an ordinary loop, or a bitcast, unless it contains what libraries compute better."""
        instructions = self._computation.instructions
        if len(instructions) == 2 and self._root.opcode == "bitcast":
            hlo.become_bitcast(self._instruction)
        else:
            _set_kind(self._instruction, instructions, self._root, self._instruction)


def before_moves(by_id: Mapping[int, Instruction], operand: Instruction) -> Sequence[Source]:
    """The possible sources of an operand: before all its moves, then at each point where they change its dtype."""
    chain = [operand]
    while chain[-1].opcode in _MOVES:
        before = by_id[chain[-1].operand_ids[0]]
        if not _loses_nothing(before, chain[-1]):
            break
        chain.append(before)
    found = []
    for i in reversed(range(len(chain))):
        is_last = i + 1 == len(chain)
        if is_last or chain[i + 1].shape.element_type != chain[i].shape.element_type:
            found.append(Source(chain[i], chain[:i][::-1]))
    return found


def _set_kind(fusion: Instruction, inner: Iterable[Instruction], root: Instruction, like: Instruction) -> None:
    """Makes a fusion a library's, if `like` is one and it contains what libraries compute better; otherwise a loop."""
    if fusion is like and like.fusion_kind == "kLoop":
        return
    if like.fusion_kind == "kCustom" and (root.opcode == "tuple" or any(x.opcode in _COSTLY for x in inner)):
        fusion.fusion_kind, fusion.backend_config = like.fusion_kind, like.backend_config
        return
    fusion.fusion_kind = "kLoop"
    partitions = []
    dims = list(root.shape.dimensions)
    if dims:
        threads = min(machine.threads(compat.cpu_devices()), math.prod(dims) // _ELEMENTS_PER_THREAD)
        outermost = root.shape.layout.minor_to_major[-1]
        if threads > 1 and dims[outermost] >= threads:
            partitions = [str(threads)]
    fusion.backend_config = json.dumps({"outer_dimension_partitions": partitions}).encode()


def _loses_nothing(source: Instruction, move: Instruction) -> bool:
    if move.opcode != "convert":
        return True
    before, after = (hlo.DTYPES.get(x.shape.element_type) for x in (source, move))
    return before is not None and after is not None and np.can_cast(before, after, "safe")


def left_in(computation: Computation, dot: Instruction) -> str:
    """Why a dot that is in no known form stays: the operations beside it in its fusion."""
    others: Iterator[str] = (x.opcode for x in computation.instructions if x.id != dot.id)
    names = dict.fromkeys(x for x in others if x not in (*_MOVES, "parameter", "constant", "broadcast", "tuple"))
    return f"inside a fusion with {', '.join(names) or 'moves of its result'}"
