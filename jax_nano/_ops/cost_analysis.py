"""XLA's cost analysis of programs with our calls: each call counts as the dot that it replaces.

XLA's cost analysis counts -1 operations and -1 bytes for a custom call, in a lowered program and in a compiled one, and
no attribute of a call can change that (JAX 0.10 to 0.12: a product of 256^3 has -1.0 flops). So
`Lowered.cost_analysis()` and `Compiled.cost_analysis()`, and with them what flax's tabulate prints, are made to analyse
a copy of the program with dots instead of our calls. A program without calls is analysed as it is. Everything else is
as XLA counts it: the body of a loop counts once, however often it runs.
"""

from __future__ import annotations

import re
from typing import Final

from jax_nano._core import jax_compat as compat
from jax_nano._core import native
from jax_nano._core.contraction import Labels

_TARGETS: Final = (native.TARGET_NAME, native.LINEAR_TARGET_NAME)
_LABELS: Final = re.compile(rb"(lhs|rhs|out)_labels = dense<\[?([0-9, ]*)\]?>")


def with_dots(serialized: bytes) -> bytes | None:
    """The HLO module with dots in the places of our calls, None if there are none.

    Epilogues are not counted: a bias, a residual and an activation cost about a hundredth of the product.
    """
    if not any(target.encode() in serialized for target in _TARGETS):
        return None
    from jax_nano._core import hlo  # needs protobuf

    module = hlo.Module(serialized)
    found = False
    for computation in module.computations:
        for x in computation.instructions:
            if x.opcode != "custom-call" or x.custom_call_target not in _TARGETS:
                continue
            found = True
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


def labels_of(backend_config: bytes) -> Labels:
    """The labels among the attributes of a call, as XLA prints them."""
    found = {
        name.decode(): tuple(map(int, re.findall(rb"\d+", text))) for name, text in _LABELS.findall(backend_config)
    }
    return Labels(found["lhs"], found["rhs"], found["out"])


compat.analyse_costs_of(with_dots)
