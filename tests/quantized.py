"""Products with quantised weights for tests: operands as kernels read them, and what must come out."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass, replace
from typing import Any, Self

import ml_dtypes
import numpy as np
import reference
from guarded import Region
from numpy.typing import NDArray

from jax_nano._core import spec


def dtype(name: str) -> np.dtype:
    """NumPy's dtype of a name, bfloat16 among them."""
    return np.dtype(getattr(ml_dtypes, name, name))


def stored(weights: str) -> np.dtype:
    """The dtype in which tests hold weights, a byte each: of 4 bits those of 8."""
    return np.dtype({"int4": np.int8, "uint4": np.uint8}.get(weights) or dtype(weights))


@dataclass(frozen=True)
class Case:
    """A product. q is [k, n] whatever the order of storage, scale and zero are [groups, n]."""

    given_x: NDArray[Any]
    q: NDArray[Any]
    given_scale: NDArray[Any]
    given_zero: NDArray[Any] | None
    weights: str
    out: str
    along_k: bool
    places: tuple[list[Region], str] | None = None

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        m: int,
        n: int,
        k: int,
        group: int,
        weights: str,
        x: str,
        scale: str,
        zero: str | None,
        out: str,
        along_k: bool,
    ) -> Self:
        facts = spec.WEIGHTS[weights]
        if facts.form[0] in "iu":
            q = rng.integers(-facts.flip, 2**facts.bits - facts.flip, (k, n)).astype(stored(weights))
        else:
            q = (3 * rng.standard_normal((k, n))).astype(dtype(weights))
        shape = (k // group, n)
        points = None if zero is None else rng.integers(0, 16, shape).astype(zero)
        scales = (rng.random(shape) + 0.5).astype(dtype(scale))
        return cls(rng.standard_normal((m, k)).astype(dtype(x)), q, scales, points, weights, out, along_k)

    def with_x(self, x: NDArray[Any]) -> Self:
        return replace(self, given_x=x)

    def with_scale(self, scale: NDArray[Any]) -> Self:
        return replace(self, given_scale=scale)

    def with_q(self, q: NDArray[Any]) -> Self:
        return replace(self, q=q)

    def placed(self, regions: list[Region], at: str) -> Self:
        """With operands that end or begin where these regions do."""
        return replace(self, places=(regions, at))

    @property
    def m(self) -> int:
        return self.given_x.shape[0]

    @property
    def n(self) -> int:
        return self.q.shape[1]

    @property
    def k(self) -> int:
        return self.q.shape[0]

    @property
    def group(self) -> int:
        return self.k // self.given_scale.shape[0]

    @property
    def dtypes(self) -> tuple[str, str, str, str, str]:
        """Names: of x, q, scale, zero points and result."""
        zero = "" if self.given_zero is None else self.given_zero.dtype.name
        return self.given_x.dtype.name, self.weights, self.given_scale.dtype.name, zero, self.out

    def _at(self, number: int, v: NDArray[Any]) -> NDArray[Any]:
        if self.places is None:
            return np.ascontiguousarray(v)
        regions, at = self.places
        here = regions[number].array(v.shape, v.dtype, at=at)
        here[...] = v
        return here

    def _stored(self, v: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(v.T if self.along_k else v)

    @property
    def x(self) -> NDArray[Any]:
        return self._at(0, self.given_x)

    @property
    def packed(self) -> NDArray[Any]:
        """The weights in memory: of 4 bits two to a byte, the first one in its lower half."""
        v = self._stored(self.q)
        if spec.WEIGHTS[self.weights].bits == 4:
            nibbles = v.astype(np.int16) & 15
            v = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
        return self._at(1, v)

    @property
    def scale(self) -> NDArray[Any]:
        return self._at(2, self._stored(self.given_scale))

    @property
    def zero(self) -> NDArray[Any] | None:
        return None if self.given_zero is None else self._at(3, self._stored(self.given_zero))

    def weights_in_float64(self) -> NDArray[np.float64]:
        """The dequantised matrix [k, n]."""
        w = self.q.astype(np.float64)
        if self.given_zero is not None:
            w = w - np.repeat(self.given_zero.astype(np.float64), self.group, 0)
        return w * np.repeat(self.given_scale.astype(np.float64), self.group, 0)

    def exact(self) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            return self.given_x.astype(np.float64) @ self.weights_in_float64()

    def check(self, got: NDArray[Any], context: object = "") -> None:
        """Raises AssertionError if that is not the product, to the bound of a sum in float32 of its terms.

        Two roundings more than a plain product has: that of the weights, and that of a group's sum.
        """
        expected = reference.expected("mk,kn->mn", self.given_x, self.weights_in_float64(), out=dtype(self.out))
        with np.errstate(invalid="ignore"):
            magnitude = np.abs(self.given_x.astype(np.float64)) @ np.abs(self.weights_in_float64())
        bound = expected.bound + 2 * np.finfo(np.float32).eps * magnitude
        reference.Expected(expected.value, bound).check(got, f"{context} {self.dtypes} along k: {self.along_k}")


def call_kernel(function: Any, block: int, case: Case, task: str) -> NDArray[Any]:
    """One call of a kernel, a ctypes function, for a task: the sums, or for "dequantize_..." the weights [k, n], or for
    "bfloat16_..." these without scales.

    The workspace is as large as the spec says, between pages that may not be touched, and full of NaN.
    """
    rows = spec.QUANTIZED_ROWS
    x, packed, scale, zero = case.x, case.packed, case.scale, case.zero
    nc, k = -(-case.n // 128) * 128, -(-case.k // 128) * 128
    line = max(nc, 4 * (case.k // case.group + 32))
    of_weights, element = task.startswith(("dequantize", "bfloat16")), "float32"
    if task.startswith("bfloat16"):
        element = "bfloat16"
    pitch = (k if case.along_k else nc) if of_weights else nc
    count = (case.n if case.along_k else case.k) if of_weights else case.m
    sizes = {"x_pack": (case.m + 1) * k, "sums": max(case.m * nc, 512), "zeros": line, "scales": line}
    with contextlib.ExitStack() as stack:
        room = {}
        for name, size in {**sizes, "y": count * pitch}.items():
            room[name] = stack.enter_context(Region(4 * size)).array((size,), np.float32)
            room[name][...] = np.nan
        if task == "columns":
            room["y"][...] = 0  # it adds
        fields = dict.fromkeys(spec.names(spec.QUANTIZED_ARGS), 0) | {
            "task": spec.QUANTIZED_TASKS.index(task),
            "m": case.m,
            "n": case.n,
            "k": case.k,
            "group": case.group,
            "x": x.ctypes.data,
            "rsx": case.k,
            "x_dtype": rows.index(x.dtype.name),
            "q": packed.ctypes.data,
            "rsq": packed.shape[1],
            "scale": scale.ctypes.data,
            "rs_scale": scale.shape[1],
            "scale_dtype": rows.index(scale.dtype.name),
            "zero": 0 if zero is None else zero.ctypes.data,
            "rs_zero": scale.shape[1],
            "zero_dtype": 0 if zero is None else rows.index(zero.dtype.name),
            "nc": pitch,
            **{name: v.ctypes.data for name, v in room.items()},
        }
        assert nc % block == 0
        function((ctypes.c_int64 * len(fields))(*fields.values()))
        found = room["y"].view(dtype(element))[: count * pitch].reshape(-1, pitch)
        if of_weights:
            return (found[: case.n, : case.k].T if case.along_k else found[:, : case.n]).copy()
        return found[:, : case.n].astype(dtype(case.out))


def _run_task(function: Any, task: str, m: int, n: int, fields: dict[str, int]) -> None:
    """Calls a kernel, a ctypes function, for one of spec.QUANTIZED_TASKS; what is not given is 0."""
    given = {"task": spec.QUANTIZED_TASKS.index(task), "m": m, "n": n, **fields}
    arguments = dict.fromkeys(spec.names(spec.QUANTIZED_ARGS), 0) | given
    function((ctypes.c_int64 * len(arguments))(*arguments.values()))


def add_scaled(
    function: Any, sums: NDArray[np.float32], n: int, scale: NDArray[Any], y: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Calls what adds sums times scales, every second element of ``scale``, to others, a ctypes function."""
    result = reference.poisoned((len(sums), n), np.dtype(np.float32)) if y is None else y.copy()
    room = np.full(-(-n // 128) * 128, np.nan, np.float32)
    fields = {
        "sums": sums.ctypes.data,
        "rsx": sums.shape[1],
        "y": result.ctypes.data,
        "nc": n,
        "keep_x": int(y is None),
        "scale": scale.ctypes.data,
        "rs_scale": 2,
        "scale_dtype": spec.QUANTIZED_ROWS.index(scale.dtype.name),
        "scales": room.ctypes.data,
    }
    _run_task(function, "add_scaled", len(sums), n, fields)
    return result


def finish(
    function: Any,
    sums: NDArray[np.float32],
    n: int,
    out: str,
    bias: NDArray[Any] | None,
    residual: NDArray[Any] | None,
    factor: float,
) -> NDArray[Any]:
    """Calls what finishes sums, a ctypes function; with a bias and a residual relu comes before that."""
    result = reference.poisoned((len(sums), n), dtype(out))
    epilogue = (ctypes.c_int64 * len(spec.EPILOGUE))()
    if bias is not None and residual is not None:
        places = spec.names(spec.EPILOGUE)
        epilogue[places.index("activation")] = spec.activation_code("relu")
        epilogue[places.index("bias")] = bias.ctypes.data
        epilogue[places.index("has_residual")] = 1
        epilogue[places.index("residual_offset")] = residual.ctypes.data - result.ctypes.data
        ctypes.cast(epilogue, ctypes.POINTER(ctypes.c_double))[places.index("scale")] = factor
    fields = {
        "y": sums.ctypes.data,
        "nc": sums.shape[1],
        "out": result.ctypes.data,
        "rs_out": n,
        "out_dtype": spec.QUANTIZED_ROWS.index(out),
        "epilogue": 0 if bias is None else ctypes.addressof(epilogue),
    }
    _run_task(function, "finish", len(sums), n, fields)
    return result
