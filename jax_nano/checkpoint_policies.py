"""Policies for `jax.checkpoint` that treat jax_nano's products as JAX's own treat lax.dot_general.

JAX's policies recognise products by their primitive, and so would recompute ours. Each policy here takes
the decision of its namesake in `jax.checkpoint_policies` for all kinds of product, `linear` included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p as lax_dot_general_p

from jax_nano import _shapes
from jax_nano._linear import linear_p
from jax_nano._primitive import dot_general_p

__all__ = [
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "extend",
    "offload_dot_with_no_batch_dims",
]

Policy: TypeAlias = Callable[..., Any]


def extend(policy: Policy) -> Policy:
    """A policy that decides about jax_nano's products as `policy` does about lax.dot_general."""

    def extended(primitive: Primitive, *avals: Any, **params: Any) -> Any:
        if primitive is linear_p:
            dimension_numbers, _ = _shapes.dimension_numbers_of(params["labels"])
            return policy(lax_dot_general_p, *avals, **params, dimension_numbers=dimension_numbers)
        return policy(lax_dot_general_p if primitive is dot_general_p else primitive, *avals, **params)

    return extended


dots_saveable: Policy = extend(jax.checkpoint_policies.dots_saveable)
checkpoint_dots = dots_saveable
dots_with_no_batch_dims_saveable: Policy = extend(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
checkpoint_dots_with_no_batch_dims = dots_with_no_batch_dims_saveable


def offload_dot_with_no_batch_dims(offload_src: str, offload_dst: str) -> Policy:
    """`jax.checkpoint_policies.offload_dot_with_no_batch_dims` for all kinds of product."""
    return extend(jax.checkpoint_policies.offload_dot_with_no_batch_dims(offload_src, offload_dst))
