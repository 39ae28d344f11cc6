"""Decoding with a whole model: the GPT-2 of examples/decoder.py by the bits of its weights, plain, ours, PyTorch's.

A token is decoded after 64 others. Scores of all ways to run the same weights are compared before anything is timed.
PyTorch, where it is installed, runs the bfloat16 weights, eagerly. Cores are those of the process (taskset), and XLA
and PyTorch have as many threads.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.pairs import interleave
from benchmarks.report import table

_REAL = {"heads": 12, "features": 768, "vocabulary": 8192}
_SMALL = {"heads": 2, "features": 128, "vocabulary": 512}
_FILLED = 64  # tokens in the cache
_STEPS = 8  # of a sample, at most: the cache has as many more places


def report(*, quick: bool) -> str:
    """Markdown table: milliseconds a token, and how much longer the others take."""
    rows = [row for blocks in ((1,) if quick else (2, 12)) for row in _rows(blocks, quick=quick)]
    head = (
        *("blocks", "weights", "MB", "ours, ms", "reading the bytes, ms"),
        *("plain JAX / ours", "PyTorch bf16 / ours", "our bf16 / ours"),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{machine.describe()['cpu']}, {cores} cores, jax_nano\n\n{table(head, rows)}"


def _rows(blocks: int, *, quick: bool) -> list[tuple[str, ...]]:
    import decode
    import decoder
    import jax
    import jax.numpy as jnp

    import jax_nano

    sizes = _SMALL if quick else _REAL
    model = decoder.Decoder(blocks=blocks, tokens=_FILLED + _STEPS, **sizes)
    prompt = jnp.asarray(np.random.default_rng(1).integers(0, sizes["vocabulary"], _FILLED, np.int32))
    candidates: dict[str, Callable[[], float]] = {}
    bytes_of: dict[str, int] = {}
    for form in decode.formats(model):
        plain = decode.Program(form.plain, prompt)
        with jax_nano.accelerate():
            ours = decode.Program(form.ours, prompt)
        _, want = plain.decode(1)
        _check(form.name, ours.decode(1)[1], want, decode.TOLERANCE[form.name])
        if form.name == "bfloat16" and (torch_step := _in_torch(form.plain, prompt)) is not None:
            _check("PyTorch", torch_step(), want, decode.TOLERANCE[form.name])
            candidates["torch"] = _timed(torch_step)
        plain.steps = max(1, min(_STEPS, int(0.05 / plain.seconds())))
        ours.steps = _STEPS
        bytes_of[form.name] = decoder.matrix_bytes(form.ours)
        words = jnp.ones(bytes_of[form.name] // 4, jnp.int32)
        reading = jax.jit(jnp.sum).lower(words).compile()
        candidates |= {f"ours {form.name}": ours.seconds, f"plain {form.name}": plain.seconds}
        candidates[f"read {form.name}"] = _timed(partial(_waited, reading, words))
    samples = interleave(candidates, 2 if quick else 9)

    def ms(name: str) -> str:
        return f"{statistics.median(samples[name]) * 1e3:.2f}"

    def times(name: str, ours: str) -> str:
        if name not in samples:
            return "-"
        return f"{statistics.median(a / b for a, b in zip(samples[name], samples[ours], strict=True)):.2f}"

    return [
        (
            *(str(blocks), name, f"{size / 1e6:.1f}", ms(ours), ms(f"read {name}")),
            *(times(other, ours) for other in (f"plain {name}", "torch", "ours bfloat16")),
        )
        for name, size in bytes_of.items()
        for ours in [f"ours {name}"]
    ]


def _check(name: str, got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    apart = np.linalg.norm(got - want) / np.linalg.norm(want)
    if not apart <= tolerance:
        raise AssertionError(f"{name}: scores differ by {apart:.1e}, more than {tolerance:.0e}")


def _waited(program: Any, words: Any) -> None:
    program(words).block_until_ready()


def _timed(run: Callable[[], Any]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for _ in range(_STEPS):
            run()
        return (time.perf_counter() - start) / _STEPS

    return sample


def _in_torch(model: Any, prompt: Any) -> Callable[[], np.ndarray] | None:
    """A step of the model after the prompt, eagerly; it gives the scores. None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    import jax.numpy as jnp
    from torch.nn import functional as tf

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def of(parameter: Any) -> Any:
        return torch.from_numpy(np.array(parameter.get_value().astype(jnp.float32))).to(torch.bfloat16)

    def layer(linear: Any) -> tuple[Any, Any]:
        return of(linear.weights).T.contiguous(), None if linear.bias is None else of(linear.bias)

    def norm(x: Any) -> tuple[Any, Any]:
        return of(x.scale), of(x.bias)

    embedding, positions, head, last = of(model.embedding), of(model.positions), layer(model.head), norm(model.norm)
    blocks = [
        (
            *(norm(b.norm1), layer(b.attention.inputs), layer(b.attention.outputs), norm(b.norm2)),
            *(layer(b.up), layer(b.down), of(b.attention.keys), of(b.attention.values)),
        )
        for b in model.blocks
    ]
    features, heads = embedding.shape[1], blocks[0][-1].shape[0]

    def run(tokens: Any, start: int) -> Any:
        end = start + len(tokens)
        x = embedding[tokens] + positions[start:end]
        for norm1, inputs, outputs, norm2, up, down, keys, values in blocks:
            y = tf.linear(tf.layer_norm(x, (features,), *norm1, 1e-5), *inputs)
            q, k, v = y.view(len(tokens), 3, heads, -1).permute(1, 2, 0, 3)
            keys[:, start:end], values[:, start:end] = k, v
            found = tf.scaled_dot_product_attention(
                q[None], keys[None, :, :end], values[None, :, :end], is_causal=len(tokens) > 1
            )
            x = x + tf.linear(found[0].transpose(0, 1).reshape(len(tokens), features), *outputs)
            y = tf.gelu(tf.linear(tf.layer_norm(x, (features,), *norm2, 1e-5), *up), approximate="tanh")
            x = x + tf.linear(y, *down)
        return tf.linear(tf.layer_norm(x[-1:], (features,), *last, 1e-5), *head)[0]

    with torch.inference_mode():
        token = run(torch.from_numpy(np.array(prompt)).long(), 0).argmax()[None]

    def step() -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = run(token, len(prompt)).float().numpy()
        return found

    return step
