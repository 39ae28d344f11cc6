"""What became of the products of a compiled program, read from the program: not from what jax_nano says of it."""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jax_nano._core import contraction
from jax_nano._core.contraction import DimensionNumbers
from jax_nano._dispatch import decision


class Dot(NamedTuple):
    """A product that XLA computes."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    dimension_numbers: DimensionNumbers


_DEFINITION = re.compile(r"^\s*(?:ROOT )?(%\S+) = [a-z0-9]+\[([0-9,]*)\]", re.MULTILINE)
_DOT = re.compile(r" dot\((%[^ ,]+), (%[^ ,]+)\)(.*)")


def products(text: str) -> int:
    """How many calls of ours a compiled program makes."""
    return text.count('custom_call_target="jax_nano_')


def dots(text: str) -> list[Dot]:
    """The products of a compiled program that XLA computes, in fusions too."""

    def sizes(listed: str) -> tuple[int, ...]:
        return tuple(map(int, filter(None, listed.split(","))))

    def dims(name: str, attributes: str) -> tuple[int, ...]:
        found = re.search(name + r"_dims=\{([0-9,]*)\}", attributes)
        return sizes(found[1]) if found else ()

    shapes = {name: sizes(listed) for name, listed in _DEFINITION.findall(text)}
    found = []
    for lhs, rhs, attributes in _DOT.findall(text):
        contracting, batch = (
            (dims(f"lhs_{kind}", attributes), dims(f"rhs_{kind}", attributes)) for kind in ("contracting", "batch")
        )
        found.append(Dot(shapes[lhs], shapes[rhs], (contracting, batch)))
    return found


def worth_a_call(text: str, element_bytes: int) -> list[Dot]:
    """The products that XLA computes though the decline gate would let them through.

    Args:
      text: of the program.
      element_bytes: of the model's matrices; XLA's dots of bfloat16 may be of float32.
    """
    dtype = np.dtype({2: ml_dtypes.bfloat16, 4: np.float32}[element_bytes])
    machine, policy = decision.this_machine(), decision.Policy(declines=True)

    def declined(dot: Dot) -> bool:
        labels = contraction.labels_of(dot.dimension_numbers, None, len(dot.lhs), len(dot.rhs))
        product = decision.Product(labels, dot.lhs, dot.rhs, (dtype,) * 3, None, placed=True)
        return decision.dispatch(product, machine, policy).declined is not None

    return [dot for dot in dots(text) if not declined(dot)]
