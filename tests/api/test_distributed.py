"""Two processes under jax.distributed: one product whose contracting dimension is sharded across them."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap

from programs import fresh_environment

WORKER = """
import sys
import jax
port, index = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
import jax.numpy as jnp, numpy as np, jax_nano
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
assert jax.device_count() == 4 and jax.local_device_count() == 2
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(7)
a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 64), (64, 40)))

def spread(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

for name, specs, products in (("K", (P(None, "x"), P("x")), 1), ("rows", (P("x"), P()), 1)):
    args = [spread(x, spec) for x, spec in zip((a, b), specs)]
    fun = jax.jit(jax_nano.matmul)
    text = fun.lower(*args).compile().as_text()
    assert text.count('custom_call_target="jax_nano_dot_general"') == products, text
    assert ("all-reduce(" in text) == (name == "K") and "all-gather(" not in text, text
    want = a.astype(np.float64) @ b
    for shard in fun(*args).addressable_shards:
        np.testing.assert_allclose(shard.data, want[shard.index], rtol=1e-4, atol=1e-4)
    grads = jax.jit(jax.grad(lambda a, b: jnp.sin(jax_nano.matmul(a, b)).sum(), (0, 1)))(*args)
    g = np.cos(want)
    for grad, whole in zip(grads, (g @ b.T, a.T @ g)):
        for shard in grad.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], rtol=1e-3, atol=1e-3)
print("ok", index)
jax.distributed.shutdown()
"""


def test_a_product_across_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(port), str(index)],
            env=fresh_environment({"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for index, worker in enumerate(workers):
            output, _ = worker.communicate(timeout=150)
            assert f"ok {index}" in output, output
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
