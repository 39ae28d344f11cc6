"""Runs a function once a module has been imported, without importing it: for modules of JAX that few programs need.

It imports the standard library alone: `import jax_nano` uses it before it is known whether JAX is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final, TypeAlias

Action: TypeAlias = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Calls `action` with the module of that name: now if it has been imported, else right after its import.

    An exception of the action becomes a RuntimeWarning: it must not break somebody else's import.
    """
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        _act(module, [action])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(action)


def _act(module: ModuleType, actions: Sequence[Action]) -> None:
    for action in actions:
        try:
            action(module)
        except Exception as error:
            text = f"jax_nano does not take part in {module.__name__}: {error!r}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)


@cache
def in_main_interpreter() -> bool:
    """Whether this is not one of the further interpreters that a process may have.

    Modules of extensions that are for one interpreter say so when one with a lock of its own imports them. In those
    that share the lock (CPython's "legacy" ones) jaxlib ends the process, which is why somebody asks first.
    """
    for name in ("_interpreters", "_xxsubinterpreters"):  # as CPython calls it from 3.13 on, and before
        with contextlib.suppress(ImportError):
            interpreters = importlib.import_module(name)
            return bool(interpreters.get_current() == interpreters.get_main())
    return True


class _Finder(MetaPathFinder):
    """Finds the modules that actions wait for, through the other finders, and makes their loaders run the actions."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        actions = self.waiting.pop(name, None)
        if actions is None:
            return None
        spec = importlib.util.find_spec(name)  # which does not find us again
        if spec is None or spec.loader is None:
            self.waiting[name] = actions
            return spec
        spec.loader = _Loader(spec.loader, actions)
        return spec


class _Loader(Loader):
    """A module's own loader, which runs actions after it."""

    def __init__(self, loader: Any, actions: list[Action]) -> None:
        self._loader = loader
        self._actions = actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self._loader
        try:
            self._loader.exec_module(module)
        except BaseException:
            _finder.waiting.setdefault(spec.name, []).extend(self._actions)
            raise
        _act(module, self._actions)


_finder: Final = _Finder()
