"""A custom call for quantised weights, written into an HLO module in the place of what `quantized` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from jax_nano._core import custom_calls, hlo, native
from jax_nano._core.hlo import Body, Instruction
from jax_nano._programs import aliasing, calls
from jax_nano._programs.elements import Element
from jax_nano._programs.loop_builder import CannotBuild, LoopBuilder, scalar
from jax_nano._programs.quantized import Found, NotQuantized, arrays_to_read

_FLOAT32: Final = hlo.ELEMENT_TYPES[np.dtype(np.float32)]
_INT8: Final = hlo.ELEMENT_TYPES[np.dtype(np.int8)]
_UINT8: Final = hlo.ELEMENT_TYPES[np.dtype(np.uint8)]

_UNSIGNED: Final = (_UINT8, 22)  # uint4

# Bits of the call's attribute `layers`.
_OF_WEIGHTS: Final = 1
_OF_SCALES: Final = 2


def write(body: Body, found: Found) -> None:
    """Makes the root of a product with quantised weights a call.

    Raises:
      NotQuantized: scales or zero points cannot be made; nothing that is read has changed.
    """
    m, k, _, n = found.sizes
    try:
        (scale, layers), zero = _scale(body, found), _zero(body, found)
        x = _x(body, found)
        number = [scalar(body, found.reader, found.reader.layer_of(a), hlo.S32) for a in found.layer]
    except CannotBuild as error:
        raise NotQuantized(f"its scales cannot be computed by themselves: {error}") from None
    weights = found.weights
    stack = [found.reader.atoms.size(found.layer)] if found.layer else []
    inputs = [x, _shaped(body, weights.q.instruction, [*stack, *((n, k) if found.along_k else (k, n))]), scale]
    inputs += [] if zero is None else [zero]
    root, epilogue = found.root, found.epilogue
    attributes = {
        "abi": f"{native.ABI} : i64",
        "along_k": f"{int(found.along_k)} : i64",
        "zero": f"{int(zero is not None)} : i64",
        "layers": f"{layers | _OF_WEIGHTS if stack else 0} : i64",
        "activation": '"none"',
        "factor": calls.float32(1.0),
        "bias": "0 : i64",
        "residual": "0 : i64",
    }
    if epilogue is not None:
        attributes["activation"], attributes["factor"] = f'"{epilogue.activation}"', calls.float32(epilogue.scale)
        if (bias := epilogue.bias) is not None:
            attributes["bias"] = "1 : i64"
            bias = bias if hlo.dtype_of(bias) == found.dtype else body.converted(bias, found.dtype)
            inputs.append(_shaped(body, bias, (n,)))
        if epilogue.residual is not None:
            attributes["residual"] = "1 : i64"
            inputs.append(_shaped(body, epilogue.residual, (m, n)))
    inputs += number
    if found.copied:
        call = body.custom_call(root, inputs)
        hlo.set_array(call.shape, found.dtype, (m, n))
        loop = LoopBuilder(body, found.reader, found.reader.in_memory(found.result))
        result = loop.array(call, found.rows + found.columns)
        loop.become(loop.converted(result, root.shape.element_type), root)
    else:
        if root.id != found.dot.id and not aliasing.has_memory_of_its_own(body, root):
            root = body.copy_result(root)
        if hlo.dtype_of(root) != found.dtype:
            root = body.convert_result(root, found.dtype)
        body.set_operands(root, inputs)
        array = hlo.array_of(root.shape)
        assert array is not None
        call = root
        if array.dims != (m, n) or not array.is_row_major:
            call = body.bitcast_result(root, found.dtype, (m, n))
        calls.clear(call)
        call.opcode = "custom-call"
    call.custom_call_target = native.QUANTIZED_TARGET_NAME
    call.custom_call_api_version = custom_calls.TYPED_FFI
    call.backend_config = calls.attributes_text(attributes)
    call.constrain_layout = True
    call.operand_shapes_with_layout.extend(x.shape for x in inputs)


def _shaped(body: Body, x: Instruction, dims: Sequence[int]) -> Instruction:
    """An array that lies in memory as a row-major one of these sizes does, as that."""
    is_it = list(x.shape.dimensions) == list(dims)
    row_major = list(x.shape.layout.minor_to_major) == list(range(len(dims)))[::-1]
    return x if is_it and row_major else body.reshaped(x, dims)


def _x(body: Body, found: Found) -> Instruction:
    m, k, _, _ = found.sizes
    order = found.rows + found.k
    if found.reader.in_memory(found.x) == order:
        return _shaped(body, found.x.instruction, (m, k))
    loop = LoopBuilder(body, found.reader, order)
    return loop.build(loop.array(found.x.instruction, found.reader.in_memory(found.x)), (m, k))


def _scale(body: Body, found: Found) -> tuple[Instruction, int]:
    """The scales, in the order of the weights, and the bit of `layers` if they are a stack of them."""
    dims = _dims(found)
    if found.epilogue is not None and found.epilogue.columns is not None:
        return _shaped(body, found.epilogue.columns, dims), 0
    for x in arrays_to_read(found):
        array = hlo.array_of(x.instruction.shape)
        is_float = array is not None and array.dtype in (np.float32, hlo.BFLOAT16, np.float16)
        if not is_float or not aliasing.keeps_its_value(body, x.instruction):
            continue
        in_memory = found.reader.in_memory(x)
        if in_memory == found.of_scales:
            return _shaped(body, x.instruction, dims), 0
        if found.layer and in_memory == found.layer + found.of_scales:
            return _shaped(body, x.instruction, [found.reader.atoms.size(found.layer), *dims]), _OF_SCALES
    loop = LoopBuilder(body, found.reader, found.of_scales)
    total = None
    for factor in found.weights.scales:
        number = loop.converted(loop.element(factor.element), _FLOAT32)
        if total is None and not factor.divides:
            total = number
        else:
            total = loop.constant(1.0, _FLOAT32) if total is None else total
            total = loop.operation("divide" if factor.divides else "multiply", _FLOAT32, total, number)
    return loop.build(loop.constant(1.0, _FLOAT32) if total is None else total, dims), 0


def _zero(body: Body, found: Found) -> Instruction | None:
    """The zero points, if there are any, in the order of the weights."""
    zero = found.weights.zero
    if zero is None:
        return None
    loop = LoopBuilder(body, found.reader, found.of_scales)
    if zero.element is None:
        kind = _INT8 if zero.number < 128 else _UINT8
        return loop.build(loop.constant(zero.number, kind), _dims(found))
    element: Element = zero.element
    here = found.reader.look(element, into_fusions=False)
    kind = _UINT8 if element.instruction.shape.element_type in _UNSIGNED else _INT8
    is_array = here.is_outside and here.opcode != "constant" and here.instruction.shape.element_type == kind
    as_it_is = is_array and found.reader.in_memory(here) == found.of_scales
    if as_it_is and aliasing.keeps_its_value(body, here.instruction):
        return _shaped(body, here.instruction, _dims(found))
    return loop.build(loop.converted(loop.element(element), kind), _dims(found))


def _dims(found: Found) -> tuple[int, int]:
    _, _, groups, n = found.sizes
    return (n, groups) if found.along_k else (groups, n)
