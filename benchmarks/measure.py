"""Measures peers side by side: one at a time, in turn, over and over."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks import machine, native, operands
from benchmarks.cases import Case
from benchmarks.peers import PEERS
from benchmarks.report import Results, Row
from benchmarks.worker import Failed, Setup, Worker


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does."""

    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    cores: tuple[int, ...]  # each case on each of these numbers of cores
    caches: tuple[str, ...]  # "warm", "cold"
    rounds: int  # samples of each peer
    sample_seconds: float  # how long one sample lasts, at least
    case_seconds: float  # slow cases get fewer rounds (at least 3) to stay near this
    pause_while: pathlib.Path | None = None  # nothing is done while this file exists
    prepare_while: pathlib.Path | None = None  # products are prepared, not measured, while this one does

    def wait(self) -> None:
        """Returns when something may be done; all workers are stopped meanwhile."""
        while self.pause_while is not None and self.pause_while.exists():
            time.sleep(_PAUSE_SECONDS)

    @property
    def only_prepares(self) -> bool:
        return self.prepare_while is not None and self.prepare_while.exists()

    def wait_to_measure(self) -> None:
        """Returns when something may be measured."""
        self.wait()
        while self.only_prepares:
            time.sleep(_PAUSE_SECONDS)
            self.wait()


_PAUSE_SECONDS = 0.1  # between two looks for the file
_WARM_UP_SHARE = 4  # before a sample, a fourth of its work goes untimed,
_WARM_UP_SECONDS = 0.01  # unless a single trip takes this long: then a sample warms itself
_MEET_SECONDS = 0.02  # on several cores: threads that share short calls must be awake, and on CPUs of their own
_FEWEST_ROUNDS = 3
# A sample is taken again where threads waited for a CPU: another program had it. Where they always do, because the peer
# has more threads than CPUs, the sample with the least waiting counts.
_WAITED_SHARE = 0.02
_TRIES = 3
# A round is measured again where the machine's peak was not what it was before, and begins when it is.
_PEAK = "peak"
_CALM_SHARE = 0.9
_CALM_SECONDS = 0.3
_ATTEMPTS = 2
_MOST_READY = 40  # cases that are prepared before they are measured
_MOST_PAIRS = 128  # more buffers than this would time the loop over them
_COLD_CACHES = 2  # operands of this many last-level caches are gone through before one comes again


def run(plan: Plan, results: Results, keep: Callable[[Results], None]) -> None:
    """Measures what `results` does not have yet, with a progress bar; calls `keep` after every case.

    Failures of a peer become lines of the results.
    """
    todo = [(case, cache) for case in plan.cases for cache in plan.caches if not results.has(case.key, cache)]
    todo.sort(key=lambda item: _cost(*item))  # a run that is stopped has most of the products
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(contextlib.closing(_Pool(plan, results)))
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(tqdm(total=len(todo), unit="case", smoothing=0))
        ready: collections.deque[_Prepared] = collections.deque()
        for case, cache in todo:
            while ready and not (plan.only_prepares and _fits(plan, ready, case, cache)):
                _measure_next(plan, pool, results, ready, keep, progress)
            ready.append(_prepare(plan, pool, results, case, cache, scratch))
        while ready:
            _measure_next(plan, pool, results, ready, keep, progress)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A case that peers are ready to be timed on."""

    case: Case
    cache: str
    peers: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        return f"{self.case.key} {self.cache}"

    @property
    def pairs(self) -> int:
        return pairs_of(self.case, self.cache)


def _cost(case: Case, cache: str) -> float:
    """About how long a case takes, in any unit."""
    return case.flops / 1e11 + case.bytes * pairs_of(case, cache) / 5e9


def _fits(plan: Plan, ready: Collection[_Prepared], case: Case, cache: str) -> bool:
    """Whether one more case may be prepared: every worker holds its operands."""
    more = case.bytes * pairs_of(case, cache)
    return len(ready) < _MOST_READY and more * len(plan.peers) * len(plan.cores) < machine.free_memory() / 2


def _measure_next(
    plan: Plan,
    pool: _Pool,
    results: Results,
    ready: collections.deque[_Prepared],
    keep: Callable[[Results], None],
    progress: tqdm,
) -> None:
    plan.wait_to_measure()
    prepared = ready.popleft()
    progress.set_description(prepared.key[:48].ljust(48))
    _measure(plan, pool, results, prepared)
    keep(results)
    progress.update()


def pairs_of(case: Case, cache: str) -> int:
    """How many operand pairs a sample goes through: one, or more than the caches hold."""
    if cache == "warm":
        return 1
    return math.ceil(_COLD_CACHES * machine.last_level_cache() / case.bytes) + 1


class _Pool:
    """The workers, one for each process name and number of cores; a dead one is started again."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self._plan, self._results = plan, results
        self._workers: dict[tuple[str, int], Worker] = {}
        self._missing: set[tuple[str, int]] = set()
        self.peaks: dict[tuple[str, int], float] = {}  # the highest of each dtype and number of cores
        for name in plan.peers:
            why = native.build(PEERS[name].library) if PEERS[name].library else ""
            for cores in plan.cores:
                if why:
                    self._miss(name, cores, why)
                else:
                    self._start(name, cores)

    def available(self) -> Iterator[tuple[str, int]]:
        for cores in self._plan.cores:
            for name in self._plan.peers:
                if (name, cores) not in self._missing:
                    yield name, cores

    def ask(self, method: str, name: str, cores: int, *args: object) -> Any:
        key = (PEERS[name].worker, cores)
        try:
            return self._workers[key].ask(method, name, *args)
        except Failed:
            if not self._workers[key].is_alive:
                self._restart(key)
            raise

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _start(self, name: str, cores: int) -> None:
        key = (PEERS[name].worker, cores)
        if key not in self._workers:
            self._workers[key] = self._new_worker(*key)
        try:
            version = self.ask("start", name, cores)
        except Failed as error:
            self._miss(name, cores, str(error))
        else:
            self._results.versions[name] = version

    def _new_worker(self, process: str, cores: int) -> Worker:
        names = tuple(name for name in self._plan.peers if PEERS[name].worker == process)
        env = {key: value for name in names for key, value in PEERS[name].env.items()}
        return Worker(Setup(names, cores, machine.cpus()[:cores], tuple(env.items())))

    def _restart(self, key: tuple[str, int]) -> None:
        self._workers[key].close()
        self._workers[key] = self._new_worker(*key)
        for name in self._plan.peers:
            if PEERS[name].worker == key[0] and (name, key[1]) not in self._missing:
                self._workers[key].ask("start", name)

    def _miss(self, name: str, cores: int, why: str) -> None:
        self._missing.add((name, cores))
        self._results.skip("", name, cores, why)


def _prepare(plan: Plan, pool: _Pool, results: Results, case: Case, cache: str, scratch: pathlib.Path) -> _Prepared:
    """Has every peer check its result of a case and load the operands that are timed."""
    prepared = _Prepared(case, cache, ())
    if prepared.pairs > _MOST_PAIRS:
        why = f"too small to be {cache}: a cache holds {prepared.pairs - 1} of its operands"
        results.skip(case.key, "", 0, why)
        return prepared
    plan.wait()
    operands.write(case, scratch)
    peers = []
    for name, cores in pool.available():
        plan.wait()
        try:
            pool.ask("prepare", name, cores, prepared.key, case, prepared.pairs, scratch)
            peers.append((name, cores))
        except Failed as error:
            results.skip(case.key, name, cores, str(error))
    return dataclasses.replace(prepared, peers=tuple(peers))


def _measure(plan: Plan, pool: _Pool, results: Results, prepared: _Prepared) -> None:
    case, pairs, ready = prepared.case, prepared.pairs, prepared.key
    trips: dict[tuple[str, int], int] = {}
    once: dict[tuple[str, int], float] = {}
    for name, cores in prepared.peers:
        try:
            trips[name, cores], once[name, cores] = _calibrate(plan, pool, ready, name, cores)
        except Failed as error:
            results.skip(case.key, name, cores, str(error))

    round_seconds = sum(once[key] * trips[key] * (1 + 1 / _WARM_UP_SHARE) for key in trips)
    rounds = plan.rounds
    if round_seconds > 0:
        rounds = max(_FEWEST_ROUNDS, min(rounds, int(plan.case_seconds / round_seconds)))

    samples: dict[tuple[str, int], list[float]] = {key: [] for key in trips}
    order = random.Random(case.key)
    guard = _Guard(pool, prepared, trips)
    for _ in range(rounds):
        plan.wait_to_measure()  # not within a round: its ratios are of samples taken seconds apart
        for cores in plan.cores:
            names = sorted(name for name, count in samples if count == cores)
            for attempt in range(_ATTEMPTS):
                guard.wait(cores)
                taken: dict[str, float] = {}
                for name in order.sample(names, len(names)):
                    try:
                        seconds = _sample(pool, ready, name, cores, trips[name, cores], once[name, cores])
                        taken[name] = seconds / (trips[name, cores] * pairs)
                    except Failed as error:
                        results.skip(case.key, name, cores, str(error))
                        del samples[name, cores]
                        names.remove(name)
                if attempt == _ATTEMPTS - 1 or guard.is_calm(cores):
                    break
            for name, each in taken.items():
                samples[name, cores].append(each)

    for (name, cores), measured in samples.items():
        with contextlib.suppress(Failed):
            pool.ask("close", name, cores, ready)
        results.rows.append(Row.of(case, name, cores, prepared.cache, measured))


class _Guard:
    """Tells when the machine gives less than it has: its multiply-add units' peak is measured before and after a round.

    On a virtual machine two CPUs may at times be halves of one core, for a second or for many.
    """

    def __init__(self, pool: _Pool, prepared: _Prepared, trips: dict[tuple[str, int], int]) -> None:
        self._pool, self._key, self._dtype = pool, prepared.key, prepared.case.dtype
        flops = prepared.case.flops * prepared.pairs
        self._work = {cores: (count, flops * count) for (name, cores), count in trips.items() if name == _PEAK}

    def is_calm(self, cores: int) -> bool:
        """Whether the peak is near the highest that this run has seen, or was not asked for."""
        if cores not in self._work:
            return True
        trips, flops = self._work[cores]
        # Of two, as threads that begin on the same CPU are moved apart within milliseconds.
        rate = max(flops / self._pool.ask("run", _PEAK, cores, self._key, trips)[0] for _ in range(2))
        best = self._pool.peaks[self._dtype, cores] = max(rate, self._pool.peaks.get((self._dtype, cores), 0.0))
        return rate >= _CALM_SHARE * best

    def wait(self, cores: int) -> None:
        """Until it is calm, but not for long."""
        end = time.monotonic() + _CALM_SECONDS
        while not self.is_calm(cores) and time.monotonic() < end:
            time.sleep(_CALM_SECONDS / 10)


def _calibrate(plan: Plan, pool: _Pool, key: str, name: str, cores: int) -> tuple[int, float]:
    """How many trips make a sample, and the seconds of one."""
    trips = 1
    while True:
        seconds, _ = pool.ask("run", name, cores, key, trips)
        if seconds >= plan.sample_seconds or trips >= 1 << 30:
            return trips, seconds / trips
        # Grow towards the goal, at most a hundredfold: the first runs are slower than the rest.
        aim = 1.2 * trips * plan.sample_seconds / max(seconds, 1e-9)
        trips = math.ceil(min(100 * trips, max(trips + 1, aim)))


def _sample(pool: _Pool, key: str, name: str, cores: int, trips: int, once: float) -> float:
    # While others ran, this worker's operands left the caches, and its threads went to sleep.
    untimed = 0
    if once < _WARM_UP_SECONDS:
        seconds = max(trips * once / _WARM_UP_SHARE, _MEET_SECONDS if cores > 1 else 0)
        untimed = math.ceil(seconds / once)
    least = math.inf
    for _ in range(_TRIES):
        seconds, waited = pool.ask("run", name, cores, key, trips, untimed)
        share = waited / seconds
        if share < least:
            least, sample = share, seconds
        if share <= _WAITED_SHARE:
            break
    return sample


def default_peers(only: Sequence[str] = ()) -> tuple[str, ...]:
    """All peers but those that must be named, or those named and the machine's limits."""
    if not only:
        return tuple(name for name, peer in PEERS.items() if peer.is_default)
    return tuple(name for name in PEERS if name in only or PEERS[name].is_roof)
