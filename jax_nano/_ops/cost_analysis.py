"""XLA's cost analysis of programs with our calls: each call counts as the dots that it replaces.

XLA's cost analysis counts -1 operations and -1 bytes for a custom call, in a lowered program and in a compiled one, and
no attribute of a call can change that (JAX 0.10 to 0.12: a product of 256^3 has -1.0 flops). So
`Lowered.cost_analysis()` and `Compiled.cost_analysis()`, and with them what flax's tabulate prints, are made to analyse
a copy of the program with dots instead of our calls. A program without calls is analysed as it is. Everything else is
as XLA counts it: the body of a loop counts once, however often it runs.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Final

from jax_nano._core import jax_compat as compat
from jax_nano._core import native
from jax_nano._core.contraction import Labels

if TYPE_CHECKING:
    from jax_nano._core.hlo import Body, Instruction

_TARGETS: Final = (native.TARGET_NAME, native.LINEAR_TARGET_NAME, native.QUANTIZED_TARGET_NAME)
_ALONG_K: Final = re.compile(rb"along_k = 1")
_LABELS: Final = re.compile(rb"(lhs|rhs|out)_labels = dense<\[?([0-9, ]*)\]?>")
_DIMS: Final = re.compile(rb"(q|k|v|out)_dims = dense<\[([0-9, ]*)\]>")


def with_dots(serialized: bytes) -> bytes | None:
    """The HLO module with dots in the places of our calls, None if there are none.

    Epilogues are not counted: a bias, a residual and an activation cost about a hundredth of the product. Nor is making
    floats of quantised weights, which count with their own bytes. Neither is softmax in attention, nor is it counted
    that a causal mask saves half of the work.
    """
    if not any(target.encode() in serialized for target in (*_TARGETS, native.ATTENTION_TARGET_NAME)):
        return None
    from jax_nano._core import hlo  # needs protobuf

    module = hlo.Module(serialized)
    found = False
    for body in module.bodies("custom-call"):
        attentions = [x for x in body.instructions if x.custom_call_target == native.ATTENTION_TARGET_NAME]
        for x in attentions:
            _attention_to_dots(body, x)
        if attentions:
            found = True
            body.commit()
            module.clear_schedule()
    for computation in module.computations:
        for x in computation.instructions:
            if x.opcode != "custom-call" or x.custom_call_target not in _TARGETS:
                continue
            found = True
            if x.custom_call_target == native.QUANTIZED_TARGET_NAME:
                labels = Labels((0, 1), (2, 1) if _ALONG_K.search(x.backend_config) else (1, 2), (0, 2))
            else:
                labels = labels_of(x.backend_config)
            dot = type(x)(name=x.name, opcode="dot", id=x.id, operand_ids=x.operand_ids[:2], shape=x.shape)
            dot.control_predecessor_ids.extend(x.control_predecessor_ids)
            numbers = dot.dot_dimension_numbers
            contracting, batch = labels.contracting, labels.batch
            numbers.lhs_contracting_dimensions.extend(labels.lhs.index(i) for i in contracting)
            numbers.rhs_contracting_dimensions.extend(labels.rhs.index(i) for i in contracting)
            numbers.lhs_batch_dimensions.extend(labels.lhs.index(i) for i in batch)
            numbers.rhs_batch_dimensions.extend(labels.rhs.index(i) for i in batch)
            x.CopyFrom(dot)
    return module.serialized() if found else None


def _attention_to_dots(body: Body, call: Instruction) -> None:
    """Makes a call of attention two dots, of matrices that have as many elements as its arrays."""
    from jax_nano._core import hlo

    q, k, v = body.operands(call)[:3]
    orders = {name.decode(): [int(i) for i in text.split(b",")] for name, text in _DIMS.findall(call.backend_config)}
    sizes = {
        name: dict(zip(orders[name], x.shape.dimensions, strict=True)) for name, x in (("q", q), ("k", k), ("v", v))
    }
    batch, heads = sizes["k"][0], sizes["k"][2]
    keys, depth, width = sizes["k"][1], sizes["k"][3], sizes["v"][3]
    rows = prod(sizes["q"].values()) // max(batch * heads * depth, 1)
    result = call.shape.tuple_shapes[0] if call.shape.tuple_shapes else call.shape

    def dot(lhs: Instruction, rhs: Instruction, contracting: int, columns: int, kind: int) -> Instruction:
        new = body.custom_call(call, (lhs, rhs))
        new.opcode = "dot"
        hlo.set_shape(new.shape, kind, (batch * heads, rows, columns))
        numbers = new.dot_dimension_numbers
        numbers.lhs_contracting_dimensions.append(2)
        numbers.rhs_contracting_dimensions.append(contracting)
        numbers.lhs_batch_dimensions.append(0)
        numbers.rhs_batch_dimensions.append(0)
        return new

    matrices = [
        body.reshaped(x, (batch * heads, n, m)) for x, n, m in ((q, rows, depth), (k, keys, depth), (v, keys, width))
    ]
    scores = dot(matrices[0], matrices[1], 2, keys, q.shape.element_type)
    out = dot(scores, matrices[2], 1, width, result.element_type)
    operands = [body.reshaped(out, result.dimensions)]
    for shape in call.shape.tuple_shapes[1:]:
        other = body.custom_call(call, ())
        other.opcode = "iota"
        other.dimensions.append(0)
        other.shape.CopyFrom(shape)
        operands.append(other)
    body.set_operands(call, operands)
    new = type(call)(name=call.name, opcode="tuple" if len(operands) > 1 else "bitcast", id=call.id, shape=call.shape)
    new.operand_ids.extend(call.operand_ids)
    new.control_predecessor_ids.extend(call.control_predecessor_ids)
    call.CopyFrom(new)


def labels_of(backend_config: bytes) -> Labels:
    """The labels among the attributes of a call, as XLA prints them."""
    found = {
        name.decode(): tuple(map(int, re.findall(rb"\d+", text))) for name, text in _LABELS.findall(backend_config)
    }
    return Labels(found["lhs"], found["rhs"], found["out"])


compat.analyse_costs_of(with_dots)
