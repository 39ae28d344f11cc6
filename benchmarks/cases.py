"""What is measured: products of given shapes, layouts and dtypes, and the suites that name them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import ROOT

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Dtype:
    """Element types of a product; `limit` bounds the integers with which its result is exact."""

    operand: str
    out: str
    limit: int

    @property
    def operand_dtype(self) -> np.dtype[Any]:
        return _dtype(self.operand)

    @property
    def out_dtype(self) -> np.dtype[Any]:
        return _dtype(self.out)


DTYPES = {
    "f32": Dtype("float32", "float32", 4),
    "f64": Dtype("float64", "float64", 64),
    "bf16": Dtype("bfloat16", "bfloat16", 2),
    "bf16-f32": Dtype("bfloat16", "float32", 4),
    "f16": Dtype("float16", "float16", 2),
    "f16-f32": Dtype("float16", "float32", 4),
    "i8": Dtype("int8", "int32", 127),
    "i8-i8": Dtype("int8", "int8", 127),
}


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A case as a BLAS sees it: a batch of matrices by element strides. C[m, n] = A[m, k] B[k, n]."""

    m: int
    n: int
    k: int
    batch: tuple[int, ...]
    a_strides: tuple[int, int]  # between rows (m), between columns (k)
    b_strides: tuple[int, int]  # between rows (k), between columns (n)
    c_strides: tuple[int, int]  # between rows (m), between columns (n)
    a_batch: tuple[int, ...]  # strides between products, one for each batch dimension
    b_batch: tuple[int, ...]
    c_batch: tuple[int, ...]

    def offsets(self, strides: Sequence[int]) -> Array:
        """Where each product of the batch starts, in elements."""
        index = itertools.product(*map(range, self.batch))
        return np.array([sum(i * s for i, s in zip(at, strides, strict=True)) for at in index], np.int64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: an einsum over labelled dimensions, and the dtypes."""

    group: str
    spec: str  # "lhs,rhs->out", each label once; operands are dense and row-major in this order
    dims: tuple[tuple[str, int], ...]
    dtype: str
    is_einsum: bool = False  # called as einsum; else as matmul of (transposed) matrices

    @property
    def labels(self) -> tuple[str, str, str]:
        operands, out = self.spec.split("->")
        lhs, rhs = operands.split(",")
        return lhs, rhs, out

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        size = dict(self.dims)
        lhs, rhs, out = (tuple(size[label] for label in labels) for labels in self.labels)
        return lhs, rhs, out

    @property
    def name(self) -> str:
        """Shape and layout, e.g. ``512x512x512``, ``TN 512x512x512``, ``64 x [8x8x8]``."""
        gemm = self.gemm
        sizes = f"{gemm.m}x{gemm.n}x{gemm.k}"
        if self.is_einsum:
            return f"{self.spec} {'x'.join(map(str, gemm.batch))} x [{sizes}]"
        if gemm.batch:
            sizes = f"{math.prod(gemm.batch)} x [{sizes}]"
        layout = self.layout
        return sizes if layout == "NN" else f"{layout} {sizes}"

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def layout(self) -> str:
        """BLAS's letters: N row-major as written, T stored transposed; first the left operand."""
        gemm = self.gemm
        return ("N" if gemm.a_strides[1] == 1 else "T") + ("N" if gemm.b_strides[1] == 1 else "T")

    @property
    def flops(self) -> int:
        return 2 * math.prod(size for _, size in self.dims)

    @property
    def operand_bytes(self) -> int:
        lhs, rhs, _ = self.shapes
        return (math.prod(lhs) + math.prod(rhs)) * DTYPES[self.dtype].operand_dtype.itemsize

    @property
    def bytes(self) -> int:
        """The least that must move: each operand read once, the result written once."""
        return self.operand_bytes + math.prod(self.shapes[2]) * DTYPES[self.dtype].out_dtype.itemsize

    @functools.cached_property
    def gemm(self) -> Gemm:
        lhs, rhs, out = self.labels
        batch = "".join(label for label in out if label in lhs and label in rhs)
        (m,) = set(lhs) & set(out) - set(batch)
        (n,) = set(rhs) & set(out) - set(batch)
        (k,) = set(lhs) & set(rhs) - set(batch)
        size = dict(self.dims)
        a, b, c = (_strides(labels, size) for labels in self.labels)
        return Gemm(
            m=size[m],
            n=size[n],
            k=size[k],
            batch=tuple(size[label] for label in batch),
            a_strides=(a[m], a[k]),
            b_strides=(b[k], b[n]),
            c_strides=(c[m], c[n]),
            a_batch=tuple(a[label] for label in batch),
            b_batch=tuple(b[label] for label in batch),
            c_batch=tuple(c[label] for label in batch),
        )

    @property
    def matrix_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Permutations that make lhs, rhs and result stacks of A[m, k], B[k, n] and C[m, n]."""
        lhs, rhs, out = self.labels
        batch = [label for label in out if label in lhs and label in rhs]
        (m,) = set(lhs) & set(out) - set(batch)
        (n,) = set(rhs) & set(out) - set(batch)
        (k,) = set(lhs) & set(rhs) - set(batch)

        def axes(own: str, *matrix: str) -> list[int]:
            return [own.index(label) for label in (*batch, *matrix)]

        return axes(lhs, m, k), axes(rhs, k, n), axes(out, m, n)

    @property
    def kind(self) -> str:
        """What it is to a user: one of `KINDS`."""
        gemm = self.gemm
        if self.group == "attention":
            return "attention, one query" if gemm.m == 1 else "attention"
        if gemm.batch:
            return "small batched products"
        if min(gemm.m, gemm.n) == 1:
            return "products with a vector"
        if gemm.m * gemm.n * gemm.k <= 64**3:
            return "one product up to 64^3"
        if gemm.n <= 64:
            return "2 to 64 columns"
        if gemm.m <= 64:
            return "2 to 64 rows"
        return "up to 513^3" if gemm.m * gemm.n * gemm.k <= 513**3 else "above 513^3"

    def exact_operands(self) -> tuple[Array, Array]:
        """Small integers, so that every order of summation gives the same result, to the last bit."""
        rng = np.random.default_rng(1)
        dtype = DTYPES[self.dtype]
        return self._draw(lambda shape: rng.integers(-dtype.limit, dtype.limit, shape, endpoint=True))

    def random_operands(self) -> tuple[Array, Array]:
        """Normal reals (or integers of the full range): what is timed."""
        rng = np.random.default_rng(2)
        if DTYPES[self.dtype].operand_dtype.kind == "i":
            return self._draw(lambda shape: rng.integers(-128, 127, shape, np.int8, endpoint=True))
        return self._draw(lambda shape: rng.standard_normal(shape, np.float32))

    def _draw(self, draw: Callable[[tuple[int, ...]], Array]) -> tuple[Array, Array]:
        lhs, rhs, _ = self.shapes
        dtype = DTYPES[self.dtype].operand_dtype
        return draw(lhs).astype(dtype), draw(rhs).astype(dtype)

    def exact_result(self) -> Array:
        """The product of `exact_operands`, computed exactly and rounded once to the result's dtype."""
        lhs, rhs = (operand.astype(np.float64) for operand in self.exact_operands())
        exact = np.empty(self.shapes[2])
        lhs_axes, rhs_axes, out_axes = self.matrix_axes
        np.matmul(lhs.transpose(lhs_axes), rhs.transpose(rhs_axes), out=exact.transpose(out_axes))
        out = DTYPES[self.dtype].out_dtype
        return exact.astype(np.int64).astype(out) if out.kind == "i" else exact.astype(out)


KINDS = (
    "one product up to 64^3",
    "small batched products",
    "products with a vector",
    "2 to 64 rows",
    "2 to 64 columns",
    "up to 513^3",
    "above 513^3",
    "attention",
    "attention, one query",
)


def _strides(labels: str, size: dict[str, int]) -> dict[str, int]:
    strides, step = {}, 1
    for label in reversed(labels):
        strides[label] = step
        step *= size[label]
    return strides


def _from_json(entry: dict[str, Any], dtype: str) -> Case:
    if "einsum" in entry:
        return Case(entry["group"], entry["einsum"], tuple(entry["dims"].items()), dtype, is_einsum=True)
    lhs = {"N": "mk", "T": "km"}[entry["layout"][0]]
    rhs = {"N": "kn", "T": "nk"}[entry["layout"][1]]
    dims = tuple((label, entry[label]) for label in "mnk")
    if "batch" not in entry:
        return Case(entry["group"], f"{lhs},{rhs}->mn", dims, dtype)
    return Case(entry["group"], f"z{lhs},z{rhs}->zmn", (("z", entry["batch"]), *dims), dtype)


def matmul(m: int, n: int, k: int, dtype: str = "f32", *, layout: str = "NN", batch: int = 0, group: str = "") -> Case:
    """A case that is not in the list of shapes."""
    entry = {"group": group, "m": m, "n": n, "k": k, "layout": layout}
    return _from_json(entry | ({"batch": batch} if batch else {}), dtype)


@functools.cache
def _listed() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "shapes.json").read_text())


def _full() -> list[Case]:
    listed = [_from_json(entry, dtype) for dtype in _listed()["dtypes"] for entry in _listed()["shapes"]]
    return [*listed, *_growth()]


def _growth() -> list[Case]:
    """Squares at powers of two, next to them and between them."""
    sizes = {size for power in (256, 512, 1024, 2048) for size in (power - 1, power, power + 1, power * 3 // 2)}
    return [matmul(n, n, n, group="growth") for n in sorted(sizes)]


def _squares() -> list[Case]:
    return [matmul(n, n, n, group="square") for n in (256, 384, 512, 768, 1024, 1536, 2048)]


def _dtypes() -> list[Case]:
    return [matmul(1024, 1024, 1024, dtype, group="square") for dtype in DTYPES]


def _quick() -> list[Case]:
    attention = next(s for s in _listed()["shapes"] if s.get("einsum") == "bqhd,bkhd->bhqk")
    return [
        matmul(64, 64, 64, group="square"),
        matmul(256, 256, 256, group="square"),
        matmul(512, 512, 512, group="square"),
        matmul(1024, 1024, 1024, group="square"),
        matmul(512, 512, 512, layout="TN", group="transposes"),
        matmul(512, 512, 512, layout="NT", group="transposes"),
        matmul(127, 129, 131, group="odd"),
        matmul(128, 3072, 768, group="bert-base"),
        matmul(1, 4096, 1024, group="gemv-skinny"),
        matmul(4, 4096, 1024, group="gemv-skinny"),
        matmul(8, 8, 8, batch=4096, group="batched-small"),
        matmul(32, 32, 32, batch=512, group="batched-small"),
        _from_json(attention, "f32"),
        matmul(512, 512, 512, "f64", group="square"),
        matmul(512, 512, 512, "bf16", group="square"),
        matmul(512, 512, 512, "i8", group="square"),
    ]


def _tiny() -> list[Case]:
    return [
        matmul(8, 8, 8, group="square"),
        matmul(13, 7, 5, group="odd"),
        matmul(24, 16, 8, layout="TN", group="transposes"),
        matmul(4, 4, 4, batch=3, group="batched-small"),
        matmul(16, 16, 16, "bf16", group="square"),
        Case("attention", "bqhd,bkhd->bhqk", tuple(zip("bhqkd", (2, 3, 5, 7, 4), strict=True)), "f32", True),
    ]


SUITES = {
    "full": ("every shape of shapes.json in every dtype, and the suite `growth`", _full),
    "growth": ("f32 squares at powers of two, beside them and between them", _growth),
    "squares": ("f32 squares from 256 to 2048", _squares),
    "dtypes": ("1024x1024x1024 in every dtype, and each beside our own f32", _dtypes),
    "quick": ("a few shapes of each kind", _quick),
    "tiny": ("milliseconds: proves that the benchmark works, measures nothing", _tiny),
}


def select(suite: str, only: Iterable[str] = (), dtypes: Iterable[str] = (), groups: Iterable[str] = ()) -> list[Case]:
    """The cases of a suite whose key holds one of `only`, in these dtypes and groups (empty: all).

    Named dtypes replace the suite's own: every one of its shapes in each of them.
    """
    cases = SUITES[suite][1]()
    only, dtypes, groups = tuple(only), tuple(dtypes), tuple(groups)
    if dtypes:
        cases = [dataclasses.replace(case, dtype=dtype) for dtype in dtypes for case in cases]
    if groups:
        cases = [case for case in cases if case.group in groups]
    if only:
        cases = [case for case in cases if any(text in case.key for text in only)]
    return list(dict.fromkeys({case.key: case for case in cases}.values()))
