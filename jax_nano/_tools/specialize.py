"""`python -m jax_nano specialize`: kernels for given products, kept where they are faster than those of the build.

For each product some register tiles and blocks are composed (`recipes`), with its sizes, strides and schedule as
constants. Each must give the bits that the kernel of the build gives; then both are timed in turns. The fastest is
measured once more, on other memory, and kept if it is faster there too. What is kept makes a pack (`_core/packs.py`).
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import ml_dtypes
import numpy as np
from tqdm import tqdm

from jax_nano._core import machine, packs, thread_limit
from jax_nano._tools import recipes
from jax_nano._tools.asked import Asked
from jax_nano._tools.composer import Composer
from jax_nano._tools.timing import Array, Probe, addresses

SECONDS_EACH: Final = 12.0
"""For a product, unless a budget is given."""
_MOST_SHARE: Final = 0.99  # of the time of the build's kernel, when it is measured again: less is no noise
_SAMPLE_SECONDS: Final = 5e-4
_ROUNDS: Final = 8
_CONFIRMING_ROUNDS: Final = 24
_OPERANDS: Final = 3  # other memory when it is measured again
_MANY_THREADS: Final = 64  # a product that is not cut for so many is never cut
_SECONDS_TO_COMPOSE: Final = 0.5  # roughly, one kernel
_MOST_AT_ONCE: Final = 6
_SHARE_OF_TILES: Final = 0.6  # of the time; the rest is for other blocks


@dataclass
class Candidate:
    """A composed kernel.

    Attributes:
      recipe: what it was made of.
      made: its object file and symbol.
      table: `_runtime.specialized.Kernels` with it alone.
      seconds: samples of its time.
    """

    recipe: recipes.Recipe
    made: dict[str, Any]
    table: Any
    seconds: list[float]


@dataclass
class Found:
    """What became of a product.

    Attributes:
      asked: the product.
      plan: by the kernel of the build; empty if there is none.
      best: the fastest kernel, if any was composed.
      share: its time, as measured again, as a share of that of the build's kernel; of what was only measured once too.
      kept: whether it is faster.
      why: what stands in the way.
    """

    asked: Asked
    plan: Mapping[str, Any]
    best: Candidate | None = None
    share: float = math.inf
    kept: bool = False
    why: str = ""

    @property
    def entry(self) -> dict[str, Any]:
        """What the pack says of the kernel."""
        assert self.best is not None
        about = {"what": str(self.asked), "share": round(self.share, 4), "symbol": self.best.made["symbol"]}
        return {**recipes.entry(self.best.recipe, self.plan), **about}

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.asked}: {self.why}"
        if not self.kept:
            return f"{self.asked}: none is faster (the best takes {self.share:.3f} of the time)"
        x = self.best.recipe
        how = f"tile {x['mr']} x {x['nr']}"
        if x["small"]:
            how += ", one function"
        elif not (self.plan["inner"] or self.plan["sweep"]):
            how += f", columns by {x['fields']['nc']}, {'B' if x['fields']['pack_b'] else 'nothing'} packed"
        return f"{self.asked}: takes {self.share:.3f} of the time ({how})"


def specialize(
    runtime: ModuleType,
    products: Sequence[Asked],
    *,
    budget: float | None = None,
    out: Path | None = None,
    generator: str | None = None,
) -> list[Found]:
    """Composes, measures, and keeps what is faster.

    Args:
      runtime: the extension.
      products: for which; those of a report may be many.
      budget: about how many seconds it may take; None: SECONDS_EACH for each product.
      out: the folder of the pack; None: that of the user's packs.
      generator: a Python with the version of jaxlib that the generator wants; None: this one.

    Raises:
      ValueError: an argument that cannot be, there is nowhere to keep a pack, or the generator does not run.
    """
    where = out or packs.folder()
    if where is None:
        raise ValueError(f"{packs.ENVIRONMENT} is off; name a folder with --out")
    if budget is not None and not budget > 0:
        raise ValueError(f"--budget {budget:g}: expected more than 0")
    products = list(dict.fromkeys(products))
    runtime.specialized.use(None)  # what is measured against are the kernels of the build
    end = time.monotonic() + (SECONDS_EACH * len(products) if budget is None else budget)
    found = []
    with (
        Composer(generator, jobs=machine.cores()) as composer,
        tqdm(products, unit="product", desc="specializing", file=sys.stderr) as bar,
    ):
        search = _Search(runtime, composer, Probe(calls=2000))
        for i, asked in enumerate(bar):
            left = (end - time.monotonic()) / (len(products) - i)
            found.append(search.of(asked, left))
            bar.set_postfix_str(f"{sum(x.kept for x in found)} faster", refresh=False)
        kept = [x for x in found if x.kept]
        library = (
            composer.link([x.best.made["object"] for x in kept if x.best], "pack.so").read_bytes() if kept else b""
        )
    _keep(runtime, where, found, library)
    return found


def _keep(runtime: ModuleType, where: Path, found: Sequence[Found], library: bytes) -> None:
    """Writes a pack of what is faster. What earlier packs hold for the same products gives way to this measurement."""
    mine = packs.signature(runtime)
    measured = {_key(recipes.entry(x.best.recipe, x.plan)) for x in found if x.best}
    if where.is_dir():
        for pack in packs.usable(where, runtime):
            superseded = {x["symbol"] for x in pack.kernels if _key(x) in measured}
            if superseded:
                packs.drop(pack, superseded, mine)
    if not library:
        return
    about = {"cpu": machine.cpu_name(), "measured": time.strftime("%Y-%m-%d")}
    name = f"{packs.prefix(runtime)}{time.strftime('%Y%m%d%H%M%S')}-{os.getpid()}{packs.SUFFIX}"
    packs.save(where / name, library, [x.entry for x in found if x.kept], about, mine)


def _key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """The product of a kernel."""
    return tuple(entry.get(x) for x in ("kernel", *recipes.SIZES, "epilogue"))


class _Search:
    """Finds the fastest kernel of a product.

    Args:
      runtime: the extension.
      composer: the generator.
      probe: that of this process.
    """

    def __init__(self, runtime: ModuleType, composer: Composer, probe: Probe) -> None:
        self._runtime, self._composer, self._probe = runtime, composer, probe
        self._kernels = {x["name"]: x for x in runtime.kernels()}
        self._number = 0

    def of(self, asked: Asked, seconds: float) -> Found:
        """What becomes of a product in about so much time."""
        end = time.monotonic() + seconds
        epilogue, bias = asked.epilogue is not None, asked.epilogue is not None and asked.epilogue.bias
        plan_of = partial(self._runtime.plan, *asked.arguments, algorithm=asked.algorithm, epilogue=epilogue, bias=bias)
        try:
            plan = plan_of(threads=1)
        except ValueError as error:
            return Found(asked, {}, why=str(error))
        if (why := recipes.why_not(plan)) is not None:
            return Found(asked, plan, why=why)
        kernel = self._kernels[plan["kernel"]]
        parts = any(x > 1 for threads in (1, _MANY_THREADS) for x in plan_of(threads=threads)["split"][1:])
        work = _Work(asked, self._runtime, self._probe)
        end -= 2 * _CONFIRMING_ROUNDS * max(work.once, _SAMPLE_SECONDS)
        tiles = recipes.of(plan, kernel, parts=parts, epilogue=epilogue)
        now = time.monotonic()
        best = self._fastest(work, plan, tiles, [], now + _SHARE_OF_TILES * (end - now))
        if not best:
            return Found(asked, plan, why="no kernel could be composed for it")
        others = [x for first in best[:2] for x in recipes.blocked_otherwise(first.recipe, plan, kernel)]
        best = self._fastest(work, plan, others, best, end)
        share = work.confirmed(best[0], 1)
        # Nor may it be slower where threads share the work.
        if share <= _MOST_SHARE and parts and (threads := thread_limit.usable()) > 1:
            shared = work.confirmed(best[0], threads)
            share = share if shared <= 1 else shared
        return Found(asked, plan, best[0], share, kept=share <= _MOST_SHARE)

    def _fastest(
        self, work: _Work, plan: Mapping[str, Any], wanted: Sequence[recipes.Recipe], best: list[Candidate], end: float
    ) -> list[Candidate]:
        """The fastest of some recipes' kernels and of the best so far, as far as there is time."""
        each = _SECONDS_TO_COMPOSE + _ROUNDS * max(work.once, _SAMPLE_SECONDS)  # a candidate takes
        left = list(wanted)
        while left and (not best or time.monotonic() + each < end):
            count = max(2, min(_MOST_AT_ONCE, int((end - time.monotonic()) / each)))
            batch, left = left[:count], left[count:]
            if made := self._made(work, plan, batch):
                best = work.fastest([*best[:2], *made])
        return best

    def _made(self, work: _Work, plan: Mapping[str, Any], wanted: Sequence[recipes.Recipe]) -> list[Candidate]:
        """The kernels of those recipes that there is one for, and that give the same bits."""
        numbered = {self._number + i: recipe for i, recipe in enumerate(wanted)}
        self._number += len(wanted)
        made = [x for x in self._composer.compose([{**x, "id": i} for i, x in numbered.items()]) if "error" not in x]
        if not made:
            return []
        name = f"candidates{self._number}.so"
        library = ctypes.CDLL(str(self._composer.link(list(dict.fromkeys(x["object"] for x in made)), name)))
        out = []
        for x in sorted(made, key=lambda x: int(x["id"])):
            recipe = numbered[x["id"]]
            table = self._runtime.specialized.Kernels()
            function = ctypes.cast(getattr(library, x["symbol"]), ctypes.c_void_p).value
            table.add(recipes.entry(recipe, plan), function, "candidate")
            candidate = Candidate(recipe, x, table, [])
            if work.gives_the_same_bits(candidate):
                out.append(candidate)
        return out


class _Work:
    """A product on memory, by the kernel of the build and by others."""

    def __init__(self, asked: Asked, runtime: ModuleType, probe: Probe) -> None:
        self._asked, self._runtime, self._probe = asked, runtime, probe
        self._arrays = _Arrays(asked, 0)
        self._generic: list[float] = []
        self.once = min(self._run(1, None, self._arrays) for _ in range(2))

    def _sample(self, trips: int, table: Any, arrays: _Arrays, threads: int = 1) -> float:
        """Seconds of a run behind one that brings the operands back, which another kernel has left elsewhere."""
        self._run(1, table, arrays, threads)
        return self._run(trips, table, arrays, threads)

    def _run(self, trips: int, table: Any, arrays: _Arrays, threads: int = 1) -> float:
        more = {"algorithm": self._asked.algorithm, "specialized": table, **arrays.epilogue}
        seconds = self._runtime.tuning.time_dot(arrays.buffers, trips, *self._asked.arguments, threads, **more)
        return float(seconds) / trips

    def gives_the_same_bits(self, candidate: Candidate) -> bool:
        """Whether it computes what the kernel of the build computes, bit for bit, and the runtime takes it."""
        results = []
        for table in (None, candidate.table):
            self._arrays.out.view(np.uint8).fill(0xFF)
            self._run(1, table, self._arrays)
            results.append(self._arrays.out.tobytes())
        return results[0] == results[1]

    def fastest(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Measures them in turns with the kernel of the build; the fastest first."""
        trips = self._trips(self._arrays)
        left = list(candidates)
        for turn in range(_ROUNDS):
            order = [None, *left]
            random.Random(turn).shuffle(order)
            for x in order:
                seconds = self._generic if x is None else x.seconds
                table = None if x is None else x.table
                seconds.append(self._probe.sample(partial(self._sample, trips, table, self._arrays)))
            if turn in (1, 3):
                best = min(min(x.seconds) for x in left)
                left = [x for x in left if min(x.seconds) < (1.1 if turn == 1 else 1.03) * best]
        return sorted(candidates, key=lambda x: min(x.seconds))

    def confirmed(self, candidate: Candidate, threads: int) -> float:
        """Its time as a share of that of the build's kernel, by new samples on other memory; the worst of these."""
        shares = []
        for seed in range(_OPERANDS):
            arrays = _Arrays(self._asked, seed + 1)
            trips = self._trips(arrays, threads)
            samples: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(_CONFIRMING_ROUNDS // _OPERANDS):
                for is_new in (True, False) if turn % 2 else (False, True):
                    table = candidate.table if is_new else None
                    samples[is_new].append(self._probe.sample(partial(self._sample, trips, table, arrays, threads)))
            shares.append(min(samples[True]) / min(samples[False]))
        return max(shares)

    def _trips(self, arrays: _Arrays, threads: int = 1) -> int:
        once: Callable[[], float] = partial(self._run, 1, None, arrays, threads)
        return max(1, round(_SAMPLE_SECONDS / max(min(once() for _ in range(3)), 1e-9)))


_ALIGNMENT: Final = 64  # bytes, of XLA's buffers; NumPy's begin 16 bytes behind a page, and vectors end in two lines


class _Arrays:
    """Operands and a result, as XLA would allocate them."""

    def __init__(self, asked: Asked, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def array(shape: Sequence[int], name: str) -> Array:
            values = rng.uniform(-4, 4, shape).astype(np.dtype(getattr(ml_dtypes, name, name)))
            room = np.empty(values.nbytes + _ALIGNMENT, np.uint8)
            begin = -room.ctypes.data % _ALIGNMENT
            aligned: Array = room[begin : begin + values.nbytes].view(values.dtype).reshape(values.shape)
            aligned[...] = values
            return aligned

        self._operands = [array(shape, name) for shape, name in zip(asked.shapes, asked.dtypes, strict=False)]
        self.out = array(asked.out_shape, asked.dtypes[2])
        self.buffers = addresses(*self._operands, self.out)
        self.epilogue: dict[str, Any] = {}
        if (x := asked.epilogue) is not None:
            self._more = [array(asked.out_shape[-1:], asked.dtypes[2]), array(asked.out_shape, asked.dtypes[2])]
            bias, residual = (y.ctypes.data if there else 0 for y, there in zip(self._more, x[2:], strict=True))
            self.epilogue = {"activation": x.activation, "scale": x.scale, "bias": bias, "residual": residual}
