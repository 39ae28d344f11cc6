"""Random programs: from a seed, always the same one.

What is drawn is typed, so nearly every program runs; sizes of values are followed, so that sums neither overflow nor
vanish. Discontinuous functions (comparisons, rounding to integers) act on exact values only, or are few.

The kinds differ in what they are rich in. Faults were found where a rewrite met something unusual around a product, so
operations are drawn mostly in groups that belong together: a product and what may follow it, an array, its update and
later reads of both, a loop and what it carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from .drawing import Scope
from .functions import Functions
from .program import Argument, Program, Statement, Value

# How often each group of operations is drawn.
_WEIGHTS: Final[dict[str, dict[str, float]]] = {
    "layers": {"layer": 6, "product": 2, "elementwise": 1, "move": 1.5, "norm": 1, "reduction": 1, "nested": 0.5},
    "products": {"product": 6, "move": 4, "elementwise": 1.5, "reduction": 1.5, "layer": 1},
    "updates": {"update": 5, "product": 3, "elementwise": 2, "move": 1.5, "layer": 1, "loop": 0.7},
    "loops": {"loop": 2, "stationary": 2, "product": 2, "layer": 1.5, "elementwise": 1, "move": 1, "update": 1},
    "small": {"loop": 3, "product": 2.5, "layer": 1, "elementwise": 1, "nested": 1, "move": 1},
    "reductions": {
        "product": 3, "reduction": 4, "norm": 2, "attention": 1.5, "convolution": 0.8, "elementwise": 1, "move": 1,
    },
    "transforms": {
        "nested": 3, "layer": 2, "product": 1.5, "elementwise": 1, "move": 1, "reduction": 1, "convolution": 0.3,
    },
    "attentions": {
        "attend": 5, "cache": 0.5, "product": 1, "update": 1, "loop": 1, "nested": 1.2, "move": 1, "elementwise": 0.7,
        "norm": 0.3,
    },
    "quantised": {
        "quantised": 5, "product": 1, "update": 1, "loop": 0.7, "nested": 1, "move": 1, "elementwise": 0.7, "norm": 0.3,
    },
    "decoding": {"cache": 2.5, "layer": 2, "norm": 1, "loop": 1, "stationary": 1, "product": 1, "move": 0.7},
    "mixed": {
        "layer": 2, "product": 2, "move": 2, "elementwise": 1.5, "reduction": 1, "norm": 0.5, "update": 1.5,
        "loop": 1, "nested": 1.5, "attention": 0.4, "cache": 0.4, "convolution": 0.3, "stationary": 0.5,
    },
    "parallel": {"layer": 2, "product": 2, "move": 1, "reduction": 1, "nested": 0.5, "sharded": 1.5, "update": 0.7},
}  # fmt: skip
KINDS: Final = tuple(_WEIGHTS)


def generate(seed: int, kinds: Sequence[str] = KINDS) -> Program:
    """The program of this seed, of one of these kinds."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(kinds)))
    return _Generator(rng, seed, kind).program()


class _Generator(Functions):
    def program(self) -> Program:
        rng = self.rng
        for _ in range(int(rng.integers(1, 4))):
            self.argument(self.shape(int(rng.choice([1, 2, 3, 4], p=[0.1, 0.55, 0.25, 0.1]))), self.some_dtype())
        self.fill(self.top, int(rng.integers(1, 4 if self.kind in ("loops", "transforms", "decoding") else 6)))
        results = self._results()
        return Program(
            self.seed,
            self.kind,
            tuple(self._donations(results)),
            tuple(self.top.statements),
            results,
            self.mode,
            self.x64,
        ).without_dead_code()

    def _results(self) -> tuple[Value, ...]:
        """What nothing reads, and some of the rest."""
        made = [x for s in self.top.statements for x in s.targets]
        read = {x.name for s in _all(self.top.statements) for x in s.operands}
        read |= {x.name for s in _all(self.top.statements) for b in s.bodies for x in b.results}
        sinks = [x for x in made if x.name not in read][-6:]
        others = [x for x in made if x.name in read]
        count = int(self.rng.choice([0, 1, 2], p=[0.6, 0.25, 0.15]))
        extra = [others[i] for i in self.rng.permutation(len(others))[:count]]
        results = [*sinks, *extra] or [self.top.values[-1]]
        self.rng.shuffle(results)
        return tuple(results)

    def _donations(self, results: Sequence[Value]) -> list[Argument]:
        """Some arguments, mostly those that a result can take over."""
        if self.rng.random() < (0.4 if self.kind in ("updates", "decoding", "loops") else 0.75):
            return self.arguments
        types = {x.type for x in results}
        chance = {True: 0.7, False: 0.1}
        return [
            Argument(
                x.value, x.number, x.fill, x.limit, bool(self.rng.random() < chance[x.value.type in types]), x.mapped
            )
            for x in self.arguments
        ]

    def fill(self, scope: Scope, count: int) -> None:
        weights = _WEIGHTS[self.kind]
        groups = {
            "layer": self.layer, "product": self.product, "elementwise": self.elementwise, "move": self.move,
            "norm": self.norm, "reduction": self.reduction, "update": self.update, "loop": self.loop,
            "nested": self.nested, "attention": self.attention, "cache": self.cache, "sharded": self.over_devices,
            "convolution": self.convolution, "attend": self.attend, "stationary": self.stationary,
            "quantised": self.quantised,
        }  # fmt: skip
        names = [x for x in weights if scope.depth < 2 or x not in ("loop", "nested", "sharded", "stationary")]
        p = np.array([weights[x] for x in names])
        for _ in range(count):
            groups[str(self.rng.choice(names, p=p / p.sum()))](scope)


def _all(statements: Sequence[Statement]) -> list[Statement]:
    """With those in bodies."""
    return [y for x in statements for y in (x, *_all([s for b in x.bodies for s in b.statements]))]
