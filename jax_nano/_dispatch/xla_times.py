"""How long XLA takes for a product on one core: a model in nanoseconds, by version of JAX.

XLA:CPU computes a product in one of a few forms (`Form`). The time of each is a sum of counts (`counts`) times costs
of a CPU (profiles/xla), which are fitted to the times of products in compiled programs by `python -m benchmarks
engines`. It reads operands that do not lie as it wants them, and those whose rows share their sets in L1, at other
prices than the rest, and what does not fit into a core's caches at another one again.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Labels
from jax_nano._core.cost import element_bytes

FOLDER: Final = Path(__file__).parent.parent / "profiles" / "xla"

Costs: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
"""Nanoseconds by name, for each version of JAX, form and dtype."""


@cache
def costs() -> Mapping[str, Costs]:
    """Those of each CPU on which products of XLA were timed, by the CPU's name."""
    files = (json.loads(x.read_text()) for x in sorted(FOLDER.glob("*.json")))
    return {x["name"]: x["versions"] for x in files}


VERSIONS: Final = ("before 0.12", "0.12")
"""Of jaxlib; the second one stands for later ones too."""
VERSION: Final = VERSIONS[0] if compat.INLINES_SMALL_PRODUCTS else VERSIONS[1]
"""That of the jaxlib of this process."""

_LINE: Final = 64
_ALIASED: Final = 4096  # bytes: rows so far apart share their sets in L1
_IN_CACHE: Final = 400e3  # bytes that a core finds in L2
_IN_CACHES: Final = 12e6  # and in its part of L3
_INLINE: Final = 4**3  # multiply-adds: 3x3x3 is emitted term by term, 4x4x4 is not; between them nothing was timed
# Multiply-adds of the largest product that XLA computes inside of a small loop that it compiles into one function
# (`compat.INLINES_SMALL_PRODUCTS`). In some loops it does so up to 6x6x6 for narrow dtypes too (experiment 0088).
_IN_FUNCTION: Final = {"float32": 6**3, "bfloat16": 5**3, "int8": 5**3, "float16": 4**3, "float64": 4**3}
_SMALL_IN_BATCH: Final = 8**3  # multiply-adds: XLA calls something dear for each product of fewer
_VECTOR_LANES: Final = 8
_TILE_ROWS: Final = 4


class Form(enum.StrEnum):
    """How XLA computes a product, in words."""

    IN_FUNCTION = "a small product inside of a loop that XLA compiles into one function"
    INLINE = "too small: XLA writes out its terms"
    VECTOR = "a product with a vector: a loop of XLA"
    BATCH = "a batch of small products"
    PRODUCT = "a product of matrices"


COUNTED: Final = frozenset({Form.VECTOR, Form.BATCH, Form.PRODUCT})
"""The forms whose time is a sum of counts times costs."""

_SMALL: Final = {Form.IN_FUNCTION: (10.0, 0.21), Form.INLINE: (100.0, 0.45)}
"""Nanoseconds of the others, and of each multiply-add: loops around 2x2x2 to 6x6x6, and chains of 2x2x2 and 3x3x3."""


class Work(NamedTuple):
    """A product's sizes, and how its operands lie. A size that is not known is -1."""

    m: int
    n: int
    k: int
    batch: int
    lhs_along_k: bool  # contiguous along the dimension that is summed over
    rhs_along_k: bool

    @classmethod
    def of(cls, labels: Labels, lhs_shape: Sequence[Any], rhs_shape: Sequence[Any]) -> Work:
        """The product of arrays of these shapes, whose sizes may be symbolic."""
        sizes = labels.sizes(lhs_shape, rhs_shape)

        def count(dims: Sequence[int]) -> int:
            found = [sizes[x] for x in dims]
            if any(isinstance(x, int) and x == 0 for x in found):
                return 0
            return math.prod(found) if all(isinstance(x, int) for x in found) else -1

        def along_k(operand: Sequence[int]) -> bool:
            stored = [x for x in operand if not (isinstance(sizes[x], int) and sizes[x] == 1)]
            return bool(stored) and stored[-1] in labels.contracting

        m, n, k, batch = (count(x) for x in (labels.lhs_free, labels.rhs_free, labels.contracting, labels.batch))
        return cls(m, n, k, batch, along_k(labels.lhs), along_k(labels.rhs))

    @property
    def is_known(self) -> bool:
        return -1 not in self[:4]


class Prediction(NamedTuple):
    """What XLA is predicted to do."""

    ns: float
    form: Form


def never_slower(work: Work) -> str | None:
    """Why XLA computes a product at no cost beyond that of what reads or writes its arrays anyway, or None."""
    if 0 in work[:4]:
        return "empty"
    if work.k == 1:
        return "an outer product, which XLA computes where it is read"
    return None


def inlines(version: str) -> bool:
    """Whether this version of XLA computes small products inside of small loops that it compiles into one function."""
    return version == VERSIONS[0]


def form_of(work: Work, dtypes: tuple[str, str], *, in_function: bool) -> Form:
    """How XLA computes a product of known sizes, none of which is 0.

    Args:
      work: the product.
      dtypes: names of its operands' dtypes.
      in_function: XLA may compile the product and a loop around it into one function.
    """
    m, n, k, batch = work[:4]
    most = min(_IN_FUNCTION[kind_of_dtype(x)] for x in dtypes)
    if in_function and batch == 1 and 1 not in (m, n) and m * n * k <= most:
        return Form.IN_FUNCTION
    if m * n * k < _INLINE and 1 not in (m, n):
        return Form.INLINE
    if 1 in (m, n):
        return Form.VECTOR
    return Form.BATCH if batch > 1 else Form.PRODUCT


def kind_of(work: Work, dtypes: tuple[str, str]) -> str:
    """The dtype whose costs are those of the product: that of the larger operand, among those that were timed."""
    return kind_of_dtype(dtypes[0] if work.m * work.k >= work.n * work.k else dtypes[1])


def kind_of_dtype(dtype: str) -> str:
    """The dtype among those that were timed that XLA treats like this one."""
    if dtype in _IN_FUNCTION:
        return dtype
    return "int8" if element_bytes(dtype) == 1 else "float32"


def counts(work: Work, form: Form, dtypes: tuple[str, str]) -> dict[str, float]:
    """How often each cost of a form arises in a product."""
    m, n, k, batch = work[:4]
    width = max(element_bytes(x) for x in dtypes)
    if form is Form.VECTOR:
        return _counts_of_vector(work, width)
    found: dict[str, float] = {
        "call": 1,
        "multiply_add": batch * m * n * k,
        "result": batch * m * n,
    }
    if form is Form.BATCH:
        small = m * n * k < _SMALL_IN_BATCH
        return found | {
            "small_product" if small else "product": batch,
            "odd_product": batch if n % _VECTOR_LANES else 0,
            "element": batch * (m + n) * k,
            "edge_column": batch * m * k * (n % _VECTOR_LANES),
        }
    for name, along, elements, row in (
        ("lhs", work.lhs_along_k, m * k, k if work.lhs_along_k else m),
        ("rhs", work.rhs_along_k, n * k, k if work.rhs_along_k else n),
    ):
        where = f"{name}_{'along' if along else 'across'}"
        found[where] = elements
        if row * width % _ALIASED == 0:
            found[f"{where}_aliased"] = elements
    read, written = (m + n) * k * width, m * n * width
    return found | {
        "edge_column": m * k * (n % _VECTOR_LANES),
        "edge_row": n * k * (m % _TILE_ROWS),
        "narrow": batch * m * n * k if n < _VECTOR_LANES else 0,
        "result_row": m,
        "result_far_line": written / _LINE if written > _IN_CACHE else 0,
        "far_line": read / _LINE if read > _IN_CACHE else 0,
        "memory_line": read / _LINE if read > _IN_CACHES else 0,
    }


def _counts_of_vector(work: Work, width: int) -> dict[str, float]:
    m, n, k, batch = work[:4]
    along = work.rhs_along_k if m == 1 else work.lhs_along_k
    elements = batch * max(m, n) * k
    size = elements * width
    found: dict[str, float] = {"call": 1, "product": batch - 1, "result": batch * max(m, n)}
    which = "batch" if batch > 1 else "rhs" if m == 1 else "lhs"
    found[f"{which}_{'along' if along else 'across'}"] = elements
    if not along:
        found["column"] = batch * k
    if m == n:
        found["of_vectors"] = elements
    # It copies a matrix that lies along K as rhs if sums are longer than the result, and one across K as lhs.
    if batch == 1 and ((m == 1 < n and along and k > n) or (n == 1 < m and not along)):
        found["copied"] = elements
    found["far_line"] = size / _LINE if size > _IN_CACHE else 0
    found["memory_line"] = size / _LINE if size > _IN_CACHES else 0
    return found


def predict(work: Work, dtypes: tuple[str, str], cpu: str, *, in_function: bool, version: str = VERSION) -> Prediction:
    """The time of a product of known sizes, none of which is 0.

    XLA widens a float operand that is narrower than the other one as it multiplies; or first, in front of a loop if it
    can, and reads more bytes then. Which of these it does is not known here: the one that takes longer.

    Args:
      work, dtypes, in_function: as in `form_of`.
      cpu: one that `costs` knows.
      version: one of VERSIONS.
    """
    ways = [dtypes]
    if dtypes[0] != dtypes[1] and all("float" in x for x in dtypes):
        wide = max(dtypes, key=element_bytes)
        ways.append((wide, wide))
    return max((_predict(work, x, cpu, in_function, version) for x in ways), key=lambda x: x.ns)


def _predict(work: Work, dtypes: tuple[str, str], cpu: str, in_function: bool, version: str) -> Prediction:
    """The same, of operands that are read as they are."""
    form = form_of(work, dtypes, in_function=in_function)
    if form in _SMALL:
        once, multiply_add = _SMALL[form]
        return Prediction(once + multiply_add * work.batch * work.m * work.n * work.k, form)
    ns = costs()[cpu][version][form.name][kind_of(work, dtypes)]
    return Prediction(sum(ns.get(name, 0) * count for name, count in counts(work, form, dtypes).items()), form)
