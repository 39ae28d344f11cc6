"""What a generated function is called with: the struct that it shares with the runtime, by the names of its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import ir
from .ir import I64, Ptr, Value


class Arguments:
    """A struct in memory: ``args.m`` is its field ``m``, loaded where it is named.

    Args:
      at: its address.
      fields: the names of its fields, words of 8 bytes, in their order (``names`` of a tuple in ``_core/spec.py``).
      pointers: for fields that are addresses the dtype name of what is there; the others are sizes.
    """

    def __init__(self, at: Ptr, fields: Sequence[str], pointers: Mapping[str, str]):
        self._at, self._fields, self._pointers = at, fields, pointers

    def __getattr__(self, name: str) -> Any:
        if name not in self._fields:
            raise AttributeError(f"no field {name} among {', '.join(self._fields)}")
        return self.get(name)

    def get(self, name: str) -> Any:
        """The field of this name: ``args.get("m")`` is ``args.m``."""
        at = self._word(name)
        if name in self._pointers:
            return Ptr(at.as_type("ptr").load(), self._pointers[name])
        return I64(at.load())

    def number(self, name: str) -> Value:
        """A double as a scalar float32."""
        return ir.convert(self._word(name).as_type("float64").load(), "float64", "float32")

    def loaded(self) -> Given:
        """All of its fields, loaded here."""
        return Given({name: self.get(name) for name in self._fields})

    def _word(self, name: str) -> Ptr:
        return self._at.at(self._fields.index(name))


class Given:
    """Addresses and sizes by name: ``given.m``. They are values that exist already."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(f"no {name} among {', '.join(self.values)}") from None

    def but(self, **changed: Any) -> Given:
        """The same with some of them replaced, or with more."""
        return Given({**self.values, **changed})
