"""What jax_nano makes faster, in two minutes: five programs, plain and accelerated, and one picture.

Each program is compiled twice, as it is and inside `jax_nano.accelerate()`. Both run in turn, so that whatever else the
machine does meets both alike, and their results are compared: the script exits with status 1 if two differ by more than
rounding, or if a program is slower by more than its samples vary.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import decoder
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from decode import GROUP
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from zoo import Workload, bert, gpt

import jax_nano

matplotlib.use("Agg")

ROUNDING = {"float32": 1e-4, "bfloat16": 4e-2}
_BAR = 40  # characters of the longest bar


class Case(NamedTuple):
    """A program, plain and as jax_nano runs it."""

    name: str
    about: str
    dtype: str  # of its numbers: how far rounding may take results apart
    plain: Callable[[], Workload]
    ours: Callable[[], Workload]


class Outcome(NamedTuple):
    """What was measured."""

    case: Case
    plain: float  # seconds, the median
    ours: float
    ratios: list[float]  # plain / ours of each round
    apart: float  # largest difference of a result, relative to all of it
    left: str  # why products are left to XLA

    @property
    def times_faster(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_slower(self) -> bool:
        """By more than samples vary: three quarters of the rounds say so."""
        return float(np.quantile(self.ratios, 0.75)) < 0.98

    @property
    def note(self) -> str:
        """Why it is not faster, if it is not."""
        if self.times_faster >= 1.03:
            return ""
        low, high = np.quantile(self.ratios, [0.25, 0.75])
        vary = f"rounds vary from {low:.2f} to {high:.2f}"
        if self.is_slower:
            return f"slower: {self.left}" if self.left else f"slower, though all products run on kernels: {vary}"
        return f"no difference: {vary}"


class Program:
    """A compiled workload."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._call = jax.jit(workload.step).lower(workload.state, workload.inputs).compile()

    def results(self) -> list[np.ndarray]:
        """Of the first two steps: the second tells whether the first left the right state."""
        state, found = self._workload.state, []
        for _ in range(2):
            state, result = self._call(state, self._workload.inputs)
            found += [np.asarray(x, np.float64) for x in jax.tree.leaves(result)]
        return found

    def seconds(self, samples: int) -> float:
        """Of a step, always the first."""
        start = time.perf_counter()
        for _ in range(samples):
            jax.block_until_ready(self._call(self._workload.state, self._workload.inputs))
        return (time.perf_counter() - start) / samples


def decoding(change: Callable[[decoder.Decoder], decoder.Decoder], sizes: dict[str, int]) -> Workload:
    """The next token of a GPT-2 of flax.nnx."""
    model = change(decoder.Decoder(tokens=128, **sizes))
    step, state, weights = decoder.decoding(model, jnp.arange(64, dtype=jnp.int32))
    return Workload(step, state, weights)


def attention(dtype: Any, tokens: int) -> Workload:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, tokens, 12, 64), dtype) for key in keys)

    def step(state: tuple[()], inputs: Any) -> tuple[tuple[()], jax.Array]:
        return state, jax.nn.dot_product_attention(*inputs, is_causal=True)

    return Workload(step, (), (q, k, v))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The programs, those that gain most first."""
    sizes = {"blocks": args.layers, "heads": 12, "features": 768, "vocabulary": args.vocabulary}
    quantized = partial(decoder.with_matrices, change=partial(jax_nano.quantize, bits=4, group=GROUP))

    def dequantized(model: decoder.Decoder) -> decoder.Decoder:
        return decoder.with_matrices(quantized(model), lambda w: decoder.Dequantized(w.q, w.scale))

    in_half = partial(decoder.in_dtype, dtype=jnp.bfloat16)
    name = f"GPT-2 of {args.layers} blocks, the next token"
    yield Case(
        "decoding, int4 weights",
        name,
        "float32",
        partial(decoding, dequantized, sizes),
        partial(decoding, quantized, sizes),
    )
    half = partial(decoding, in_half, sizes)
    yield Case("decoding, bfloat16", name, "bfloat16", half, half)
    about = f"jax.nn.dot_product_attention, causal, {args.attended} tokens, 12 heads"
    attend = partial(attention, jnp.float32, args.attended)
    yield Case("attention", about, "float32", attend, attend)
    layers = {"layers": args.layers, "heads": 12, "features": 768, "hidden": 3072, "vocabulary": args.vocabulary}
    make = partial(bert.training, batch=2, tokens=args.tokens, **layers)
    yield Case(
        "training, bfloat16", f"BERT of {args.layers} layers, a step of 2 x {args.tokens}", "bfloat16", make, make
    )
    make = partial(gpt.training, batch=1, tokens=args.tokens, **layers)
    yield Case("training, float32", f"GPT-2 of {args.layers} blocks, a step of {args.tokens}", "float32", make, make)


def apart(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest difference between two arrays, relative to the whole of them."""
    pairs = [(x, y) for x, y in zip(got, want, strict=True) if y.size and np.issubdtype(y.dtype, np.floating)]
    return max(float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(y)), 1e-30) for x, y in pairs)


def measure(case: Case, rounds: int, progress: tqdm) -> Outcome:
    """Compiles a program both ways, compares results, and times both in turn."""
    progress.set_description(f"{case.name:<24}")
    plain = Program(case.plain())
    before = {(x.program, x.reason) for x in jax_nano.report().left}
    with jax_nano.accelerate():
        ours = Program(case.ours())
    left = [x.reason for x in jax_nano.report().left if (x.program, x.reason) not in before]
    difference = apart(ours.results(), plain.results())
    samples = max(1, round(0.1 / min(ours.seconds(1) for _ in range(2))))
    progress.update()
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        pair = {}
        for key in ("plain", "ours") if number % 2 else ("ours", "plain"):
            program, count = (ours, samples) if key == "ours" else (plain, 1)
            pair[key] = program.seconds(count)
        times.append((pair["plain"], pair["ours"]))
        progress.update()
    before_, after = (statistics.median(x) for x in zip(*times, strict=True))
    reasons = "; ".join(dict.fromkeys(str(x) for x in left))
    return Outcome(case, before_, after, [a / b for a, b in times], difference, reasons)


def bars(outcomes: list[Outcome]) -> Table:
    """The picture for a terminal."""
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    longest = max(x.times_faster for x in outcomes)
    for x in outcomes:
        length = max(1, round(_BAR * x.times_faster / longest))
        times = f"{1e3 * x.plain:.1f} -> {1e3 * x.ours:.1f} ms"
        table.add_row(x.case.name, "█" * length, f"{x.times_faster:.2f} x", times)
    return table


def save(outcomes: list[Outcome], file: pathlib.Path) -> None:
    """The picture as PNG."""
    from matplotlib import pyplot

    names = [f"{x.case.name}\n{x.case.about}" for x in outcomes][::-1]
    values = [x.times_faster for x in outcomes][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.8 * len(outcomes)), layout="constrained")
    drawn = axes.barh(names, values, color="#3465a4")
    axes.axvline(1, color="black", linewidth=1)
    for label in axes.bar_label(drawn, [f"{x:.1f} x" for x in values], padding=6):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # also where the line is
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("times as fast as plain JAX")
    axes.set_title(f"jax_nano {jax_nano.__version__}, JAX {jax.__version__}, {jax_nano.info().cpu}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def summary(outcomes: list[Outcome], picture: pathlib.Path) -> list[tuple[str, str]]:
    """Five lines."""
    here = jax_nano.info()
    best = max(outcomes, key=lambda x: x.times_faster)
    mean = statistics.geometric_mean(x.times_faster for x in outcomes)
    worst = max(outcomes, key=lambda x: x.apart / ROUNDING[x.case.dtype])
    targets = ", ".join(dict.fromkeys(x.target for x in here.signatures if x.target))
    ran = jax_nano.report().summary.removeprefix("jax_nano: ")
    return [
        ("what ran", f"{len(outcomes)} programs as their users write them; {ran}"),
        ("how much faster", f"{mean:.1f} times in the mean, up to {best.times_faster:.1f} ({best.case.name})"),
        ("on what", f"{here.cpu}, {here.threads} threads, kernels for {targets or 'no target'}; JAX {jax.__version__}"),
        ("differences", f"at most {worst.apart:.0e} of a result ({worst.case.name}): rounding"),
        ("where to go on", f"README.md, `python -m jax_nano run your_script.py`; the picture is {picture}"),
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="blocks of the models (default: 2)")
    parser.add_argument("--tokens", type=int, default=128, help="of a text that is learnt (default: 128)")
    parser.add_argument("--attended", type=int, default=1024, help="tokens of the attention (default: 1024)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: 8192)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each program (default: 7)")
    parser.add_argument("--save", type=pathlib.Path, default="build/demo.png", help="(default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="print what became of each product as well")
    args = parser.parse_args(argv)
    if min(args.layers, args.rounds) < 1 or min(args.tokens, args.vocabulary, args.attended) < 4:
        parser.error("--layers and --rounds must be at least 1, the others at least 4")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs and compares everything; returns the process's exit status."""
    args = parse_args(argv)
    jax_nano.clear_report()
    chosen = list(cases(args))
    with tqdm(total=len(chosen) * (args.rounds + 1), unit="round") as progress:
        outcomes = [measure(case, args.rounds, progress) for case in chosen]
    console = Console(highlight=False, soft_wrap=True, width=120)
    if args.report:
        console.print(str(jax_nano.report()), markup=False)
    console.print("\ntimes as fast as plain JAX (1 x)\n")
    console.print(bars(outcomes))
    for x in outcomes:
        if x.note:
            console.print(f"{x.case.name}: {x.note}", markup=False)
    save(outcomes, args.save)
    console.print()
    for title, text in summary(outcomes, args.save):
        console.print(f"{title:<16} {text}", markup=False)
    failed = [x for x in outcomes if x.apart > ROUNDING[x.case.dtype]]
    for x in failed:
        console.print(f"FAILED: {x.case.name}: results are {x.apart:.0e} apart, more than rounding", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
