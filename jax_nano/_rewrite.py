"""From dots in an HLO module to calls of our kernels.

XLA hands over a module that it has simplified, partitioned and fused. A product is there a `dot`, or a fusion of
nothing but a dot (a library's: YNNPACK, oneDNN) and what brings its operands into shape (a loop, for products with a
vector). Others are made so first: `_fusions` takes them out of what they are fused with, `_inner_products` finds them
in sums of products. Each becomes one custom call. Its labels describe operands and result as they lie in memory: in
whatever layout XLA chose, and before or after the copies that XLA made for its own kernels. The loop after a product
becomes a part of the call if an epilogue does the same. Those that stay are in the report as well, with the reason.

Whatever is not understood stays as it was. What has no kernel stays too, and so does what the decline gate declines.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from jax.lax import DotAlgorithmPreset

from jax_nano import (
    _epilogues,
    _fusions,
    _hlo,
    _inner_products,
    _loops,
    _lowering,
    _native,
    _report,
    _shapes,
    _views,
)
from jax_nano import _jax_compat as compat
from jax_nano._hlo import Body, Computation, Instruction, Module
from jax_nano._lowering import Choice
from jax_nano._shapes import Dims, Labels
from jax_nano._signatures import Precision
from jax_nano._views import View

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


# Where results of a changed module do not take over what is donated, they are new pages in each call once they are too
# large for malloc to keep: decoding with GPT-2, which donates 9 MB, gains all that its products do, a perceptron's
# training step with 22 MB ran at 0.85 of XLA's speed, GPT-2's with 1.5 GB at 0.46.
_MOST_DONATED: Final = 16 << 20

_SMALL: Final = "part of a small loop that XLA compiles into one function, in which no call can stand"
_UNREADABLE: Final = "no kernel reads this dtype or layout"


class Operand(NamedTuple):
    """An operand of a dot: which operand of the fusion around it this is, after what moves."""

    array: Instruction  # as the dot sees it
    moves: Sequence[Instruction]
    position: int  # of the dot or fusion's operands


class Dot(NamedTuple):
    """A dot, and where its operands come from."""

    dot: Instruction
    lhs: Operand
    rhs: Operand


def rewrite(module: Module) -> list[_report.Product]:
    """Turns the products of a module into calls; returns what became of each."""
    products, why_not, in_one_function = [], _why_not(module), module.called_from(_hlo.is_one_function)

    def declined(computation: Computation) -> str | None:
        return _SMALL if computation.id in in_one_function else why_not

    def declines(where: Computation, dot: Instruction, sources: Sequence[_fusions.Source]) -> str | None:
        return declined(where) or _declines(dot, sources)

    _inner_products.restore(module, declines)
    why = _fusions.take_out(module, declines)
    if why_not is None:
        _loops.carry_narrow_arrays(module, module.fused(), _calls_in)
        in_one_function = module.called_from(_hlo.is_one_function)
    fused, matched = module.fused(), set[int]()
    for computation in module.computations:
        if computation.id in fused:  # a fusion is looked at as a whole, where it stands
            continue
        if not any(x.opcode in ("dot", "fusion") for x in computation.instructions):
            continue
        body = Body(module, computation)
        found = [(x, dot) for x in computation.instructions if (dot := _dot_of(module, body, x)) is not None]
        if found:
            readers = {instruction.id for instruction, _ in found}
            matched.update(dot.dot.id for _, dot in found)
            reason = declined(computation)
            products += [_rewrite(module, body, instruction, dot, readers, reason) for instruction, dot in found]
            body.commit()
    return [*products, *_unmatched(module, matched, why)]


def _unmatched(module: Module, matched: Collection[int], why: Mapping[int, str]) -> Iterator[_report.Product]:
    """The products that nothing was tried with, for the report."""
    for computation in module.computations:
        by_id = {x.id: x for x in computation.instructions}
        for dot in computation.instructions:
            if dot.opcode == "dot" and dot.id not in matched:
                arrays = (*(by_id[x] for x in dot.operand_ids), dot)
                reason = why.get(dot.id) or _fusions.left_in(computation, dot)
                yield _left(module, dot.metadata.op_name or dot.name, dot, arrays, reason)


def _left(module: Module, source: str, dot: Instruction, arrays: Sequence[Instruction], why: str) -> _report.Product:
    """A product that stays as it is, as HLO counts its dimensions."""
    labels = _labels_of(dot, *(len(x.shape.dimensions) for x in arrays[:2]))
    a, b, c = (_report.Array(_hlo.dtype_name(x.shape), tuple(x.shape.dimensions)) for x in arrays)
    return _report.Product(module.name, source, (a, b, c), labels, "default", why)


def _declines(dot: Instruction, sources: Sequence[_fusions.Source]) -> str | None:
    """Why no kernel takes a dot in a fusion, of operands that are made of these, if none does."""
    arrays = [x.moves[-1] if x.moves else x.instruction for x in sources]
    labels = _labels_of(dot, *(len(x.shape.dimensions) for x in arrays))
    seen = [View.of(*pair) for pair in zip((*arrays, dot), labels, strict=True)]
    given = [
        None if view is None else _views.through(x.moves, view, x.instruction)
        for view, x in zip(seen, sources, strict=False)
    ]
    lhs, rhs, out = *given, seen[2]
    if lhs is None or rhs is None or out is None:
        return _UNREADABLE
    return _choose(dot, lhs, rhs, out).declined


def _why_not(module: Module) -> str | None:
    """Why all of the module's products are better left to XLA, if they are."""
    donated = 0 if compat.KEEPS_DONATION else module.donated_bytes()
    if donated <= _MOST_DONATED:
        return None
    return f"this jaxlib would not reuse the {donated >> 20} MiB that the program donates; 0.11.1 and newer do"


def _calls_in(module: Module, computation: Computation) -> dict[int, _loops.Call]:
    """The products of a computation that would become calls, by id."""
    if not any(x.opcode in ("dot", "fusion") for x in computation.instructions):
        return {}
    body = Body(module, computation)
    found = [(x, dot) for x in computation.instructions if (dot := _dot_of(module, body, x)) is not None]
    readers, calls = {instruction.id for instruction, _ in found}, {}
    for instruction, dot in found:
        seen = _seen(body, instruction, dot)
        call = None if seen.views is None else _best(module, body, dot.dot, seen.dtypes, *seen.views, readers)
        if call is not None:
            lhs, rhs, _ = call.views
            labels = call.choice.labels
            sizes = labels.sizes(lhs.sizes, rhs.sizes)
            m, n, batch = (math.prod(sizes[x] for x in y) for y in (labels.lhs_free, labels.rhs_free, labels.batch))
            calls[instruction.id] = _loops.Call(
                {lhs.instruction.id, rhs.instruction.id},
                math.prod(sizes.values()),
                is_vector=1 in (m, n) and batch == 1,
                is_narrow=min(lhs.dtype.itemsize, rhs.dtype.itemsize) < 4,
            )
    return calls


class Seen(NamedTuple):
    """What a product reads and writes, as it stands in a module."""

    arrays: list[Instruction]  # as the dot sees them
    dtypes: tuple[np.dtype, ...]  # of these; the dot may convert what it is given
    views: tuple[View, View, View] | None  # None if one of them is no array that kernels read


def _seen(body: Body, instruction: Instruction, found: Dot) -> Seen:
    dot, *operands = found
    labels = _labels_of(dot, *(len(x.array.shape.dimensions) for x in operands))
    arrays = [*(x.array for x in operands), instruction]
    *views, out = (View.of(*pair) for pair in zip(arrays, labels, strict=True))
    dtypes = tuple(view.dtype for view in (*views, out) if view is not None)
    lhs, rhs = (
        None if view is None else _views.through(x.moves, view, body.operands(instruction)[x.position])
        for view, x in zip(views, operands, strict=True)
    )
    if lhs is None or rhs is None or out is None:
        return Seen(arrays, dtypes, None)
    return Seen(arrays, dtypes, (lhs, rhs, out))


def _dot_of(module: Module, body: Body, instruction: Instruction) -> Dot | None:
    """The dot that an instruction is, or that it fuses with nothing but moves of operands."""
    if instruction.opcode == "dot":
        return Dot(instruction, *(Operand(x, (), i) for i, x in enumerate(body.operands(instruction))))
    # Libraries' fusions are custom ones; a product with a vector is a loop.
    if instruction.opcode != "fusion" or instruction.fusion_kind not in ("kCustom", "kLoop"):
        return None
    if instruction.output_operand_aliasing:
        return None
    fused = module.computation(instruction.called_computation_ids[0])
    by_id = {x.id: x for x in fused.instructions}
    root = by_id[fused.root_id]
    others = [x for x in fused.instructions if x.opcode not in (*_views.MOVES, "parameter")]
    if root.opcode != "dot" or others != [root]:
        return None
    operands = []
    for number in root.operand_ids:
        parameter, moves = _views.chain(by_id, by_id[number])
        operands.append(Operand(by_id[number], moves, parameter.parameter_number))
    return Dot(root, *operands)


def _rewrite(
    module: Module,
    body: Body,
    instruction: Instruction,
    found: Dot,
    products: Collection[int],
    declined: str | None,
) -> _report.Product:
    dot = found.dot
    arrays, dtypes, views = _seen(body, instruction, found)
    source = instruction.metadata.op_name or instruction.name
    if views is None:
        return _left(module, source, dot, arrays, _UNREADABLE)
    lhs, rhs, out = views
    call = None if declined else _best(module, body, dot, dtypes, lhs, rhs, out, products)
    if call is None:
        choice, epilogue = _choose(dot, lhs, rhs, out), None
        choice = choice._replace(declined=choice.declined or declined)
    else:
        (lhs, rhs, out), choice, epilogue = call
        assert choice.signature is not None
        _call(module, body, lhs, rhs, out, choice.labels, choice.signature.algorithm, epilogue)
    algorithm = "default" if choice.signature is None else choice.signature.algorithm
    a, b, c = (_report.Array(_hlo.NAMES[x.dtype], x.sizes) for x in (lhs, rhs, out))
    fate = (choice.declined, str(epilogue or ""))
    return _report.Product(module.name, source, (a, b, c), choice.labels, algorithm, *fate)


class Call(NamedTuple):
    """What a call reads and writes, and does besides: with an epilogue, `views` have its result's dtype."""

    views: tuple[View, View, View]
    choice: Choice
    epilogue: _epilogues.Found | None


def _best(
    module: Module,
    body: Body,
    dot: Instruction,
    dtypes: tuple[np.dtype, ...],
    lhs: View,
    rhs: View,
    out: View,
    products: Collection[int],
) -> Call | None:
    """The call that saves most of what is done around a product; None if it is declined.

    `dtypes` are the dot's own: it may convert what it is given.
    """
    left, right = (_views.sources(module, body, x, products)[::-1] for x in (lhs, rhs))
    for result, epilogue in _results(module, body, out):
        for views in ((a, b, result) for a in left for b in right):
            a, b, c = (x.dtype for x in views)
            # A product of other dtypes than the dot's must be the same before its result is rounded.
            same = (a, b, c) == dtypes
            if not same and (dot.precision_config.algorithm or (a != b and c != dtypes[0]) or not _rounds(out, c)):
                continue
            choice = _choose(dot, *views)
            if choice.declined is None:
                return Call(views, choice, epilogue)
    return None


def _results(module: Module, body: Body, out: View) -> Iterator[tuple[View, _epilogues.Found | None]]:
    """What a call may write instead of a product's result, and by which epilogue, the last first."""
    for view in reversed(_views.copies(module, body, out)):
        epilogue = _epilogues.epilogue_of(module, body, view)
        if epilogue is not None:
            yield view._replace(dtype=epilogue.dtype), epilogue
        yield view, None


def _rounds(out: View, dtype: np.dtype) -> bool:
    """Whether a kernel whose result has this dtype rounds once what the dot gives."""
    return dtype == out.dtype or (out.dtype == np.float32 and dtype in (_hlo.BFLOAT16, np.float16))


def _labels_of(dot: Instruction, lhs_ndim: int, rhs_ndim: int) -> Labels:
    numbers = dot.dot_dimension_numbers
    dimension_numbers = (
        (tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)),
        (tuple(numbers.lhs_batch_dimensions), tuple(numbers.rhs_batch_dimensions)),
    )
    return _shapes.labels_of(dimension_numbers, None, lhs_ndim, rhs_ndim)


def _choose(dot: Instruction, lhs: View, rhs: View, out: View) -> Choice:
    """What becomes of a product; declined too if there would be something to do around the call."""
    labels = Labels(lhs.labels, rhs.labels, out.labels)
    algorithm = dot.precision_config.algorithm
    if algorithm not in _ALGORITHMS:
        return Choice(labels, None, f"no kernel for XLA's algorithm number {algorithm}")
    if dot.dot_sparsity:
        return Choice(labels, None, "an operand is sparse")
    dtypes = (lhs.dtype, rhs.dtype, out.dtype)
    choice = _lowering.choose(
        *_shapes.dimension_numbers_of(labels), _ALGORITHMS[algorithm], lhs.sizes, rhs.sizes, dtypes
    )
    if choice.signature is None:
        return choice
    if (choice.signature.lhs, choice.signature.rhs, choice.signature.out) != dtypes:
        return choice._replace(declined="no kernel for {} x {} -> {}".format(*dtypes))
    if _lowering.stored(choice.labels, lhs.sizes, rhs.sizes).perm is not None:
        return choice._replace(declined="the result's last dimension is a batch dimension")
    return choice


def _call(
    module: Module,
    body: Body,
    lhs: View,
    rhs: View,
    out: View,
    labels: Labels,
    algorithm: str,
    epilogue: _epilogues.Found | None,
) -> None:
    """Makes the instruction of `out` the call, or that of its epilogue."""
    inputs = [_narrowed(module, body, view) for view in (lhs, rhs)]
    attributes = {"abi": f"{_native.ABI} : i64", "algorithm": f'"{algorithm}"'}
    target = _native.TARGET_NAME
    if epilogue is not None:
        out = out._replace(instruction=epilogue.instruction)
    if _hlo.dtype_of(out.instruction) != out.dtype:
        out = out._replace(instruction=body.convert_result(out.instruction, out.dtype))
    if epilogue is not None and not epilogue.is_nothing:
        target = _native.LINEAR_TARGET_NAME
        if (bias := epilogue.bias) is not None:
            bias = bias if _hlo.dtype_of(bias) == out.dtype else body.converted(bias, out.dtype)
            inputs.append(View(bias, out.dtype, out.sizes[-1:], out.labels[-1:]))
        if epilogue.residual is not None:
            inputs.append(out._replace(instruction=epilogue.residual))
        attributes["activation"] = f'"{epilogue.activation}"'
        attributes["scale"] = _float32(epilogue.scale)
        attributes["bias"] = f"{int(epilogue.bias is not None)} : i64"
        attributes["residual"] = f"{int(epilogue.residual is not None)} : i64"
    for name, dims in zip(("lhs", "rhs", "out"), labels, strict=True):
        attributes[f"{name}_labels"] = _dense(dims)

    call = out.instruction
    operands = [x.instruction if x.is_its_shape else body.bitcast(x.instruction, x.dtype, x.sizes) for x in inputs]
    body.set_operands(call, operands)
    if not out.is_its_shape:
        call = body.bitcast_result(call, out.dtype, out.sizes)
    for field in ("dot_dimension_numbers", "precision_config", "fusion_kind", "called_computation_ids"):
        call.ClearField(field)
    call.opcode = "custom-call"
    call.custom_call_target = target
    call.custom_call_api_version = _hlo.TYPED_FFI
    call.backend_config = ("{" + ", ".join(f"{x} = {value}" for x, value in attributes.items()) + "}").encode()
    call.constrain_layout = True
    call.operand_shapes_with_layout.extend(x.shape for x in operands)


def _narrowed(module: Module, body: Body, view: View) -> View:
    """A view of an instruction that has its dtype."""
    instruction = _views.before_widening(body, view.instruction, view.dtype)
    return view._replace(instruction=instruction or _views.narrow(module, body, view.instruction))


def _float32(value: float) -> str:
    """A number as MLIR's text, bit for bit: decimal digits have no infinities and no NaN."""
    with np.errstate(over="ignore"):
        bits = int(np.float32(value).view(np.uint32))
    return f"0x{bits:08X} : f32"


@cache
def _dense(values: Dims) -> str:
    return f"dense<[{', '.join(map(str, values))}]> : tensor<{len(values)}xi64>"
