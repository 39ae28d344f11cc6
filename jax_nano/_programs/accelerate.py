"""The switch: whether the products of a program that XLA compiles become calls of our kernels.

XLA compiles on threads of its own, so the setting must be part of the program: when JAX has lowered a program, in the
thread and in the context of its caller, the module gets a mark; and the transformation that XLA calls at the end of its
passes changes modules with the mark and no others. The mark is part of the module, and so of the key of the persistent
compilation cache; the switch is a user context of JAX, and so part of the key of every cache in the process. A program
compiled with the switch on is never taken for one compiled with it off.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, Final, ParamSpec, TypeVar, overload

import jax
import numpy as np

from jax_nano._core import jax_compat as compat
from jax_nano._core import native as _native
from jax_nano._core import record, tested_jax
from jax_nano._dispatch import decision
from jax_nano._ops import cost_analysis as cost_analysis  # importing it teaches XLA's analysis about our calls

MARK: Final = "jax_nano.accelerate"
_VARIABLE: Final = "JAX_NANO_ACCELERATE"
_SWITCH: Final = {
    **dict.fromkeys(("1", "on", "true", "yes"), True),
    **dict.fromkeys(("0", "off", "false", "no", ""), False),
}

# Functions whose body does not run when they are called, but later.
_RUN_LATER: Final = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_log = logging.getLogger("jax_nano")


class _Hook:
    """The transformation that is registered with XLA, once for the process and for good.

    It stays when the switch is off: a program lowered while it was on may be compiled at any time. It is registered
    when the first such program is lowered, because registering may start JAX's backends: an import should not do that,
    and a plugin, which is called while they start, cannot.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self._registered = False
        self.failures: list[str] = []
        """The warnings so far: programs that run without acceleration because something went wrong, and why."""

    def install(self) -> None:
        """Raises RuntimeError where this is not possible."""
        with self._lock:
            if self._installed:
                return
            native = _native.runtime()
            refusal = _native.refusal()
            if refusal is not None:
                raise RuntimeError(f"jax_nano.accelerate: {tested_jax.describe()}: {refusal}")
            _native.register()  # programs from the compilation cache have calls that nobody writes here
            if native is None or not native.selected_target():
                raise RuntimeError(
                    "jax_nano.accelerate: there are no kernels for this machine (`python -m jax_nano info` says why)"
                )
            try:
                compat.require_hlo_transformations()
            except compat.NoHook as error:
                raise RuntimeError(
                    f"jax_nano.accelerate {error}. jax_nano.matmul and the other functions work with this version"
                ) from None
            compat.mark_lowered_modules(_mark)
            compat.lower_scaled_matmul()
            compat.retry_failed_compilations(MARK, record.recorded, self._not_compiled)
            self._installed = True

    def register(self) -> None:
        """Before the first program with a mark is compiled."""
        with self._lock:
            if not self._registered:
                compat.register_hlo_transformation("jax_nano", self._transform)
                self._registered = True

    def _transform(self, serialized: bytes) -> bytes | None:
        # A module without these is not changed; looking for them is cheaper than parsing it. Most modules are small
        # programs that JAX runs op by op, without a product.
        if MARK.encode() not in serialized or b"dot" not in serialized:
            return None
        try:
            return _rewritten(serialized)
        except Exception as error:  # of any kind: a program that XLA can compile must run
            self._failed("it could not be rewritten", error)
            return None

    def _not_compiled(self, program: str, before: record.Recorded, error: Exception) -> None:
        record.withdraw(program, before, "XLA did not compile the program with our calls")
        self._failed(f"XLA did not compile {program} with our calls", error)

    def _failed(self, what: str, error: Exception) -> None:
        """Says once that programs run without acceleration."""
        text = f"jax_nano.accelerate failed, and the program runs without it: {what}: {error!r}"
        with self._lock:
            known = text in self.failures
            self.failures.append(text)
        if known:
            return
        _log.debug(text, exc_info=error)
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=1)
        except RuntimeWarning:  # turned into an error, which must not reach XLA
            _log.error(text)


def _rewritten(serialized: bytes) -> bytes | None:
    """The module with its products rewritten, None if it stays as it is."""
    from jax_nano._core import hlo
    from jax_nano._programs import rewrite, verify  # only where there is something to do: they need protobuf

    module = hlo.Module(serialized)
    mark = module.attribute(MARK)
    if mark is None:
        return None
    program_shape = module.program_shape()
    products = rewrite.rewrite(module, _policy_of(mark))
    is_changed = module.is_changed or any(x.declined is None for x in products)
    changed = module.serialized() if is_changed else None
    try:
        if changed is not None:
            verify.check(module, program_shape)
    except verify.Invalid:
        products = [x._replace(declined="the rewritten program was not valid", epilogue="") for x in products]
        raise
    finally:
        for product in products:
            record.add(product)
    return changed


_hook: Final = _Hook()


def _mark() -> dict[str, str]:
    """The mark of a module that is lowered now: it names everything that its rewriting depends on."""
    if not accelerate.enabled:
        return {}
    _hook.register()
    native = _native.runtime()
    assert native is not None
    return {MARK: f"{_native.build()}, abi {_native.ABI}, {native.selected_target()}, {decision.policy}"}


def _policy_of(mark: str) -> decision.Policy:
    """The policy that a module was marked with, which may not be that of the moment when XLA compiles it."""
    return decision.Policy(declines=mark.endswith(str(decision.Policy(declines=True))))


class Scope(ContextDecorator):
    """`with accelerate():`, for one thread; also a decorator."""

    def __init__(self, on: bool) -> None:
        self._on = on
        self._context: Any = None

    def __call__(self, func: Callable[_P, _R]) -> Callable[_P, _R]:  # type: ignore[override]  # keeps its type
        if any(is_one(func) for is_one in _RUN_LATER):
            raise TypeError(
                f"jax_nano.accelerate cannot wrap {func!r}, whose body runs after the call: enter the scope in there"
            )
        return super().__call__(func)

    def __enter__(self) -> None:
        if self._context is not None:
            raise RuntimeError("this scope has been entered already: call jax_nano.accelerate() for another one")
        accelerate._check(self._on)
        self._context = accelerate._switch(self._on)
        self._context.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)
        self._context = None

    def _recreate_cm(self) -> Scope:  # a decorated function may call itself, or run in several threads
        return Scope(self._on)


class Accelerate:
    """Runs the matrix products of unmodified programs on jax_nano's kernels.

    Every product that XLA would compile for the CPU becomes one of ours: in any library, forward and backward, under
    any transformation, eager or jitted, unless there is no kernel for it or it is too small to gain.

        with jax_nano.accelerate():        # in this thread
            step(params, batch)

        jax_nano.accelerate.enable()       # in the whole process, until disable()

    or `@jax_nano.accelerate` before a function, or `JAX_NANO_ACCELERATE=1` in the environment.
    `with accelerate(False):` makes an exception. The innermost scope of a thread decides; without one, what `enable` or
    `disable` said last; else the environment.

    The switch is read when a program is lowered, that is when a jitted function is first called with new shapes or in a
    new setting. Compiled programs are kept for each setting, so switching costs nothing the second time.
    """

    def __init__(self) -> None:
        # Part of the key of JAX's caches. None stands for what the environment says, which never changes.
        self._switch = jax.make_user_context(None)

    @overload
    def __call__(self, on: bool = True) -> Scope: ...

    @overload
    def __call__(self, on: Callable[_P, _R]) -> Callable[_P, _R]: ...

    def __call__(self, on: Any = True) -> Any:
        """A scope in which the calling thread accelerates programs, or with `on=False` does not.

        Given a function, as by `@accelerate` without parentheses, it returns one that runs in such a scope.

        Raises:
          TypeError: `on` is neither True, False nor a function, or one whose body would run after the scope.
        """
        if isinstance(on, bool | np.bool_):
            return Scope(bool(on))
        if callable(on) and not isinstance(on, type):
            return Scope(True)(on)
        raise TypeError(
            f"jax_nano.accelerate takes True, False or a function, got {on!r}; for the whole process there are"
            " accelerate.enable() and accelerate.disable()"
        )

    @property
    def enabled(self) -> bool:
        """Whether a program that this thread lowers now is accelerated."""
        value = self._switch.value
        return _environment if value is None else value

    def enable(self) -> None:
        """Accelerate programs in every thread. Twice is as good as once.

        Raises:
          RuntimeError: in a function that is being traced; or JAX is too old; or the machine has no kernels.
        """
        self._check(True)
        self._switch.set_global(True)

    def disable(self) -> None:
        """Undo `enable`, or what the environment says.

        Raises:
          RuntimeError: in a function that is being traced.
        """
        self._check(False)
        self._switch.set_global(False)

    def _check(self, on: bool) -> None:
        """RuntimeError if this is not the moment to turn the switch."""
        if on:
            _hook.install()
        if on != self.enabled and compat.in_jit():
            raise RuntimeError(
                "jax_nano.accelerate cannot be switched inside a function that is being traced: it acts on whole"
                " programs. Enter the scope, or call enable() or disable(), where the jitted function is called"
            )

    def __repr__(self) -> str:
        return f"jax_nano.accelerate ({'on' if self.enabled else 'off'})"


def _read_environment() -> bool:
    value = os.environ.get(_VARIABLE, "").strip().lower()
    if not _SWITCH.get(value, True):
        return False
    try:
        if value not in _SWITCH:
            raise ValueError(f"expected one of {', '.join(filter(None, _SWITCH))}")
        _hook.install()
    except (RuntimeError, ValueError) as error:  # a program that knows nothing of jax_nano must run
        warnings.warn(f"{_VARIABLE}={value} has no effect: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


accelerate: Final = Accelerate()
record.seen_again = lambda: accelerate.enabled
_environment: Final = _read_environment()
