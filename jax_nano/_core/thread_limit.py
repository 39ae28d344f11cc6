"""How many threads work for a call: as many as XLA's pool has, unless the user or the container allows fewer.

When JAX's CPU backend starts, XLA makes a pool with a thread for each CPU that the process may use, or as many as NPROC
says, and that number stays. What is limited here are the threads of it that share a call of ours, from one call to the
next. Results are the same bits for any number.
"""

from __future__ import annotations

import operator
import os
import re
import warnings
from types import ModuleType, TracebackType
from typing import Any, Final, SupportsIndex

from jax_nano._core import machine

ENVIRONMENT: Final = "JAX_NANO_THREADS"


def initial() -> int | None:
    """What JAX_NANO_THREADS says, or else the control group's share of CPUs; None: no limit.

    A value that is no number of threads is ignored with a warning.
    """
    value = os.environ.get(ENVIRONMENT, "").strip()
    if re.fullmatch(r"[0-9]+", value) and int(value) >= 1:
        return int(value)
    if value:
        warnings.warn(f"{ENVIRONMENT}={value}: expected a number of threads; it is ignored", stacklevel=2)
    return machine.quota()


class threads:  # noqa: N801  # called like a function
    """Limits how many threads work for a call of jax_nano's, in this process and until it is changed.

    `jax_nano.threads(4)` sets the limit, `jax_nano.threads(None)` lifts it, and `with jax_nano.threads(1): ...` limits
    a block: the former limit is back when it ends. Nothing is compiled again. XLA's own operations are not affected:
    they use the whole pool, whose size NPROC sets when the process starts.

    JAX runs programs asynchronously: what is to run within a block must be waited for within it, with
    `jax.block_until_ready`. In a process that has no kernels it does nothing.

    Args:
      most: at least 1; None: as many as XLA's pool has.

    Raises:
      TypeError: `most` is no integer.
      ValueError: it is below 1.
    """

    def __init__(self, most: SupportsIndex | None) -> None:
        limit = None if most is None else operator.index(most)
        if limit is not None and limit < 1:
            raise ValueError(f"threads({limit}): a call has at least one thread")
        self._before = current()
        _set(limit)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set(self._before)


def current() -> int | None:
    """The limit; None: there is none."""
    runtime = _runtime()
    limit: int | None = None if runtime is None else runtime.thread_limit()
    return limit


def _set(limit: int | None) -> None:
    runtime = _runtime()
    if runtime is not None:
        runtime.limit_threads(limit)


def _runtime() -> ModuleType | None:
    from jax_nano._core import native

    return native.runtime()


def control_by(threadpoolctl: Any) -> None:
    """Makes threadpoolctl list and limit the threads of jax_nano, as it does those of other libraries."""

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = "jax_nano"
        internal_api = "jax_nano"
        filename_prefixes = ("_runtime.",)

        def get_num_threads(self) -> int:
            return usable()

        def set_num_threads(self, num_threads: int) -> None:
            _set(num_threads)

        def get_version(self) -> str:
            from jax_nano._core import native

            return native.build().split()[0]

        def set_additional_attributes(self) -> None:
            self.limit = current()

    threadpoolctl.register(Controller)


def usable(devices: int = 1) -> int:
    """How many threads work for a call at most, in a process with so many CPU devices."""
    limit, pool = current(), machine.threads(devices)
    return pool if limit is None else min(limit, pool)
