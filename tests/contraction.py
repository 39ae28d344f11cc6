"""einsum notation for the runtime: subscripts to integer labels, and random contractions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import reference

from jax_nano import _runtime


@dataclass(frozen=True)
class Contraction:
    """A two-operand einsum with sizes, e.g. ``Contraction("bqhd,bkhd->bhqk", b=2, q=5, h=3, d=8, k=7)``."""

    subscripts: str
    sizes: dict[str, int]

    def __init__(self, subscripts: str, **sizes: int) -> None:
        object.__setattr__(self, "subscripts", subscripts)
        object.__setattr__(self, "sizes", sizes)

    @property
    def terms(self) -> tuple[str, str, str]:
        operands, out = self.subscripts.split("->")
        lhs, rhs = operands.split(",")
        return lhs, rhs, out

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.sizes[x] for x in term) for term in self.terms]

    @property
    def labels(self) -> list[list[int]]:
        return [[ord(x) for x in term] for term in self.terms]

    def plan(
        self, *, dtypes: tuple[str, str, str] = ("float32",) * 3, threads: int = 1, **where: object
    ) -> dict[str, object]:
        """What the runtime would do; ``where``: target and caches."""
        return dict(_runtime.plan(*self.shapes[:2], *self.labels, *dtypes, threads, **where))

    def dot(
        self, lhs: np.ndarray, rhs: np.ndarray, *, out: str | None = None, threads: int = 1, algorithm: str = "default"
    ) -> np.ndarray:
        """The runtime's result, of lhs's dtype unless told, in memory full of poison beforehand."""
        result = reference.poisoned(self.shapes[2], out or lhs.dtype)
        addresses = (lhs.ctypes.data, rhs.ctypes.data, result.ctypes.data)
        dtypes = (x.dtype.name for x in (lhs, rhs, result))
        _runtime.testing.dot(*addresses, *self.shapes[:2], *self.labels, *dtypes, threads, algorithm)
        return result


def random_contraction(rng: np.random.Generator) -> Contraction:
    """Any number of dimensions of each kind in any order, as long as the result does not end in a batch dimension."""
    letters = iter("abcdefghijkl")
    kinds = {kind: [next(letters) for _ in range(rng.integers(0, 3))] for kind in "bmnk"}
    lhs, rhs, out = ([x for kind in term for x in kinds[kind]] for term in ("bmk", "bnk", "bmn"))
    for term in (lhs, rhs, out):
        rng.shuffle(term)
    sizes = {x: int(rng.choice([1, 2, 3, 5, 9], p=[0.25, 0.2, 0.2, 0.2, 0.15])) for x in "".join([*lhs, *rhs])}
    free = [x for x in out if x in kinds["m"] + kinds["n"] and sizes[x] > 1]
    if free:
        out.remove(free[-1])
        out.append(free[-1])
    return Contraction(f"{''.join(lhs)},{''.join(rhs)}->{''.join(out)}", **sizes)
