"""What an epilogue saves: `linear` compared with our product followed by XLA's operations, and with jnp's.

Results are checked against the composition in float32 first. The product alone is measured too: what `linear` takes
longer is what the epilogue costs.
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
    """One layer of a model: x[m, k] @ w[k, n] + b, an activation, perhaps a residual."""

    m: int
    k: int
    n: int
    dtype: str
    activation: str
    residual: bool = False

    def __str__(self) -> str:
        tail = " + residual" if self.residual else ""
        return f"{self.m}x{self.n}x{self.k} {self.dtype} {self.activation}{tail}"


LAYERS = (
    Layer(512, 768, 3072, "float32", "relu"),
    Layer(512, 768, 3072, "float32", "gelu_tanh"),
    Layer(512, 768, 3072, "float32", "gelu_erf"),
    Layer(512, 3072, 768, "float32", "none", residual=True),
    Layer(512, 768, 3072, "bfloat16", "gelu_tanh"),
    Layer(128, 256, 256, "float32", "silu"),
    Layer(1, 2048, 2048, "bfloat16", "silu", residual=True),
    Layer(8, 2048, 2048, "bfloat16", "silu", residual=True),
    Layer(8, 768, 3072, "float32", "gelu_tanh"),
)
_SMALL = (Layer(9, 17, 33, "float32", "gelu_erf", residual=True), Layer(3, 64, 40, "bfloat16", "silu"))


def report(*, quick: bool) -> str:
    """Markdown table: microseconds of a layer, and how much longer the others take."""
    rounds, seconds = (2, 1e-4) if quick else (15, 3e-3)
    rows = [_row(layer, rounds, seconds) for layer in (_SMALL if quick else LAYERS)]
    head = ("layer", "linear, µs", "product alone / linear", "product, then XLA / linear", "jnp / linear")
    return f"{machine.describe()['cpu']}, jax_nano\n\n{table(head, rows)}"


def _row(layer: Layer, rounds: int, seconds: float) -> tuple[str, ...]:
    import jax.numpy as jnp

    import jax_nano

    args = _operands(layer)
    want = np.asarray(_composed(jnp.matmul, layer, [v.astype(jnp.float32) for v in args]))
    programs = {
        "linear": _compiled(layer, lambda x, w, b, r: _linear(layer, x, w, b, r)),
        "product": _compiled(layer, lambda x, w, b, r: jax_nano.matmul(x, w)),
        "parts": _compiled(layer, lambda *given: _composed(jax_nano.matmul, layer, given)),
        "jnp": _compiled(layer, lambda *given: _composed(jnp.matmul, layer, given)),
    }
    tolerance = 2e-5 if layer.dtype == "float32" else 0.06
    for name in ("linear", "parts", "jnp"):
        got = np.asarray(programs[name](*args).astype(jnp.float32))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=f"{layer}: {name}")
    samples = interleave({name: _timed(program, args, seconds) for name, program in programs.items()}, rounds)
    pairs = {
        name: statistics.median(a / b for a, b in zip(samples[name], samples["linear"], strict=True))
        for name in ("product", "parts", "jnp")
    }
    return str(layer), f"{statistics.median(samples['linear']) * 1e6:.1f}", *(f"{x:.2f}" for x in pairs.values())


def _operands(layer: Layer) -> list[Any]:
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    shapes = ((layer.m, layer.k), (layer.k, layer.n), (layer.n,), (layer.m, layer.n))
    x, w, b, r = (rng.standard_normal(shape) for shape in shapes)
    return [jnp.asarray(v, layer.dtype) for v in (x, w / layer.k**0.5, b, r)]


def _linear(layer: Layer, x: Any, w: Any, b: Any, r: Any) -> Any:
    import jax_nano

    return jax_nano.linear(x, w, b, activation=layer.activation, residual=r if layer.residual else None)


def _composed(matmul: Callable[..., Any], layer: Layer, given: Any) -> Any:
    from jax_nano._core import activations

    x, w, b, r = given
    y = activations.FUNCTIONS[layer.activation](matmul(x, w) + b)
    return y + r if layer.residual else y


def _compiled(layer: Layer, f: Callable[..., Any]) -> Any:
    import jax

    return jax.jit(f).lower(*_operands(layer)).compile()


def _timed(program: Any, args: list[Any], seconds: float) -> Timed:
    """Several calls for each sample, one waited for before the next."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            program(*args).block_until_ready()
        return (time.perf_counter() - start) / calls

    run(2)
    calls = max(1, int(seconds / run(3)))
    return lambda: run(calls)
