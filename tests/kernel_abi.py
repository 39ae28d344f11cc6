"""What the tests know of the contract between kernels and runtime: the spec's own words, and two rules of plan.h."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_nano._core import spec

FIELDS = spec.names(spec.GEMM_ARGS)
PACK_SLACK_BYTES = spec.PACK_SLACK_BYTES


def packed_a_row(nbytes: int) -> int:
    """Workspace that a row of packed A takes: an odd number of cache lines."""
    return (-(-nbytes // 64) | 1) * 64


def reads_a(kernel: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """Whether a kernel of the manifest can read A with these k, rsa and csa where it lies, as plan.h's ReadsA."""
    in_units = (fields["csa"] == 1) & (fields["k"] % kernel["kr"] == 0) & (fields["rsa"] % kernel["kr"] == 0)
    return kernel["direct_a"] & ((kernel["kr"] == 1) | in_units)
