"""Ten products and five models, beside jnp: what no release may lose.

Ratios alone are kept, to jnp in the same process and to our own product of 1024^3 in float32, as another day's machine
runs at another speed. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.pairs import interleave
from benchmarks.report import table

TOLERANCE: Final = 0.85
"""A ratio below this share of the recorded one is a loss: from run to run ratios vary by a tenth."""


class Product(NamedTuple):
    """Sizes, and the operands' dtype."""

    m: int
    n: int
    k: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} {self.dtype}"


PRODUCTS: Final = (
    Product(1024, 1024, 1024, "float32"),
    Product(512, 512, 512, "float32"),
    Product(128, 768, 768, "float32"),
    Product(64, 64, 64, "float32"),
    Product(8, 3072, 768, "float32"),
    Product(1, 4096, 1024, "bfloat16"),
    Product(256, 256, 256, "bfloat16"),
    Product(512, 512, 512, "float64"),
    Product(512, 512, 512, "int8"),
    Product(4000, 4, 2000, "float32"),
)


class Found(NamedTuple):
    """What was measured, by name."""

    of_jnp: Mapping[str, float]  # how many times as fast as jnp
    of_square: Mapping[str, float]  # operations a second, in those of 1024^3 in float32
    models: Mapping[str, float]  # how many times as fast as plain JAX


def measure(*, quick: bool) -> Found:
    """In a minute or two; `quick` proves that it works."""
    rounds, seconds = (2, 1e-4) if quick else (9, 2e-2)
    of_jnp, rates = {}, {}
    for product in PRODUCTS:
        samples = interleave(_programs(product, seconds), rounds)
        pairs = zip(samples["jnp"], samples["ours"], strict=True)
        of_jnp[str(product)] = statistics.median(a / b for a, b in pairs)
        rates[str(product)] = 2 * product.m * product.n * product.k / statistics.median(samples["ours"])
    square = rates[str(PRODUCTS[0])]
    return Found(of_jnp, {name: rate / square for name, rate in rates.items()}, _models(quick=quick))


def _programs(product: Product, seconds: float) -> dict[str, Callable[[], float]]:
    import jax
    import jax.numpy as jnp

    import jax_nano

    m, n, k, dtype = product
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((m, k), (k, n)))
    out = jnp.int32 if dtype == "int8" else None
    with jax.enable_x64(dtype == "float64"):
        given = [jnp.asarray(x).astype(dtype) for x in (lhs, rhs)]
        programs: dict[str, Callable[[], float]] = {}
        for name, function in (("ours", jax_nano.matmul), ("jnp", jnp.matmul)):
            run = jax.jit(partial(function, preferred_element_type=out)).lower(*given).compile()
            got = np.asarray(run(*given), np.float64)
            if not np.allclose(got, lhs @ rhs, rtol=1e-2, atol=1.0):
                raise RuntimeError(f"{name}: {product} is wrong")
            programs[name] = partial(_seconds, partial(run, *given), seconds)
    return programs


def _seconds(run: Callable[[], Any], at_least: float) -> float:
    """Of one run, in a sample of that length."""
    count, begin = 0, time.perf_counter()
    while True:
        run().block_until_ready()
        count += 1
        took = time.perf_counter() - begin
        if took >= at_least:
            return took / count


def _models(*, quick: bool) -> dict[str, float]:
    """The programs of examples/demo.py."""
    import demo
    from tqdm import tqdm

    little = ["--layers", "1", "--tokens", "16", "--vocabulary", "512", "--attended", "64", "--rounds", "1"]
    args = demo.parse_args(little if quick else [])
    found = {}
    with tqdm(total=0, disable=True) as progress:
        for case in demo.cases(args):
            outcome = demo.measure(case, args.rounds, progress)
            if outcome.apart > demo.ROUNDING[case.dtype]:
                raise RuntimeError(f"{case.name}: results are {outcome.apart:.0e} apart")
            found[case.name] = outcome.times_faster
    return found


def losses(found: Found, recorded: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is below its recorded ratio by more than TOLERANCE allows; ratios that one of them lacks are left out."""
    return [
        f"{name}: {ratio:.2f} {what}, {recorded[part][name]:.2f} recorded"
        for part, what in (("of_jnp", "times jnp"), ("of_square", "of 1024^3"), ("models", "times plain JAX"))
        for name, ratio in getattr(found, part).items()
        if name in recorded.get(part, {}) and ratio < TOLERANCE * recorded[part][name]
    ]


def markdown(found: Found) -> str:
    """Two tables."""
    rows = [(name, f"{ratio:.2f}", f"{found.of_square[name]:.2f}") for name, ratio in found.of_jnp.items()]
    models = [(name, f"{ratio:.2f}") for name, ratio in found.models.items()]
    about = f"{machine.describe()['cpu']}, {len(machine.cpus())} cores"
    products = table(("product", "times jnp", "rate, of 1024^3"), rows)
    return f"{about}\n\n{products}\n\n{table(('model', 'times plain JAX'), models)}"


def run(args: argparse.Namespace) -> int:
    """Measures, prints, compares; the exit status is 1 if something was lost."""
    found = measure(quick=args.quick)
    print(markdown(found))
    if args.save:
        record = {"cpu": machine.describe()["cpu"], "cores": len(machine.cpus()), **found._asdict()}
        Path(args.save).write_text(json.dumps(record, indent=1) + "\n")
    if not args.against:
        return 0
    recorded = json.loads(Path(args.against).read_text())
    if recorded["cpu"] != machine.describe()["cpu"]:
        print(f"\nrecorded on another CPU, {recorded['cpu']}: what follows may be no loss")
    lost = losses(found, recorded)
    print("\n" + ("\n".join(lost) or "nothing was lost"))
    return 1 if lost else 0
