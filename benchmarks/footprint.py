"""What a product costs apart from time: memory beyond its operands, the time of the very first call, disk."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys

from benchmarks.report import Section

_ROUNDS = 3

# Runs in a process of its own, as a peak is reached and a first call made only once. The memory is what the
# process's resident set grew by at its highest while the product ran, without the result.
_PROGRAM = """
import json, pathlib, re, sys, time
import jax, jax.numpy as jnp
n, ours = int(sys.argv[1]), sys.argv[2] == "jax_nano"
if ours:
    import jax_nano
    matmul = jax_nano.matmul
else:
    matmul = jnp.matmul

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

a, b = (jax.random.normal(jax.random.key(i), (n, n)).block_until_ready() for i in (1, 2))
start = time.perf_counter()
compiled = jax.jit(matmul).lower(a, b).compile()
building = time.perf_counter() - start
try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
except OSError:
    before = None
start = time.perf_counter()
out = compiled(a, b).block_until_ready()
running = time.perf_counter() - start
extra = None if before is None else max(0, status("VmHWM") - before - out.nbytes)
print(json.dumps({"extra": extra, "first": building + running}))
"""


def report(*, quick: bool) -> Section:
    """All of it, as a table."""
    import jax_nano
    from jax_nano import _runtime

    sizes, rounds = ((64,), 1) if quick else ((256, 1024, 2048, 4096), _ROUNDS)
    rows: list[tuple[str, ...]] = []
    for n in sizes:
        samples = {peer: [_sample(n, peer) for _ in range(rounds)] for peer in ("jax_nano", "jnp")}
        for what, key, unit in (
            ("memory beyond operands and result, MiB", "extra", 1 << 20),
            ("first call, ms", "first", 1e-3),
        ):
            rows.append((f"{n}x{n}x{n}: {what}", *(_median(samples[peer], key, unit) for peer in samples)))
    extension = pathlib.Path(_runtime.__file__)
    python = _size(pathlib.Path(jax_nano.__file__).parent, "*.py")
    rows += [
        (f"the extension, {len(_runtime.kernels())} kernels, MiB", f"{extension.stat().st_size / 2**20:.2f}", "-"),
        ("the package's Python files, MiB", f"{python / 2**20:.2f}", "-"),
    ]
    note = (
        "float32, all cores, each in a new process. The first call is tracing, lowering, compiling and running, after "
        "the operands were made."
    )
    return Section("Memory, first calls, size on disk", note, ("", "jax_nano", "jnp"), tuple(rows))


def _sample(n: int, peer: str) -> dict[str, float | None]:
    command = [sys.executable, "-P", "-c", _PROGRAM, str(n), peer]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sample: dict[str, float | None] = json.loads(done.stdout)
    return sample


def _median(samples: list[dict[str, float | None]], key: str, unit: float) -> str:
    values = [value for sample in samples if (value := sample[key]) is not None]
    return f"{statistics.median(values) / unit:.1f}" if values else "-"


def _size(folder: pathlib.Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))
