"""The one decision about a product on a CPU, or about attention: which kernel computes it, or why XLA does.

`dispatch` is a pure function of the product, the machine and the policy, and `why_no_attention` of the first two, so
that results can be cached. Callers pass `this_machine()` and a policy: that of the process, or the one that a program
was marked with.

A product goes to the engine of less predicted time, on one thread: XLA's is that of xla_times.py, a kernel's that of
the planner's model (csrc/plan/cost.h), both with the costs of one CPU. Nothing is measured, and the number of threads
plays no part, so that a program always makes the same choice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Final, NamedTuple

import numpy as np

from jax_nano._core import contraction, cost, native, signatures, spec
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Dims, Labels
from jax_nano._core.signatures import Precision, Signature
from jax_nano._dispatch import xla_times


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
    cpu: str = ""  # whose costs are known, if it is this one's family

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


class Times(NamedTuple):
    """What a product is predicted to take on one core, in a program, by each engine."""

    kernel_ns: float
    xla_ns: float
    form: str  # in which XLA computes it, in words
    cpu: str  # on which CPU

    @property
    def prefers_xla(self) -> bool:
        """Whether XLA is to compute it."""
        return self.kernel_ns > self.xla_ns * (VECTOR_MARGIN if self.form == xla_times.Form.VECTOR else MARGIN)

    def __str__(self) -> str:
        return f"{cost.duration(self.kernel_ns)} by a kernel, {cost.duration(self.xla_ns)} by XLA"


MARGIN: Final = 1.1
"""How much longer than XLA a kernel may be predicted to take and is chosen all the same: it shares its work better
among threads, and predictions are not better than that. On the recorded times any margin from 1 to 1.1 is as good."""

VECTOR_MARGIN: Final = 0.8
"""The same of a product with a vector: one thread computes it, and XLA's loop may become a part of what is around it.
On the recorded times any margin from 0.8 to 1.1 is as good for both versions of JAX together; with 0.8 loops that gain
nothing by calls, as small decoding steps in bfloat16 on JAX 0.10.2, stay as XLA makes them more often."""

REFERENCE: Final = ("AMD Zen 3", "x86-64-v3")
"""The CPU and target that stand for those whose kernels or whose XLA nobody has timed. Both engines are then predicted
there: from one CPU to another their ratio changes less than their times do."""

IN_A_PROGRAM_NS: Final = 50.0
"""What a call inside a program takes beyond the kernel's own (experiment 0088)."""


class Decision(NamedTuple):
    """What becomes of a product."""

    labels: Labels
    signature: Signature | None  # that of the kernel; None if XLA computes it
    declined: str | None  # why XLA does, in words
    times: Times | None = None  # if they decided, or would have if the policy were another one


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
    kernels = frozenset(x for x in found if native.supports(*x))
    return Machine(native.target(), kernels, attentions, native.measured_cpu())


@lru_cache(maxsize=4096)
def dispatch(product: Product, machine: Machine, policy: Policy) -> Decision:
    """The decision about a product."""
    signature = signature_of(product, machine)
    if signature is None:
        why = "no kernel for {} x {} -> {} at precision {}".format(*product.dtypes, product.precision)
        return Decision(product.labels, None, why)
    return between(product, signature, machine, policy)


def between(product: Product, signature: Signature, machine: Machine, policy: Policy) -> Decision:
    """The decision between XLA and the kernel of this signature."""
    labels = product.labels
    # XLA would compute an algorithm that rounds operands in plain float32, so it goes to a kernel at any size.
    if signature.algorithm != signatures.DEFAULT:
        return Decision(labels, signature, None)
    work = xla_times.Work.of(labels, product.lhs_shape, product.rhs_shape)
    if why := xla_times.never_slower(work):
        return Decision(labels, None, why) if policy.declines else Decision(labels, signature, None)
    if not work.is_known:
        return Decision(labels, signature, None)
    times = predicted(product, work, signature, machine)
    if policy.declines and times.prefers_xla:
        return Decision(labels, None, f"{times.form}: {times}", times)
    return Decision(labels, signature, None, times)


def predicted(product: Product, work: xla_times.Work, signature: Signature, machine: Machine) -> Times:
    """Both engines' times of a product of known sizes.

    Raises:
      ValueError: the reference has no kernel for it.
    """
    labels = stored(product.labels, product.lhs_shape, product.rhs_shape).labels
    asked = (product.lhs_shape, product.rhs_shape), tuple(labels), tuple(x.name for x in signature[:3])
    cpu, target = machine.cpu, machine.target
    ns = native.predicted_ns(*asked, target, cpu) if cpu in xla_times.costs() else None
    if ns is None:
        cpu, target = REFERENCE
        ns = native.predicted_ns(*asked, target, cpu)
    if ns is None:
        raise ValueError(f"{cpu} has no costs of a kernel for {signature}")
    in_function = compat.INLINES_SMALL_PRODUCTS and not product.placed
    names = product.dtypes[0].name, product.dtypes[1].name
    xla = xla_times.predict(work, names, cpu, in_function=in_function)
    return Times(ns + IN_A_PROGRAM_NS, xla.ns, xla.form, cpu)


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
