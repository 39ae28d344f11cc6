"""What generators draw from: the values that a place in a program sees, and arguments made when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from .program import Argument, Statement, Value

FLOATS: Final = ("float32", "bfloat16", "float16")
MAX_COUNT: Final = 100_000  # elements of a value
MAX_WORK: Final = 2**24  # multiply-adds of a product
LARGE: Final = 20.0
"""Values whose elements are larger are brought down before they are used again."""

_ACTIVATIONS: Final = (
    "jax.nn.relu({0})", "jnp.tanh({0})", "jax.nn.sigmoid({0})", "jax.nn.silu({0})", "jax.nn.gelu({0})",
    "jax.nn.gelu({0}, approximate=False)", "jnp.maximum({0}, 0)", "jnp.maximum({0}, 0.25)", "jnp.minimum({0}, 0.5)",
    "jax.nn.leaky_relu({0})", "jax.nn.softplus({0})", "jnp.sin({0})", "{0} * {0}", "jnp.abs({0})", "-{0}",
    "jax.nn.elu({0})", "jnp.clip({0}, -1, 1)", "jnp.exp(-jnp.abs({0}))", "jnp.sqrt(jnp.abs({0}) + 1)",
    "{0} / (1 + jnp.abs({0}))", "jnp.log1p(jnp.abs({0}))", "lax.rsqrt({0} * {0} + 1)", "jax.nn.relu6({0})",
)  # fmt: skip
_COMMON: Final = 6  # of these, which calls can compute


class Scope:
    """Where statements are added: the program, or a function in it. It sees what is around it."""

    def __init__(self, outer: Scope | None, values: Sequence[Value] = ()) -> None:
        self.outer = outer
        self.statements: list[Statement] = []
        self.values = list(values)

    @property
    def depth(self) -> int:
        return 0 if self.outer is None else 1 + self.outer.depth

    def visible(self) -> list[Value]:
        """The nearest and latest last."""
        return [*(self.outer.visible() if self.outer else ()), *self.values]


class Drawing:
    """Statements are added to a scope; each operation gives the value that it made."""

    def __init__(self, rng: np.random.Generator, seed: int, kind: str) -> None:
        self.rng, self.seed, self.kind = rng, seed, kind
        self.names = 0
        self.top = Scope(None)
        self.arguments: list[Argument] = []
        self.x64 = bool(kind not in ("small", "decoding") and rng.random() < 0.06)
        self.dtype = "float64" if self.x64 else str(rng.choice(FLOATS, p=(0.35, 0.4, 0.25)))
        self.mode = str(rng.choice(["pmap", "sharded", "jit"], p=[0.4, 0.3, 0.3])) if kind == "parallel" else "jit"
        self.dims = self._dims()
        self.forward = False
        """Whether what is added is differentiated forward, which nothing with its own backward pass can be."""

    def _dims(self) -> list[int]:
        """Few sizes, so that arrays of a program fit each other."""
        rng = self.rng
        if self.kind == "small":
            return [int(x) for x in rng.integers(1, 9, 2)] + [int(rng.choice([2, 4, 8]))]
        pools = (
            (0.5, lambda: int(rng.integers(2, 33))),
            (0.28, lambda: int(rng.choice([8, 16, 32, 64]))),
            (0.12, lambda: int(rng.integers(33, 71))),
            (0.06, lambda: int(rng.choice([128, 129, 200, 256, 260, 384]))),
            (0.036, lambda: 1),
            (0.004, lambda: 0),
        )
        chances = [p for p, _ in pools]
        dims = [pools[rng.choice(len(pools), p=chances)][1]() for _ in range(int(rng.integers(2, 5)))]
        if self.kind == "parallel":
            dims = [max(n, 1) for n in dims]
            dims[0] = 4 * int(rng.integers(1, 9))
        return dims

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def choose(self, options: Sequence[str]) -> str:
        return options[self.rng.integers(len(options))]

    def dim(self) -> int:
        return self.dims[self.rng.integers(len(self.dims))]

    def shape(self, ndim: int) -> tuple[int, ...]:
        """Small in front, so that arrays of many dimensions are not large."""
        shape = [self.dim() for _ in range(ndim)]
        for i in range(ndim - 2):
            shape[i] = min(shape[i], int(self.rng.integers(1, 5)))
        if self.mode == "sharded" and ndim > 1 and self.chance(0.7):
            shape[0] = 4 * max(1, shape[0] // 4)
        while math.prod(shape) > MAX_COUNT:
            shape[int(np.argmax(shape))] //= 2
        return tuple(shape)

    def some_dtype(self) -> str:
        if self.chance(0.8):
            return self.dtype
        if self.x64:
            return self.choose(("float32", "float64"))
        return self.choose((*FLOATS, "int8"))

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def argument(self, shape: tuple[int, ...], dtype: str, size: float = 1.0) -> Value:
        number = len(self.arguments)
        value = Value(f"a{number}", tuple(shape), dtype, size if "float" in dtype else 1.0)
        self.arguments.append(Argument(value, number, mapped=not shape or self.chance(0.6)))
        self.top.values.insert(0, value)
        return value

    def index(self, scope: Scope, limit: int) -> Value:
        """A position below limit: an argument, or one that something near holds."""
        number = len(self.arguments)
        value = Value(f"a{number}", (), "int32")
        self.arguments.append(Argument(value, number, "index", max(limit, 1)))
        return value

    def pick(self, scope: Scope, test: Callable[[Value], bool] = lambda x: True) -> Value | None:
        """A visible value, mostly one of the latest."""
        found = [x for x in scope.visible() if test(x)]
        if not found:
            return None
        back = (
            min(int(self.rng.geometric(0.4)), len(found)) if self.chance(0.85) else self.rng.integers(1, len(found) + 1)
        )
        return self.tame(scope, found[-int(back)])

    def array(self, scope: Scope, least: int = 2, most: int = 5) -> Value:
        """A float array of that many dimensions."""
        found = self.pick(scope, lambda x: x.is_float and least <= x.ndim <= most)
        return found or self.argument(self.shape(max(least, min(2, most))), self.dtype)

    def need(self, scope: Scope, shape: tuple[int, ...], dtype: str, size: float = 1.0, reuse: float = 0.6) -> Value:
        """One of this type: there already, or a new argument."""
        found = [x for x in scope.visible() if x.type == (tuple(shape), dtype)]
        if found and self.chance(reuse):
            return self.tame(scope, found[self.rng.integers(len(found))])
        if len(self.arguments) > 14 and found:
            return self.tame(scope, found[-1])
        return self.argument(shape, dtype, size)

    def emit(
        self, scope: Scope, text: str, operands: Sequence[Value], shape: Sequence[int], dtype: str, size: float = 1.0
    ) -> Value:
        value = Value(self.name(), tuple(int(x) for x in shape), dtype, max(float(size), 1e-6))
        scope.statements.append(Statement((value,), text, tuple(operands)))
        scope.values.append(value)
        return value

    def tame(self, scope: Scope, x: Value) -> Value:
        """Not too large to go on with."""
        if not x.is_float or 1e-3 < x.size < LARGE or not math.isfinite(x.size):
            return x
        if self.chance(0.5):
            factor = float(f"{1 / x.size:.1g}")
            return self.emit(scope, f"{{0}} * {factor}", [x], x.shape, x.dtype)
        return self.emit(scope, "jnp.tanh({0})", [x], x.shape, x.dtype)

    def _part(self, n: int) -> tuple[int, int]:
        size = int(self.rng.integers(1, n + 1))
        if self.chance(0.4):
            size = max(1, n // 2)
        return int(self.rng.integers(0, n - size + 1)), size

    def _places(self, n: int, limit: int) -> Value:
        number = len(self.arguments)
        value = Value(f"a{number}", (n,), "int32")
        self.arguments.append(Argument(value, number, "index", max(limit, 1)))
        return value

    def activation(self, scope: Scope, y: Value) -> Value:
        y = self.tame(scope, y)
        text = self.choose(_ACTIVATIONS[:_COMMON] if self.chance(0.75) else _ACTIVATIONS)
        size = y.size**2 if text == "{0} * {0}" else y.size
        return self.emit(scope, text, [y], y.shape, y.dtype, size)

    def convert(self, scope: Scope, x: Value) -> Value:
        others = [y for y in (*FLOATS, *(("float64",) if self.x64 else ())) if y != x.dtype]
        dtype = "float32" if x.dtype in FLOATS[1:] and self.chance(0.6) else self.choose(others)
        return self.emit(scope, f"{{0}}.astype(jnp.{dtype})", [x], x.shape, dtype, x.size)

    def fill(self, scope: Scope, count: int) -> None:
        """Adds that many groups of operations."""
        raise NotImplementedError
