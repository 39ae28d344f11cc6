"""Peers that are called through their C interfaces, and the machine's limits.

The timing loops are C as well (benchmarks/native), so that no time of Python's is in the result.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import pathlib
import re

import numpy as np

from benchmarks import native
from benchmarks.cases import DTYPES, Array, Case
from benchmarks.peers import Operands, Unavailable


class Job(ctypes.Structure):
    """native/job.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "rsa", "csa", "rsb", "csb", "rsc", "batch")),
        *((name, ctypes.c_void_p) for name in ("a_offset", "b_offset", "c_offset")),
        ("pairs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("a", "b", "c")),
    )


def _aligned_copy(array: Array) -> Array:
    """A copy that starts at a cache line, as a C library's own allocations would."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Buffers:
    """Operands and results at addresses that C can have, for as long as this object lives."""

    def __init__(self, case: Case, operands: Operands) -> None:
        empty = np.zeros(case.shapes[2], DTYPES[case.dtype].out_dtype)
        self.a = [_aligned_copy(a) for a, _ in operands]
        self.b = [_aligned_copy(b) for _, b in operands]
        self.c = [_aligned_copy(empty) for _ in operands]
        self.a_addresses, self.b_addresses, self.c_addresses = (
            (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
            for arrays in (self.a, self.b, self.c)
        )


class _CRunner:
    """What the libraries have in common: buffers, results, and a Job that describes the product."""

    _buffers: Buffers | None = None
    _case: Case

    def load(self, operands: Operands) -> None:
        self._buffers = Buffers(self._case, operands)

    def results(self) -> list[Array]:
        assert self._buffers is not None
        return self._buffers.c

    def close(self) -> None:
        self._buffers = None

    def _job(self, case: Case) -> Job:
        gemm = case.gemm
        if gemm.c_strides[1] != 1:
            raise Unavailable("the result is not row-major")
        self._offsets = [gemm.offsets(s) for s in (gemm.a_batch, gemm.b_batch, gemm.c_batch)]
        return Job(
            gemm.m,
            gemm.n,
            gemm.k,
            *gemm.a_strides,
            *gemm.b_strides,
            gemm.c_strides[0],
            math.prod(gemm.batch),
            *(offsets.ctypes.data for offsets in self._offsets),
        )

    def _fill(self, job: Job) -> None:
        assert self._buffers is not None
        job.pairs = len(self._buffers.a)
        job.a = ctypes.addressof(self._buffers.a_addresses)
        job.b = ctypes.addressof(self._buffers.b_addresses)
        job.c = ctypes.addressof(self._buffers.c_addresses)


class KernelsRunner(_CRunner):
    """jax_nano's plan and kernels as the custom call runs them, on threads of their own; the gate is not asked."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        try:
            self._runtime = importlib.import_module("jax_nano._runtime")
        except ImportError as error:
            raise Unavailable(f"cannot import jax_nano: {error}") from error

    def version(self) -> str:
        return self._runtime.selected_target()

    def prepare(self, case: Case, pairs: int) -> None:
        dtype = DTYPES[case.dtype]
        if not self._runtime.supports(dtype.operand, dtype.operand, dtype.out):
            raise Unavailable(f"no {case.dtype}")
        self._case = case

    def run(self, trips: int) -> float:
        assert self._buffers is not None
        buffers, case, dtype = self._buffers, self._case, DTYPES[self._case.dtype]
        sets = zip(buffers.a, buffers.b, buffers.c, strict=True)
        return self._runtime.tuning.time_dot(
            np.array([[array.ctypes.data for array in arrays] for arrays in sets], np.uintp),
            trips,
            *case.shapes[:2],
            *([ord(label) for label in labels] for labels in case.labels),
            *(dtype.operand, dtype.operand, dtype.out),
            self._threads,
        )


class CblasRunner(_CRunner):
    """sgemm and dgemm (for vectors sgemv and dgemv, for MKL's batches gemm_batch) of a library that speaks cblas."""

    def __init__(self, threads: int, *, blas: str) -> None:
        self._loops = native.load("cblas")
        self._batches = native.load("mkl") if blas == "mkl" else None
        self._blas = blas
        self._library, self._symbol, self._integer = {"openblas": _openblas, "blis": _blis, "mkl": _mkl}[blas]()

    def version(self) -> str:
        if self._blas == "mkl":
            return _mkl_version(self._library)
        name = {"openblas": "scipy_openblas_get_config64_", "blis": "bli_info_get_version_str"}[self._blas]
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        return function().decode().strip()

    def prepare(self, case: Case, pairs: int) -> None:
        if case.dtype not in ("f32", "f64"):
            raise Unavailable(f"cblas has no {case.dtype}")
        letter = {"f32": "s", "f64": "d"}[case.dtype]
        self._case, self._descriptor = case, self._job(case)
        kinds: tuple[str, ...]
        if self._batches is not None and case.gemm.batch:
            self._loop, kinds = getattr(self._batches, f"run_batch_{case.dtype}"), ("gemm_batch",)
        else:
            self._loop, kinds = getattr(self._loops, f"run_{case.dtype}_{self._integer}"), ("gemm", "gemv")
        self._loop.restype = ctypes.c_double
        self._functions = [
            ctypes.cast(getattr(self._library, self._symbol.format(f"{letter}{kind}")), ctypes.c_void_p)
            for kind in kinds
        ]

    def load(self, operands: Operands) -> None:
        super().load(operands)
        self._fill(self._descriptor)

    def run(self, trips: int) -> float:
        return self._loop(ctypes.byref(self._descriptor), *self._functions, ctypes.c_int64(trips))


def _openblas() -> tuple[ctypes.CDLL, str, str]:
    libraries = pathlib.Path(np.__file__).parent.parent / "numpy.libs"
    found = next(libraries.glob("libscipy_openblas64_*"), None)
    if found is None:
        raise Unavailable("this NumPy does not bring its OpenBLAS")
    return ctypes.CDLL(str(found)), "scipy_cblas_{}64_", "int64"


def _blis() -> tuple[ctypes.CDLL, str, str]:
    try:
        return ctypes.CDLL("libblis.so.4"), "cblas_{}", "int32"
    except OSError as error:
        raise Unavailable("not installed: apt-get install libblis-pthread-dev") from error


def _mkl() -> tuple[ctypes.CDLL, str, str]:
    try:
        return ctypes.CDLL(str(native.PREFIX / "lib" / "libmkl_rt.so.3")), "cblas_{}", "int32"
    except OSError as error:
        raise Unavailable("not installed: make bench-peers") from error


def _mkl_version(library: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(256)
    library.mkl_get_version_string(text, len(text))
    found = text.value.decode()
    number = re.search(r"\d{4}\.\d+", found)
    return number[0] if number else found.strip()


class _SmallProductsRunner(_CRunner):
    """What compiles a function for one small product each; its users bring the loops and threads."""

    _LARGEST = 64  # (m n k)^(1/3), libxsmm's own bound for the sizes that it is made for

    def __init__(self, threads: int) -> None:
        if threads > 1:
            raise Unavailable("its threads are its caller's")

    def _take(self, case: Case, no_dtype: str) -> None:
        """Takes a case, or says why not: `no_dtype` of other dtypes than f32 and f64."""
        gemm = case.gemm
        if case.dtype not in ("f32", "f64"):
            raise Unavailable(no_dtype)
        if gemm.m * gemm.n * gemm.k > self._LARGEST**3:
            raise Unavailable(f"made for products up to {self._LARGEST}^3")
        self._case, self._descriptor = case, self._job(case)

    def load(self, operands: Operands) -> None:
        super().load(operands)
        self._fill(self._descriptor)


class MklJitRunner(_SmallProductsRunner):
    """MKL's functions for small products."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._loops = native.load("mkl")
        self._library, _, _ = _mkl()
        self._jitter: ctypes.c_void_p | None = None

    def version(self) -> str:
        return _mkl_version(self._library)

    def prepare(self, case: Case, pairs: int) -> None:
        self.close()
        self._take(case, f"no {case.dtype}")
        letter, real = {"f32": ("s", ctypes.c_float), "f64": ("d", ctypes.c_double)}[case.dtype]
        job, self._jitter = self._descriptor, ctypes.c_void_p()
        transposed = [stride != 1 for stride in (job.csa, job.csb)]
        status = getattr(self._library, f"mkl_cblas_jit_create_{letter}gemm")(
            ctypes.byref(self._jitter),
            101,  # row-major
            *(112 if each else 111 for each in transposed),
            *(job.m, job.n, job.k),
            real(1),
            job.csa if transposed[0] else job.rsa,
            job.csb if transposed[1] else job.rsb,
            real(0),
            job.rsc,
        )
        if status != 0:  # MKL_NO_JIT: the standard function would be called, which another peer measures
            raise Unavailable("MKL compiles no function for it on this CPU")
        pointer_of = getattr(self._library, f"mkl_jit_get_{letter}gemm_ptr")
        pointer_of.restype = ctypes.c_void_p
        self._kernel = ctypes.c_void_p(pointer_of(self._jitter))
        self._loop = getattr(self._loops, f"run_jit_{case.dtype}")
        self._loop.restype = ctypes.c_double

    def run(self, trips: int) -> float:
        return self._loop(ctypes.byref(self._descriptor), self._kernel, self._jitter, ctypes.c_int64(trips))

    def close(self) -> None:
        if self._jitter:
            self._library.mkl_jit_destroy(self._jitter)
        self._jitter = None
        super().close()


_DNNL_DATA_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3, "int32": 4, "int8": 5}


def _loaded(build: str) -> ctypes.CDLL:
    try:
        return native.load(build)
    except OSError as error:  # compiled while the library was there, or what it needs in turn is missing
        raise Unavailable(f"cannot load it: {error}") from error


def _dnnl_version(library: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(64)
    library.version(text, len(text))
    return text.value.decode()


class OnednnRunner(_CRunner):
    """oneDNN's matmul primitive, created once for a case. `build` is one of native's: which oneDNN."""

    def __init__(self, threads: int, *, build: str) -> None:
        self._library = _loaded(build)
        self._library.create.restype = ctypes.c_void_p
        self._library.run.restype = ctypes.c_double
        self._plan: ctypes.c_void_p | None = None

    def version(self) -> str:
        return _dnnl_version(self._library)

    def prepare(self, case: Case, pairs: int) -> None:
        dtype = DTYPES[case.dtype]
        if dtype.operand not in _DNNL_DATA_TYPES or dtype.out not in _DNNL_DATA_TYPES:
            raise Unavailable(f"no {case.dtype}")
        self._case = case

    def load(self, operands: Operands) -> None:
        self.close()
        super().load(operands)
        case, gemm, dtype = self._case, self._case.gemm, DTYPES[self._case.dtype]
        rank = len(gemm.batch) + 2
        dims = [*gemm.batch, gemm.m, gemm.k, *gemm.batch, gemm.k, gemm.n, *gemm.batch, gemm.m, gemm.n]
        strides = [*gemm.a_batch, *gemm.a_strides, *gemm.b_batch, *gemm.b_strides]
        strides += [*gemm.c_batch, *gemm.c_strides]
        types = [_DNNL_DATA_TYPES[name] for name in (dtype.operand, dtype.operand, dtype.out)]
        assert self._buffers is not None
        plan = self._library.create(
            rank,
            (ctypes.c_int64 * len(dims))(*dims),
            (ctypes.c_int64 * len(strides))(*strides),
            (ctypes.c_int * 3)(*types),
            ctypes.c_int64(len(operands)),
            self._buffers.a_addresses,
            self._buffers.b_addresses,
            self._buffers.c_addresses,
        )
        if not plan:
            raise Unavailable(f"no matmul primitive for {case.key}")
        self._plan = ctypes.c_void_p(plan)

    def run(self, trips: int) -> float:
        return self._library.run(self._plan, ctypes.c_int64(trips))

    def close(self) -> None:
        if self._plan is not None:
            self._library.destroy(self._plan)
            self._plan = None
        super().close()


class OnednnSgemmRunner(_CRunner):
    """oneDNN's sgemm: a function without primitives and streams, f32 alone."""

    def __init__(self, threads: int, *, build: str) -> None:
        self._library = _loaded(build)
        self._library.run_sgemm.restype = ctypes.c_double

    def version(self) -> str:
        return _dnnl_version(self._library)

    def prepare(self, case: Case, pairs: int) -> None:
        if case.dtype != "f32":
            raise Unavailable(f"no {case.dtype}")
        self._case, self._descriptor = case, self._job(case)

    def load(self, operands: Operands) -> None:
        super().load(operands)
        self._fill(self._descriptor)

    def run(self, trips: int) -> float:
        return self._library.run_sgemm(ctypes.byref(self._descriptor), ctypes.c_int64(trips))


class XsmmRunner(_SmallProductsRunner):
    """libxsmm's kernels."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._library = native.load("xsmm")
        self._library.version.restype = ctypes.c_char_p
        self._library.run.restype = ctypes.c_double

    def version(self) -> str:
        return self._library.version().decode()

    def prepare(self, case: Case, pairs: int) -> None:
        self._take(case, f"its {case.dtype} wants operands in a packed layout")
        self._is_double = ctypes.c_int(case.dtype == "f64")
        if not self._library.compiles(ctypes.byref(self._descriptor), self._is_double):
            raise Unavailable(f"no kernel for layout {case.layout}")

    def run(self, trips: int) -> float:
        return self._library.run(ctypes.byref(self._descriptor), self._is_double, ctypes.c_int64(trips))


class _RoofRunner:
    """A limit of the machine in the guise of a peer: the time that the case would take at it."""

    def __init__(self, threads: int) -> None:
        self._library = native.load("machine")
        self._threads = threads

    def version(self) -> str:
        return ""

    def results(self) -> list[Array]:
        return []

    def close(self) -> None:
        pass


_UNIT_KINDS = {"float32": 0, "float16": 0, "float64": 1, "bfloat16": 2, "int8": 3}  # of native/machine.c


class PeakRunner(_RoofRunner):
    """The time of the case's multiplications and additions at the units' peak."""

    def prepare(self, case: Case, pairs: int) -> None:
        self._kind = _UNIT_KINDS[DTYPES[case.dtype].operand]
        if not self._library.has_unit(self._kind):
            raise Unavailable("measured with AVX2 and FMA, which this CPU lacks")
        self._library.run_peak.restype = ctypes.c_double
        self._flops = float(case.flops * pairs)

    def load(self, operands: Operands) -> None:
        pass

    def run(self, trips: int) -> float:
        return self._library.run_peak(self._kind, self._threads, ctypes.c_double(self._flops * trips))


class BandwidthRunner(_RoofRunner):
    """The time of reading as many bytes as the case must move, from a working set of its size."""

    _data: ctypes.c_void_p | None = None

    def prepare(self, case: Case, pairs: int) -> None:
        self._bytes = case.bytes * pairs
        self._library.allocate.restype = ctypes.c_void_p
        self._library.run_bandwidth.restype = ctypes.c_double

    def load(self, operands: Operands) -> None:
        self.close()
        share = ctypes.c_int64()
        data = self._library.allocate(ctypes.c_int64(self._bytes), self._threads, ctypes.byref(share))
        self._data, self._share = ctypes.c_void_p(data), share

    def run(self, trips: int) -> float:
        seconds = self._library.run_bandwidth(self._data, self._share, self._threads, ctypes.c_int64(trips))
        # The share of a thread is rounded up to whole blocks; small cases would look slow for it.
        return seconds * self._bytes / (self._share.value * self._threads)

    def close(self) -> None:
        if self._data is not None:
            self._library.deallocate(self._data)
            self._data = None
