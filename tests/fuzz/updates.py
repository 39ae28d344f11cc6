"""Random updates of a part of an array, with reads of what was before and after, and caches."""

from __future__ import annotations

import math

from .arrays import Arrays
from .drawing import Scope
from .program import Value


class Updates(Arrays):
    def updated(self, scope: Scope, x: Value) -> Value:
        """The array with something else in some place."""
        if not x.count:
            return self.activation(scope, x)
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

    def part(self, scope: Scope, shape: tuple[int, ...], dtype: str) -> Value:
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

    def update(self, scope: Scope) -> None:
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

    def cache(self, scope: Scope) -> None:
        """Attention of one position over a cache that is written first."""
        b, t, h, d = (max(1, min(self.dim(), most)) for most in (3, 70, 4, 64))
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
