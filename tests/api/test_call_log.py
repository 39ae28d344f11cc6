"""JAX_NANO_VERBOSE=2: a line for each call that has run, with its time."""

from __future__ import annotations

import re
import subprocess
import sys

from programs import fresh_environment

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, jax_nano
small, large = np.ones((8, 8), np.float32), np.ones((512, 512), np.float32)
q = np.ones((1, 64, 4, 32), np.float32)
w = jax_nano.quantize(jnp.ones((256, 64)), bits=4, group=128)
calls = [
    lambda: jax_nano.matmul(small, small),
    lambda: jax_nano.matmul(large, large),
    lambda: jax_nano.linear(small, small, activation="relu"),
    lambda: jax_nano.dot_product_attention(q, q, q),
    lambda: jax.grad(lambda q: jax_nano.dot_product_attention(q, q, q).sum())(q),
    lambda: np.ones((1, 256), np.float32) @ w,
]
for call in calls:
    for _ in range(2):
        jax.block_until_ready(call())
"""

EXPECTED = {
    "dot_general float32[8,8] x float32[8,8] -> float32[8,8]": 2,
    "dot_general float32[512,512] x float32[512,512] -> float32[512,512]": 2,
    "linear float32[8,8] x float32[8,8] -> float32[8,8]": 2,
    "attention float32[1,64,4,32] x float32[1,64,4,32] x float32[1,64,4,32]": 4,
    "gradients of attention float32[1,64,4,32] x float32[1,64,4,32] x float32[1,64,4,32]": 2,
    "quantized product float32[1,256] x int4[256,64] -> float32[1,64]": 2,
}


def logged(value: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env=fresh_environment({"JAX_NANO_VERBOSE": value, "JAX_NANO_GATE": "off"}),
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return [x for x in done.stderr.splitlines() if x.startswith("jax_nano: ran ")]


def test_every_call_has_a_line() -> None:
    lines = logged("2")
    for what, count in EXPECTED.items():
        assert sum(bool(re.fullmatch(rf"jax_nano: ran {re.escape(what)}: \d+\.\d{{3}} us", x)) for x in lines) == count
    assert len(lines) == sum(EXPECTED.values())


def test_no_call_has_a_line_unless_asked_for() -> None:
    assert logged("1") == []
