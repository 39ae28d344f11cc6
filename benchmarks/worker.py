"""A process that runs one or a few peers, on a given number of cores, and times them on request.

Peers run in separate processes because thread counts, affinities and XLA's flags belong to a process. Between
two requests a worker is stopped (SIGSTOP), so that no pool of threads spins during a measurement.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from benchmarks import ROOT

if TYPE_CHECKING:  # what they import must not be imported before the affinity is set
    from benchmarks.cases import Case
    from benchmarks.peers import Runner


class Failed(Exception):
    """The worker could not do what it was asked; says why in one line."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a worker is started with."""

    peers: tuple[str, ...]
    threads: int
    cpus: tuple[int, ...]  # those that it may run on
    env: tuple[tuple[str, str], ...] = ()

    def environment(self) -> dict[str, str]:
        count = str(self.threads)
        return os.environ | {
            "NPROC": count,  # the size of XLA's pools
            "OMP_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "BLIS_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **dict(self.env),
        }


class Worker:
    """The parent's end: each method is one request, answered before the next."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno())],
            cwd=ROOT,
            env=setup.environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        theirs.close()
        self._pipe.send(setup)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, method: str, *args: Any) -> Any:
        """Calls a method of `_Peers` in the worker; raises Failed where that raised anything."""
        try:
            self._process.send_signal(signal.SIGCONT)
            self._pipe.send((method, args))
            ok, value = self._pipe.recv()
            self._process.send_signal(signal.SIGSTOP)
        except (EOFError, ConnectionError) as error:
            raise Failed(f"its process died ({self._process.wait()})") from error
        if not ok:
            raise Failed(value)
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


class _Peers:
    """The worker's end. Imports only here, when the environment and the affinity are as they must be."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._runners: dict[tuple[str, str], Runner] = {}  # by peer and key: those of the products that are prepared

    def start(self, peer: str) -> str:
        """Loads the peer; returns its version."""
        return self._new(peer).version()

    def prepare(self, peer: str, key: str, case: Case, pairs: int, folder: pathlib.Path) -> None:
        """Makes the peer ready to be timed on a case, after a check of every element of its result."""
        from benchmarks import operands

        runner = self._new(peer)
        runner.prepare(case, pairs)
        runner.load([operands.read(case, folder, operands.EXACT)] * pairs)
        runner.run(1)
        expected = operands.read_result(case, folder)
        for result in runner.results():
            check(case, result, expected)
        runner.load([operands.read(case, folder, operands.RANDOM)] * pairs)
        self._runners[peer, key] = runner

    def run(self, peer: str, key: str, trips: int, untimed: int = 0) -> tuple[float, float]:
        """The seconds of `trips`, after `untimed` others, and those in which a thread was ready but had no CPU."""
        if (peer, key) not in self._runners:
            raise Failed("its process died before")
        runner = self._runners[peer, key]
        if untimed:
            runner.run(untimed)
        before = waited()
        return runner.run(trips), waited() - before

    def close(self, peer: str, key: str) -> None:
        if (peer, key) in self._runners:
            self._runners.pop((peer, key)).close()

    def _new(self, peer: str) -> Runner:
        from benchmarks.peers import PEERS

        return PEERS[peer].start(self._setup.threads)


def waited() -> float:
    """Seconds that this process' threads were ready to run and had no CPU, so far; 0 where the system does not tell."""
    total = 0
    for path in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            total += int(path.read_text().split()[1])
    return total / 1e9


def check(case: Any, result: Any, expected: Any) -> None:
    """Raises unless the result is the exact one, `expected`.

    The operands are small integers: every order of summation has the same exact sum. A result of 16
    bits is allowed to be rounded twice (to 16 bits from each of several partial sums).
    """
    import numpy as np

    if result.shape != expected.shape:
        raise Failed(f"WRONG RESULT: shape {result.shape}, expected {expected.shape}")
    if np.array_equal(result, expected):
        return
    got, want = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    error = np.abs(got - want)
    if result.dtype.itemsize == 2 and result.dtype.kind != "i":
        ulp = np.abs(want) * (2.0**-7 if result.dtype.name == "bfloat16" else 2.0**-10)
        if (error <= ulp).all():
            return
    worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
    at = ", ".join(map(str, worst))
    raise Failed(f"WRONG RESULT: [{at}] is {got[worst]}, exactly {want[worst]} ({case.key})")


def _serve(pipe: Connection) -> None:
    setup: Setup = pipe.recv()
    os.sched_setaffinity(0, setup.cpus)
    from benchmarks.peers import Unavailable

    peers = _Peers(setup)
    while True:
        method, args = pipe.recv()
        try:
            answer = (True, getattr(peers, method)(*args))
        except (Failed, Unavailable) as error:
            answer = (False, str(error))
        except Exception as error:  # a peer's own failure is a line of the report, not the end of it
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        pipe.send(answer)


def _die_with_parent() -> None:
    """A stopped process does not notice that its parent is gone; the kernel is asked to end it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    # This file runs as __main__; what is pickled names benchmarks.worker. Serve from there.
    from benchmarks import worker

    _die_with_parent()
    with contextlib.suppress(EOFError):
        worker._serve(Connection(int(sys.argv[1])))
