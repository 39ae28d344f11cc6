"""Steps of whole models, accelerated and not: the models of examples/zoo, unmodified.

Both programs of a model are compiled in one process and run in turn. XLA reads its flags once a process, so each
setting of XLA has a process of its own, in which the accelerated program is measured again; so has each number of
devices.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm
from zoo import MODELS, Workload
from zoo.compiled import dots, products, worth_a_call

import jax_nano
from benchmarks import ROOT, machine
from benchmarks.pairs import interleave
from benchmarks.peers import PEERS
from benchmarks.report import table

_SETTINGS: dict[str, Mapping[str, str]] = {"YNNPACK": {}, "no YNNPACK": PEERS["jnp-eigen"].env}
_SAMPLE_SECONDS = 0.25
_TRUST = 16
"""Units in the last place, relative to the whole result, that two programs of a model may be apart. The tests are
stricter: this finds a result that is wrong, and a time that means nothing."""

_EPS = {2: 2**-7, 4: 2**-23}  # of bfloat16 and float32


@dataclasses.dataclass(frozen=True)
class Row:
    """Samples of one model in one setting of XLA: seconds a step, one sample a round; or why there are none."""

    model: str
    setting: str
    plain: tuple[float, ...] = ()
    accelerated: tuple[float, ...] = ()
    compile_seconds: tuple[float, float] = (0, 0)  # plain, accelerated
    products: int = 0  # of the accelerated program that are ours
    left: int = 0  # those that XLA computes
    missed: int = 0  # of these, worth a call: fused by XLA with what is not understood
    skipped: str = ""

    @property
    def times_faster(self) -> float:
        """The median over the rounds, in each of which both ran seconds apart."""
        return statistics.median(x / y for x, y in zip(self.plain, self.accelerated, strict=True))


def run(only: Sequence[str], *, rounds: int, quick: bool) -> Iterator[Row]:
    """Measures the models whose name has a text of `only`; one that fails raises RuntimeError."""
    names = [name for name in MODELS if not only or any(text in name for text in only)]
    with tqdm(total=len(names) * len(_SETTINGS), unit="model", smoothing=0) as progress:
        for setting, env in _SETTINGS.items():
            for devices in sorted({MODELS[name].devices for name in names}):
                mine = [name for name in names if MODELS[name].devices == devices]
                order = json.dumps({"models": mine, "devices": devices, "rounds": rounds, "quick": quick})
                child = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.models", setting, order],
                    cwd=ROOT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", **env},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                assert child.stdout is not None
                for line in child.stdout:
                    row = _row(json.loads(line))
                    progress.set_description(row.model[:24].ljust(24))
                    progress.update()
                    yield row
                if child.wait():
                    raise RuntimeError(f"the process that measured {mine} failed: exit status {child.returncode}")


def save(rows: Iterable[Row], path: pathlib.Path) -> None:
    """Writes JSON that `load` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = {"started": now, "machine": machine.describe(), "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(data, indent=1))


def load(paths: Iterable[pathlib.Path]) -> list[Row]:
    """Rows of several runs; of a model measured twice, the later one."""
    rows = [_row(each) for path in paths for each in json.loads(path.read_text())["rows"]]
    return list({(row.model, row.setting): row for row in rows}.values())


def markdown(rows: Sequence[Row]) -> str:
    """A line for each model."""
    by_setting = {setting: {row.model: row for row in rows if row.setting == setting} for setting in _SETTINGS}
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


def _row(fields: dict[str, Any]) -> Row:
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return Row(**values)


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
    _check(name, accelerated.step(), plain.step(), _EPS[model.element_bytes])
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


def _check(name: str, got: Any, want: Any, eps: float) -> None:
    """RuntimeError if two results differ by more than rounding of the model's numbers: a loss has wider ones."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        difference, whole = (np.linalg.norm(np.asarray(each, np.float64).ravel()) for each in (_minus(x, y), y))
        if not difference <= _TRUST * eps * whole:
            raise RuntimeError(
                f"{name}: the accelerated result is WRONG: {difference:.2e} from one of size {whole:.2e}"
            )


def _minus(x: jax.Array, y: jax.Array) -> np.ndarray[Any, np.dtype[Any]]:
    return np.asarray(x, np.float64) - np.asarray(y, np.float64)


def _child(setting: str, order: str) -> None:
    options = json.loads(order)
    if options["devices"] > 1:
        jax.config.update("jax_num_cpu_devices", options["devices"])
    for name in options["models"]:
        row = _measure(name, setting, options["rounds"], quick=options["quick"])
        print(json.dumps(dataclasses.asdict(row)), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    _child(*sys.argv[1:])
