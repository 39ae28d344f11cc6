"""A custom call of the attention kernels, written into an HLO module in the place of what `attention` found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Final

import numpy as np

from jax_nano._core import hlo, native
from jax_nano._core.hlo import Body, Instruction
from jax_nano._programs import aliasing, calls
from jax_nano._programs.attention import (
    BATCH,
    ELEMENT,
    HEAD,
    POSITION,
    Found,
    NotAttention,
    Operand,
)
from jax_nano._programs.elements import Element, Index, Reader
from jax_nano._programs.loop_builder import CannotBuild, LoopBuilder

_MASKED: Final = float(np.float32(-0.7) * np.finfo(np.float32).max)
"""The logarithm that the call gives for a query that sees no key."""

_FLOAT32: Final = hlo.ELEMENT_TYPES[np.dtype(np.float32)]
_INT32: Final = hlo.ELEMENT_TYPES[np.dtype(np.int32)]

Extra = Callable[[], Instruction]
"""Makes an operand behind q, k and v, when everything has been found possible."""


def write(body: Body, found: Found) -> None:
    """Makes the root of an attention a call.

    Raises:
      NotAttention: bias, mask or lengths cannot be made; nothing was changed.
    """
    try:
        extras = _extras(body, found)
    except CannotBuild as error:
        raise NotAttention(f"its bias or mask cannot be computed by itself: {error}") from None
    reader, layout = found.reader, found.layout
    dims = _dims(found)
    operands = [
        _operand(body, x, found.kv_dtype if i else found.dtype, [dims[i][role] for role in layout.orders[i]])
        for i, x in enumerate((found.q, found.k, found.v))
    ]
    operands += [make() for make in extras.values()]
    root, order = found.root, layout.orders[3]
    sizes = [dims[3][role] for role in order]
    if found.nan_rows or found.copied:
        call = body.custom_call(root, operands)
        kind = hlo.ELEMENT_TYPES[found.dtype]
        loop = LoopBuilder(body, reader, reader.in_memory(found.result))
        roles = dict(zip((BATCH, POSITION, HEAD), (layout.batch, layout.queries, layout.scores[1]), strict=True))
        in_call = tuple(chain.from_iterable({**roles, ELEMENT: layout.width}[role] for role in order))
        if found.nan_rows:
            hlo.set_tuple(call.shape, [(kind, sizes), (_FLOAT32, [dims[3][role] for role in roles])])
            out, logarithms = (body.get(call, i) for i in (0, 1))
            values = loop.converted(loop.array(out, in_call), _FLOAT32)
            of_logarithms = loop.array(logarithms, tuple(chain.from_iterable(roles.values())))
            sees_none = loop.compare("LE", of_logarithms, loop.constant(_MASKED, _FLOAT32))
            result = loop.operation("select", _FLOAT32, sees_none, loop.constant(float("nan"), _FLOAT32), values)
        else:
            hlo.set_shape(call.shape, kind, sizes)
            result = loop.array(call, in_call)
        loop.become(loop.converted(result, root.shape.element_type), root)
    else:
        if not aliasing.has_memory_of_its_own(body, root):
            root = body.copy_result(root)
        if hlo.dtype_of(root) != found.dtype:
            root = body.convert_result(root, found.dtype)
        body.set_operands(root, operands)
        array = hlo.array_of(root.shape)
        assert array is not None
        call = root
        if array.dims != tuple(sizes) or not array.is_row_major:
            call = body.bitcast_result(root, found.dtype, sizes)
        calls.clear(call)
        call.opcode = "custom-call"
    call.custom_call_target = native.ATTENTION_TARGET_NAME
    call.custom_call_api_version = hlo.TYPED_FFI
    call.backend_config = _attributes(found, extras)
    call.constrain_layout = True
    call.operand_shapes_with_layout.extend(x.shape for x in operands)


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


def _operand(body: Body, operand: Operand, dtype: np.dtype, sizes: Sequence[int]) -> Instruction:
    x = operand.element.instruction
    array = hlo.array_of(x.shape)
    assert array is not None
    if array.dims != tuple(sizes) or not array.is_row_major:
        x = body.reshaped(x, sizes)
    return x if operand.dtype == dtype else body.converted(x, dtype)


def _attributes(found: Found, extras: dict[str, Extra]) -> bytes:
    names = ("q_dims", "k_dims", "v_dims", "out_dims")
    attributes = {
        "abi": f"{native.ABI} : i64",
        **{
            name: f"dense<[{', '.join(map(str, order))}]> : tensor<4xi64>"
            for name, order in zip(names, found.layout.orders, strict=True)
        },
        "scale": f"0x{int(np.float64(found.scale).view(np.uint64)):016X} : f64",
        "left": f"{found.left} : i64",
        "right": f"{found.right} : i64",
        **{name: f"{int(name in extras)} : i64" for name in ("bias", "mask", "q_lengths", "kv_lengths")},
        "residual": f"{int(found.nan_rows)} : i64",
    }
    return calls.attributes_text(attributes)


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
