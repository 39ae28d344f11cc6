"""Runs a GPT-2 of flax.nnx's layers as it is, plain and inside `jax_nano.accelerate()`, side by side.

The model is that of `zoo/gpt.py`, which knows nothing of jax_nano: blocks of GPT-2 small (768 features, 12 heads), but
two of them. Three programs are compiled both ways and run in turn: scores of a prompt, a step of training with AdamW,
and the next token in bfloat16 from a key-value cache. The script compares their results, prints the times and what
became of each product, and exits with status 1 if two results differ by more than rounding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm
from zoo import Workload, gpt

import jax_nano

TOLERANCE = {4: 1e-4, 2: 4e-2}
"""Of a result, relative to the whole of it, by the bytes of the model's numbers: rounding through all layers."""


class Program:
    """One way to compile a workload."""

    def __init__(self, workload: Workload) -> None:
        self._call = jax.jit(workload.step).lower(workload.state, workload.inputs).compile()
        self._workload = workload

    def results(self, steps: int) -> list[Any]:
        """Of one step after the other: the second loss tells whether the first step was right."""
        state, found = self._workload.state, []
        for _ in range(steps):
            state, result = self._call(state, self._workload.inputs)
            found.append(result)
        return found

    def seconds(self) -> float:
        """Of a step, always the first."""
        start = time.perf_counter()
        jax.block_until_ready(self._call(self._workload.state, self._workload.inputs))
        return time.perf_counter() - start


class Outcome(NamedTuple):
    """Two programs of a workload beside each other."""

    what: str
    plain: float  # seconds, the median
    accelerated: float
    times_faster: float  # the median over the rounds
    apart: float  # the largest difference of an array, relative to it
    tolerance: float


def workloads(args: argparse.Namespace) -> dict[str, tuple[Callable[[], Workload], int]]:
    """How each is made, and the bytes of its numbers."""
    sizes = {"layers": args.layers, "heads": 12, "features": 768, "hidden": 3072, "vocabulary": args.vocabulary}
    sizes["tokens"] = args.tokens
    return {
        f"forward, {args.tokens} tokens": (partial(gpt.forward, **sizes), 4),
        f"training step, {args.tokens} tokens": (partial(gpt.training, batch=1, **sizes), 4),
        "decoding a token, bfloat16": (partial(gpt.decoding, filled=args.tokens // 2, **sizes), 2),
    }


def apart(got: list[Any], want: list[Any]) -> float:
    """The largest difference between two arrays, relative to the whole of them."""
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(got, want, strict=True)]
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def compare(what: str, make: Callable[[], Workload], element_bytes: int, rounds: int, progress: tqdm) -> Outcome:
    """Compiles a workload both ways, checks that both give the same, and times them in turn."""
    progress.set_description(f"{what:<28}")
    workload = make()
    plain = Program(workload)
    with jax_nano.accelerate():
        accelerated = Program(workload)
    difference = apart(accelerated.results(2), plain.results(2))
    times: dict[Program, list[float]] = {plain: [], accelerated: []}
    for number in range(rounds):
        for program in (plain, accelerated) if number % 2 else (accelerated, plain):
            times[program].append(program.seconds())
        progress.update()
    ratios = [a / b for a, b in zip(times[plain], times[accelerated], strict=True)]
    before, after = (statistics.median(times[program]) for program in (plain, accelerated))
    return Outcome(what, before, after, statistics.median(ratios), difference, TOLERANCE[element_bytes])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="blocks; GPT-2 small has 12 (default: 2)")
    parser.add_argument("--tokens", type=int, default=128, help="of prompt and cache (default: 128)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="GPT-2 has 50257 (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each program (default: 5)")
    args = parser.parse_args(argv)
    if min(args.layers, args.rounds) < 1 or min(args.tokens, args.vocabulary) < 4:
        parser.error("--layers and --rounds must be at least 1, --tokens and --vocabulary at least 4")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs and compares everything; returns the process's exit status."""
    args = parse_args(argv)
    print(f"jax_nano {jax_nano.__version__} on JAX {jax.__version__}")
    jax_nano.clear_report()
    with tqdm(total=3 * args.rounds, unit="round") as progress:
        outcomes = [
            compare(what, make, element_bytes, args.rounds, progress)
            for what, (make, element_bytes) in workloads(args).items()
        ]

    print(f"\n{'':28}{'plain ms':>12}{'accelerated':>14}{'times faster':>14}{'apart':>10}")
    for x in outcomes:
        print(
            f"{x.what:<28}{1e3 * x.plain:>12.1f}{1e3 * x.accelerated:>14.1f}{x.times_faster:>14.2f}{x.apart:>10.0e}"
            + ("" if x.apart <= x.tolerance else f"  FAILED: more than {x.tolerance:.0e}")
        )
    print(f"\n{jax_nano.report()}")
    return 0 if all(x.apart <= x.tolerance for x in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
