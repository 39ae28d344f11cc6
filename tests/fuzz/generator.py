"""Random programs: from a seed, always the same one.

What is drawn is typed, so nearly every program runs; sizes of values are followed, so that sums neither overflow nor
vanish. Discontinuous functions (comparisons, rounding to integers) act on exact values only, or are few.

The kinds differ in what they are rich in. Faults were found where a rewrite met something unusual around a product, so
operations are drawn mostly in groups that belong together: a product and what may follow it, an array, its update and
later reads of both, a loop and what it carries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from .program import Argument, Block, Program, Statement, Value

FLOATS: Final = ("float32", "bfloat16", "float16")
MAX_COUNT: Final = 100_000  # elements of a value
MAX_WORK: Final = 2**24  # multiply-adds of a product
LARGE: Final = 20.0
"""Values whose elements are larger are brought down before they are used again."""

# How often each group of operations is drawn.
_WEIGHTS: Final[dict[str, dict[str, float]]] = {
    "layers": {"layer": 6, "product": 2, "elementwise": 1, "move": 1.5, "norm": 1, "reduction": 1, "nested": 0.5},
    "products": {"product": 6, "move": 4, "elementwise": 1.5, "reduction": 1.5, "layer": 1},
    "updates": {"update": 5, "product": 3, "elementwise": 2, "move": 1.5, "layer": 1, "loop": 0.7},
    "loops": {"loop": 3, "product": 2, "layer": 1.5, "elementwise": 1, "move": 1, "update": 1},
    "small": {"loop": 3, "product": 2.5, "layer": 1, "elementwise": 1, "nested": 1, "move": 1},
    "reductions": {"product": 3, "reduction": 4, "norm": 2, "attention": 1.5, "elementwise": 1, "move": 1},
    "transforms": {"nested": 3, "layer": 2, "product": 1.5, "elementwise": 1, "move": 1, "reduction": 1},
    "decoding": {"cache": 2.5, "layer": 2, "norm": 1, "loop": 1, "product": 1, "move": 0.7},
    "mixed": {
        "layer": 2, "product": 2, "move": 2, "elementwise": 1.5, "reduction": 1, "norm": 0.5, "update": 1.5,
        "loop": 1, "nested": 1.5, "attention": 0.4, "cache": 0.4,
    },
    "parallel": {"layer": 2, "product": 2, "move": 1, "reduction": 1, "nested": 0.5, "sharded": 1.5, "update": 0.7},
}  # fmt: skip
KINDS: Final = tuple(_WEIGHTS)

_ACTIVATIONS: Final = (
    "jax.nn.relu({0})", "jnp.tanh({0})", "jax.nn.sigmoid({0})", "jax.nn.silu({0})", "jax.nn.gelu({0})",
    "jax.nn.gelu({0}, approximate=False)", "jnp.maximum({0}, 0)", "jnp.maximum({0}, 0.25)", "jnp.minimum({0}, 0.5)",
    "jax.nn.leaky_relu({0})", "jax.nn.softplus({0})", "jnp.sin({0})", "{0} * {0}", "jnp.abs({0})", "-{0}",
    "jax.nn.elu({0})", "jnp.clip({0}, -1, 1)", "jnp.exp(-jnp.abs({0}))", "jnp.sqrt(jnp.abs({0}) + 1)",
    "{0} / (1 + jnp.abs({0}))", "jnp.log1p(jnp.abs({0}))", "lax.rsqrt({0} * {0} + 1)", "jax.nn.relu6({0})",
)  # fmt: skip
_COMMON: Final = 6  # of these, which calls can compute

_SCALES: Final = ("0.5", "0.125", "3", "1.7", "-1", "1e-3", "0.1", "2")
_ODD_SCALES: Final = ("inf", "nan", "-inf", "1e5", "7e4", "1e-30", "0.0", "1e30")


def generate(seed: int, kinds: Sequence[str] = KINDS) -> Program:
    """The program of this seed, of one of these kinds."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(kinds)))
    return _Generator(rng, seed, kind).program()


class _Scope:
    """Where statements are added: the program, or a function in it. It sees what is around it."""

    def __init__(self, outer: _Scope | None, values: Sequence[Value] = ()) -> None:
        self.outer = outer
        self.statements: list[Statement] = []
        self.values = list(values)

    @property
    def depth(self) -> int:
        return 0 if self.outer is None else 1 + self.outer.depth

    def visible(self) -> list[Value]:
        """The nearest and latest last."""
        return [*(self.outer.visible() if self.outer else ()), *self.values]


class _Generator:
    def __init__(self, rng: np.random.Generator, seed: int, kind: str) -> None:
        self.rng, self.seed, self.kind = rng, seed, kind
        self.names = 0
        self.top = _Scope(None)
        self.arguments: list[Argument] = []
        self.x64 = bool(kind not in ("small", "decoding") and rng.random() < 0.06)
        self.dtype = "float64" if self.x64 else str(rng.choice(FLOATS, p=(0.35, 0.4, 0.25)))
        self.mode = str(rng.choice(["pmap", "sharded", "jit"], p=[0.4, 0.3, 0.3])) if kind == "parallel" else "jit"
        self.dims = self._dims()

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
            (0.04, lambda: 1),
        )
        chances = [p for p, _ in pools]
        dims = [pools[rng.choice(len(pools), p=chances)][1]() for _ in range(int(rng.integers(2, 5)))]
        if self.kind == "parallel":
            dims[0] = 4 * int(rng.integers(1, 9))
        return dims

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

    # --- drawing ---------------------------------------------------------------------------------

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

    def index(self, scope: _Scope, limit: int) -> Value:
        """A position below limit: an argument, or one that something near holds."""
        number = len(self.arguments)
        value = Value(f"a{number}", (), "int32")
        self.arguments.append(Argument(value, number, "index", max(limit, 1)))
        return value

    def pick(self, scope: _Scope, test: Callable[[Value], bool] = lambda x: True) -> Value | None:
        """A visible value, mostly one of the latest."""
        found = [x for x in scope.visible() if test(x)]
        if not found:
            return None
        back = (
            min(int(self.rng.geometric(0.4)), len(found)) if self.chance(0.85) else self.rng.integers(1, len(found) + 1)
        )
        return self.tame(scope, found[-int(back)])

    def array(self, scope: _Scope, least: int = 2, most: int = 5) -> Value:
        """A float array of that many dimensions."""
        found = self.pick(scope, lambda x: x.is_float and least <= x.ndim <= most)
        return found or self.argument(self.shape(max(least, min(2, most))), self.dtype)

    def need(self, scope: _Scope, shape: tuple[int, ...], dtype: str, size: float = 1.0, reuse: float = 0.6) -> Value:
        """One of this type: there already, or a new argument."""
        found = [x for x in scope.visible() if x.type == (tuple(shape), dtype)]
        if found and self.chance(reuse):
            return self.tame(scope, found[self.rng.integers(len(found))])
        if len(self.arguments) > 14 and found:
            return self.tame(scope, found[-1])
        return self.argument(shape, dtype, size)

    def emit(
        self, scope: _Scope, text: str, operands: Sequence[Value], shape: Sequence[int], dtype: str, size: float = 1.0
    ) -> Value:
        value = Value(self.name(), tuple(int(x) for x in shape), dtype, max(float(size), 1e-6))
        scope.statements.append(Statement((value,), text, tuple(operands)))
        scope.values.append(value)
        return value

    def tame(self, scope: _Scope, x: Value) -> Value:
        """Not too large to go on with."""
        if not x.is_float or 1e-3 < x.size < LARGE or not math.isfinite(x.size):
            return x
        if self.chance(0.5):
            factor = float(f"{1 / x.size:.1g}")
            return self.emit(scope, f"{{0}} * {factor}", [x], x.shape, x.dtype)
        return self.emit(scope, "jnp.tanh({0})", [x], x.shape, x.dtype)

    def fill(self, scope: _Scope, count: int) -> None:
        weights = _WEIGHTS[self.kind]
        groups = {
            "layer": self.layer, "product": self.product, "elementwise": self.elementwise, "move": self.move,
            "norm": self.norm, "reduction": self.reduction, "update": self.update, "loop": self.loop,
            "nested": self.nested, "attention": self.attention, "cache": self.cache, "sharded": self.over_devices,
        }  # fmt: skip
        names = [x for x in weights if scope.depth < 2 or x not in ("loop", "nested", "sharded")]
        p = np.array([weights[x] for x in names])
        for _ in range(count):
            groups[str(self.rng.choice(names, p=p / p.sum()))](scope)

    # --- products --------------------------------------------------------------------------------

    def product(self, scope: _Scope) -> Value | None:
        forms = (
            (3.0, self.matmul), (2.0, self.dot_general), (2.0, self.einsum), (1.2, self.with_vector),
            (1.0, self.batched),
            (0.6, self.with_itself), (0.8, self.of_bytes), (0.5, self.of_two_dtypes), (0.5, self.custom),
        )  # fmt: skip
        p = np.array([x for x, _ in forms])
        return forms[self.rng.choice(len(forms), p=p / p.sum())][1](scope)

    def result(self, dtype: str) -> tuple[str, str]:
        """What preferred_element_type says, and the dtype of the result."""
        if dtype in ("bfloat16", "float16") and self.chance(0.3):
            return ", preferred_element_type=jnp.float32", "float32"
        return "", dtype

    def matmul(self, scope: _Scope, n: int | None = None) -> Value:
        x = self.array(scope)
        k, n = x.shape[-1], n or self.columns(x.count)
        size = x.size * math.sqrt(k) * 0.5
        form = self.rng.random()
        if form < 0.6:
            w = self.need(scope, (k, n), x.dtype, 0.5)
            if self.chance(0.6):
                return self.emit(scope, "{0} @ {1}", [x, w], (*x.shape[:-1], n), x.dtype, size)
            preferred, dtype = self.result(x.dtype)
            return self.emit(scope, f"jnp.dot({{0}}, {{1}}{preferred})", [x, w], (*x.shape[:-1], n), dtype, size)
        if form < 0.8:
            w = self.need(scope, (n, k), x.dtype, 0.5)
            return self.emit(scope, "{0} @ {1}.T", [x, w], (*x.shape[:-1], n), x.dtype, size)
        if x.ndim == 2:
            k = x.shape[0]
            w = self.need(scope, (k, n), x.dtype, 0.5)
            return self.emit(scope, "{0}.T @ {1}", [x, w], (x.shape[1], n), x.dtype, x.size * math.sqrt(k) * 0.5)
        w = self.need(scope, (k, n), x.dtype, 0.5)
        merged = (math.prod(x.shape[:-1]), n)
        return self.emit(scope, f"{{0}}.reshape(-1, {k}) @ {{1}}", [x, w], merged, x.dtype, size)

    def columns(self, count: int) -> int:
        n = self.dim()
        while n > 1 and count * n > MAX_WORK:
            n //= 2
        return n

    def _numbers(self, x: Value) -> tuple[list[int], list[int], list[int]]:
        """Dimensions of x in a product: batch, contracting, free."""
        order = [int(i) for i in self.rng.permutation(x.ndim)]
        contracting = 1 + int(x.ndim > 2 and self.chance(0.25))
        batch = int(self.rng.integers(0, 2)) if x.ndim - contracting > 0 and self.chance(0.6) else 0
        return order[contracting : contracting + batch], order[:contracting], sorted(order[contracting + batch :])

    def dot_general(self, scope: _Scope) -> Value:
        x = self.array(scope, 1, 4)
        batch, contracting, free = self._numbers(x)
        free_sizes = [
            min(self.dim(), 16) if i else self.dim()
            for i in range(int(self.rng.choice([0, 1, 2], p=[0.15, 0.7, 0.15])))
        ]
        while math.prod(free_sizes) * x.count > MAX_WORK:
            free_sizes[0] = max(1, free_sizes[0] // 2)
        labels = [
            *(("b", i) for i in batch),
            *(("k", i) for i in contracting),
            *(("n", i) for i in range(len(free_sizes))),
        ]
        order = [labels[i] for i in self.rng.permutation(len(labels))]
        sizes = tuple(free_sizes[i] if kind == "n" else x.shape[i] for kind, i in order)
        if math.prod(sizes) > MAX_COUNT:
            return self.matmul(scope)
        k = math.prod(x.shape[i] for i in contracting)
        y = self.need(scope, sizes, x.dtype, 0.5)
        numbers = (
            (tuple(contracting), tuple(order.index(("k", i)) for i in contracting)),
            (tuple(batch), tuple(order.index(("b", i)) for i in batch)),
        )
        shape = [
            *(x.shape[i] for i in batch),
            *(x.shape[i] for i in free),
            *(s for (t, _), s in zip(order, sizes, strict=True) if t == "n"),
        ]
        if math.prod(shape) > MAX_COUNT:
            return self.matmul(scope)
        preferred, dtype = self.result(x.dtype)
        swapped = self.chance(0.3)
        if swapped:
            numbers = tuple((b, a) for a, b in numbers)  # type: ignore[assignment]
            shape = [
                *(x.shape[i] for i in batch),
                *(s for (t, _), s in zip(order, sizes, strict=True) if t == "n"),
                *(x.shape[i] for i in free),
            ]
        text = f"lax.dot_general({{0}}, {{1}}, {numbers}{preferred})"
        return self.emit(scope, text, [y, x] if swapped else [x, y], shape, dtype, x.size * math.sqrt(k) * 0.5)

    def einsum(self, scope: _Scope) -> Value:
        x = self.array(scope, 1, 4)
        batch, contracting, free = self._numbers(x)
        letters = "abcdefgh"[: x.ndim]
        new = [] if self.chance(0.1) else ["z"]
        of_y = [*(letters[i] for i in batch), *(letters[i] for i in contracting), *new]
        of_y = [of_y[i] for i in self.rng.permutation(len(of_y))]
        result = [*(letters[i] for i in batch), *(letters[i] for i in free), *new]
        result = [result[i] for i in self.rng.permutation(len(result))]
        sizes = {**dict(zip(letters, x.shape, strict=True)), "z": self.columns(x.count)}
        shape_y, shape = ([sizes[c] for c in each] for each in (of_y, result))
        if max(math.prod(shape_y), math.prod(shape)) > MAX_COUNT:
            return self.matmul(scope)
        y = self.need(scope, tuple(shape_y), x.dtype, 0.5)
        k = math.prod(sizes[letters[i]] for i in contracting)
        preferred, dtype = self.result(x.dtype)
        text = f'jnp.einsum("{letters},{"".join(of_y)}->{"".join(result)}", {{0}}, {{1}}{preferred})'
        return self.emit(scope, text, [x, y], shape, dtype, x.size * math.sqrt(k) * 0.5)

    def with_vector(self, scope: _Scope) -> Value:
        x = self.array(scope)
        k = x.shape[-1]
        form = self.rng.integers(4)
        if form == 0:
            v = self.need(scope, (k,), x.dtype, 0.5)
            return self.emit(scope, "{0} @ {1}", [x, v], x.shape[:-1], x.dtype, x.size * math.sqrt(k) * 0.5)
        if form == 1:
            v = self.need(scope, (x.shape[-2],), x.dtype, 0.5)
            shape = (*x.shape[:-2], k)
            return self.emit(scope, "{1} @ {0}", [x, v], shape, x.dtype, x.size * math.sqrt(x.shape[-2]) * 0.5)
        if form == 2:
            y = self.need(scope, x.shape, x.dtype, 0.5)
            return self.emit(scope, "jnp.vdot({0}, {1})", [x, y], (), x.dtype, x.size * math.sqrt(x.count) * 0.5)
        w = self.need(scope, (k, 1), x.dtype, 0.5)
        return self.emit(scope, "{0} @ {1}", [x, w], (*x.shape[:-1], 1), x.dtype, x.size * math.sqrt(k) * 0.5)

    def batched(self, scope: _Scope) -> Value:
        x = self.array(scope, 3, 5)
        n = self.columns(x.count)
        if x.count // x.shape[-2] * n > MAX_COUNT or math.prod(x.shape[:-1]) * n > MAX_COUNT:
            return self.matmul(scope)
        y = self.need(scope, (*x.shape[:-2], x.shape[-1], n), x.dtype, 0.5)
        return self.emit(scope, "{0} @ {1}", [x, y], (*x.shape[:-1], n), x.dtype, x.size * math.sqrt(x.shape[-1]) * 0.5)

    def with_itself(self, scope: _Scope) -> Value:
        x = self.array(scope)
        m, k = x.shape[-2:]
        if x.ndim == 2 and self.chance(0.5):
            return self.emit(scope, "{0}.T @ {0}", [x], (k, k), x.dtype, x.size**2 * math.sqrt(m) + 1)
        text = "{0} @ jnp.swapaxes({0}, -1, -2)"
        return self.emit(scope, text, [x], (*x.shape[:-1], m), x.dtype, x.size**2 * math.sqrt(k) + 1)

    def of_bytes(self, scope: _Scope) -> Value:
        """Integers, exactly, then scaled; or weights that are integers."""
        form = self.rng.integers(4)
        if form == 0:
            x = self.array(scope)
            k, n = x.shape[-1], self.columns(x.count)
            w = self.need(scope, (k, n), "int8")
            if self.chance(0.5):
                s = self.need(scope, (n,), x.dtype, 0.01)
                text = f"{{0}} @ ({{1}}.astype(jnp.{x.dtype}) * {{2}})"
                return self.emit(
                    scope, text, [x, w, s], (*x.shape[:-1], n), x.dtype, x.size * 70 * s.size * math.sqrt(k)
                )
            text = f"({{0}} @ {{1}}.astype(jnp.{x.dtype})) * 0.01"
            return self.emit(scope, text, [x, w], (*x.shape[:-1], n), x.dtype, x.size * math.sqrt(k))
        a = self.pick(scope, lambda x: x.dtype == "int8" and x.ndim >= 1) or self.argument(self.shape(2), "int8")
        n = self.columns(a.count)
        w = self.need(scope, (a.shape[-1], n), "int8")
        shape = (*a.shape[:-1], n)
        if form == 1:
            return self.emit(scope, "{0} @ {1}", [a, w], shape, "int8")
        text = "jnp.matmul({0}, {1}, preferred_element_type=jnp.int32)"
        if form == 2:
            return self.emit(scope, text, [a, w], shape, "int32")
        y = self.emit(scope, text, [a, w], shape, "int32")
        return self.emit(
            scope, f"{{0}}.astype(jnp.{self.dtype}) * 1e-3", [y], shape, self.dtype, 5 * math.sqrt(a.shape[-1])
        )

    def of_two_dtypes(self, scope: _Scope) -> Value:
        x = self.array(scope)
        other = self.choose([y for y in (*FLOATS, *(("float64",) if self.x64 else ())) if y != x.dtype])
        k, n = x.shape[-1], self.columns(x.count)
        w = self.need(scope, (k, n), other, 0.5)
        dtype = "float64" if "float64" in (x.dtype, other) else "float32"
        return self.emit(scope, "{0} @ {1}", [x, w], (*x.shape[:-1], n), dtype, x.size * math.sqrt(k) * 0.5)

    def custom(self, scope: _Scope) -> Value:
        x = self.array(scope)
        k, n = x.shape[-1], self.columns(x.count)
        w = self.need(scope, (k, n), x.dtype, 0.5)
        return self.emit(scope, "custom({0}, {1})", [x, w], (*x.shape[:-1], n), x.dtype, x.size * math.sqrt(k) * 0.5)

    def layer(self, scope: _Scope) -> None:
        """A product, and what may become a part of its call."""
        y = self.product(scope) if self.chance(0.4) else self.matmul(scope)
        if y is None or not y.is_float or not y.ndim:
            return
        odd = self.chance(0.08)
        if odd or self.chance(0.3):
            scale = self.choose(_ODD_SCALES if odd else _SCALES)
            size = y.size * min(abs(float(scale)), 1e4) if math.isfinite(float(scale)) else math.inf
            y = self.emit(scope, f"{{0}} * {scale}", [y], y.shape, y.dtype, size)
            if odd and self.chance(0.6):
                return
        if self.chance(0.5):
            other = y.dtype if self.chance(0.85) else self.choose(FLOATS)
            b = self.need(scope, y.shape[-1:], other, 0.5)
            text = "{0} + {1}" if other == y.dtype else f"{{0}} + {{1}}.astype(jnp.{y.dtype})"
            y = self.emit(scope, text, [y, b], y.shape, y.dtype, y.size + 0.5)
        if self.chance(0.1):
            y = self.convert(scope, y)
        if self.chance(0.6):
            y = self.activation(scope, y)
        if self.chance(0.25):
            r = self.need(scope, y.shape, y.dtype)
            y = self.emit(scope, "{0} + {1}", [y, r], y.shape, y.dtype, y.size + r.size)
        if self.chance(0.2):
            self.convert(scope, y)

    def activation(self, scope: _Scope, y: Value) -> Value:
        y = self.tame(scope, y)
        text = self.choose(_ACTIVATIONS[:_COMMON] if self.chance(0.75) else _ACTIVATIONS)
        size = y.size**2 if text == "{0} * {0}" else y.size
        return self.emit(scope, text, [y], y.shape, y.dtype, size)

    def convert(self, scope: _Scope, x: Value) -> Value:
        others = [y for y in (*FLOATS, *(("float64",) if self.x64 else ())) if y != x.dtype]
        dtype = "float32" if x.dtype in FLOATS[1:] and self.chance(0.6) else self.choose(others)
        return self.emit(scope, f"{{0}}.astype(jnp.{dtype})", [x], x.shape, dtype, x.size)

    # --- what moves, and elementwise -------------------------------------------------------------

    def move(self, scope: _Scope) -> None:
        x = self.pick(scope, lambda x: x.ndim >= 1 and x.count > 1)
        if x is None:
            return
        forms = (
            self.reshape, self.transpose, self.slice, self.dynamic_slice, self.concatenate, self.pad, self.row,
            self.broadcast, self.reverse, self.gather, self.transpose, self.reshape,
        )  # fmt: skip
        if x.is_float and self.chance(0.2):
            self.convert(scope, x)
        else:
            forms[self.rng.integers(len(forms))](scope, x)

    def reshape(self, scope: _Scope, x: Value) -> None:
        shape = list(x.shape)
        i = int(self.rng.integers(len(shape)))
        if x.ndim >= 2 and (self.chance(0.5) or x.ndim >= 5):
            i = min(i, x.ndim - 2)
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
        else:
            factors = [f for f in range(1, min(shape[i], 17) + 1) if shape[i] % f == 0]
            f = factors[self.rng.integers(len(factors))]
            shape[i : i + 1] = [f, shape[i] // f] if self.chance(0.5) else [shape[i] // f, f]
        self.emit(scope, f"{{0}}.reshape({tuple(shape)})", [x], shape, x.dtype, x.size)

    def transpose(self, scope: _Scope, x: Value) -> None:
        order = tuple(int(i) for i in self.rng.permutation(x.ndim))
        self.emit(scope, f"jnp.transpose({{0}}, {order})", [x], [x.shape[i] for i in order], x.dtype, x.size)

    def _part(self, n: int) -> tuple[int, int]:
        size = int(self.rng.integers(1, n + 1))
        if self.chance(0.4):
            size = max(1, n // 2)
        return int(self.rng.integers(0, n - size + 1)), size

    def slice(self, scope: _Scope, x: Value) -> None:
        parts, shape = [], []
        for n in x.shape:
            if self.chance(0.5):
                parts.append(":")
                shape.append(n)
            else:
                start, size = self._part(n)
                step = 2 if self.chance(0.1) else 1
                parts.append(f"{start}:{start + size}" + (f":{step}" if step > 1 else ""))
                shape.append(-(-size // step))
        self.emit(scope, f"{{0}}[{', '.join(parts)}]", [x], shape, x.dtype, x.size)

    def row(self, scope: _Scope, x: Value) -> None:
        i = int(self.rng.integers(x.shape[0]))
        self.emit(scope, f"{{0}}[{i}]", [x], x.shape[1:], x.dtype, x.size)

    def dynamic_slice(self, scope: _Scope, x: Value) -> None:
        axis = int(self.rng.integers(x.ndim))
        _, size = self._part(x.shape[axis])
        i = self.index(scope, x.shape[axis])
        shape = [size if j == axis else n for j, n in enumerate(x.shape)]
        self.emit(scope, f"lax.dynamic_slice_in_dim({{0}}, {{1}}, {size}, {axis})", [x, i], shape, x.dtype, x.size)

    def concatenate(self, scope: _Scope, x: Value) -> None:
        axis = int(self.rng.integers(x.ndim))
        y = self.need(scope, x.shape, x.dtype)
        shape = [2 * n if j == axis else n for j, n in enumerate(x.shape)]
        if math.prod(shape) <= MAX_COUNT:
            text = f"jnp.concatenate([{{0}}, {{1}}], {axis})"
            self.emit(scope, text, [x, y], shape, x.dtype, max(x.size, y.size))

    def pad(self, scope: _Scope, x: Value) -> None:
        widths = [(int(a), int(b)) for a, b in self.rng.integers(0, 3, (x.ndim, 2))]
        shape = [a + n + b for (a, b), n in zip(widths, x.shape, strict=True)]
        if math.prod(shape) <= MAX_COUNT:
            self.emit(scope, f"jnp.pad({{0}}, {widths})", [x], shape, x.dtype, x.size)

    def broadcast(self, scope: _Scope, x: Value) -> None:
        n = int(self.rng.integers(1, 5))
        if x.ndim < 5 and n * x.count <= MAX_COUNT:
            shape = (n, *x.shape)
            self.emit(scope, f"jnp.broadcast_to({{0}}, {shape})", [x], shape, x.dtype, x.size)

    def reverse(self, scope: _Scope, x: Value) -> None:
        self.emit(scope, f"jnp.flip({{0}}, {int(self.rng.integers(x.ndim))})", [x], x.shape, x.dtype, x.size)

    def gather(self, scope: _Scope, x: Value) -> None:
        """Rows at places that are data."""
        n = int(self.rng.integers(1, 9))
        i = self._places(n, x.shape[0])
        if n * x.count // x.shape[0] <= MAX_COUNT:
            self.emit(scope, "{0}[{1}]", [x, i], (n, *x.shape[1:]), x.dtype, x.size)

    def _places(self, n: int, limit: int) -> Value:
        number = len(self.arguments)
        value = Value(f"a{number}", (n,), "int32")
        self.arguments.append(Argument(value, number, "index", max(limit, 1)))
        return value

    def elementwise(self, scope: _Scope) -> None:
        x = self.array(scope, 0)
        form = self.rng.random()
        if form < 0.35:
            self.activation(scope, x)
            return
        y = self.need(scope, x.shape, x.dtype)
        if form < 0.8:
            text, size = [
                ("{0} + {1}", x.size + y.size), ("{0} * {1}", x.size * y.size), ("{0} - 2 * {1}", x.size + 2 * y.size),
                ("{0} / (1 + {1} * {1})", x.size), ("jnp.maximum({0}, {1})", x.size + y.size),
                ("0.9 * {0} + 0.1 * {1}", x.size + y.size), ("jnp.where({1} == {1}, {0}, {1})", x.size),
            ][self.rng.integers(7)]  # fmt: skip
            self.emit(scope, text, [x, y], x.shape, x.dtype, size)
        elif x.ndim:
            axis = int(self.rng.integers(x.ndim))
            b = self.need(scope, x.shape[axis : axis + 1], x.dtype)
            spread = ", ".join(":" if i == axis else "None" for i in range(x.ndim))
            operation = self.choose(("+", "*", "-"))
            self.emit(
                scope, f"{{0}} {operation} {{1}}[{spread}]", [x, b], x.shape, x.dtype, (x.size + 1) * (b.size + 1)
            )

    def reduction(self, scope: _Scope) -> None:
        """Often of a product, with something between."""
        if self.chance(0.5):
            self.product(scope)
        x = self.array(scope, 1)
        axis = int(self.rng.integers(-x.ndim, 0)) if self.chance(0.8) else None
        keep = self.chance(0.3)
        reduced = () if axis is None else tuple(n for i, n in enumerate(x.shape) if i != axis + x.ndim)
        if keep:
            reduced = (
                (1,) * x.ndim if axis is None else tuple(1 if i == axis + x.ndim else n for i, n in enumerate(x.shape))
            )
        terms = x.count if axis is None else x.shape[axis]
        how = f"axis={axis}, keepdims={keep}"
        text, size = [
            (f"jnp.sum({{0}}, {how})", x.size * terms), (f"jnp.mean({{0}}, {how})", x.size),
            (f"jnp.max({{0}}, {how})", 3 * x.size), (f"jnp.mean({{0}} ** 2, {how})", x.size**2),
            (f"jnp.sum({{0}} * {{0}}, {how})", x.size**2 * terms), (f"jax.nn.logsumexp({{0}}, {how})", 3 * x.size),
            (f"jnp.sqrt(jnp.sum({{0}} ** 2, {how}) + 0.1)", x.size * math.sqrt(terms)),
            (f"jnp.min({{0}}, {how})", 3 * x.size),
            (f"jnp.sum(jnp.tanh({{0}}), {how})", math.sqrt(terms)), (f"jnp.var({{0}}, {how})", x.size**2 + 1),
        ][self.rng.integers(10)]  # fmt: skip
        self.emit(scope, text, [x], reduced, x.dtype, size)

    def norm(self, scope: _Scope) -> None:
        x = self.array(scope, 1)
        form = self.rng.integers(4)
        if form == 0:
            axis = int(self.rng.integers(-x.ndim, 0))
            self.emit(scope, f"jax.nn.softmax({{0}}, {axis})", [x], x.shape, x.dtype, 0.5)
        elif form == 1:
            text = "{0} * lax.rsqrt(jnp.mean({0} * {0}, -1, keepdims=True) + 0.1)"
            self.emit(scope, text, [x], x.shape, x.dtype)
        elif form == 2:
            g = self.need(scope, x.shape[-1:], x.dtype)
            text = "{1} * ({0} - jnp.mean({0}, -1, keepdims=True)) / jnp.sqrt(jnp.var({0}, -1, keepdims=True) + 0.1)"
            self.emit(scope, text, [x, g], x.shape, x.dtype)
        else:
            self.emit(scope, "jax.nn.log_softmax({0})", [x], x.shape, x.dtype, 2 * x.size)

    def attention(self, scope: _Scope) -> None:
        b, q, k, h, d = (min(self.dim(), most) for most in (3, 40, 40, 4, 64))
        x, y, z = (self.need(scope, (b, n, h, d), self.dtype) for n in (q, k, k))
        s = self.emit(scope, 'jnp.einsum("bqhd,bkhd->bhqk", {0}, {1})', [x, y], (b, h, q, k), self.dtype, math.sqrt(d))
        if self.chance(0.5):
            s = self.emit(scope, f"{{0}} * {d**-0.5:.3f}", [s], s.shape, s.dtype)
        if self.chance(0.3):
            text = f"jnp.where(jnp.arange({q})[:, None] >= jnp.arange({k}), {{0}}, -1e4)"
            s = self.emit(scope, text, [s], s.shape, s.dtype)
        if self.chance(0.4):
            s = self.emit(scope, "{0}.astype(jnp.float32)", [s], s.shape, "float32", s.size)
        p = self.emit(scope, "jax.nn.softmax({0})", [s], s.shape, s.dtype, 0.3)
        if p.dtype != self.dtype:
            p = self.emit(scope, f"{{0}}.astype(jnp.{self.dtype})", [p], p.shape, self.dtype, 0.3)
        o = self.emit(scope, 'jnp.einsum("bhqk,bkhd->bqhd", {0}, {1})', [p, z], (b, q, h, d), self.dtype)
        if self.chance(0.6):
            self.emit(scope, f"{{0}}.reshape({(b, q, h * d)})", [o], (b, q, h * d), self.dtype)

    # --- updates ---------------------------------------------------------------------------------

    def updated(self, scope: _Scope, x: Value) -> Value:
        """The array with something else in some place."""
        axis = int(self.rng.integers(x.ndim))
        n = x.shape[axis]
        form = self.rng.integers(7)
        if form <= 1:
            shape = tuple(self._part(m)[1] for m in x.shape)
            b = self.part(scope, shape, x.dtype)
            starts = [self.index(scope, m - s + 1) for m, s in zip(x.shape, shape, strict=True)]
            if self.chance(0.5):
                text = ", ".join("{2}" if i == axis else "jnp.int32(0)" for i in range(x.ndim))
                starts = starts[axis : axis + 1]
            else:
                text = ", ".join(f"{{{i + 2}}}" for i in range(x.ndim))
            return self.emit(
                scope, f"lax.dynamic_update_slice({{0}}, {{1}}, ({text},))", [x, b, *starts], x.shape, x.dtype, x.size
            )
        if form == 2:
            i, b = self.index(scope, x.shape[0]), self.part(scope, x.shape[1:], x.dtype)
            how = self.choose(("set", "add", "multiply"))
            return self.emit(scope, f"{{0}}.at[{{1}}].{how}({{2}})", [x, i, b], x.shape, x.dtype, x.size + b.size)
        if form == 3 and x.ndim > 1:
            shape = (x.shape[0], *x.shape[2:])
            i, b = self.index(scope, x.shape[1]), self.part(scope, shape, x.dtype)
            return self.emit(
                scope,
                f"{{0}}.at[:, {{1}}].{self.choose(('set', 'add'))}({{2}})",
                [x, i, b],
                x.shape,
                x.dtype,
                x.size + b.size,
            )
        if form == 4:
            m = int(self.rng.integers(1, 5))
            i, b = self._places(m, x.shape[0]), self.part(scope, (m, *x.shape[1:]), x.dtype)
            return self.emit(scope, "{0}.at[{1}].add({2})", [x, i, b], x.shape, x.dtype, x.size + b.size)
        start, size = self._part(n)
        shape = tuple(size if i == axis else m for i, m in enumerate(x.shape))
        b = self.part(scope, shape, x.dtype)
        part = ", ".join(f"{start}:{start + size}" if i == axis else ":" for i in range(x.ndim))
        return self.emit(
            scope,
            f"{{0}}.at[{part}].{self.choose(('set', 'add', 'set'))}({{1}})",
            [x, b],
            x.shape,
            x.dtype,
            x.size + b.size,
        )

    def part(self, scope: _Scope, shape: tuple[int, ...], dtype: str) -> Value:
        """What is written: one of this type, or cut out of something larger."""

        def holds(x: Value) -> bool:
            return (
                x.dtype == dtype and x.ndim == len(shape) and all(n >= s for n, s in zip(x.shape, shape, strict=True))
            )

        larger = self.pick(scope, holds) if shape and self.chance(0.7) else None
        if larger is None:
            return self.need(scope, shape, dtype)
        if larger.shape == shape:
            return larger
        cut = ", ".join(f":{s}" for s in shape)
        return self.emit(scope, f"{{0}}[{cut}]", [larger], shape, dtype, larger.size)

    def update(self, scope: _Scope) -> None:
        """An array, an update of it, and reads of one or both."""
        x = self.array(scope, 1, 4)
        if self.chance(0.5):
            x = self.activation(scope, x)
        d = self.updated(scope, x)
        if self.chance(0.25):
            d = self.updated(scope, d)
        if self.chance(0.2):
            d = self.activation(scope, d)
        k, n = x.shape[-1], self.columns(x.count)
        if self.chance(0.75):
            w = self.need(scope, (k, n), d.dtype, 0.5, reuse=0.8)
            self.emit(scope, "{0} @ {1}", [d, w], (*d.shape[:-1], n), d.dtype, d.size * math.sqrt(k) * 0.5)
            if self.chance(0.6):
                self.emit(scope, "{0} @ {1}", [x, w], (*x.shape[:-1], n), x.dtype, x.size * math.sqrt(k) * 0.5)
        elif self.chance(0.5):
            self.emit(scope, "{0} + {1}", [x, d], x.shape, x.dtype, x.size + d.size)

    def cache(self, scope: _Scope) -> None:
        """Attention of one position over a cache that is written first."""
        b, t, h, d = (min(self.dim(), most) for most in (3, 70, 4, 64))
        width = h * d
        keys, values = (self.need(scope, (b, t, h, d), self.dtype, reuse=0.5) for _ in range(2))
        x = self.need(scope, (b, width), self.dtype)
        i = self.index(scope, t)
        made = []
        for kept in (None, keys, values):
            w = self.need(scope, (width, width), self.dtype, width**-0.5, reuse=0.3)
            y = self.emit(scope, "{0} @ {1}", [x, w], (b, width), self.dtype, x.size)
            if kept is None:
                made.append(self.emit(scope, f"{{0}}.reshape({(b, h, d)})", [y], (b, h, d), self.dtype, y.size))
            elif self.chance(0.5):
                text = f"lax.dynamic_update_slice({{0}}, {{1}}.reshape({(b, 1, h, d)}), (0, {{2}}, 0, 0))"
                made.append(self.emit(scope, text, [kept, y, i], kept.shape, self.dtype, y.size))
            else:
                text = f"{{0}}.at[:, {{2}}].set({{1}}.reshape({(b, h, d)}))"
                made.append(self.emit(scope, text, [kept, y, i], kept.shape, self.dtype, y.size))
        q, keys, values = made
        s = self.emit(
            scope, 'jnp.einsum("bhd,bthd->bht", {0}, {1})', [q, keys], (b, h, t), self.dtype, q.size * math.sqrt(d)
        )
        s = self.tame(scope, s)
        text = f"jnp.where(jnp.arange({t}) <= {{1}}, {{0}}, -1e4)"
        s = self.emit(scope, text, [s, i], s.shape, self.dtype)
        p = self.emit(scope, "jax.nn.softmax({0})", [s], s.shape, self.dtype)
        o = self.emit(scope, 'jnp.einsum("bht,bthd->bhd", {0}, {1})', [p, values], (b, h, d), self.dtype)
        self.emit(scope, f"{{0}}.reshape({(b, width)})", [o], (b, width), self.dtype)

    # --- functions in functions ------------------------------------------------------------------

    def match(self, scope: _Scope, like: Value) -> Value:
        """A value of the type of another one, and not much larger: the latest that is near to it."""
        local = [x for x in scope.values if x.is_float and x.shape == like.shape and x.name != like.name]
        if local and self.chance(0.8):
            x = local[-1 if self.chance(0.7) else self.rng.integers(len(local))]
        elif like.ndim >= 2 and like.is_float and self.chance(0.7):
            w = self.need(scope, (like.shape[-1],) * 2, like.dtype, like.shape[-1] ** -0.5)
            x = self.emit(scope, "{0} @ {1}", [like, w], like.shape, like.dtype, like.size)
        elif like.ndim and self.chance(0.5):
            x = self.updated(scope, like)
        else:
            x = self.activation(scope, like) if like.is_float else like
        if x.dtype != like.dtype:
            x = self.emit(scope, f"{{0}}.astype(jnp.{like.dtype})", [x], like.shape, like.dtype, x.size)
        if x.is_float and not x.size < 1.5 * like.size + 1:
            x = self.emit(scope, "jnp.tanh({0})", [x], x.shape, x.dtype)
        return x

    def carried(self, scope: _Scope) -> list[Value]:
        """What a loop begins with."""
        found = [self.array(scope, 1 if self.chance(0.2) else 2, 4) for _ in range(int(self.rng.integers(1, 4)))]
        return list({x.name: x for x in found}.values())

    def inside(self, scope: _Scope, params: Sequence[Value]) -> _Scope:
        inner = _Scope(scope, params)
        self.fill(inner, 1 if scope.depth or self.chance(0.7) else 2)
        return inner

    def renamed(self, x: Value, shape: tuple[int, ...] | None = None) -> Value:
        return Value(self.name(), x.shape if shape is None else shape, x.dtype, x.size)

    def loop(self, scope: _Scope) -> None:
        forms = (self.scan, self.fori_loop, self.while_loop)
        forms[self.rng.choice(3, p=[0.5, 0.3, 0.2])](scope)

    def next_values(self, inner: _Scope, carry: Sequence[Value]) -> list[Value]:
        """Of what a loop carries: some unchanged, the rest computed."""
        unchanged = [self.chance(0.25) for _ in carry]
        if all(unchanged):
            unchanged[0] = False
        following = [x if same else self.match(inner, x) for x, same in zip(carry, unchanged, strict=True)]
        if self.chance(0.05):  # exchange two of a type
            for i in range(1, len(carry)):
                if carry[i].type == carry[0].type:
                    following[0], following[i] = following[i], following[0]
        return following

    def scan(self, scope: _Scope) -> None:
        start = self.carried(scope)
        length = int(self.rng.integers(1, 7))
        xs = []
        if self.chance(0.5):
            x = self.pick(scope, lambda x: x.is_float and 2 <= x.ndim <= 4 and 1 < x.shape[0] <= 8)
            if x is None:
                x = self.need(scope, (length, *self.shape(int(self.rng.integers(1, 3)))), self.dtype, 0.5)
            xs, length = [x], x.shape[0]
        carry = [self.renamed(x) for x in start]
        slices = [self.renamed(x, x.shape[1:]) for x in xs]
        inner = self.inside(scope, [*slices, *carry])
        following = self.next_values(inner, carry)
        made = [x for x in inner.values if x not in carry and x not in slices and x.count * length <= MAX_COUNT]
        ys = made[-1:] if made and self.chance(0.5) else []
        head: list[Value | tuple[Value, ...]] = [tuple(carry), slices[0] if slices else Value(self.name(), (), "int32")]
        names = ["{}"] * len(following)
        returns = f"({', '.join(names)},), {'{}' if ys else 'None'}"
        body = Block(tuple(head), tuple(inner.statements), (*following, *ys), returns)
        after = [self.renamed(x) for x in start]
        stacked = [self.renamed(x, (length, *x.shape)) for x in ys]
        first = ", ".join(f"{{{i}}}" for i in range(len(start)))
        over = f"{{{len(start)}}}" if xs else "None"
        options = f", length={length}" if not xs else ""
        options += ", unroll=2" if self.chance(0.1) else ", reverse=True" if self.chance(0.1) else ""
        text = f"jax.tree.leaves(lax.scan({{f0}}, ({first},), {over}{options}))"
        if len(after) + len(stacked) == 1:
            text += "[0]"
        scope.statements.append(Statement((*after, *stacked), text, (*start, *xs), (body,)))
        scope.values += [*after, *stacked]

    def fori_loop(self, scope: _Scope) -> None:
        start = self.carried(scope)
        i = Value(self.name(), (), "int32")
        carry = [self.renamed(x) for x in start]
        inner = self.inside(scope, carry)
        following = self.next_values(inner, carry)
        if self.chance(0.4):  # a row written at the counter
            place, x = 0, carry[0]
            row = self.part(inner, x.shape[1:], x.dtype)
            following[place] = self.emit(
                inner, "{0}.at[{1}].set({2})", [following[place], i, row], x.shape, x.dtype, x.size + row.size
            )
        returns = "".join("{}, " for _ in following)
        body = Block((i, tuple(carry)), tuple(inner.statements), tuple(following), returns)
        first = ", ".join(f"{{{j}}}" for j in range(len(start)))
        after = [self.renamed(x) for x in start]
        text = f"lax.fori_loop(0, {int(self.rng.integers(1, 6))}, {{f0}}, ({first},))" + (
            "[0]" if len(start) == 1 else ""
        )
        scope.statements.append(Statement(tuple(after), text, tuple(start), (body,)))
        scope.values += after

    def while_loop(self, scope: _Scope) -> None:
        start = self.carried(scope)
        i = Value(self.name(), (), "int32")
        carry = [self.renamed(x) for x in start]
        inner = self.inside(scope, carry)
        following = self.next_values(inner, carry)
        step = self.emit(inner, "{0} + 1", [i], (), "int32")
        returns = "{}, " + "".join("{}, " for _ in following)
        body = Block(((i, *carry),), tuple(inner.statements), (step, *following), returns)
        first = ", ".join(f"{{{j}}}" for j in range(len(start)))
        after = [self.renamed(x) for x in start]
        trips = self.index(scope, 5)
        text = f"lax.while_loop(lambda s: s[0] < {{{len(start)}}}, {{f0}}, (jnp.int32(0), {first}))[1:]"
        text += "[0]" if len(start) == 1 else ""
        scope.statements.append(Statement(tuple(after), text, (*start, trips), (body,)))
        scope.values += after

    def nested(self, scope: _Scope) -> None:
        forms = (
            (1.0, self.cond), (0.6, self.switch), (1.0, self.remat), (0.5, self.inner_jit), (2.2, self.grad),
            (1.5, self.vmap), (0.5, self.jvp),
        )  # fmt: skip
        p = np.array([x for x, _ in forms])
        forms[self.rng.choice(len(forms), p=p / p.sum())][1](scope)

    def branches(self, scope: _Scope, count: int) -> tuple[list[Value], list[Block], Value]:
        given = self.carried(scope)
        like = given[0]
        blocks = []
        for _ in range(count):
            params = [self.renamed(x) for x in given]
            inner = self.inside(scope, params)
            result = self.match(inner, params[0])
            blocks.append(Block(tuple(params), tuple(inner.statements), (result,)))
        return given, blocks, self.renamed(like)

    def cond(self, scope: _Scope) -> None:
        given, blocks, result = self.branches(scope, 2)
        i = self.index(scope, 2)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        text = f"lax.cond({{{len(given)}}} > 0, {{f0}}, {{f1}}, {places})"
        scope.statements.append(Statement((result,), text, (*given, i), tuple(blocks)))
        scope.values.append(result)

    def switch(self, scope: _Scope) -> None:
        given, blocks, result = self.branches(scope, 3)
        i = self.index(scope, 3)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        text = f"lax.switch({{{len(given)}}}, [{{f0}}, {{f1}}, {{f2}}], {places})"
        scope.statements.append(Statement((result,), text, (*given, i), tuple(blocks)))
        scope.values.append(result)

    def called(self, scope: _Scope, wrapper: str) -> None:
        given = self.carried(scope)
        params = [self.renamed(x) for x in given]
        inner = self.inside(scope, params)
        made = [x for x in inner.values if x not in params]
        if not made:
            return
        results = tuple({x.name: x for x in (made[-1], made[self.rng.integers(len(made))])}.values())
        body = Block(tuple(params), tuple(inner.statements), results)
        after = tuple(self.renamed(x) for x in results)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        scope.statements.append(Statement(after, f"{wrapper.format('{f0}')}({places})", tuple(given), (body,)))
        scope.values += after

    def remat(self, scope: _Scope) -> None:
        self.called(
            scope,
            self.choose(("jax.checkpoint({})", "jax.checkpoint({}, policy=jax.checkpoint_policies.dots_saveable)")),
        )

    def inner_jit(self, scope: _Scope) -> None:
        self.called(scope, "jax.jit({})")

    def scalar_function(self, scope: _Scope, given: Sequence[Value]) -> Block:
        params = [self.renamed(x) for x in given]
        inner = self.inside(scope, params)
        last = next((x for x in reversed(inner.values) if x.is_float and x not in params), None)
        if last is None:
            last = self.matmul(inner)
        last = self.tame(inner, last)
        text = self.choose(("jnp.mean({0} * {0})", "jnp.mean(jnp.tanh({0}))", "jnp.mean({0})"))
        dtype = last.dtype
        value = self.emit(inner, text, [last], (), dtype, last.size**2)
        return Block(tuple(params), tuple(inner.statements), (value,))

    def grad(self, scope: _Scope) -> None:
        given = self.carried(scope)
        body = self.scalar_function(scope, given)
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        numbers = tuple(range(len(given)))
        fun = "{f0}" if self.chance(0.75) else "jax.checkpoint({f0})"
        results = tuple(self.renamed(x) for x in given)
        text = f"jax.grad({fun}, {numbers})({places})"
        if self.chance(0.4):
            loss = self.renamed(body.results[0])
            text = f"jax.tree.leaves(jax.value_and_grad({fun}, {numbers})({places}))"
            results = (loss, *results)
        elif len(results) == 1:
            text += "[0]"
        scope.statements.append(Statement(results, text, tuple(given), (body,)))
        if self.chance(0.5) and given[0].size < LARGE:  # a step of descent
            self_result = results[-1]
            x = given[-1]
            self.emit_after(scope, results)
            self.emit(scope, "{0} - 0.5 * {1}", [x, self_result], x.shape, x.dtype, x.size)
        else:
            self.emit_after(scope, results)

    @staticmethod
    def emit_after(scope: _Scope, results: Sequence[Value]) -> None:
        scope.values += results

    def jvp(self, scope: _Scope) -> None:
        given = self.carried(scope)[:1]
        tangent = self.need(scope, given[0].shape, given[0].dtype)
        body = self.scalar_function(scope, given)
        results = (self.renamed(body.results[0]), self.renamed(body.results[0]))
        scope.statements.append(Statement(results, "jax.jvp({f0}, ({0},), ({1},))", (given[0], tangent), (body,)))
        scope.values += results

    def vmap(self, scope: _Scope) -> None:
        x = self.array(scope, 2, 5)
        axis = int(self.rng.integers(x.ndim)) if self.chance(0.4) else 0
        n = x.shape[axis]
        given, axes = [x], [axis]
        if self.chance(0.5):
            y = self.array(scope, 1, 4)
            given.append(y)
            axes.append(0 if y.shape[0] == n and y.ndim > 1 else -1)
        params = [
            self.renamed(v, v.shape if a < 0 else v.shape[:a] + v.shape[a + 1 :])
            for v, a in zip(given, axes, strict=True)
        ]
        inner = self.inside(scope, params)
        made = [v for v in inner.values if v not in params and v.count * n <= MAX_COUNT]
        if not made:
            return
        result = made[-1]
        body = Block(tuple(params), tuple(inner.statements), (result,))
        in_axes = "(" + "".join(f"{None if a < 0 else a}, " for a in axes) + ")"
        out = int(self.rng.integers(result.ndim + 1)) if self.chance(0.2) else 0
        shape = (*result.shape[:out], n, *result.shape[out:])
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        text = f"jax.vmap({{f0}}, {in_axes}, {out})({places})"
        after = self.renamed(result, shape)
        scope.statements.append(Statement((after,), text, tuple(given), (body,)))
        scope.values.append(after)

    def over_devices(self, scope: _Scope) -> None:
        """shard_map of something, over the first dimension."""
        if self.mode == "pmap" or scope.depth:
            self.layer(scope)
            return
        x = self.pick(scope, lambda x: x.is_float and x.ndim >= 2 and x.shape[0] % 4 == 0)
        if x is None:
            x = self.argument((4 * int(self.rng.integers(1, 5)), self.dim()), self.dtype)
        given, specs = [x], ['P("d")']
        if self.chance(0.6):
            given.append(self.need(scope, (x.shape[-1], self.columns(x.count)), x.dtype, 0.5))
            specs.append("P()")
        params = [
            self.renamed(v, (v.shape[0] // 4, *v.shape[1:]) if s != "P()" else v.shape)
            for v, s in zip(given, specs, strict=True)
        ]
        inner = _Scope(None, params)  # sees nothing else
        count = len(self.arguments)
        self.fill_closed(inner)
        assert len(self.arguments) == count
        made = [v for v in inner.values if v not in params and v.ndim]
        if not made:
            return
        result = made[-1]
        if self.chance(0.3):
            result = self.emit(inner, 'lax.psum({0}, "d")', [result], result.shape, result.dtype, 4 * result.size)
            out, shape = "P()", result.shape
        else:
            out, shape = 'P("d")', (4 * result.shape[0], *result.shape[1:])
        if math.prod(shape) > MAX_COUNT:
            return
        body = Block(tuple(params), tuple(inner.statements), (result,))
        places = ", ".join(f"{{{j}}}" for j in range(len(given)))
        after = self.renamed(result, shape)
        text = f"sharded({{f0}}, ({''.join(s + ', ' for s in specs)}), {out})({places})"
        scope.statements.append(Statement((after,), text, tuple(given), (body,)))
        scope.values.append(after)

    def fill_closed(self, inner: _Scope) -> None:
        """Products of what is there, and no new arguments."""
        x = inner.values[0]
        if len(inner.values) > 1:
            w = inner.values[1]
            x = self.emit(
                inner, "{0} @ {1}", [x, w], (*x.shape[:-1], w.shape[-1]), x.dtype, x.size * math.sqrt(w.shape[0]) * 0.5
            )
        x = self.activation(inner, x)
        if self.chance(0.5):
            x = self.with_itself(inner)
            self.tame(inner, x)


def _all(statements: Sequence[Statement]) -> list[Statement]:
    """With those in bodies."""
    return [y for x in statements for y in (x, *_all([s for b in x.bodies for s in b.statements]))]
