"""Times ours and jnp's version of the same thing in turn, in this process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.report import table

Timed = Callable[[], float]  # does the thing; returns the seconds of one


def interleave(candidates: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Samples of each, one a round; the order changes from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for timed in candidates.values():
        timed()
    for number in range(rounds):
        names = list(candidates)
        for name in names if number % 2 else reversed(names):
            samples[name].append(candidates[name]())
    return samples


def compare(what: str, ours: Timed, theirs: Timed, rounds: int, unit: float, digits: int = 2) -> tuple[str, ...]:
    """A row of `pairs_table`: medians, and the median over the rounds of ours over theirs."""
    samples = interleave({"ours": ours, "theirs": theirs}, rounds)
    ratio = statistics.median(a / b for a, b in zip(samples["ours"], samples["theirs"], strict=True))
    medians = (f"{statistics.median(samples[who]) / unit:.{digits}f}" for who in ("ours", "theirs"))
    return what, *medians, f"{ratio:.2f}"


def pairs_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown."""
    return table(("", "jax_nano", "jnp", "jax_nano / jnp"), rows)
