"""The products of an HLO module: which instructions are products, and what a call could read and write instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from jax.lax import DotAlgorithmPreset

from jax_nano._core import contraction, hlo
from jax_nano._core.contraction import Labels
from jax_nano._core.hlo import Body, Instruction
from jax_nano._core.signatures import Precision
from jax_nano._dispatch import decision
from jax_nano._dispatch.decision import Decision, Policy
from jax_nano._programs import epilogues, views
from jax_nano._programs.fusions import Source
from jax_nano._programs.views import View

UNREADABLE: Final = "no kernel reads this dtype or layout"

# PrecisionConfig.Algorithm by number; other algorithms are XLA's. The rest of that message, operand_precision, means
# nothing on CPUs.
_ALGORITHMS: Final[dict[int, Precision]] = {
    0: None,
    6: DotAlgorithmPreset.BF16_BF16_F32,
    7: DotAlgorithmPreset.BF16_BF16_F32_X3,
    8: DotAlgorithmPreset.BF16_BF16_F32_X6,
    11: DotAlgorithmPreset.F32_F32_F32,
    12: DotAlgorithmPreset.F64_F64_F64,
}


class Views(NamedTuple):
    """The arrays that a product, or the call that replaces it, reads and writes."""

    lhs: View
    rhs: View
    out: View

    @property
    def labels(self) -> Labels:
        return Labels(self.lhs.labels, self.rhs.labels, self.out.labels)

    @property
    def dtypes(self) -> tuple[np.dtype, np.dtype, np.dtype]:
        return self.lhs.dtype, self.rhs.dtype, self.out.dtype


class Operand(NamedTuple):
    """An operand of a dot: which operand of the fusion around it this is, and the moves between the two."""

    array: Instruction  # as the dot sees it
    moves: Sequence[Instruction]
    position: int  # of the dot or fusion's operands


class Dot(NamedTuple):
    """An instruction that is a product: a dot, or a fusion of a dot with nothing but moves of its operands."""

    instruction: Instruction
    dot: Instruction
    lhs: Operand
    rhs: Operand

    @property
    def arrays(self) -> tuple[Instruction, Instruction, Instruction]:
        """What the dot reads and writes, as HLO counts dimensions; it may convert what it is given."""
        return self.lhs.array, self.rhs.array, self.instruction


def of(body: Body, instruction: Instruction) -> Dot | None:
    """The product that an instruction is, if it is one."""
    if instruction.opcode == "dot":
        lhs, rhs = (Operand(x, (), i) for i, x in enumerate(body.operands(instruction)))
        return Dot(instruction, instruction, lhs, rhs)
    # Libraries' fusions are custom ones; a product with a vector is a loop.
    if instruction.opcode != "fusion" or instruction.fusion_kind not in ("kCustom", "kLoop"):
        return None
    if instruction.output_operand_aliasing:
        return None
    fused = body.module.computation(instruction.called_computation_ids[0])
    by_id = {x.id: x for x in fused.instructions}
    root = by_id[fused.root_id]
    others = [x for x in fused.instructions if x.opcode not in (*views.MOVES, "parameter")]
    if root.opcode != "dot" or others != [root]:
        return None
    operands = []
    for number in root.operand_ids:
        parameter, moves = views.chain(by_id, by_id[number])
        operands.append(Operand(by_id[number], moves, parameter.parameter_number))
    return Dot(instruction, root, *operands)


def labels_of(dot: Instruction, lhs_ndim: int, rhs_ndim: int) -> Labels:
    """Those of a dot's dimensions, as HLO counts them."""
    numbers = dot.dot_dimension_numbers
    dimension_numbers = (
        (tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)),
        (tuple(numbers.lhs_batch_dimensions), tuple(numbers.rhs_batch_dimensions)),
    )
    return contraction.labels_of(dimension_numbers, None, lhs_ndim, rhs_ndim)


def _views_of(arrays: Sequence[Instruction], dot: Instruction) -> Views | None:
    """Arrays as a dot sees them; None if one of them is none that kernels read."""
    labels = labels_of(dot, *(len(x.shape.dimensions) for x in arrays[:2]))
    lhs, rhs, out = (View.of(*pair) for pair in zip(arrays, labels, strict=True))
    return None if lhs is None or rhs is None or out is None else Views(lhs, rhs, out)


def _before_moves(seen: Views, moves: Sequence[tuple[Sequence[Instruction], Instruction]]) -> Views | None:
    """The arrays of a dot whose operands are read before their moves.

    Args:
      seen: the arrays as the dot sees them.
      moves: for each operand the moves, and the operand of the first one.
    """
    lhs, rhs = (views.through(steps, view, first) for view, (steps, first) in zip(seen[:2], moves, strict=True))
    return None if lhs is None or rhs is None else Views(lhs, rhs, seen.out)


class Seen(NamedTuple):
    """The dtypes of a product's arrays as its dot sees them, and the arrays as they are before moves in its fusion."""

    dtypes: tuple[np.dtype, ...]
    views: Views


def see(body: Body, product: Dot) -> Seen | None:
    """The arrays of a product; None if kernels cannot read one of them."""
    seen = _views_of(product.arrays, product.dot)
    if seen is None:
        return None
    given = body.operands(product.instruction)
    before = _before_moves(seen, [(x.moves, given[x.position]) for x in (product.lhs, product.rhs)])
    return None if before is None else Seen(seen.dtypes, before)


def decide(dot: Instruction, arrays: Views, policy: Policy) -> Decision:
    """The decision about a product of these arrays; also declined if the call would need conversions or a transpose."""
    labels, dtypes = arrays.labels, arrays.dtypes
    algorithm = dot.precision_config.algorithm
    if algorithm not in _ALGORITHMS:
        return Decision(labels, None, f"no kernel for XLA's algorithm number {algorithm}")
    if dot.dot_sparsity:
        return Decision(labels, None, "an operand is sparse")
    shapes = arrays.lhs.sizes, arrays.rhs.sizes
    asked = decision.Product(labels, *shapes, dtypes, _ALGORITHMS[algorithm], placed=True)
    found = decision.dispatch(asked, decision.this_machine(), policy)
    if found.signature is None:
        return found
    if found.signature[:3] != dtypes:
        return found._replace(declined="no kernel for {} x {} -> {}".format(*dtypes))
    if decision.stored(labels, *shapes).perm is not None:
        return found._replace(declined="the result's last dimension is a batch dimension")
    return found


def why_declined(dot: Instruction, sources: Sequence[Source], policy: Policy) -> str | None:
    """Why no kernel computes a dot in a fusion from these sources of its operands; None if one does."""
    seen = _views_of([*(x.moves[-1] if x.moves else x.instruction for x in sources), dot], dot)
    arrays = None if seen is None else _before_moves(seen, [(x.moves, x.instruction) for x in sources])
    return UNREADABLE if arrays is None else decide(dot, arrays, policy).declined


class Call(NamedTuple):
    """What a call reads and writes, and its epilogue; `views.out` has the dtype of the epilogue's result."""

    views: Views
    decision: Decision
    epilogue: epilogues.Found | None


def best_call(body: Body, dot: Instruction, seen: Seen, products: frozenset[int], policy: Policy) -> Call | None:
    """The call that replaces most of the operations around a product too; None if every such call is declined.

    Args:
      body, dot, seen: the product.
      products: ids of all instructions of the computation that are products.
      policy: of the program.
    """
    lhs, rhs, out = seen.views
    left, right = (views.sources(body, x, products)[::-1] for x in (lhs, rhs))
    for result, epilogue in _results(body, out):
        for arrays in (Views(a, b, result) for a in left for b in right):
            a, b, c = arrays.dtypes
            # A product of other dtypes than the dot's must be the same before its result is rounded.
            same = arrays.dtypes == seen.dtypes
            if not same and (dot.precision_config.algorithm or (a != b and c != seen.dtypes[0]) or not _rounds(out, c)):
                continue
            found = decide(dot, arrays, policy)
            if found.declined is None:
                return Call(arrays, found, epilogue)
    return None


def _results(body: Body, out: View) -> Iterator[tuple[View, epilogues.Found | None]]:
    """What a call may write instead of a product's result, with its epilogue; the one computed last comes first."""
    for view in reversed(views.copies(body, out)):
        epilogue = epilogues.epilogue_of(body, view)
        if epilogue is not None:
            yield view._replace(dtype=epilogue.dtype), epilogue
        yield view, None


def _rounds(out: View, dtype: np.dtype) -> bool:
    """Whether a kernel with a result of this dtype computes what the dot does, rounded at most once."""
    return dtype == out.dtype or (out.dtype == np.float32 and dtype in (hlo.BFLOAT16, np.float16))
