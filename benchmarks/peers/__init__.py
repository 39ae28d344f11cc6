"""Who is measured. Each peer is a Runner, and runs in a worker process that is set up for it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks import native
from benchmarks.cases import Array, Case

Operands = Sequence[tuple[Array, Array]]


class Unavailable(Exception):
    """The peer is not installed, or does not compute this case; says why in one line."""


class Runner(Protocol):
    """One peer inside its worker process.

    `prepare` is told how many operand pairs a round goes through (one: caches stay warm; more than
    the last-level cache holds: they are cold), `load` brings them, `run` goes through all of them
    `trips` times and returns the seconds that took, `results` has the latest result for each pair.
    """

    def __init__(self, threads: int, **options: Any) -> None: ...

    def version(self) -> str: ...

    def prepare(self, case: Case, pairs: int) -> None: ...

    def load(self, operands: Operands) -> None: ...

    def run(self, trips: int) -> float: ...

    def results(self) -> list[Array]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Peer:
    """What the parent process knows of a peer."""

    name: str
    what: str
    runner: str  # "module:class" below this package
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    process: str = ""  # peers with the same process name share a worker; the peer's own name by default
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_roof: bool = False  # not a peer but a limit of the machine
    is_ours: bool = False
    library: str = ""  # what has to be compiled for it, in benchmarks/native
    is_default: bool = True  # measured unless peers are named

    @property
    def worker(self) -> str:
        return self.process or self.name

    @property
    def is_called_from_c(self) -> bool:
        return self.runner.startswith("in_c:") and not self.is_roof

    @property
    def is_rival(self) -> bool:
        return not (self.is_ours or self.is_roof)

    def start(self, threads: int) -> Runner:
        module, _, name = self.runner.partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(threads, **self.options)


OURS = "jax_nano"
OUR_KERNELS = "kernels"

# PyPI's packages put the libraries that they need in turn into the environment, where nothing looks for them. The CPU
# engine of PyPI's oneDNN runs on an OpenCL runtime; the file that registers it names a folder of its makers.
_LIBRARIES = native.PREFIX / "lib"
_PYPI = {"LD_LIBRARY_PATH": str(_LIBRARIES), "OCL_ICD_FILENAMES": str(_LIBRARIES / "libintelocl.so")}

# jnp runs in our process, so that the two share everything but the product. XLA reads its flags
# once a process, so XLA without YNNPACK (its Eigen path) has a process of its own.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, "jax_nano inside jax.jit", "in_jax:JaxRunner", {"ours": True}, process="jax", is_ours=True),
        Peer(OUR_KERNELS, "jax_nano's kernels from a loop in C++, without XLA", "in_c:KernelsRunner", is_ours=True),
        Peer("jnp", "jax.numpy inside jax.jit (XLA:CPU, YNNPACK)", "in_jax:JaxRunner", process="jax"),
        Peer(
            "jnp-eigen",
            "the same with YNNPACK fusions off",
            "in_jax:JaxRunner",
            env={"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=-individual_dot"},
        ),
        Peer("numpy", "numpy.matmul with its OpenBLAS, called from Python", "in_numpy:NumpyRunner"),
        Peer("torch", "torch.matmul, called from Python", "in_torch:TorchRunner"),
        Peer(
            "torch-compile",
            "torch.matmul compiled by torch.compile, called from Python",
            "in_torch:TorchRunner",
            {"compiled": True},
            is_default=False,  # seconds to compile a product, and faster for none so far
        ),
        Peer(
            "openblas",
            "NumPy's OpenBLAS through cblas",
            "in_c:CblasRunner",
            {"blas": "openblas"},
            library="cblas",
        ),
        Peer("blis", "BLIS through cblas", "in_c:CblasRunner", {"blas": "blis"}, library="cblas"),
        Peer(
            "mkl",
            "MKL through cblas, batches by gemm_batch",
            "in_c:CblasRunner",
            {"blas": "mkl"},
            env=_PYPI,
            library="mkl",
        ),
        Peer("mkl-jit", "functions that MKL compiles for small sizes", "in_c:MklJitRunner", env=_PYPI, library="mkl"),
        Peer(
            "onednn",
            "the matmul primitive of Debian's oneDNN",
            "in_c:OnednnRunner",
            {"build": "onednn"},
            library="onednn",
        ),
        Peer(
            "onednn-omp",
            "the matmul primitive of PyPI's last oneDNN on OpenMP",
            "in_c:OnednnRunner",
            {"build": "onednn-omp"},
            library="onednn-omp",
        ),
        Peer(
            "onednn-sycl",
            "the matmul primitive of PyPI's oneDNN, on SYCL",
            "in_c:OnednnRunner",
            {"build": "onednn-sycl"},
            env=_PYPI,
            library="onednn-sycl",
        ),
        Peer(
            "onednn-sgemm",
            "the sgemm of PyPI's oneDNN, without SYCL",
            "in_c:OnednnSgemmRunner",
            {"build": "onednn-sycl"},
            env=_PYPI,
            library="onednn-sycl",
        ),
        Peer("libxsmm", "libxsmm's small-matrix kernels", "in_c:XsmmRunner", library="xsmm"),
        Peer(
            "peak",
            "the CPU's multiply-add units, measured",
            "in_c:PeakRunner",
            process="machine",
            is_roof=True,
            library="machine",
        ),
        Peer(
            "bandwidth",
            "reading memory of the same size, measured",
            "in_c:BandwidthRunner",
            process="machine",
            is_roof=True,
            library="machine",
        ),
    )
}
