"""Policies for `jax.checkpoint` that save jax_nano's products: those of `jax.checkpoint_policies`, by the same names.

A policy recognises products by their primitive. jax_nano makes every policy decide about its own primitives, `linear`
included, as about lax.dot_general (see `jax_nano._ops.tables`). So nothing here is needed any more; it is kept for
programs that were written for earlier releases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from jax_nano._ops import tables as tables  # importing it makes policies know our primitives

__all__ = [
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "extend",
    "offload_dot_with_no_batch_dims",
]

Policy: TypeAlias = Callable[..., Any]

checkpoint_dots: Policy = jax.checkpoint_policies.checkpoint_dots
checkpoint_dots_with_no_batch_dims: Policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
dots_saveable: Policy = jax.checkpoint_policies.dots_saveable
dots_with_no_batch_dims_saveable: Policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
offload_dot_with_no_batch_dims: Callable[[str, str], Policy] = jax.checkpoint_policies.offload_dot_with_no_batch_dims


def extend(policy: Policy) -> Policy:
    """A policy that decides about jax_nano's products as about lax.dot_general: `policy` itself."""
    return policy
