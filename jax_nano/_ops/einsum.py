"""An einsum expression as a sequence of products: parsing and path, no tracing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import opt_einsum  # type: ignore[import-untyped]

from jax_nano._core import contraction
from jax_nano._core.contraction import Labels


class Step(NamedTuple):
    """One contraction: which operands to take, in which order to pop them, and what to do with them."""

    operands: tuple[int, ...]
    subscripts: str
    labels: Labels | None  # None: not a plain product; jnp.einsum does it


def steps(subscripts: Any, operands: Sequence[Any], optimize: Any, out_sharding: Any) -> tuple[Step, ...] | None:
    """The contractions of an expression; None if it is to be left to jnp.einsum as a whole.

    That is: errors, so that they are JAX's own; operands in the form of alternating arrays and lists; an object that
    finds paths; symbolic sizes and an out_sharding where there is more than one contraction.
    """
    if not isinstance(subscripts, str):
        return None
    if not operands or not all(hasattr(x, "shape") for x in operands):
        return None
    shapes = tuple(x.shape for x in operands)
    path = tuple(optimize) if isinstance(optimize, list) else optimize
    if not isinstance(path, str | bool | tuple):
        return None
    if any(not isinstance(size, int) for shape in shapes for size in shape) and len(shapes) > 2:
        return None
    try:
        found = _steps(subscripts, shapes, path)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return None if out_sharding is not None and len(found) > 1 else found


@lru_cache(maxsize=1024)
def _steps(subscripts: str, shapes: tuple[tuple[int, ...], ...], optimize: Any) -> tuple[Step, ...]:
    if len(shapes) == 2 and not isinstance(optimize, tuple):
        names, output, _ = opt_einsum.parser.parse_einsum_input((subscripts, *shapes), shapes=True)
        labels = contraction.einsum_labels(names.split(","), output, shapes)
        if labels is not None:
            return (Step((0, 0), f"{names}->{output}", labels),)
    if isinstance(optimize, bool):
        optimize = ((0, 1),) * (len(shapes) - 1) if not optimize and len(shapes) > 2 else "optimal"
    _, info = opt_einsum.contract_path(subscripts, *shapes, shapes=True, optimize=optimize)
    left = list(shapes)
    found = []
    for taken, _, expression, *_ in info.contraction_list:
        if len(taken) > 2:
            raise ValueError("JAX contracts no more than two operands at a time")
        inputs, output = expression.split("->")
        names = inputs.split(",")
        taken_shapes = [left.pop(i) for i in taken]
        found.append(Step(tuple(taken), expression, contraction.einsum_labels(names, output, taken_shapes)))
        sizes: dict[str, int] = {}
        for dims, shape in zip(names, taken_shapes, strict=True):
            for name, size in zip(dims, shape, strict=True):
                sizes[name] = max(size, sizes.get(name, size))
        left.append(tuple(sizes[name] for name in output))
    return tuple(found)
