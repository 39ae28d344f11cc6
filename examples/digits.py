"""Trains a classifier of handwritten digits, every matrix product computed by jax_nano.

The data are scikit-learn's 1797 real images of 8x8 pixels. A perceptron with two hidden layers is trained
with optax under `jax.jit` and `jax.grad`, once with `jax_nano.matmul` and once, from the same seed, with
`jnp.matmul`. The script then checks itself, and exits with status 1 if any of this does not hold:

  * both runs classify enough of the held-out images correctly;
  * the two loss curves agree to rounding;
  * every product of the compiled program runs on jax_nano's kernels. Only a product that is too small
    to be worth a call may stay with XLA; it is listed then.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_nano
from jax_nano import _runtime
from jax_nano._core.contraction import Labels
from jax_nano._dispatch import decision

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
Params = list[tuple[jax.Array, jax.Array]]  # weight [inputs, outputs] and bias [outputs] of each layer


@dataclasses.dataclass(frozen=True)
class Data:
    """Images [count, 64] with values in 0..1, and the digits they show [count]."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array

    @classmethod
    def load(cls, seed: int) -> Data:
        digits = load_digits()
        parts = train_test_split(
            (digits.data / 16).astype(np.float32),
            digits.target,
            test_size=0.2,
            random_state=seed,
            stratify=digits.target,
        )
        train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
        return cls(train_images, train_labels, test_images, test_labels)

    def batches(self, rng: np.random.Generator, size: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """One pass over the training images in random order; what does not fill a batch is left out."""
        order = rng.permutation(len(self.train_labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield self.train_images[chosen], self.train_labels[chosen]


def init_params(seed: int, sizes: list[int]) -> Params:
    """He initialisation: weights scaled for the inputs of each layer, biases zero."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    shapes = zip(keys, itertools.pairwise(sizes), strict=True)
    return [(jax.random.normal(key, (i, o)) * jnp.sqrt(2 / i), jnp.zeros(o)) for key, (i, o) in shapes]


def logits(matmul: Matmul, params: Params, images: jax.Array) -> jax.Array:
    """The network: scores [count, 10] of images [count, 64]."""
    x = images
    for weight, bias in params[:-1]:
        x = jax.nn.relu(matmul(x, weight) + bias)
    weight, bias = params[-1]
    return matmul(x, weight) + bias


def make_step(matmul: Matmul, optimizer: optax.GradientTransformation) -> Callable:
    """One step of training, to be compiled: (params, state, images, labels) -> (params, state, loss)."""

    def loss_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        scores = logits(matmul, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def step(
        params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one training run came to."""

    losses: np.ndarray  # one for each step
    accuracy: float  # share of the held-out images
    seconds: float  # of training, compilation left out
    hlo: str  # the compiled step, as XLA runs it


def train(name: str, matmul: Matmul, data: Data, args: argparse.Namespace) -> Outcome:
    """Trains from args.seed, with a progress bar."""
    optimizer = optax.adamw(args.learning_rate)
    params = init_params(args.seed, [data.train_images.shape[1], *args.hidden, 10])
    state = optimizer.init(params)
    rng = np.random.default_rng(args.seed)

    first = next(data.batches(np.random.default_rng(0), args.batch))
    step = jax.jit(make_step(matmul, optimizer)).lower(params, state, *first).compile()

    losses = []
    start = time.perf_counter()
    with tqdm(range(args.epochs), desc=f"{name:>15}", unit="epoch") as epochs:
        for _ in epochs:
            for images, labels in data.batches(rng, args.batch):
                params, state, loss = step(params, state, images, labels)
                losses.append(loss)
            epochs.set_postfix(loss=f"{losses[-1]:.4f}")
    seconds = time.perf_counter() - start

    guesses = jax.jit(logits, static_argnums=0)(matmul, params, data.test_images).argmax(axis=-1)
    accuracy = float((guesses == data.test_labels).mean())
    return Outcome(np.array(losses), accuracy, seconds, step.as_text() or "")


def count_products(hlo: str) -> tuple[int, list[str]]:
    """Products of a compiled program that are ours, and the shapes of those that XLA computes."""
    ours = len(re.findall(r'custom_call_target="jax_nano_', hlo))
    theirs = re.findall(r"= (\S+?)(?:\{[^ ]*\})? dot\(", hlo)
    return ours, theirs


def products_of_step(batch: int, sizes: list[int]) -> list[tuple[int, int, int]]:
    """(M, N, K) of all products of a training step: forward, gradient of weights, gradient of inputs."""
    layers = list(itertools.pairwise(sizes))
    forward = [(batch, outputs, inputs) for inputs, outputs in layers]
    of_weights = [(inputs, outputs, batch) for inputs, outputs in layers]
    of_inputs = [(batch, inputs, outputs) for inputs, outputs in layers[1:]]  # the images need none
    return forward + of_weights + of_inputs


def is_declined(product: tuple[int, int, int]) -> bool:
    """Whether jax_nano leaves the product to XLA: it is tiny, or this CPU has none of our targets."""
    m, n, k = product
    matrices = Labels(lhs=(0, 1), rhs=(1, 2), out=(0, 2))
    asked = decision.Product(matrices, (m, k), (k, n), (np.dtype(np.float32),) * 3, None)
    return decision.dispatch(asked, decision.this_machine(), decision.Policy(declines=True)).declined is not None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images (default: 30)")
    parser.add_argument("--batch", type=int, default=64, help="images in a step (default: 64)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 128], help="(default: 256 128)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of data split, weights and order (default: 0)")
    parser.add_argument("--goal", type=float, default=0.96, help="held-out accuracy (default: 0.96)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="between the loss curves (default: 0.02)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 1 <= args.batch <= 1024 or min(args.hidden) < 1:
        parser.error("--epochs and --hidden must be at least 1, --batch from 1 to 1024")
    return args


def print_kernels() -> None:
    """Which of the compiled kernels computes the products here."""
    plan = None
    if _runtime.selected_target():
        matrices = (64, 64), (64, 64), (0, 1), (1, 2), (0, 2)  # shapes and labels: A[0, 1] B[1, 2] = C[0, 2]
        plan = _runtime.plan(*matrices, "float32", "float32", "float32", 1)
    for entry in _runtime.targets():
        chosen = plan is not None and entry["name"] == plan["target"]
        note = "runs here" if chosen else entry["why"] or "usable, not the best for float32"
        print(f"  target   {entry['name']:<14} {note}")
    if plan is not None:
        print(f"  kernel   {plan['kernel']}")


class Checks:
    """Prints each check as it is made, and remembers whether one failed."""

    failed = False

    def check(self, holds: bool, text: str) -> None:
        print(f"  {'ok' if holds else 'FAILED':<8} {text}")
        self.failed |= not holds


def main(argv: list[str] | None = None) -> int:
    """Trains twice, compares; returns the process's exit status."""
    args = parse_args(argv)
    data = Data.load(args.seed)
    print(f"jax_nano {jax_nano.__version__} on JAX {jax.__version__}")
    print_kernels()
    print(f"  data     {len(data.train_labels)} images to learn from, {len(data.test_labels)} held out\n")

    ours = train("jax_nano.matmul", jax_nano.matmul, data, args)
    theirs = train("jnp.matmul", jnp.matmul, data, args)

    print(f"\n{'':17}{'held-out accuracy':>18}{'first loss':>12}{'last loss':>12}{'ms a step':>12}")
    for name, run in (("jax_nano.matmul", ours), ("jnp.matmul", theirs)):
        pace = 1e3 * run.seconds / len(run.losses)
        print(f"  {name:<15}{run.accuracy:>18.2%}{run.losses[0]:>12.4f}{run.losses[-1]:>12.4f}{pace:>12.3f}")

    print()
    checks = Checks()
    for name, run in (("jax_nano.matmul", ours), ("jnp.matmul", theirs)):
        checks.check(run.accuracy >= args.goal, f"{name}: at least {args.goal:.0%} of the held-out images")

    # Rounding differs, and training amplifies it: tight over the first steps, looser over the whole run.
    apart = np.abs(ours.losses - theirs.losses)
    early = float(apart[:20].max())
    checks.check(early <= 1e-5, f"the first 20 losses agree to 0.00001 (apart: {early:.1e})")
    worst = float(apart.max())
    checks.check(worst <= args.tolerance, f"all losses agree to {args.tolerance} (apart: {worst:.1e})")

    wanted = products_of_step(args.batch, [data.train_images.shape[1], *args.hidden, 10])
    declined = [product for product in wanted if is_declined(product)]
    if declined:
        print(f"  note     too small for a call of their own, or no target for this CPU: {declined}")
    products, left = count_products(ours.hlo)
    checks.check(
        products == len(wanted) - len(declined) and len(left) <= len(declined),
        f"{products} of the {len(wanted)} products of a training step are jax_nano's, {len(left)} XLA's"
        + (f": {', '.join(left)}" if left else ""),
    )
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
