"""Writes a custom call of our kernels into an HLO module, instead of a product and the operations of its epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

import numpy as np

from jax_nano._core import hlo, native
from jax_nano._core.contraction import Dims, Labels
from jax_nano._core.hlo import Body, Instruction
from jax_nano._programs import epilogues, views
from jax_nano._programs.views import View

_OF_OTHERS: Final = ("called_computation_ids", "dimensions", "dot_dimension_numbers", "fusion_kind", "precision_config")


def write(
    body: Body, lhs: View, rhs: View, out: View, labels: Labels, algorithm: str, epilogue: epilogues.Found | None
) -> None:
    """Turns the instruction of `out` into the call; with an epilogue, the instruction that computes the epilogue."""
    inputs = [_narrowed(body, view) for view in (lhs, rhs)]
    attributes = {"abi": f"{native.ABI} : i64", "algorithm": f'"{algorithm}"'}
    target = native.TARGET_NAME
    if epilogue is not None:
        out = out._replace(instruction=epilogue.instruction)
    if hlo.dtype_of(out.instruction) != out.dtype:
        out = out._replace(instruction=body.convert_result(out.instruction, out.dtype))
    if epilogue is not None and not epilogue.is_nothing:
        target = native.LINEAR_TARGET_NAME
        if (bias := epilogue.bias) is not None:
            bias = bias if hlo.dtype_of(bias) == out.dtype else body.converted(bias, out.dtype)
            inputs.append(View(bias, out.dtype, out.sizes[-1:], out.labels[-1:]))
        if epilogue.residual is not None:
            inputs.append(out._replace(instruction=epilogue.residual))
        attributes["activation"] = f'"{epilogue.activation}"'
        attributes["scale"] = float32(epilogue.scale)
        attributes["bias"] = f"{int(epilogue.bias is not None)} : i64"
        attributes["residual"] = f"{int(epilogue.residual is not None)} : i64"
    for name, dims in zip(("lhs", "rhs", "out"), labels, strict=True):
        attributes[f"{name}_labels"] = _dense(dims)

    call = out.instruction
    operands = [x.instruction if x.is_its_shape else body.bitcast(x.instruction, x.dtype, x.sizes) for x in inputs]
    body.set_operands(call, operands)
    if not out.is_its_shape:
        call = body.bitcast_result(call, out.dtype, out.sizes)
    clear(call)
    call.opcode = "custom-call"
    call.custom_call_target = target
    call.custom_call_api_version = hlo.TYPED_FFI
    call.backend_config = attributes_text(attributes)
    call.constrain_layout = True
    call.operand_shapes_with_layout.extend(x.shape for x in operands)


def clear(instruction: Instruction) -> None:
    """Removes from an instruction what says which operation it was."""
    for field in _OF_OTHERS:
        instruction.ClearField(field)


def attributes_text(attributes: Mapping[str, str]) -> bytes:
    """A call's attributes as a dictionary of MLIR."""
    return ("{" + ", ".join(f"{x} = {value}" for x, value in attributes.items()) + "}").encode()


def _narrowed(body: Body, view: View) -> View:
    """The view with an instruction whose result has the view's dtype."""
    instruction = views.before_widening(body, view.instruction, view.dtype)
    return view._replace(instruction=instruction or views.narrow(body, view.instruction))


def float32(value: float) -> str:
    """A number as MLIR's text, bit for bit: decimal digits have no infinities and no NaN."""
    with np.errstate(over="ignore"):
        bits = int(np.float32(value).view(np.uint32))
    return f"0x{bits:08X} : f32"


@cache
def _dense(values: Dims) -> str:
    return f"dense<[{', '.join(map(str, values))}]> : tensor<{len(values)}xi64>"
