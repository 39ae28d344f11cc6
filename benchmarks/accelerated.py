"""Programs compiled with and without `jax_nano.accelerate()`: their samples, how they are compared and kept."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import ROOT, machine

_TRUST = 16
"""Units in the last place, relative to the whole result, by which two programs may differ. The tests are stricter: this
finds a result that is wrong, and a time that means nothing."""

_EPS = {2: 2**-7, 4: 2**-23}  # of bfloat16 and float32


@dataclasses.dataclass(frozen=True)
class Row:
    """Samples of one program in one setting: seconds a step, one sample a round; or why there are none."""

    name: str
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

    def send(self) -> None:
        """From the process that measures to `rows_of`."""
        print(json.dumps(dataclasses.asdict(self)), flush=True)


def rows_of(module: str, arguments: Sequence[str], env: Mapping[str, str]) -> Iterator[Row]:
    """Rows that a module, run with these arguments in a process of its own, sends; RuntimeError if it fails.

    `env` is what is different in its environment.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                yield _row(json.loads(line))
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise RuntimeError(f"the process {' '.join([module, *arguments])} failed: exit status {child.returncode}")


def save(rows: Iterable[Row], path: pathlib.Path) -> None:
    """Writes JSON that `load` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    data = {
        "started": now,
        "jax": jax.__version__,
        "machine": machine.describe(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(data, indent=1))


def load(paths: Iterable[pathlib.Path]) -> list[Row]:
    """Rows of several runs; of a program measured twice in a setting, the later one."""
    rows = [_row(each) for path in paths for each in json.loads(path.read_text())["rows"]]
    return list({(row.name, row.setting): row for row in rows}.values())


def check(name: str, got: Any, want: Any, element_bytes: int, trust: float = _TRUST) -> None:
    """RuntimeError if two results differ by more than rounding of the program's numbers: a loss has wider ones."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(each, np.float64).ravel() for each in (x, y))
        difference, whole = np.linalg.norm(a - b), np.linalg.norm(b)
        if not difference <= trust * _EPS[element_bytes] * whole:
            raise RuntimeError(
                f"{name}: the accelerated result is WRONG: {difference:.2e} from one of size {whole:.2e}"
            )


def _row(fields: dict[str, Any]) -> Row:
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return Row(**values)
