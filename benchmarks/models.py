"""Steps of whole models, accelerated and not: the models of examples/zoo, unmodified.

Both programs of a model are compiled in one process and run in turn. XLA reads its flags once a process, so each
setting of XLA has a process of its own, in which the accelerated program is measured again; so has each number of
devices.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm
from zoo import MODELS, Workload
from zoo.compiled import dots, products, worth_a_call

import jax_nano
from benchmarks import machine
from benchmarks.accelerated import Row, check, rows_of
from benchmarks.pairs import interleave
from benchmarks.peers import PEERS
from benchmarks.report import table

_SETTINGS: dict[str, Mapping[str, str]] = {"YNNPACK": {}, "no YNNPACK": PEERS["jnp-eigen"].env}
_SAMPLE_SECONDS = 0.25


def run(only: Sequence[str], *, rounds: int, quick: bool) -> Iterator[Row]:
    """Measures the models whose name has a text of `only`; one that fails raises RuntimeError."""
    names = [name for name in MODELS if not only or any(text in name for text in only)]
    with tqdm(total=len(names) * len(_SETTINGS), unit="model", smoothing=0) as progress:
        for setting, env in _SETTINGS.items():
            for devices in sorted({MODELS[name].devices for name in names}):
                mine = [name for name in names if MODELS[name].devices == devices]
                order = json.dumps({"models": mine, "devices": devices, "rounds": rounds, "quick": quick})
                for row in rows_of("benchmarks.models", [setting, order], env):
                    progress.set_description(row.name[:24].ljust(24))
                    progress.update()
                    yield row


def markdown(rows: Sequence[Row]) -> str:
    """A line for each model."""
    by_setting = {setting: {row.name: row for row in rows if row.setting == setting} for setting in _SETTINGS}
    body: list[tuple[str, ...]] = []
    skipped: dict[str, str] = {}
    for name, model in MODELS.items():
        found = {setting: by_setting[setting][name] for setting in _SETTINGS if name in by_setting[setting]}
        measured = {setting: row for setting, row in found.items() if not row.skipped}
        if not measured:
            skipped.update((name, row.skipped) for row in found.values())
            continue
        first = next(iter(measured.values()))
        body.append(
            (
                name,
                f"{1e3 * statistics.median(first.accelerated):.1f}",
                *(f"{measured[x].times_faster:.2f}" if x in measured else "-" for x in _SETTINGS),
                f"{model.goal:.2f}",
                "yes" if all(row.times_faster >= model.goal for row in measured.values()) else "no",
                f"{first.products} of {first.products + first.left}" + f" ({first.missed} missed)" * bool(first.missed),
                f"{first.compile_seconds[1] / first.compile_seconds[0]:.2f}",
            )
        )
    ratios = (f"faster than XLA, {setting}" for setting in _SETTINGS)
    header = ("model", "ms a step", *ratios, "goal", "met", "products that are ours", "compile time over XLA's")
    text = f"{machine.describe()['cpu']}, {len(machine.cpus())} CPUs, JAX {jax.__version__}\n\n{table(header, body)}"
    return text + "".join(f"\nLeft out: {name}: {why}\n" for name, why in skipped.items())


# --- the process that measures ------------------------------------------------------------------


class _Program:
    """A model's compiled step with a state of its own."""

    def __init__(self, workload: Workload) -> None:
        start = time.perf_counter()
        self._step = jax.jit(workload.step, donate_argnums=0).lower(workload.state, workload.inputs).compile()
        self.compile_seconds = time.perf_counter() - start
        self._state = jax.tree.map(jnp.copy, workload.state)
        self._inputs = workload.inputs
        self.steps = 1  # of a sample

    def step(self) -> Any:
        self._state, result = self._step(self._state, self._inputs)
        return jax.block_until_ready(result)

    def sample(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        for _ in range(self.steps):
            self._state, result = self._step(self._state, self._inputs)
        jax.block_until_ready((self._state, result))
        return (time.perf_counter() - start) / self.steps

    def text(self) -> str:
        return self._step.as_text() or ""


def _measure(name: str, setting: str, rounds: int, *, quick: bool) -> Row:
    model = MODELS[name]
    try:
        workload = model.build(model.tiny if quick else model.real)
    except ImportError as error:
        return Row(name, setting, skipped=f"needs {error.name}")
    plain = _Program(workload)
    jax_nano.clear_report()
    with jax_nano.accelerate():
        accelerated = _Program(workload)
    text = accelerated.text()
    ours, missed = products(text), worth_a_call(text, model.element_bytes)
    if missed and not ours and "left to XLA: " not in jax_nano.report():  # without saying why
        raise RuntimeError(f"{name}: acceleration failed: {len(missed)} products are XLA's that are worth a call")
    check(name, accelerated.step(), plain.step(), model.element_bytes)
    seconds = plain.sample()
    if not quick:
        plain.steps = accelerated.steps = max(1, round(_SAMPLE_SECONDS / seconds))
    samples = interleave({"plain": plain.sample, "accelerated": accelerated.sample}, rounds)
    return Row(
        name,
        setting,
        tuple(samples["plain"]),
        tuple(samples["accelerated"]),
        (plain.compile_seconds, accelerated.compile_seconds),
        ours,
        len(dots(text)),
        len(missed),
    )


def _child(setting: str, order: str) -> None:
    options = json.loads(order)
    if options["devices"] > 1:
        jax.config.update("jax_num_cpu_devices", options["devices"])
    for name in options["models"]:
        row = _measure(name, setting, options["rounds"], quick=options["quick"])
        row.send()
        jax.clear_caches()


if __name__ == "__main__":
    _child(*sys.argv[1:])
