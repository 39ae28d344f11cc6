"""Layers with quantised weights: a token and more through them, beside plain JAX, PyTorch and reading the bytes alone.

Weights are larger than the last level of cache, so that every call reads them from memory. Results are checked against
the product of the dequantised weights first. The time to read is measured here too: XLA sums them up as
int32, and does nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.pairs import Timed, interleave
from benchmarks.report import table


class Layer(NamedTuple):
    """x[m, k] @ w[k, n] with quantised w."""

    m: int
    k: int
    n: int
    weights: str
    group: int | None
    dtype: str = "bfloat16"
    along_k: bool = False

    def __str__(self) -> str:
        order = ", along K" if self.along_k else ""
        scales = "a column" if self.group is None else f"{self.group}"
        return f"{self.m}x{self.n}x{self.k} {self.dtype} x {self.weights}, scale by {scales}{order}"


LAYERS = (
    Layer(1, 4096, 14336, "int8", None),
    Layer(1, 4096, 14336, "int8", None, along_k=True),
    Layer(1, 4096, 14336, "int4", 128),
    Layer(1, 4096, 14336, "int4", 128, along_k=True),
    Layer(1, 4096, 14336, "float8_e4m3fn", None),
    Layer(4, 4096, 14336, "int8", None),
    Layer(4, 4096, 14336, "int4", 128),
    Layer(16, 4096, 14336, "int8", None),
    Layer(128, 4096, 4096, "int8", 128, "float32"),
)
_SMALL = (Layer(1, 64, 128, "int8", None), Layer(2, 64, 128, "int4", 32), Layer(9, 64, 128, "int8", 32, along_k=True))


def report(*, quick: bool) -> str:
    """Markdown table: milliseconds of a layer, and how much longer the others take."""
    rounds, seconds = (2, 1e-4) if quick else (7, 2e-2)
    rows = [_row(layer, rounds, seconds, plain=quick or layer.m == 1) for layer in (_SMALL if quick else LAYERS)]
    head = ("layer", "ms", "reading the bytes, ms", "share of its speed", "plain JAX / ours", "PyTorch / ours")
    return f"{machine.describe()['cpu']}, jax_nano\n\n{table(head, rows)}"


def _row(layer: Layer, rounds: int, seconds: float, *, plain: bool) -> tuple[str, ...]:
    import jax.numpy as jnp

    import jax_nano

    x, q, scale = _operands(layer)
    contracting = int(layer.along_k)
    programs = {"ours": _compiled(lambda *v: jax_nano.quantized_matmul(*v, contracting=contracting), x, q, scale)}
    if plain:
        programs["plain"] = _compiled(lambda *v: _in_jax(layer, *v), x, q, scale)
    want = np.asarray(_in_jax(layer, x.astype(jnp.float32), q, scale))
    tolerance = 2e-5 if layer.dtype == "float32" else 2e-2
    for name, program in programs.items():
        got = np.asarray(program(x, q, scale).astype(jnp.float32))
        np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=f"{layer}: {name}"
        )

    def runner(program: Any) -> Callable[[], Any]:
        return lambda: program(x, q, scale).block_until_ready()

    candidates = {name: _timed(runner(program), seconds) for name, program in programs.items()}
    words = jnp.asarray(np.ones(q.size * (4 if "int4" in layer.weights else 8) // 32, np.int32))
    reading = _compiled(jnp.sum, words)
    candidates["read"] = _timed(lambda: reading(words).block_until_ready(), seconds)
    torch_product = _in_torch(layer, x, q, scale)
    if torch_product is not None:
        candidates["torch"] = _timed(torch_product, seconds)
    samples = interleave(candidates, rounds)
    ours = statistics.median(samples["ours"])
    read = statistics.median(samples["read"])

    def times(name: str) -> str:
        if name not in samples:
            return "-"
        return f"{statistics.median(a / b for a, b in zip(samples[name], samples['ours'], strict=True)):.2f}"

    return str(layer), f"{ours * 1e3:.2f}", f"{read * 1e3:.2f}", f"{read / ours:.2f}", times("plain"), times("torch")


def _operands(layer: Layer) -> tuple[Any, ...]:
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    groups = 1 if layer.group is None else layer.k // layer.group
    q = jnp.asarray(rng.integers(-7, 8, (layer.k, layer.n), np.int8)).astype(jnp.dtype(layer.weights))
    scale = jnp.asarray((rng.random((groups, layer.n)) + 0.5) / layer.k**0.5 / 4, jnp.float32)
    x = jnp.asarray(rng.standard_normal((layer.m, layer.k)), layer.dtype)
    return (x, jnp.array(q.T), jnp.array(scale.T)) if layer.along_k else (x, q, scale)


def _in_jax(layer: Layer, x: Any, q: Any, scale: Any) -> Any:
    """As users write it."""
    import jax.numpy as jnp

    axis = int(layer.along_k)
    if layer.group is None:
        w = q.astype(x.dtype)
        y = x @ (w.T if layer.along_k else w)
        return (y * jnp.squeeze(scale, axis)).astype(x.dtype)
    w = q.astype(jnp.float32) * jnp.repeat(scale, layer.group, axis)
    w = w.astype(x.dtype)
    return x @ (w.T if layer.along_k else w)


def _in_torch(layer: Layer, x: Any, q: Any, scale: Any) -> Callable[[], Any] | None:
    """PyTorch's kernel for such weights; None where it has none, or there is no PyTorch.

    Its int8 weights lie along K with a scale a column; its int4 weights are packed by itself, with scales by groups.
    """
    by_column = layer.weights == "int8" and layer.group is None and layer.along_k
    by_group = layer.weights == "int4" and layer.group is not None and layer.along_k
    if not (by_column or by_group) or layer.n % 64:
        return None
    try:
        import torch
    except ImportError:
        return None
    import jax.numpy as jnp

    rows = torch.from_numpy(np.array(x.astype(jnp.float32))).to(torch.bfloat16)
    weights = torch.from_numpy(np.array(q.astype(jnp.int8)))
    scales = torch.from_numpy(np.array(scale)).to(torch.bfloat16)
    if by_column:
        return lambda: torch._weight_int8pack_mm(rows, weights, scales[:, 0])
    packed = torch._convert_weight_to_int4pack_for_cpu((weights + 8).to(torch.int32), 2)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).contiguous()
    return lambda: torch._weight_int4pack_mm_for_cpu(rows, packed, layer.group, pairs)


def _compiled(f: Callable[..., Any], *args: Any) -> Any:
    import jax

    return jax.jit(f).lower(*args).compile()


def _timed(run_once: Callable[[], Any], seconds: float) -> Timed:
    """Several calls for each sample, one waited for before the next."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run_once()
        return (time.perf_counter() - start) / calls

    run(1)
    calls = max(1, int(seconds / run(1)))
    return lambda: run(calls)
