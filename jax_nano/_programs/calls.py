"""Writes a custom call of our kernels into an HLO module, instead of a product and the operations of its epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

from jax_nano._core import custom_calls, hlo, native
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
    target, described = native.TARGET_NAME, None
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
        has_bias, has_residual = epilogue.bias is not None, epilogue.residual is not None
        described = native.Epilogue.of(epilogue.activation, epilogue.scale, bias=has_bias, residual=has_residual)
    arrays = (*inputs[:2], out)
    dtypes = tuple(hlo.NAMES[x.dtype] for x in arrays)
    untyped = native.untyped_call(tuple(x.sizes for x in arrays), tuple(labels), dtypes, algorithm, described)

    call = out.instruction
    operands = [x.instruction if x.is_its_shape else body.bitcast(x.instruction, x.dtype, x.sizes) for x in inputs]
    body.set_operands(call, operands)
    if not out.is_its_shape:
        call = body.bitcast_result(call, out.dtype, out.sizes)
    clear(call)
    call.opcode = "custom-call"
    call.custom_call_target = target
    if untyped is not None:
        call.custom_call_api_version = custom_calls.STATUS_RETURNING
        call.backend_config = untyped.encode()
    else:
        call.custom_call_api_version = custom_calls.TYPED_FFI
        call.backend_config = _attributes(labels, algorithm, described)
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
    return f"0x{native.float32_bits(value):08X} : f32"


def _attributes(labels: Labels, algorithm: str, epilogue: native.Epilogue | None) -> bytes:
    """The attributes of a typed call as MLIR's text."""
    attributes = {"abi": f"{native.ABI} : i64", "algorithm": f'"{algorithm}"'}
    if epilogue is not None:
        attributes["activation"] = f'"{epilogue.activation}"'
        attributes["scale"] = f"0x{epilogue.scale_bits:08X} : f32"  # decimal digits have no infinities and no NaN
        attributes["bias"] = f"{int(epilogue.bias)} : i64"
        attributes["residual"] = f"{int(epilogue.residual)} : i64"
    for name, dims in zip(("lhs", "rhs", "out"), labels, strict=True):
        attributes[f"{name}_labels"] = _dense(dims)
    return attributes_text(attributes)


@cache
def _dense(values: Dims) -> str:
    return f"dense<[{', '.join(map(str, values))}]> : tensor<{len(values)}xi64>"
