"""Times of candidate plans of a product, taken in turn while the core has its full speed."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_nano._core import native

Array = NDArray[Any]

CHOICE: Final = (
    *("kernel", "inner", "sweep", "pack_a", "pack_b", "prefetch", "mc", "kc", "nc", "tile_rows", "split", "split_k"),
    "transposed",
)
"""What is kept of a candidate, beside its time."""

NUMERIC: Final = ("kernel", "inner", "sweep", "pack_b", "kc", "split_k", "transposed")
"""Those that decide the order of sums."""

_STAGES: Final = ((2.5, 2), (1.25, 4))
"""Rounds of samples that candidates get, until one is slower than the best by this factor."""


def tuning() -> Any:
    """The extension's module of this name (_runtime_tuning.pyi).

    Raises:
      ImportError: there is none on this platform.
    """
    runtime = native.runtime()
    if runtime is None:
        raise ImportError("this platform has no kernels")
    return runtime.tuning


class Probe:
    """Tells whether the cores have their full speed, by a short product of known time.

    A core of a virtual machine may share its execution units with another machine, for milliseconds to seconds, and
    some candidates suffer more from that than others. Samples are kept if the cores were fast before and after.
    """

    _SIZE, _TRIPS, _SLOWER, _TRIES = 48, 12, 1.08, 40

    def __init__(self, calls: int = 10_000) -> None:
        self._arrays = [np.ones((self._SIZE, self._SIZE), np.float32) for _ in range(3)]
        labels = [[ord(x) for x in term] for term in ("mk", "kn", "mn")]
        shape = (self._SIZE, self._SIZE)
        arguments = (addresses(*self._arrays), self._TRIPS, shape, shape, *labels, *["float32"] * 3, 1)
        self._run: Callable[[], float] = partial(tuning().time_dot, *arguments)
        self._best = min(self._run() for _ in range(calls))
        self._last = math.inf

    def _now(self) -> float:
        self._run()  # brings its operands back, which a product from memory has displaced
        self._last = self._run()
        self._best = min(self._best, self._last)
        return self._last

    def sample(self, measure: Callable[[], float]) -> float:
        """The first of some measurements that was taken at full speed; the least of all, if none was."""
        seen = []
        for _ in range(self._TRIES):
            if self._last > self._SLOWER * self._best and self._now() > self._SLOWER * self._best:
                continue
            seen.append(measure())
            if self._now() <= self._SLOWER * self._best:
                return seen[-1]
        return min(seen, default=math.inf) if seen else measure()


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of dense arrays, as the extension takes it."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    labels: tuple[str, str, str]
    dtypes: tuple[str, str, str]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (*self.shapes, *([ord(x) for x in term] for term in self.labels), *self.dtypes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        sizes = dict(zip(self.labels[0] + self.labels[1], (*self.shapes[0], *self.shapes[1]), strict=True))
        return tuple(sizes[x] for x in self.labels[2])


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a product is measured.

    Attributes:
      threads: how many compute it.
      rounds: samples of each candidate that comes close to the best.
      sample_seconds: how long one sample lasts, at least.
      most: at most so many candidates, the planner's among them; the others are drawn at random. 0: all.
      alike: of those that are drawn, at least so many take sums in the planner's order, if there are.
      cold_bytes: operands come from so many bytes of copies in turn, so that no cache has them; 0: from one copy.
    """

    threads: int = 1
    rounds: int = 9
    sample_seconds: float = 2e-3
    most: int = 0
    alike: int = 0
    cold_bytes: int = 0


def candidates(product: Product, how: Settings) -> list[dict[str, Any]]:
    """The plans to measure, each by CHOICE; the planner's is the first."""
    found = tuning().candidates(*product.arguments, how.threads)
    plans = [{name: plan[name] for name in CHOICE} for plan in found]
    if not 0 < how.most < len(plans):
        return plans
    rng = random.Random(repr(product))
    planned, *others = plans
    rng.shuffle(others)
    alike = [x for x in others if all(x[name] == planned[name] for name in NUMERIC)][: how.alike]
    rest = [x for x in others if x not in alike]
    return [planned, *alike, *rest][: how.most]


def times(
    product: Product, choices: Sequence[dict[str, Any]], operands: Sequence[Array], how: Settings, probe: Probe
) -> list[list[float]]:
    """Seconds of samples of each candidate. Those that are soon seen to be slow get fewer.

    Args:
      product: what they compute.
      choices: of `candidates`.
      operands: lhs, rhs, and memory for the result.
      how: as in Settings.
      probe: that of this process.
    """
    sets = [operands]
    if how.cold_bytes:
        copies = math.ceil(how.cold_bytes / sum(x.nbytes for x in operands))
        sets += [[x.copy() for x in operands] for _ in range(copies)]
    buffers = np.vstack([addresses(*x) for x in sets])
    time_dot = tuning().time_dot

    def run(trips: int, choice: dict[str, Any]) -> float:
        return float(time_dot(buffers, trips, *product.arguments, how.threads, choice=choice)) / len(sets)

    once = max(min(run(1, choices[0]) for _ in range(3)), 1e-9)
    trips = max(1, round(how.sample_seconds / once / len(sets)))
    samples: list[list[float]] = [[] for _ in choices]

    def sample(which: Sequence[int], rounds: int) -> None:
        order = list(which)
        for turn in range(rounds):
            random.Random(turn).shuffle(order)
            for i in order:
                samples[i].append(probe.sample(partial(run, trips, choices[i])) / trips)

    left: Sequence[int] = range(len(choices))
    for factor, rounds in (*_STAGES, (math.inf, how.rounds)):
        sample(left, rounds)
        best = min(min(samples[i]) for i in left)
        left = sorted({0, *(i for i in left if min(samples[i]) <= factor * best)})
    return samples


def addresses(*arrays: Array) -> Array:
    """Of the arrays' first elements, as the extension takes a set of buffers."""
    return np.array([[array.ctypes.data for array in arrays]], np.uintp)


def size(rng: random.Random, most: float) -> int:
    """A size, log-uniform up to `most`; a quarter are powers of two, a quarter are odd."""
    x = 2 ** rng.uniform(0, math.log2(most))
    kind = rng.random()
    return 1 << round(math.log2(x)) if kind < 0.25 else int(x) | 1 if kind < 0.5 else max(1, round(x))


def operands_of(product: Product, seed: int) -> list[Array]:
    """Random lhs and rhs, and memory for the result."""
    rng = np.random.default_rng(seed)

    def dtype(name: str) -> np.dtype[Any]:
        return np.dtype(getattr(ml_dtypes, name, name))

    arrays = [rng.uniform(-4, 4, shape) for shape in product.shapes]
    given = [x.astype(dtype(name)) for x, name in zip(arrays, product.dtypes, strict=False)]
    return [*given, np.empty(product.out_shape, dtype(product.dtypes[2]))]
