"""Custom calls of the attention kernels, written into an HLO module in the place of what `attention` found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, permutations
from typing import Final

import numpy as np

from jax_nano._core import custom_calls, hlo, native
from jax_nano._core.hlo import Body, Instruction
from jax_nano._programs import aliasing, calls
from jax_nano._programs.attention import (
    BATCH,
    ELEMENT,
    HEAD,
    MASKED,
    POSITION,
    Found,
    Gradient,
    Gradients,
    NotAttention,
    Operand,
)
from jax_nano._programs.elements import Element, Index, Reader
from jax_nano._programs.loop_builder import CannotBuild, LoopBuilder

_ROWS: Final = (BATCH, POSITION, HEAD)
_DENSE: Final = (BATCH, POSITION, HEAD, ELEMENT)
"""jax.nn's order of dimensions, in which gradients are written."""

_EQUAL: Final = 1e-6  # Factors that differ by less are one and the same, rounded

_FLOAT32: Final = hlo.ELEMENT_TYPES[np.dtype(np.float32)]
_INT32: Final = hlo.ELEMENT_TYPES[np.dtype(np.int32)]

Extra = Callable[[], Instruction]
"""Makes an operand behind q, k and v, when everything has been found possible."""


def write(body: Body, found: Found) -> None:
    """Makes the root of an attention a call, and the products of its backward half another one.

    Raises:
      NotAttention: bias, mask or lengths cannot be made; nothing was changed.
    """
    try:
        extras = _extras(body, found)
    except CannotBuild as error:
        raise NotAttention(f"its bias or mask cannot be computed by itself: {error}") from None
    if found.gradients is not None:
        _write_both(body, found.resolved(), found.gradients, extras)
        return
    layout = found.layout
    dims = _dims(found)
    operands = [*_operands(body, found, dims), *(make() for make in extras.values())]
    root, order = found.root, layout.orders[3]
    sizes = [dims[3][role] for role in order]
    if found.nan_rows or found.copied:
        call = body.custom_call(root, operands)
        if found.nan_rows:
            _set_results(call, found, dims)
            out, maxima = (body.get(call, i) for i in (0, 1))
            _become_result(body, found, out, maxima)
        else:
            hlo.set_shape(call.shape, hlo.ELEMENT_TYPES[found.dtype], sizes)
            _become_result(body, found, call, None)
    else:
        call = _own_root(body, found, operands, sizes)
        calls.clear(call)
        call.opcode = "custom-call"
    _make_call(call, native.ATTENTION_TARGET_NAME, operands, _attributes(found, extras, residual=found.nan_rows))


def _make_call(call: Instruction, target: str, operands: Sequence[Instruction], attributes: bytes) -> None:
    call.custom_call_target = target
    call.custom_call_api_version = custom_calls.TYPED_FFI
    call.backend_config = attributes
    call.constrain_layout = True
    call.operand_shapes_with_layout.extend(x.shape for x in operands)


def _set_results(call: Instruction, found: Found, dims: list[dict[int, int]]) -> None:
    """Makes the results of a call those of attention with its statistics."""
    kind = hlo.ELEMENT_TYPES[found.dtype]
    sizes, rows = ([dims[3][role] for role in x] for x in (found.layout.orders[3], _ROWS))
    hlo.set_tuple(call.shape, [(kind, sizes), (_FLOAT32, rows), (_FLOAT32, rows)])


def _roles(found: Found) -> dict[int, Index]:
    """The atoms of the result's dimensions."""
    layout = found.layout
    return {BATCH: layout.batch, POSITION: layout.queries, HEAD: layout.scores[1], ELEMENT: layout.width}


def _of_rows(found: Found) -> Index:
    """The atoms of statistics in memory."""
    roles = _roles(found)
    return tuple(chain.from_iterable(roles[x] for x in _ROWS))


def _own_root(body: Body, found: Found, operands: Sequence[Instruction], sizes: Sequence[int]) -> Instruction:
    """The root of an attention, with these operands and the shape and dtype that a call writes."""
    root = found.root
    if not aliasing.has_memory_of_its_own(body, root):
        root = body.copy_result(root)
    if hlo.dtype_of(root) != found.dtype:
        root = body.convert_result(root, found.dtype)
    body.set_operands(root, operands)
    array = hlo.array_of(root.shape)
    assert array is not None
    if array.dims != tuple(sizes) or not array.is_row_major:
        root = body.bitcast_result(root, found.dtype, sizes)
    return root


def _become_result(body: Body, found: Found, out: Instruction, maxima: Instruction | None) -> None:
    """Makes the root a loop that reads what a call computed, with NaN for queries that see no key."""
    loop = LoopBuilder(body, found.reader, found.reader.in_memory(found.result))
    roles = _roles(found)
    in_call = tuple(chain.from_iterable(roles[role] for role in found.layout.orders[3]))
    result = loop.array(out, in_call)
    if maxima is not None:
        result = _with_nan(loop, loop.converted(result, _FLOAT32), maxima, _of_rows(found))
    loop.become(loop.converted(result, found.root.shape.element_type), found.root)


def _with_nan(loop: LoopBuilder, values: int, maxima: Instruction, rows: Index) -> int:
    sees_none = loop.compare("LE", loop.array(maxima, rows), loop.constant(MASKED, _FLOAT32))
    return loop.operation("select", _FLOAT32, sees_none, loop.constant(float("nan"), _FLOAT32), values)


# --- gradients ----------------------------------------------------------------------------------------------------


def _write_both(body: Body, found: Found, gradients: Gradients, extras: dict[str, Extra]) -> None:
    """Makes the root of an attention and the products of its backward half what two calls compute."""
    try:
        cotangent, order = _cotangent(body, found, gradients)
    except CannotBuild as error:
        raise NotAttention(f"the cotangent of its result cannot be computed by itself: {error}") from None
    dims = _dims(found)
    operands, others = _operands(body, found, dims), [make() for make in extras.values()]
    call = body.custom_call(found.root, [*operands, *others])
    _set_results(call, found, dims)
    _make_call(call, native.ATTENTION_TARGET_NAME, [*operands, *others], _attributes(found, extras, residual=True))
    out, maxima, logs = (body.get(call, i) for i in range(3))
    if found.nan_rows or found.copied:
        _become_result(body, found, out, maxima if found.nan_rows else None)
    else:
        root = _own_root(body, found, [out], [dims[3][role] for role in found.layout.orders[3]])
        body.become_bitcast(root)

    dout = cotangent(maxima)
    delta = _delta(body, found, out, dout, order)
    inputs = [*operands, dout, maxima, logs, delta, *others]
    backward = body.custom_call(gradients.products[0].result.instruction, inputs)
    sizes = [[dims[i][role] for role in _DENSE] for i in range(3)]
    kinds = [hlo.ELEMENT_TYPES[x] for x in (found.dtype, found.kv_dtype, found.kv_dtype)]
    hlo.set_tuple(backward.shape, list(zip(kinds, sizes, strict=True)))
    attributes = _attributes(found, extras, out_dims=order, dbias=False)
    _make_call(backward, native.ATTENTION_GRADIENTS_TARGET_NAME, inputs, attributes)
    results = {i: body.get(backward, i) for i in sorted({x.of for x in gradients.products})}
    for x in gradients.products:
        _become_gradient(body, found, x, results[x.of])


def _become_gradient(body: Body, found: Found, gradient: Gradient, computed: Instruction) -> None:
    """Makes a product of the backward half what the call computed."""
    reader, root = found.reader, gradient.result.instruction
    in_call = found.layout.gradient(gradient.of)
    in_memory = reader.in_memory(gradient.result)
    factor = np.float32(gradient.factor)
    if (
        abs(factor - 1) < _EQUAL
        and in_memory == in_call
        and hlo.dtype_of(root) == hlo.dtype_of(computed)
        and aliasing.has_memory_of_its_own(body, root)
    ):
        body.set_operands(root, [computed])
        body.become_bitcast(root)
        return
    loop = LoopBuilder(body, reader, in_memory)
    result = loop.array(computed, in_call)
    if abs(factor - 1) >= _EQUAL:
        scale = loop.constant(float(factor), _FLOAT32)
        result = loop.operation("multiply", _FLOAT32, loop.converted(result, _FLOAT32), scale)
    loop.become(loop.converted(result, root.shape.element_type), root)


def _cotangent(
    body: Body, found: Found, gradients: Gradients
) -> tuple[Callable[[Instruction], Instruction], tuple[int, ...]]:
    """How to make the array of the result's cotangents, given the maxima, and the order of its dimensions."""
    reader, roles, dims = found.reader, _roles(found), _dims(found)[3]
    kind = hlo.ELEMENT_TYPES[found.dtype]
    if not found.nan_rows:
        for x in gradients.arrays:
            if x.dtype != found.dtype or x.scale != 1 or x.narrowed:
                continue
            order = _order_of(reader.in_memory(x.element), roles)
            if order is not None:
                return partial(_reshaped, body, x.element.instruction, [dims[role] for role in order]), order
    atoms = tuple(chain.from_iterable(roles[role] for role in _DENSE))
    loop = LoopBuilder(body, reader, atoms)
    number = loop.element(gradients.cotangent)

    def make(maxima: Instruction) -> Instruction:
        result = number
        if found.nan_rows:
            result = _with_nan(loop, loop.converted(result, _FLOAT32), maxima, _of_rows(found))
        return loop.build(loop.converted(result, kind), [dims[role] for role in _DENSE])

    return make, _DENSE


def _reshaped(body: Body, x: Instruction, sizes: Sequence[int], maxima: Instruction) -> Instruction:
    del maxima
    return body.reshaped(x, sizes)


def _order_of(in_memory: Index, roles: dict[int, Index]) -> tuple[int, ...] | None:
    """The order of an array's dimensions, if its atoms are those of whole dimensions."""
    for order in permutations(roles):
        if tuple(chain.from_iterable(roles[x] for x in order)) == in_memory:
            return order
    return None


def _delta(body: Body, found: Found, out: Instruction, dout: Instruction, order: tuple[int, ...]) -> Instruction:
    """Of each query, the sum of its results times their cotangents."""
    roles = _roles(found)
    rows = _of_rows(found)
    loop = LoopBuilder(body, found.reader, (*rows, *roles[ELEMENT]))
    factors = [
        loop.converted(loop.array(x, tuple(chain.from_iterable(roles[role] for role in y))), _FLOAT32)
        for x, y in ((out, found.layout.orders[3]), (dout, order))
    ]
    number = loop.operation("multiply", _FLOAT32, *factors)
    dims = _dims(found)[3]
    return loop.build(loop.sum(number, len(roles[ELEMENT])), [dims[role] for role in _ROWS])


# --- operands and attributes --------------------------------------------------------------------------------------


def _dims(found: Found) -> list[dict[int, int]]:
    """Sizes of q, k, v and the result by the dimensions of attention."""
    layout, size = found.layout, found.reader.atoms.size
    batch, heads, group = (size(x) for x in (layout.batch, layout.heads, layout.group))
    queries, keys, depth, width = (size(x) for x in (layout.queries, layout.keys, layout.depth, layout.width))
    return [
        {BATCH: batch, POSITION: positions, HEAD: count, ELEMENT: elements}
        for positions, count, elements in (
            (queries, heads * group, depth),
            (keys, heads, depth),
            (keys, heads, width),
            (queries, heads * group, width),
        )
    ]


def _operands(body: Body, found: Found, dims: list[dict[int, int]]) -> list[Instruction]:
    """Queries, keys and values as the call reads them."""
    return [
        _operand(body, x, found.kv_dtype if i else found.dtype, [dims[i][role] for role in found.layout.orders[i]])
        for i, x in enumerate((found.q, found.k, found.v))
    ]


def _operand(body: Body, operand: Operand, dtype: np.dtype, sizes: Sequence[int]) -> Instruction:
    x = operand.element.instruction
    array = hlo.array_of(x.shape)
    assert array is not None
    if array.dims != tuple(sizes) or not array.is_row_major:
        x = body.reshaped(x, sizes)
    return x if operand.dtype == dtype else body.converted(x, dtype)


def _attributes(
    found: Found, extras: dict[str, Extra], *, out_dims: Sequence[int] | None = None, **others: bool
) -> bytes:
    orders = (*found.layout.orders[:3], out_dims or found.layout.orders[3])
    names = ("q_dims", "k_dims", "v_dims", "out_dims")
    attributes = {
        "abi": f"{native.ABI} : i64",
        **{
            name: f"dense<[{', '.join(map(str, order))}]> : tensor<4xi64>"
            for name, order in zip(names, orders, strict=True)
        },
        "scale": _float64(found.scale),
        "masked": _float64(found.masked),
        "left": f"{found.left} : i64",
        "right": f"{found.right} : i64",
        **{name: f"{int(name in extras)} : i64" for name in ("bias", "mask", "q_lengths", "kv_lengths")},
        **{name: f"{int(x)} : i64" for name, x in others.items()},
    }
    return calls.attributes_text(attributes)


def _float64(x: float) -> str:
    return f"0x{int(np.float64(x).view(np.uint64)):016X} : f64"


# --- what follows q, k and v --------------------------------------------------------------------------------------


def _extras(body: Body, found: Found) -> dict[str, Extra]:
    """How to make bias, mask and lengths, as far as there are any, in the order of the call's operands."""
    extras: dict[str, Extra] = {}
    if found.terms:
        extras["bias"] = _bias(body, found)
    if found.conditions:
        extras["mask"] = _mask(body, found)
    if found.length is not None:
        extras["kv_lengths"] = _lengths(body, found)
    return extras


def _scores_dims(found: Found, elements: Sequence[Element]) -> tuple[Index, list[int]]:
    """The atoms that an array of scores needs, of all keys, and its four sizes."""
    atoms = found.reader.atoms
    there = frozenset[int]().union(*(found.reader.atoms_of(x) for x in elements))
    dims = [dim if there & set(dim) else () for dim in found.layout.scores[:3]] + [found.layout.keys]
    return tuple(chain.from_iterable(dims)), [atoms.size(dim) for dim in dims]


def _as_it_is(body: Body, reader: Reader, element: Element, kind: int, atoms: Index, dims: list[int]) -> Extra | None:
    """An array that the call can read where it lies."""
    x = reader.look(element, into_fusions=False)
    instruction = x.instruction
    if not x.is_outside or instruction.shape.element_type != kind or reader.in_memory(x) != atoms:
        return None
    if instruction.opcode == "constant" and not instruction.shape.dimensions:
        return None
    return (lambda: body.reshaped(instruction, dims)) if aliasing.keeps_its_value(body, instruction) else None


def _bias(body: Body, found: Found) -> Extra:
    reader = found.reader
    atoms, dims = _scores_dims(found, [x.element for x in found.terms])
    if len(found.terms) == 1 and found.terms[0].factor == 1:
        as_it_is = _as_it_is(body, reader, found.terms[0].element, _FLOAT32, atoms, dims)
        if as_it_is is not None:
            return as_it_is
    loop = LoopBuilder(body, reader, atoms)
    total: int | None = None
    for term in found.terms:
        number = loop.converted(loop.element(term.element), _FLOAT32)
        if term.factor != 1:
            number = loop.operation("multiply", _FLOAT32, number, loop.constant(term.factor, _FLOAT32))
        total = number if total is None else loop.operation("add", _FLOAT32, total, number)
    assert total is not None
    return lambda: loop.build(total, dims)


def _mask(body: Body, found: Found) -> Extra:
    reader = found.reader
    atoms, dims = _scores_dims(found, [x.element for x in found.conditions])
    if len(found.conditions) == 1 and found.conditions[0].positive:
        as_it_is = _as_it_is(body, reader, found.conditions[0].element, hlo.PRED, atoms, dims)
        if as_it_is is not None:
            return as_it_is
    loop = LoopBuilder(body, reader, atoms)
    total: int | None = None
    for element, positive in found.conditions:
        number = loop.element(element)
        if not positive:
            number = loop.operation("not", hlo.PRED, number)
        total = number if total is None else loop.operation("and", hlo.PRED, total, number)
    assert total is not None
    return lambda: loop.build(total, dims)


def _lengths(body: Body, found: Found) -> Extra:
    """Between 0 and the number of keys, one for each batch."""
    assert found.length is not None
    layout, size = found.layout, found.reader.atoms.size
    loop = LoopBuilder(body, found.reader, layout.batch)
    keys = size(layout.keys)
    # Only then can something be added to it without wrapping around.
    least, most = (loop.constant(x - found.length.more, _INT32) for x in (0, keys))
    number = loop.operation("minimum", _INT32, loop.element(found.length.element), most)
    number = loop.operation("maximum", _INT32, number, least)
    number = loop.operation("add", _INT32, number, loop.constant(found.length.more, _INT32))
    return lambda: loop.build(number, [size(layout.batch)])
