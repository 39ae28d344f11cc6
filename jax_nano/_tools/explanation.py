"""`jax_nano.explain`: how a product would be computed and why, as an object that prints itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jax_nano._core import native, spec, thread_limit
from jax_nano._dispatch import decision
from jax_nano._tools import explain as _explain
from jax_nano._tools.explain import BadRequest, Request


class HasShape(Protocol):
    """An array, or a jax.ShapeDtypeStruct."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes."""

    @property
    def dtype(self) -> Any:
        """Its dtype, or the name of one."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that the planner compared."""

    schedule: str
    """In words, such as "register tiles, B packed, K by 256"."""
    seconds: float
    """What it takes on one core by the planner's prediction."""


@dataclass(frozen=True)
class Explanation:
    """How a product would be computed, and why. `str` of it is text, as is its `repr`."""

    product: str
    """Dtypes and shapes, M, N and K."""
    declined: str | None
    """Why it is left to XLA; None if a kernel computes it."""
    times: decision.Times | None
    """What a kernel and XLA take on one core by prediction, in nanoseconds; None where something else decided."""
    plan: Mapping[str, Any]
    """What the kernel would do: names and numbers as `_runtime.plan` gives them."""
    candidates: tuple[Candidate, ...]
    """The schedules that were compared, the best first; empty where costs are not known and thresholds decide."""
    text: str

    @property
    def kernel(self) -> str:
        """The name of the kernel, "" for a product without elements."""
        return str(self.plan.get("kernel", ""))

    @property
    def target(self) -> str:
        """The instruction set of the kernel."""
        return str(self.plan.get("target", ""))

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def explain(
    lhs: HasShape,
    rhs: HasShape,
    *,
    preferred_element_type: Any = None,
    layout: str = "NN",
    algorithm: str = "default",
    threads: int | None = None,
    target: str | None = None,
) -> Explanation:
    """How `lhs @ rhs` would be computed: the gate's decision, kernel, packing, blocking, threads, predicted times.

    Args:
      lhs, rhs: arrays or `jax.ShapeDtypeStruct`s of at least two dimensions, the leading ones equal: a batch.
      preferred_element_type: of the result; by default the wider of the operands' dtypes, int32 for 8-bit integers.
      layout: "T" for an operand that is stored transposed, with its last two dimensions swapped: "NN", "NT", "TN",
        "TT".
      algorithm: the name of a `jax.lax.DotAlgorithmPreset`.
      threads: how many share the work; by default as many as XLA's pool has.
      target: explain the kernel of this target, whether it can run here or not; by default of the best one.

    Raises:
      ValueError: shapes do not fit, there is no kernel for the dtypes, or no such target.
    """
    return of_request(
        request(lhs, rhs, preferred_element_type, layout), threads=threads, algorithm=algorithm, target=target
    )


def request(lhs: HasShape, rhs: HasShape, out: Any, layout: str) -> Request:
    """A product of two arrays as the command line asks for one.

    Raises:
      BadRequest: their shapes do not fit.
    """
    if layout not in _explain.LAYOUTS:
        raise BadRequest(f"layout {layout!r} is none of {', '.join(_explain.LAYOUTS)}")
    *batch, m, k = lhs.shape if layout[0] == "N" else (*lhs.shape[:-2], *reversed(lhs.shape[-2:]))
    *rhs_batch, rows, n = rhs.shape if layout[1] == "N" else (*rhs.shape[:-2], *reversed(rhs.shape[-2:]))
    if rows != k or batch != rhs_batch:
        raise BadRequest(f"shapes {tuple(lhs.shape)} and {tuple(rhs.shape)} with layout {layout} do not fit")
    names = [None if x is None else np.dtype(x).name for x in (lhs.dtype, rhs.dtype, out)]
    return Request(m, n, k, tuple(batch), layout, _explain.dtypes_of(str(names[0]), str(names[1]), names[2]))


def of_request(asked: Request, *, threads: int | None, algorithm: str, target: str | None) -> Explanation:
    """As `explain`, of a product that the command line asks for."""
    runtime = native.runtime()
    if runtime is None:
        raise ValueError("this platform has no kernels; XLA computes every product")
    if target is not None and target not in (known := list(spec.TARGETS)):
        raise BadRequest(f"target {target!r} is none of {', '.join(known)}")
    threads = thread_limit.usable() if threads is None else threads
    if threads < 1:
        raise BadRequest(f"threads {threads}: expected at least 1")
    here = decision.this_machine()
    if target:
        here = here._replace(target=target)
    decided = _explain.decided(asked, algorithm, here, decision.policy)
    text = _explain.explain(runtime, asked, threads=threads, algorithm=algorithm, target=target, decided=decided)
    arguments = (*asked.shapes, *asked.labels, *asked.dtypes)
    considered = runtime.considered(*arguments, algorithm=algorithm, target=target)
    return Explanation(
        product=str(asked),
        declined=decided.declined,
        times=decided.times,
        plan=runtime.plan(*arguments, threads, algorithm=algorithm, target=target),
        candidates=tuple(Candidate(_explain.schedule_text(x), x["ns"] * 1e-9) for x in considered),
        text=text,
    )
