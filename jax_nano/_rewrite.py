"""From dots in an HLO module to calls of our kernels.

XLA hands over a module that it has simplified, partitioned and fused. A product is there a `dot`, or a fusion of
nothing but a dot (a library's: YNNPACK, oneDNN). Each becomes one custom call, in place: its operands and its result
stay where they were and in the layout they had, which the call's labels describe.

Whatever is not understood stays as it was. What has no kernel stays too, and so does what the decline gate declines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from jax.lax import DotAlgorithmPreset

from jax_nano import _hlo, _lowering, _native, _report, _shapes
from jax_nano._hlo import Body, Instruction, Module
from jax_nano._lowering import Choice
from jax_nano._shapes import Dims, Labels
from jax_nano._signatures import Precision

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


class View(NamedTuple):
    """An instruction's array as it lies in memory: row-major, with a label for each dimension."""

    instruction: Instruction
    dtype: np.dtype
    sizes: tuple[int, ...]
    labels: Dims

    @classmethod
    def of(cls, instruction: Instruction, labels: Dims) -> View | None:
        """A view, given labels of the dimensions as HLO counts them; None if it is not a plain array."""
        array = _hlo.array_of(instruction.shape)
        if array is None:
            return None
        return cls(instruction, array.dtype, array.physical, _shapes.permute(labels, array.major_to_minor))

    @property
    def is_its_shape(self) -> bool:
        """Whether the instruction's own shape is row-major and has these sizes."""
        array = _hlo.array_of(self.instruction.shape)
        rank = len(self.sizes)
        return array is not None and array.dims == self.sizes and array.major_to_minor == tuple(range(rank))

    def described(self) -> _report.Array:
        return _report.Array(self.dtype.name, self.sizes)


class Dot(NamedTuple):
    """A dot, and which operands of the instruction that it is, or is fused in, are its own."""

    dot: Instruction
    operands: tuple[int, int]


def rewrite(module: Module) -> list[_report.Product]:
    """Turns the products of a module into calls; returns what became of each."""
    fused = {
        number
        for computation in module.computations
        for instruction in computation.instructions
        if instruction.opcode == "fusion"
        for number in instruction.called_computation_ids
    }
    products = []
    for computation in module.computations:
        if computation.id in fused:  # a fusion is looked at as a whole, where it stands
            continue
        found = [(x, dot) for x in computation.instructions if (dot := _dot_of(module, x)) is not None]
        if found:
            body = Body(computation)
            products += [_rewrite(body, instruction, dot, module.name) for instruction, dot in found]
            body.commit()
    return products


def _dot_of(module: Module, instruction: Instruction) -> Dot | None:
    if instruction.opcode == "dot":
        return Dot(instruction, (0, 1))
    if instruction.opcode != "fusion" or instruction.fusion_kind != "kCustom":
        return None
    fused = module.computation(instruction.called_computation_ids[0])
    parameters = {x.id: x.parameter_number for x in fused.instructions if x.opcode == "parameter"}
    others = [x for x in fused.instructions if x.opcode != "parameter"]
    if [x.opcode for x in others] != ["dot"] or not parameters.keys() >= set(others[0].operand_ids):
        return None
    lhs, rhs = (parameters[x] for x in others[0].operand_ids)
    return Dot(others[0], (lhs, rhs))


def _rewrite(body: Body, instruction: Instruction, found: Dot, program: str) -> _report.Product:
    dot, positions = found
    operands = body.operands(instruction)
    arrays = (*(operands[i] for i in positions), instruction)
    labels = _labels_of(dot, *(len(x.shape.dimensions) for x in arrays[:2]))
    lhs, rhs, out = (View.of(*pair) for pair in zip(arrays, labels, strict=True))
    source = instruction.metadata.op_name or instruction.name
    if lhs is None or rhs is None or out is None:
        a, b, c = (_report.Array(_hlo.dtype_name(x.shape), tuple(x.shape.dimensions)) for x in arrays)
        return _report.Product(program, source, (a, b, c), labels, "default", "no kernel reads this dtype or layout")
    choice = _choose(dot, lhs, rhs, out)
    described = lhs.described(), rhs.described(), out.described()
    if choice.signature is not None and choice.declined is None:
        _call(body, lhs, rhs, out, choice.labels, choice.signature.algorithm)
    algorithm = "default" if choice.signature is None else choice.signature.algorithm
    return _report.Product(program, source, described, choice.labels, algorithm, choice.declined)


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


def _call(body: Body, lhs: View, rhs: View, out: View, labels: Labels, algorithm: str) -> None:
    """Makes the instruction of `out` the call."""
    call = out.instruction
    operands = [
        x.instruction if x.is_its_shape else body.bitcast(x.instruction, x.dtype, x.sizes, before=call)
        for x in (lhs, rhs)
    ]
    body.set_operands(call, operands)
    if not out.is_its_shape:
        call = body.bitcast_result(call, out.dtype, out.sizes)
    for field in ("dot_dimension_numbers", "precision_config", "fusion_kind", "called_computation_ids"):
        call.ClearField(field)
    call.opcode = "custom-call"
    call.custom_call_target = _native.TARGET_NAME
    call.custom_call_api_version = _hlo.TYPED_FFI
    call.backend_config = _attributes(labels, algorithm).encode()
    call.constrain_layout = True
    call.operand_shapes_with_layout.extend(x.shape for x in operands)


def _attributes(labels: Labels, algorithm: str) -> str:
    """The call's attributes in MLIR's syntax."""
    dense = {f"{name}_labels": _dense(x) for name, x in zip(("lhs", "rhs", "out"), labels, strict=True)}
    attributes = {"abi": f"{_native.ABI} : i64", "algorithm": f'"{algorithm}"', **dense}
    return "{" + ", ".join(f"{name} = {value}" for name, value in attributes.items()) + "}"


def _dense(values: Sequence[int]) -> str:
    return f"dense<[{', '.join(map(str, values))}]> : tensor<{len(values)}xi64>"
