"""What all generated kernels have: a name, a target, MLIR, and facts that the runtime is told."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

from jax_nano._core import spec

from .target import Target


class Generated(abc.ABC):
    """One generated function with everything behind it.

    Attributes:
      INFO: the fields of the struct that the runtime knows it by.
      target: the instruction set it is compiled for.
    """

    INFO: ClassVar[Sequence[spec.Field]]
    target: Target

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    @abc.abstractmethod
    def signature(self) -> str:
        """The dtypes that it is for, for people."""

    @property
    def symbol(self) -> str:
        """The C identifier of the generated function."""
        return "jax_nano_" + self.name.replace("-", "_")

    @abc.abstractmethod
    def mlir(self) -> str:
        """The kernel's verified MLIR module, as composed."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """The values of the fields of ``INFO``, but for its functions, its name and its target's."""
