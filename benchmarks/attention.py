"""`dot_product_attention` beside jax.nn's and, where it is installed, PyTorch's.

Every result is checked against jax.nn's in float32 first. Shares of the peak count the two products of what is not
masked, and compare with float32 products of 1024 x 1024 matrices on the same cores. Cores are those
of the process (taskset), and XLA and PyTorch have as many threads.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.pairs import Timed, interleave
from benchmarks.report import table


class Shape(NamedTuple):
    """One attention: batch, queries, keys, heads, heads of keys and values, their size."""

    b: int
    t: int
    s: int
    n: int
    k: int
    h: int
    dtype: str
    causal: bool = False

    def __str__(self) -> str:
        keys = "" if self.t == self.s else f" against {self.s} keys"
        heads = f"{self.n}" if self.n == self.k else f"{self.n}/{self.k}"
        return f"{self.b}x{self.t}x{heads}x{self.h}{keys} {self.dtype}{' causal' if self.causal else ''}"

    @property
    def operations(self) -> float:
        """Multiplications and additions of the products."""
        share = (self.t + 1) / (2 * self.t) if self.causal else 1.0
        return 4.0 * self.b * self.n * self.t * self.s * self.h * share

    @property
    def cache_bytes(self) -> float:
        """Of keys and values."""
        return 2.0 * self.b * self.s * self.k * self.h * (4 if self.dtype == "float32" else 2)


SHAPES = (
    *(
        Shape(b, t, t, n, n, h, dtype, causal)
        for b, t, n, h in ((1, 1024, 12, 64), (4, 512, 12, 64), (1, 2048, 8, 128))
        for dtype in ("float32", "bfloat16")
        for causal in (False, True)
    ),
    Shape(1, 1, 4096, 32, 8, 128, "float32"),
    Shape(1, 1, 4096, 32, 8, 128, "bfloat16"),
)
_SMALL = (Shape(1, 33, 33, 2, 1, 16, "float32", True), Shape(1, 1, 600, 4, 2, 16, "bfloat16"))


def report(*, quick: bool) -> str:
    """Markdown table: milliseconds, and how much longer the others take."""
    rounds, seconds = (2, 1e-4) if quick else (9, 2e-2)
    peak = _products_per_second(0.01 if quick else 0.3)
    rows = [_row(shape, rounds, seconds, peak) for shape in (_SMALL if quick else SHAPES)]
    head = ("attention", "ours, ms", "of products", "GB/s of the cache", "jax.nn / ours", "PyTorch / ours")
    cores = len(os.sched_getaffinity(0))
    note = f"float32 products: {peak / 1e9:.0f} GFLOP/s on {cores} cores"
    gradients = [_gradient_row(shape, rounds, seconds) for shape in (_SMALL[:1] if quick else SHAPES[:2])]
    backward = table(("forward and backward", "ours, ms", "jax.nn / ours"), gradients)
    return f"{machine.describe()['cpu']}, jax_nano\n\n{note}\n\n{table(head, rows)}\n\n{backward}"


def _operands(shape: Shape) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = ((shape.b, shape.t, shape.n, shape.h), *[(shape.b, shape.s, shape.k, shape.h)] * 2)
    return [rng.standard_normal(size).astype(np.float32) for size in sizes]


def _row(shape: Shape, rounds: int, seconds: float, peak: float) -> tuple[str, ...]:
    import jax
    import jax.numpy as jnp

    import jax_nano

    arrays = _operands(shape)
    given = [jnp.asarray(x, shape.dtype) for x in arrays]
    want = jax.nn.dot_product_attention(*(x.astype(np.float32) for x in given), is_causal=shape.causal)
    programs: dict[str, Callable[[], Any]] = {}
    for name, function in (("ours", jax_nano.dot_product_attention), ("jax.nn", jax.nn.dot_product_attention)):
        compiled = jax.jit(partial(function, is_causal=shape.causal)).lower(*given).compile()
        programs[name] = partial(_waited, compiled, given)
        _check(np.asarray(programs[name]().astype(np.float32)), np.asarray(want), shape, name)
    torch = _torch_program(shape, given)
    if torch is not None:
        programs["torch"] = torch
        _check(np.moveaxis(torch().float().numpy(), 1, 2), np.asarray(want), shape, "torch")
    samples = interleave({name: _timed(program, seconds) for name, program in programs.items()}, rounds)
    ours = statistics.median(samples["ours"])

    def ratio(name: str) -> str:
        if name not in samples:
            return "-"
        return f"{statistics.median(a / b for a, b in zip(samples[name], samples['ours'], strict=True)):.2f}"

    read = f"{shape.cache_bytes / ours / 1e9:.1f}" if shape.t == 1 else "-"
    share = "-" if shape.t == 1 else f"{shape.operations / ours / peak:.2f}"
    return str(shape), f"{ours * 1e3:.2f}", share, read, ratio("jax.nn"), ratio("torch")


def _gradient_row(shape: Shape, rounds: int, seconds: float) -> tuple[str, ...]:
    import jax
    import jax.numpy as jnp

    import jax_nano

    given = [jnp.asarray(x, shape.dtype) for x in _operands(shape)]
    programs = {}
    for name, function in (("ours", jax_nano.dot_product_attention), ("jax.nn", jax.nn.dot_product_attention)):
        step = jax.grad(lambda *x, f=function: (f(*x, is_causal=shape.causal) ** 2).sum(), (0, 1, 2))
        compiled = jax.jit(step).lower(*given).compile()
        programs[name] = partial(_waited, compiled, given)
    for got, want in zip(*(programs[name]() for name in ("ours", "jax.nn")), strict=True):
        _check(np.asarray(got.astype(np.float32)), np.asarray(want.astype(np.float32)), shape, "gradient")
    samples = interleave({name: _timed(program, seconds) for name, program in programs.items()}, rounds)
    ratio = statistics.median(a / b for a, b in zip(samples["jax.nn"], samples["ours"], strict=True))
    return str(shape), f"{statistics.median(samples['ours']) * 1e3:.2f}", f"{ratio:.2f}"


def _check(got: np.ndarray, want: np.ndarray, shape: Shape, name: str) -> None:
    near = 1e-4 if shape.dtype == "float32" else 3e-2
    np.testing.assert_allclose(got, want, rtol=near, atol=near, err_msg=f"{shape}: {name}")


def _waited(program: Callable[..., Any], args: list[Any]) -> Any:
    import jax

    return jax.block_until_ready(program(*args))


def _torch_program(shape: Shape, given: list[Any]) -> Callable[[], Any] | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[shape.dtype]
    q, k, v = (torch.from_numpy(np.array(x, np.float32)).to(dtype).transpose(1, 2) for x in given)
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.n != shape.k)


def _products_per_second(seconds: float) -> float:
    """Operations a second of float32 products, by our kernels inside jit."""
    import jax
    import jax.numpy as jnp

    import jax_nano

    a = jnp.asarray(np.random.default_rng(1).standard_normal((1024, 1024)), np.float32)
    program = jax.jit(jax_nano.matmul).lower(a, a).compile()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        program(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def _timed(program: Callable[[], Any], seconds: float) -> Timed:
    """Several calls for each sample, one waited for before the next."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            program()
        return (time.perf_counter() - start) / calls

    run(1)
    calls = max(1, int(seconds / run(1)))
    return lambda: run(calls)
