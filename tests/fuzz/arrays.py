"""Random operations that move arrays, act on their elements or reduce them."""

from __future__ import annotations

import math

from .drawing import MAX_COUNT, Scope
from .products import Products
from .program import Value


class Arrays(Products):
    def move(self, scope: Scope) -> None:
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

    def reshape(self, scope: Scope, x: Value) -> None:
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

    def transpose(self, scope: Scope, x: Value) -> None:
        order = tuple(int(i) for i in self.rng.permutation(x.ndim))
        self.emit(scope, f"jnp.transpose({{0}}, {order})", [x], [x.shape[i] for i in order], x.dtype, x.size)

    def slice(self, scope: Scope, x: Value) -> None:
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

    def row(self, scope: Scope, x: Value) -> None:
        i = int(self.rng.integers(x.shape[0]))
        self.emit(scope, f"{{0}}[{i}]", [x], x.shape[1:], x.dtype, x.size)

    def dynamic_slice(self, scope: Scope, x: Value) -> None:
        axis = int(self.rng.integers(x.ndim))
        _, size = self._part(x.shape[axis])
        i = self.index(scope, x.shape[axis])
        shape = [size if j == axis else n for j, n in enumerate(x.shape)]
        self.emit(scope, f"lax.dynamic_slice_in_dim({{0}}, {{1}}, {size}, {axis})", [x, i], shape, x.dtype, x.size)

    def concatenate(self, scope: Scope, x: Value) -> None:
        axis = int(self.rng.integers(x.ndim))
        y = self.need(scope, x.shape, x.dtype)
        shape = [2 * n if j == axis else n for j, n in enumerate(x.shape)]
        if math.prod(shape) <= MAX_COUNT:
            text = f"jnp.concatenate([{{0}}, {{1}}], {axis})"
            self.emit(scope, text, [x, y], shape, x.dtype, max(x.size, y.size))

    def pad(self, scope: Scope, x: Value) -> None:
        widths = [(int(a), int(b)) for a, b in self.rng.integers(0, 3, (x.ndim, 2))]
        shape = [a + n + b for (a, b), n in zip(widths, x.shape, strict=True)]
        if math.prod(shape) <= MAX_COUNT:
            self.emit(scope, f"jnp.pad({{0}}, {widths})", [x], shape, x.dtype, x.size)

    def broadcast(self, scope: Scope, x: Value) -> None:
        n = int(self.rng.integers(1, 5))
        if x.ndim < 5 and n * x.count <= MAX_COUNT:
            shape = (n, *x.shape)
            self.emit(scope, f"jnp.broadcast_to({{0}}, {shape})", [x], shape, x.dtype, x.size)

    def reverse(self, scope: Scope, x: Value) -> None:
        self.emit(scope, f"jnp.flip({{0}}, {int(self.rng.integers(x.ndim))})", [x], x.shape, x.dtype, x.size)

    def gather(self, scope: Scope, x: Value) -> None:
        """Rows at places that are data."""
        n = int(self.rng.integers(1, 9))
        i = self._places(n, x.shape[0])
        if n * x.count // x.shape[0] <= MAX_COUNT:
            self.emit(scope, "{0}[{1}]", [x, i], (n, *x.shape[1:]), x.dtype, x.size)

    def elementwise(self, scope: Scope) -> None:
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

    def reduction(self, scope: Scope) -> None:
        """Often of a product, with something between."""
        if self.chance(0.5):
            self.product(scope)
        x = self.array(scope, 1)
        if not x.count:
            return
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

    def norm(self, scope: Scope) -> None:
        x = self.array(scope, 1)
        if not x.count:
            return
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

    def attention(self, scope: Scope) -> None:
        b, q, k, h, d = (max(1, min(self.dim(), most)) for most in (3, 40, 40, 4, 64))
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
