"""Profilers show our calls by names that say what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nano
from jax_nano._dispatch import decision

X, W = np.ones((24, 40), np.float32), np.ones((40, 56), np.float32)
Q = np.ones((1, 64, 4, 32), np.float32)

PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[str]]] = {
    "matmul": (jax_nano.matmul, (X, W), ["jax_nano_dot_general_float32_24x40_40x56"]),
    "a product for several threads": (
        jax_nano.matmul,
        (np.ones((768, 768), np.float32),) * 2,
        ["jax_nano_dot_general_float32_768x768_768x768"],
    ),
    "linear": (
        lambda x, w: jax_nano.linear(x, w, activation="relu"),
        (X, W),
        ["jax_nano_linear_float32_24x40_40x56"],
    ),
    "attention": (
        lambda q: jax_nano.dot_product_attention(q, q, q),
        (Q,),
        ["jax_nano_attention_float32_1x64x4x32_1x64x4x32"],
    ),
    "gradients": (
        jax.grad(lambda q: jax_nano.dot_product_attention(q, q, q).sum()),
        (Q,),
        [
            "jax_nano_attention_float32_1x64x4x32_1x64x4x32",
            "jax_nano_attention_gradients_float32_1x64x4x32_1x64x4x32",
        ],
    ),
    "quantised": (
        lambda x, w: x @ jax_nano.quantize(w, bits=8, group=None),
        (X, W),
        ["jax_nano_quantized_float32_24x40_40x56"],
    ),
    "accelerated": (lambda x, w: jnp.tanh(x @ w), (X, W), ["jax_nano_linear_float32_24x40_40x56"]),
    "accelerated attention": (
        lambda q: jax.nn.dot_product_attention(q, q, q),
        (Q,),
        ["jax_nano_attention_float32_1x64x4x32_1x64x4x32"],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "policy", decision.Policy(declines=False))
    program, args, expected = PROGRAMS[name]
    with jax_nano.accelerate(name.startswith("accelerated")):
        run = jax.jit(program)
        jax.block_until_ready(run(*args))
        with jax.profiler.trace(str(tmp_path)):
            jax.block_until_ready(run(*args))
    (file,) = tmp_path.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    seen = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    for want in expected:
        assert any(x.startswith(want) for x in seen), sorted(x for x in seen if "jax_nano" in x)
