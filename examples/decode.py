"""Decodes text greedily with weights of 32, 16, 8 and 4 bits, plain and by jax_nano, side by side.

The model is a GPT-2 of flax.nnx with a key-value cache (`decoder.py`), blocks of GPT-2 small, but two of them. It is
made here: a few steps of training on `decode.txt`, whose words are the first of its vocabulary. Then it decodes with
float32 and bfloat16 weights, and with `jax_nano.quantize`'s integers of 8 and 4 bits by groups of 128, in a model whose
other numbers are float32 or, "-bf16", bfloat16.

    plain      JAX's operations; quantised weights are multiplied by their scales, then with x
    jax_nano   inside `jax_nano.accelerate()`; quantised weights are multiplied by their own `@`

The script prints tokens a second, taken in turn, and what fewer bits change: how far scores are from float32's, and the
perplexity of the text. It exits with status 1 if both ways to run the same weights differ by more than rounding.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_nano

TEXT = pathlib.Path(__file__).with_suffix(".txt")
GROUP = 128
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "int8": 1e-4, "int4": 1e-4, "int8-bf16": 4e-2, "int4-bf16": 4e-2}
"""Between two ways to run the same weights, relative to all scores: rounding through all layers."""


class Format(NamedTuple):
    """How the matrices of a model are stored, and the models that multiply with them."""

    name: str
    plain: decoder.Decoder
    ours: decoder.Decoder


class Program:
    """Decoding with a model, compiled."""

    def __init__(self, model: decoder.Decoder, prompt: jax.Array) -> None:
        step, self._start, self._weights = decoder.decoding(model, prompt)
        self._call = jax.jit(step, donate_argnums=0).lower(self._start, self._weights).compile()
        self.steps = 1  # of a sample

    def decode(self, count: int) -> tuple[list[int], np.ndarray]:
        """That many tokens after the prompt, and the scores of the first."""
        state, tokens, first = jax.tree.map(jnp.copy, self._start), [], None
        for _ in range(count):
            tokens.append(int(state[1][0]))
            state, scores = self._call(state, self._weights)
            first = np.asarray(scores, np.float64) if first is None else first
        assert first is not None
        return tokens, first

    def seconds(self) -> float:
        """Of a token, always the first ones after the prompt."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, self._start))
        start = time.perf_counter()
        for _ in range(self.steps):
            state, _ = self._call(state, self._weights)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / self.steps


class Outcome(NamedTuple):
    """A format's numbers."""

    name: str
    plain: float  # tokens a second, the median
    ours: float
    megabytes: float  # of matrices
    apart: float  # the first scores of both ways
    from_float32: float  # scores of the text
    perplexity: float
    words: str


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


def formats(model: decoder.Decoder) -> list[Format]:
    """All of them; the model has float32 weights."""
    half = decoder.in_dtype(model, jnp.bfloat16)
    out = [Format("float32", model, model), Format("bfloat16", half, half)]
    for of, suffix in ((model, ""), (half, "-bf16")):
        for bits in (8, 4):
            ours = decoder.with_matrices(of, partial(jax_nano.quantize, bits=bits, group=GROUP))
            plain = decoder.with_matrices(ours, lambda w: decoder.Dequantized(w.q, w.scale))
            out.append(Format(f"int{bits}{suffix}", plain, ours))
    return out


def windows(tokens: np.ndarray, size: int) -> np.ndarray:
    """A text as rows [., size + 1], each of which begins with the last token of the one before it."""
    starts = range(0, len(tokens) - size, size)
    return np.stack([tokens[i : i + size + 1] for i in starts])


def train(model: decoder.Decoder, rows: np.ndarray, steps: int, progress: tqdm) -> None:
    """A few steps of Adam on rows [., count + 1], two of them each."""
    score, weights = decoder.scoring(model)
    optimizer = optax.adam(1e-3)

    def loss_of(weights: Any, rows: jax.Array) -> jax.Array:
        scores = jax.vmap(partial(score, weights))(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, rows[:, 1:]).mean()

    @jax.jit
    def step(weights: Any, memory: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(weights, rows)
        change, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(weights, change), memory, loss

    memory, rng = optimizer.init(weights), np.random.default_rng(0)
    for number in range(steps):
        chosen = jnp.asarray(rows[rng.permutation(len(rows))[:2]])
        weights, memory, loss = step(weights, memory, chosen)
        progress.set_description(f"training, step {number + 1}, loss {float(loss):.2f}", refresh=False)
        progress.update()
    nnx.update(model, weights)


def scores_of(model: decoder.Decoder, rows: np.ndarray) -> np.ndarray:
    """Of each next token [., count, vocabulary]."""
    score, weights = decoder.scoring(model)
    compiled = jax.jit(score)
    return np.stack([np.asarray(compiled(weights, jnp.asarray(row[:-1])), np.float64) for row in rows])


def perplexity(scores: np.ndarray, rows: np.ndarray) -> float:
    top = scores.max(-1, keepdims=True)
    log_sums = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
    right = np.take_along_axis(scores, rows[:, 1:, None], -1)[..., 0]
    return float(np.exp((log_sums - right).mean()))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """The difference of two arrays, relative to the whole of the second."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def compare(args: argparse.Namespace, progress: tqdm) -> list[Outcome]:
    """Makes the model, checks, measures."""
    found = words_of(TEXT.read_text())
    words = list(dict.fromkeys(found))
    tokens = np.asarray([words.index(word) for word in found], np.int32)
    rows = windows(tokens, args.prompt + args.tokens)
    sizes = {"heads": args.heads, "features": args.features, "vocabulary": args.vocabulary, "blocks": args.blocks}
    model = decoder.Decoder(tokens=args.prompt + args.tokens, **sizes)
    with jax_nano.accelerate():
        train(model, rows, args.training, progress)

    prompt = jnp.asarray(rows[0, : args.prompt])
    programs: dict[tuple[str, str], Program] = {}
    outcomes, want = [], None
    for form in formats(model):
        progress.set_description(f"{form.name:<28}")
        plain = programs[form.name, "plain"] = Program(form.plain, prompt)
        with jax_nano.accelerate():
            ours = programs[form.name, "jax_nano"] = Program(form.ours, prompt)
            scores = scores_of(form.ours, rows)
        want = scores if want is None else want
        said, first = ours.decode(args.tokens)
        _, plain_first = plain.decode(1)
        text = " ".join(words[i] if i < len(words) else "?" for i in said)
        differences = apart(first, plain_first), apart(scores, want), perplexity(scores, rows)
        outcomes.append(Outcome(form.name, 0, 0, decoder.matrix_bytes(form.ours) / 1e6, *differences, text))
        progress.update()

    speeds = measure(programs, args, progress)
    return [x._replace(plain=speeds[x.name, "plain"], ours=speeds[x.name, "jax_nano"]) for x in outcomes]


def measure(
    programs: Mapping[tuple[str, str], Program], args: argparse.Namespace, progress: tqdm
) -> dict[tuple[str, str], float]:
    """Tokens a second of each program, in turn with all others."""
    for program in programs.values():
        once = min(program.seconds() for _ in range(2))
        program.steps = max(1, min(args.tokens, round(args.sample_seconds / once)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for number in range(args.rounds):
        progress.set_description(f"measuring, round {number + 1}".ljust(28), refresh=False)
        for key in list(programs)[:: 1 if number % 2 else -1]:
            times[key].append(programs[key].seconds())
        progress.update()
    return {key: 1 / statistics.median(found) for key, found in times.items()}


def table(outcomes: Sequence[Outcome]) -> str:
    head = ("plain", "jax_nano", "times", "matrices", "scores from", "perplexity")
    units = ("tokens/s", "tokens/s", "faster", "MB", "float32's", "of the text")
    lines = [f"{'':12}" + "".join(f"{word:>13}" for word in line) for line in (head, units)]
    for x in outcomes:
        numbers = f"{x.plain:>13.1f}{x.ours:>13.1f}{x.ours / x.plain:>13.1f}{x.megabytes:>13.1f}"
        lines.append(f"{x.name:<12}{numbers}{x.from_float32:>13.1e}{x.perplexity:>13.2f}" + failed(x))
    return "\n".join(lines)


def failed(x: Outcome) -> str:
    limit = TOLERANCE[x.name]
    return "" if x.apart <= limit else f"  FAILED: plain and jax_nano differ by {x.apart:.0e}, more than {limit:.0e}"


def picture(outcomes: Sequence[Outcome], title: str, path: pathlib.Path) -> None:
    """A bar chart of tokens a second."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    places = np.arange(len(outcomes))
    kinds: dict[str, tuple[str, Callable[[Outcome], float]]] = {
        "plain JAX": ("#b0b0b0", lambda x: x.plain),
        "jax_nano": ("#0072b2", lambda x: x.ours),
    }
    for i, (label, (color, of)) in enumerate(kinds.items()):
        bars = axes.bar(places + 0.4 * i - 0.2, [of(x) for x in outcomes], 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="{:.0f}" if min(x.plain for x in outcomes) >= 10 else "{:.1f}", fontsize=8)
    axes.set_xticks(places, [f"{x.name}\n{x.megabytes:.0f} MB" for x in outcomes])
    axes.set(ylabel="tokens a second", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=2, help="GPT-2 small has 12 (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="to decode after the prompt (default: 64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the text's beginning (default: 32)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="GPT-2 has 50257 (default: 8192)")
    parser.add_argument("--training", type=int, default=40, help="steps of training (default: 40)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each program (default: 7)")
    parser.add_argument("--save", type=pathlib.Path, metavar="PNG", help="a bar chart of tokens a second")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few repetitions: proves that it works")
    args = parser.parse_args(argv)
    args.features, args.heads, args.sample_seconds = 768, 12, 0.2
    if args.quick:
        args.features, args.heads, args.sample_seconds = 128, 2, 1e-3
        args.rounds, args.training = 1, 2
    least = len(set(words_of(TEXT.read_text())))
    if min(args.blocks, args.tokens, args.prompt, args.rounds) < 1 or args.training < 0:
        parser.error("--blocks, --tokens, --prompt and --rounds must be at least 1, --training at least 0")
    if args.vocabulary < least or args.vocabulary % 2:
        parser.error(f"--vocabulary must be even and at least {least}, the words of {TEXT.name}")
    if args.prompt + args.tokens >= len(words_of(TEXT.read_text())):
        parser.error(f"--prompt and --tokens must be fewer than the words of {TEXT.name}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs and compares everything; returns the process's exit status."""
    args = parse_args(argv)
    title = f"{args.blocks} blocks of {args.features} features, vocabulary {args.vocabulary}"
    print(f"jax_nano {jax_nano.__version__} on JAX {jax.__version__}: {title}")
    with tqdm(total=args.training + 4 + args.rounds) as progress:
        outcomes = compare(args, progress)
    print(f"\n{table(outcomes)}\n")
    for x in (outcomes[0], outcomes[-1]):
        print(f"{x.name:<12}... {x.words}")
    if args.save is not None:
        picture(outcomes, title, args.save)
        print(f"\nwritten: {args.save}")
    return 1 if any(failed(x) for x in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
