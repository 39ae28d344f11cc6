"""The two engines that may compute a product, a kernel and XLA: their times, and how good the decision between them is.

Both run the product inside a fori_loop of a compiled program on one thread, in turn with each other. The times are kept
as data (benchmarks/data/engines-*), by version of JAX, from which the regret of the decision is computed later without
a clock: the time of the engine that is decided for by that of the faster one.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import pathlib
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import DTYPES, Case, matmul
from jax_nano._core import contraction, native
from jax_nano._core.contraction import Labels
from jax_nano._dispatch import decision, xla_times
from jax_nano._tools.timing import Probe, size

Row = dict[str, Any]

_SQUARES = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128, 256)
_BATCHED = (3, 4, 5, 6, 8, 16, 32)
_BATCHES = (
    *((64, (1, 16, 16)), (32, (1, 128, 1024)), (32, (1, 1024, 128)), (12, (1, 64, 128))),
    *(
        (500, (9, 9, 9)),
        (256, (12, 12, 12)),
        (256, (16, 16, 16)),
        (1024, (8, 8, 8)),
        (1000, (4, 4, 4)),
        (300, (5, 7, 6)),
    ),
    *((64, (24, 24, 24)), (32, (48, 48, 48)), (24, (128, 128, 64)), (24, (128, 64, 128)), (4, (384, 64, 384))),
    *((4, (100, 100, 100)), (16, (64, 8, 64)), (16, (8, 64, 64)), (2, (256, 256, 64)), (100, (3, 40, 5))),
)
_BATCHES_OF_VECTORS = (
    (32, (1, 1024, 128)),
    (32, (1, 128, 1024)),
    (8, (1, 300, 64)),
    (100, (20, 1, 50)),
    (6, (500, 1, 400)),
)
_VECTORS = (16, 64, 128, 256, 512, 1024, 2048)
_LONG_VECTORS = ((4096, 256), (256, 4096), (64, 8192), (8192, 64), (1000, 33))
_SHALLOW = (2, 4, 8, 16, 32)
_FLAT = ((1024, 1024, 4), (4096, 16, 16), (16384, 8, 4), (32768, 4, 16), (2048, 64, 8), (300, 300, 7), (5000, 3, 3))
_NARROW = (
    (128, 2, 128),
    (1024, 2, 1024),
    (1024, 8, 1024),
    (1024, 16, 1024),
    (4096, 4, 64),
    (2, 256, 256),
    (4, 256, 256),
)
_FEW_ROWS = ((2, 1024, 1024), (4, 1024, 1024), (8, 1024, 1024), (16, 1024, 1024), (4, 4096, 1024))
_LARGE = (
    (4, 4096, 4096),
    (8, 4096, 2048),
    (16, 16, 32768),
    (384, 384, 384),
    (128, 768, 768),
    (20000, 64, 64),
    (97, 997, 511),
)
_MOST_FLOPS = 3e7
_RANDOM = {"f32": 45}
_SOME_RANDOM = 12
_PULL = 1e-2  # to zero, for costs of which the data say nothing
_LARGE_ERROR = 0.2  # of a logarithm: larger ones count linearly


def cases(dtype: str) -> Iterator[Case]:
    """Products on both sides of the decision, and random ones."""
    for n in _SQUARES:
        yield matmul(n, n, n, dtype)
    for n in _BATCHED:
        yield matmul(n, n, n, dtype, batch=64)
    for batch, sizes in _BATCHES:
        yield matmul(*sizes, dtype, batch=batch)
    for batch, sizes in _BATCHES_OF_VECTORS:
        yield matmul(*sizes, dtype, batch=batch, layout="NT")
    yield matmul(128, 64, 128, dtype, batch=24, layout="NT")
    yield matmul(64, 512, 64, dtype, batch=8, layout="NT")
    for n, k in (*((n, n) for n in _VECTORS), *_LONG_VECTORS):
        yield matmul(1, n, k, dtype)
        yield matmul(1, n, k, dtype, layout="NT")
        yield matmul(n, 1, k, dtype)
    for n, k in ((64, 64), (300, 200), (256, 1000), (1024, 256)):
        yield matmul(n, 1, k, dtype, layout="TN")
    for sizes in ((48, 48, 48), (200, 200, 200), (8, 1024, 250), (300, 40, 500)):
        yield matmul(*sizes, dtype, layout="NT")
        yield matmul(*sizes, dtype, layout="TN")
    for k in (64, 4096, 2**18):
        yield matmul(1, 1, k, dtype)
    for k in _SHALLOW:
        yield matmul(512, 512, k, dtype, layout="TN")
    for sizes in (*_FLAT, *_FEW_ROWS, *_LARGE):
        yield matmul(*sizes, dtype)
    for sizes in _NARROW:
        for layout in ("NN", "NT", "TN") if dtype == "f32" else ("NN",):
            yield matmul(*sizes, dtype, layout=layout)
    yield from _random(dtype)


def _random(dtype: str) -> Iterator[Case]:
    """Products of log-uniform sizes, of at most _MOST_FLOPS."""
    rng = random.Random(f"engines {dtype}")
    left = _RANDOM.get(dtype, _SOME_RANDOM)
    while left:
        m, n, k = (size(rng, 4096) for _ in range(3))
        if 2 * m * n * k <= _MOST_FLOPS and k > 1:
            left -= 1
            yield matmul(m, n, k, dtype, layout=rng.choice(("NN", "NN", "NT", "TN", "TT")))


@dataclasses.dataclass
class Pair:
    """Both engines' programs of one product."""

    case: Case
    runners: Mapping[str, Any]  # by the name of the engine

    @classmethod
    def of(cls, case: Case) -> Pair:
        """Compiles them. `jax_nano` must decline nothing (`JAX_NANO_GATE=off`)."""
        from benchmarks.peers.in_jax import JaxRunner

        runners = {name: JaxRunner(1, ours=name == "kernel") for name in ("kernel", "xla")}
        for runner in runners.values():
            runner.prepare(case, 1)
        return cls(case, runners)

    def measure(self, probe: Probe, rounds: int = 5, sample_seconds: float = 1.5e-3) -> Row:
        """Microseconds of one product by each engine, the least of some samples while the core has its full speed."""
        trips = dict.fromkeys(self.runners, 1)
        for name, runner in self.runners.items():
            runner.load([self.case.random_operands()])
            runner.run(3)
            while (
                seconds := min(runner.run(trips[name]) for _ in range(2))
            ) < sample_seconds:  # so that starting the program counts little
                trips[name] = math.ceil(trips[name] * min(10, 1.2 * sample_seconds / seconds))
        samples: dict[str, list[float]] = {name: [] for name in self.runners}
        for _ in range(rounds):
            for name, runner in self.runners.items():
                count = trips[name]
                samples[name].append(probe.sample(partial(runner.run, count)) / count)
        case = self.case
        us = {f"{name}_us": round(min(x) * 1e6, 4) for name, x in samples.items()}
        return {"product": case.key, "spec": case.spec, "dims": dict(case.dims), "dtype": case.dtype, **us}


def case_of(row: Mapping[str, Any]) -> Case:
    """That of a row of times."""
    return Case("", row["spec"], tuple(row["dims"].items()), row["dtype"])


def measure(dtypes: Sequence[str], *, only: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of all cases of some dtypes whose name has one of `only` (empty: all)."""
    decision.policy = decision.Policy(declines=False)
    probe = Probe()
    todo = {case.key: case for dtype in dtypes for case in cases(dtype)}
    chosen = [case for key, case in todo.items() if not only or any(text in key for text in only)]
    for case in tqdm(chosen, unit="product", disable=None):
        yield Pair.of(case).measure(probe)


def asked(row: Mapping[str, Any]) -> tuple[xla_times.Work, tuple[str, str]]:
    """The product of a row, as XLA's times are predicted, and the names of its operands' dtypes."""
    case = case_of(row)
    lhs, rhs, _ = case.shapes
    return xla_times.Work.of(_labels(case), lhs, rhs), (DTYPES[case.dtype].operand,) * 2


def _labels(case: Case) -> Labels:
    *operands, out = case.labels
    found = contraction.einsum_labels(operands, out, case.shapes[:2])
    assert found is not None
    return found


def kernel_ns(row: Mapping[str, Any], cpu: str, target: str) -> float:
    """The predicted time of the kernel, as the decision takes it."""
    case = case_of(row)
    lhs, rhs, _ = case.shapes
    dtype = DTYPES[case.dtype]
    names = dtype.operand, dtype.operand, dtype.out
    ns = native.predicted_ns((lhs, rhs), tuple(_labels(case)), names, target, cpu)
    assert ns is not None, case.key
    return ns + decision.IN_A_PROGRAM_NS


def regret(rows: Sequence[Row], version: str, cpu: str, target: str) -> list[tuple[float, Row]]:
    """For each product the time of the engine that is decided for by that of the faster one; the worst first.

    Args:
      rows: the times, of programs whose loops XLA may compile into one function.
      version: of JAX, one of xla_times.VERSIONS.
      cpu, target: whose costs decide.
    """
    found = []
    for row in rows:
        work, dtypes = asked(row)
        if xla_times.never_slower(work):
            picked = row["xla_us"]
        else:
            xla = xla_times.predict(work, dtypes, cpu, version=version, in_function=xla_times.inlines(version))
            times = decision.Times(kernel_ns(row, cpu, target), xla.ns, xla.form, cpu)
            picked = row["xla_us"] if times.prefers_xla else row["kernel_us"]
        found.append((picked / min(row["kernel_us"], row["xla_us"]), row))
    return sorted(found, key=lambda x: -x[0])


def fit(rows: Sequence[Row], version: str) -> dict[str, dict[str, dict[str, float]]]:
    """The costs of each form and dtype that `predict` computes by counts, in nanoseconds."""
    groups: dict[tuple[str, str], list[tuple[Mapping[str, float], float]]] = {}
    for row in rows:
        work, dtypes = asked(row)
        form = xla_times.form_of(work, dtypes, in_function=xla_times.inlines(version))
        if not xla_times.never_slower(work) and form in xla_times.COUNTED:
            counted = xla_times.counts(work, form, dtypes)
            groups.setdefault((form.name, xla_times.kind_of(work, dtypes)), []).append((counted, row["xla_us"] * 1e3))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, dtype), timed in sorted(groups.items()):
        found.setdefault(name, {})[dtype] = _fitted(timed)
    return found


def _fitted(timed: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Costs, none below zero, whose times are least off by ratio, too small or too large alike."""
    names = sorted({name for counted, _ in timed for name, count in counted.items() if count})
    table = np.array([[counted.get(name, 0) for name in names] for counted, _ in timed])
    relative = table / np.array([ns for _, ns in timed])[:, None]
    scale = 1 / (np.linalg.norm(relative, axis=0) + 1e-30)
    start = nnls(relative * scale, np.ones(len(timed)), maxiter=30_000)[0]

    def off(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
        ratios = relative @ (scaled * scale)
        return np.concatenate([np.log(np.maximum(ratios, 1e-6)), _PULL * scaled])

    least = 1e-4  # from zero no cost would ever rise
    found = least_squares(off, np.maximum(start, least), bounds=(0, np.inf), loss="soft_l1", f_scale=_LARGE_ERROR)
    costs = np.where(found.x > least, found.x, 0) * scale
    return {name: float(f"{cost:.3g}") for name, cost in zip(names, costs, strict=True) if cost > 0}


def summary(rows: Sequence[Row], version: str = xla_times.VERSION) -> str:
    """The regret of the decision with the costs of the reference, and the worst products, in words."""
    found = regret(rows, version, *decision.REFERENCE)
    ratios = [ratio for ratio, _ in found]
    mean, most = statistics.geometric_mean(ratios), np.quantile(ratios, 0.95)
    ratio = f"decided / faster engine {mean:.3f} in geometric mean, {most:.2f} in 95 %"
    first = f"jaxlib {version}: {len(rows)} products, {ratio}"
    return "\n".join(
        [
            f"{first}; the worst:",
            *(
                f"  {x:.2f}  {row['product']}: kernel {row['kernel_us']:g} us, XLA {row['xla_us']:g}"
                for x, row in found[:8]
            ),
        ]
    )


def told(files: Sequence[pathlib.Path], profile: pathlib.Path | None) -> str:
    """The summaries of some files of times; if a profile is named, with costs fitted to them, written to it."""
    loaded = [load(path) for path in files]
    timed = {xla_times.VERSIONS[_version(x["jaxlib"]) >= (0, 12)]: x["rows"] for x in loaded}
    if profile is not None:
        text = json.loads(profile.read_text())
        versions = text["versions"] | {version: fit(rows, version) for version, rows in timed.items()}
        write_profile(profile, text["name"], text["source"], versions)
        xla_times.costs.cache_clear()
    return "\n".join(summary(rows, version) for version, rows in timed.items())


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(".")[:2])


def write_profile(
    path: pathlib.Path, cpu: str, source: str, versions: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
) -> None:
    """Writes the costs that `fit` found for some versions of JAX as a file of jax_nano/profiles/xla, a dtype a line."""
    lines = []
    for version, forms in versions.items():
        of_forms = []
        for form, dtypes in forms.items():
            of_dtypes = ",\n".join(f"    {json.dumps(dtype)}: {json.dumps(ns)}" for dtype, ns in dtypes.items())
            of_forms.append(f"   {json.dumps(form)}: {{\n{of_dtypes}\n   }}")
        lines.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(of_forms) + "\n  }")
    head = f' "name": {json.dumps(cpu)},\n "source": {json.dumps(source)},\n "versions": {{\n'
    path.write_text("{\n" + head + ",\n".join(lines) + "\n }\n}\n")


def save(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Keeps the rows as JSON, a line for each; compressed if the name ends with .gz."""
    from jaxlib.version import __version__ as jaxlib_version

    head = {"machine": machine.describe(), "when": time.strftime("%Y-%m-%d"), "jaxlib": jaxlib_version}
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    text = f'{json.dumps(head)[:-1]}, "rows": [\n{body}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def load(path: pathlib.Path) -> dict[str, Any]:
    """The file that `save` wrote."""
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return found
