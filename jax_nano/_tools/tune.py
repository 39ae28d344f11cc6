"""`python -m jax_nano tune`: measures what this CPU needs for each thing that the kernels do, and keeps it.

Candidate plans of random products are timed, and costs fitted to the times of two thirds of them. The costs of a kernel
are kept if, for the other third, they choose better than what is planned without them. They decide what only
moves data (docs/planner.md): blocks, packing A, prefetching. The order of sums, and so every result, stays as it is.

Costs of an earlier run take no part: plans are compared with those that are made without any. A file is added to,
kernel by kernel: what this run keeps replaces what an earlier one kept, and the costs of all other kernels stay.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
from tqdm import tqdm

from jax_nano._core import machine, tuned
from jax_nano._tools import fitting
from jax_nano._tools.timing import NUMERIC, Probe, Product, Settings, candidates, operands_of, size, times

DTYPES: Final = {
    "f32": ("float32",) * 3,
    "bf16": ("bfloat16",) * 3,
    "bf16-f32": ("bfloat16", "bfloat16", "float32"),
    "f16": ("float16",) * 3,
    "f64": ("float64",) * 3,
    "i8": ("int8", "int8", "int32"),
}
DEFAULT: Final = ("f32", "bf16", "f64", "i8")
_LAYOUTS: Final = ("mk,kn", "mk,kn", "mk,nk", "km,kn", "km,nk")
_LARGEST: Final = 2048
_MOST_MULTIPLY_ADDS: Final = 50e6  # so that a product's candidates take a second at most
_SETTINGS: Final = Settings(rounds=4, sample_seconds=5e-4, most=20, alike=12)
_LEAST_PRODUCTS: Final = 12  # of a kernel: fewer say too little
_TESTED: Final = 3  # every third product is not fitted

# Parts of L3 that a core finds for itself, fast and at all, beside what the others keep there (as in zen3.json).
_NEAR, _FAR = 1 / 6, 7 / 16


class Timed(NamedTuple):
    """A product with the times of its candidates."""

    kernel: str
    row: dict[str, Any]  # as fitting takes it
    table: fitting.Floats  # what each candidate counts
    alike: list[int]  # the candidates that take sums in the planner's order


class Found(NamedTuple):
    """What was learned of a kernel."""

    kernel: str
    products: int
    before: float  # times of the plans without the costs, of products that were not fitted, by those of the best
    after: float  # and with them
    ns: list[float]

    @property
    def kept(self) -> bool:
        return self.after < self.before


def tune(
    runtime: ModuleType, *, seconds: float, dtypes: Sequence[str], output: Path | None = None, show: bool = False
) -> int:
    """Runs the command.

    Args:
      runtime: the extension.
      seconds: how long it measures.
      dtypes: keys of DTYPES; if empty, DEFAULT.
      output: where to keep the costs; in the user's cache folder if None.
      show: only tell where that is.

    Returns:
      The exit status.

    Raises:
      ValueError: an argument that cannot be, or there is nowhere to keep costs.
    """
    file = output or tuned.path(runtime)
    if file is None:
        raise ValueError(f"{tuned.ENVIRONMENT} is off; name a file with --output")
    if show:
        print(f"{file}: {'costs of this machine' if file.exists() else 'nothing there yet'}")
        return 0
    if not seconds > 0:
        raise ValueError(f"--seconds {seconds:g}: expected more than 0")
    if unknown := [x for x in dtypes if x not in DTYPES]:
        raise ValueError(f"--dtype {' '.join(unknown)}: expected some of {', '.join(DTYPES)}")
    core = _core(runtime)
    runtime.tuning.use_costs(core, {})  # so that plans are those that are made without costs of an earlier run
    timed = list(_timed(dtypes or DEFAULT, seconds, core))
    kernels = dict.fromkeys(x.kernel for x in timed)
    found = [_fitted(runtime, kernel, [x for x in timed if x.kernel == kernel]) for kernel in kernels]
    print(*(_line(x) for x in found), sep="\n")
    kept = {x.kernel: x.ns for x in found if x.kept}
    earlier = _earlier(runtime, file, core)
    stays = f"; costs of an earlier run stay for: {', '.join(x)}" if (x := sorted(earlier.keys() - kept.keys())) else ""
    if not kept:
        print(f"nothing new is kept: what is planned without costs of this machine is as good{stays}")
        return 0
    about = {"cpu": machine.cpu_name(), "signature": tuned.signature(runtime), "measured": time.strftime("%Y-%m-%d")}
    tuned.save(tuned.Costs(core, earlier | kept), file, about)
    print(f"kept in {file}{stays}")
    if output:
        print(f"used where {tuned.ENVIRONMENT}={file}")
    else:
        print("used by every process that starts from now on; remove the file to forget it")
    return 0


def _earlier(runtime: ModuleType, file: Path, core: tuple[int, ...]) -> dict[str, list[float]]:
    """The costs of each kernel that are kept already, for the same caches; none if there is no usable file."""
    try:
        costs = tuned.load(file, {x["name"] for x in runtime.kernels()})
    except (OSError, ValueError):
        return {}
    return costs.kernels if costs.core == core else {}


def _core(runtime: ModuleType) -> tuple[int, ...]:
    caches = runtime.caches()
    halves = machine.splits_512_bit(machine.cpu_fields())
    return caches["l1d"], caches["l2"], round(caches["l3"] * _NEAR), round(caches["l3"] * _FAR), int(halves)


def _products(dtypes: Sequence[str]) -> Iterator[Product]:
    """Random ones, of each dtype in turn."""
    rng = random.Random(0)
    while True:
        for dtype in dtypes:
            m, n, k = _LARGEST, _LARGEST, _LARGEST
            while m * n * k > _MOST_MULTIPLY_ADDS:
                m, n, k = (size(rng, _LARGEST) for _ in range(3))
            sizes = {"m": m, "n": n, "k": k}
            lhs, rhs = rng.choice(_LAYOUTS).split(",")
            yield Product((tuple(sizes[x] for x in lhs), tuple(sizes[x] for x in rhs)), (lhs, rhs, "mn"), DTYPES[dtype])


def _timed(dtypes: Sequence[str], seconds: float, core: Sequence[int]) -> Iterator[Timed]:
    """The times of as many products as there is time for, at least one of each dtype."""
    start = time.monotonic()
    probe = Probe(calls=2000)
    with tqdm(total=round(seconds), unit="s", desc="measuring", file=sys.stderr) as bar:
        for number, product in enumerate(_products(dtypes)):
            passed = time.monotonic() - start
            bar.update(min(round(passed), bar.total) - bar.n)
            if passed >= seconds and number >= len(dtypes):
                return
            choices = candidates(product, _SETTINGS)
            kernel = choices[0]["kernel"]
            choices = [x for x in choices if x["kernel"] == kernel]
            if len(choices) < 2:
                continue
            samples = times(product, choices, operands_of(product, number), _SETTINGS, probe)
            row = {"us": [min(x) * 1e6 for x in samples], "samples": [len(x) for x in samples]}
            alike = [i for i, x in enumerate(choices) if all(x[name] == choices[0][name] for name in NUMERIC)]
            yield Timed(kernel, row, fitting.counts(product, choices, core), alike)


def _prior(runtime: ModuleType, kernel: str) -> fitting.Floats | None:
    """Costs that stand where too little was measured: the built-in ones for this CPU, or else for another one.

    Of the kernel itself, or of one for the same dtypes; None if there are none.
    """
    dtypes = {x["name"]: tuple(x[name] for name in ("lhs", "rhs", "out", "algorithm")) for x in runtime.kernels()}
    for cpu in filter(None, (runtime.profile(), *runtime.profiles())):
        known = runtime.tuning.profile_costs(cpu)
        alike = [name for name in known if dtypes[name] == dtypes[kernel]]
        if kernel in known or alike:
            return np.array(known[kernel if kernel in known else alike[0]])
    return None


def _fitted(runtime: ModuleType, kernel: str, timed: Sequence[Timed]) -> Found:
    fitted = [x for i, x in enumerate(timed) if i % _TESTED]
    tested = [x for i, x in enumerate(timed) if not i % _TESTED]
    if len(timed) < _LEAST_PRODUCTS:
        return Found(kernel, len(timed), 1.0, float("inf"), [])
    prior = _prior(runtime, kernel)
    costs = fitting.fit([x.row for x in fitted], [x.table for x in fitted], prior)
    after = [fitting.chosen(x.row, x.table, costs, x.alike) for x in tested]
    before = [x.row["us"][0] / min(x.row["us"][0], *(x.row["us"][i] for i in x.alike)) for x in tested]
    everything = fitting.fit([x.row for x in timed], [x.table for x in timed], prior)
    return Found(
        kernel,
        len(timed),
        statistics.geometric_mean(before),
        statistics.geometric_mean(after),
        [float(x) for x in np.asarray(everything)],
    )


def _line(x: Found) -> str:
    if not x.ns:
        return f"{x.kernel}: {x.products} products are too few; give it more --seconds, or fewer dtypes"
    became = f"plans took {x.before:.3f} of the best, with these costs {x.after:.3f}"
    return f"{x.kernel}: {x.products} products; of those not fitted, {became}{'' if x.kept else ', which are not kept'}"
