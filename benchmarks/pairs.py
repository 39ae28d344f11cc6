"""Times ours and jnp's version of the same thing in turn, in this process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Sample = TypeVar("Sample")
Timed = Callable[[], float]  # does the thing; returns the seconds of one

HEADER = ("", "jax_nano", "jnp", "jax_nano / jnp")
"""Of a table whose rows are those of `compare`."""


def interleave(candidates: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Samples of each, one a round; the order changes from round to round."""
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for timed in candidates.values():
        timed()
    for number in range(rounds):
        names = list(candidates)
        for name in names if number % 2 else reversed(names):
            samples[name].append(candidates[name]())
    return samples


def compare(what: str, ours: Timed, theirs: Timed, rounds: int, unit: float, digits: int = 2) -> tuple[str, ...]:
    """Measures both, and makes a row of it."""
    samples = interleave({"ours": ours, "theirs": theirs}, rounds)
    return row(what, samples["ours"], samples["theirs"], unit, digits)


def row(what: str, ours: Sequence[float], theirs: Sequence[float], unit: float, digits: int = 2) -> tuple[str, ...]:
    """Medians, and the median over the rounds of ours over theirs."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    medians = (f"{statistics.median(samples) / unit:.{digits}f}" for samples in (ours, theirs))
    return what, *medians, f"{ratio:.2f}"
