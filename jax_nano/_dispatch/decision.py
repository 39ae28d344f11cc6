"""The one decision about a product on a CPU, or about attention: which kernel computes it, or why XLA does.

`dispatch` is a pure function of the product, the machine and the policy, and `why_no_attention` of the first two, so
that results can be cached. Callers pass `this_machine()` and a policy: that of the process, or the one that a program
was marked with.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import contraction, native, signatures, spec
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Dims, Labels
from jax_nano._core.signatures import Precision, Signature
from jax_nano._dispatch import xla


class Product(NamedTuple):
    """A product of two arrays, as far as it is known when a program is compiled."""

    labels: Labels
    lhs_shape: tuple[int, ...]  # a size may be symbolic
    rhs_shape: tuple[int, ...]
    dtypes: tuple[np.dtype, np.dtype, np.dtype]  # of lhs, rhs and result
    precision: Precision  # canonical
    placed: bool = False  # whether it is known that XLA will not compile a loop around it into one function


class Attention(NamedTuple):
    """An attention, as far as it is known when a program is compiled."""

    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of q, k, v; a size may be symbolic
    dtypes: tuple[np.dtype, np.dtype, np.dtype]


class Machine(NamedTuple):
    """What this CPU has kernels for."""

    target: str  # the best one; "" if there is none
    signatures: frozenset[tuple[str, str, str, str]]  # names of the dtypes of lhs, rhs and result, and the algorithm
    attentions: frozenset[tuple[str, str]] = frozenset()  # names of the dtypes of queries, and of keys and values

    @property
    def vector_bits(self) -> int:
        """Bits of a vector register of the target, 0 without one."""
        facts = spec.TARGETS.get(self.target)
        return 0 if facts is None else facts.vector_bits

    def supports(self, lhs: str, rhs: str, out: str, algorithm: str) -> bool:
        """Whether there is a kernel for these names."""
        return (lhs, rhs, out, algorithm) in self.signatures


class Policy(NamedTuple):
    """What the user decides about all products."""

    declines: bool = True  # whether products that XLA computes faster are left to it

    def __str__(self) -> str:
        return f"gate {'on' if self.declines else 'off'}"

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Policy:
        """JAX_NANO_GATE=on, the default, or off.

        Raises:
          ValueError: it is neither.
        """
        value = environment.get("JAX_NANO_GATE") or "on"
        try:
            return cls({"on": True, "off": False}[value.strip().lower()])
        except KeyError:
            raise ValueError(f"JAX_NANO_GATE={value}: expected one of on, off") from None


class Decision(NamedTuple):
    """What becomes of a product."""

    labels: Labels
    signature: Signature | None  # that of the kernel; None if XLA computes it
    declined: str | None  # why XLA does, in words


policy: Policy = Policy.of_environment(os.environ)
"""The policy of this process."""


@cache
def this_machine() -> Machine:
    """The kernels of the extension that run on this CPU, none where there is no extension."""
    runtime = native.runtime()
    if runtime is None:
        return Machine("", frozenset())
    algorithms = (spec.DEFAULT_ALGORITHM, *spec.ALGORITHMS)
    operands = {name for signature in spec.SIGNATURES for name in signature[:2]}
    found = (
        (lhs, rhs, out, algorithm)
        for lhs in operands
        for rhs in operands
        for out in spec.DTYPES
        for algorithm in algorithms
    )
    attentions = frozenset(x for x in spec.ATTENTION_SIGNATURES if native.supports_attention(*x))
    return Machine(native.target(), frozenset(x for x in found if native.supports(*x)), attentions)


@lru_cache(maxsize=4096)
def dispatch(product: Product, machine: Machine, policy: Policy) -> Decision:
    """The decision about a product."""
    labels, lhs_shape, rhs_shape, dtypes, precision, placed = product
    signature = signature_of(product, machine)
    if signature is None:
        return Decision(labels, None, "no kernel for {} x {} -> {} at precision {}".format(*dtypes, precision))
    names = dtypes[0].name, dtypes[1].name
    declined = why_declined(labels, (lhs_shape, rhs_shape), names, signature.algorithm, machine, policy, placed=placed)
    return Decision(labels, None if declined else signature, declined)


def why_declined(
    labels: Labels,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    dtypes: tuple[str, str],
    algorithm: str,
    machine: Machine,
    policy: Policy,
    *,
    placed: bool = False,
) -> str | None:
    """Why a product that a kernel could compute is left to XLA, or None.

    Args:
      labels: of the product's dimensions.
      shapes: those of its operands.
      dtypes: names of theirs.
      algorithm: that of the kernel.
      machine: what there are kernels for.
      policy: that of the process, or of the program.
      placed: as in `Product`.
    """
    # XLA would compute an algorithm that rounds operands in plain float32, so it goes to a kernel at any size.
    if not policy.declines or algorithm != signatures.DEFAULT:
        return None
    in_function = compat.INLINES_SMALL_PRODUCTS and not placed
    return xla.is_faster(labels, *shapes, dtypes=dtypes, vector_bits=machine.vector_bits, in_function=in_function)


def signature_of(product: Product, machine: Machine) -> Signature | None:
    """The kernel's dtypes for a product, None if there is none."""
    sizes = product.labels.sizes(product.lhs_shape, product.rhs_shape)
    terms = math.prod(sizes[x] for x in product.labels.contracting)
    return signatures.find(*product.dtypes, product.precision, terms, machine.supports)


MOST_ATTENTION_ELEMENTS: Final = 1024
"""Of a query, key or value: blocks of longer ones do not fit the caches that attention is planned for."""


@lru_cache(maxsize=4096)
def why_no_attention(attention: Attention, machine: Machine) -> str | None:
    """Why an attention and its gradients are left to XLA, or None: a kernel computes them in one pass."""
    shapes, dtypes = attention
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return "a size is symbolic"
    if not all(size > 0 for shape in shapes for size in shape):
        return "there are no elements"
    longest = max(shape[-1] for shape in shapes)
    if longest > MOST_ATTENTION_ELEMENTS:
        return f"heads of {longest} elements, more than {MOST_ATTENTION_ELEMENTS}"
    q, k, v = dtypes
    if k != v or (q.name, k.name) not in machine.attentions:
        return f"no kernel for attention of {q}, {k} and {v}"
    return None


class Stored(NamedTuple):
    """How a call stores its result."""

    labels: Labels
    shape: tuple[int, ...]
    perm: Dims | None  # the transpose that makes it the result that was asked for


@lru_cache(maxsize=4096)
def stored(labels: Labels, lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...]) -> Stored:
    """How kernels store a result: in the order of dimensions closest to `labels.out` that they can write."""
    out = contraction.runnable_out(labels, lhs_shape, rhs_shape)
    shape = labels._replace(out=out).out_shape(lhs_shape, rhs_shape)
    return Stored(
        labels._replace(out=out), shape, None if out == labels.out else contraction.positions(out, labels.out)
    )
