"""Random products of every form, and what may become a part of their calls."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from .drawing import FLOATS, MAX_COUNT, MAX_WORK, Drawing, Scope
from .program import Value

_SCALES: Final = ("0.5", "0.125", "3", "1.7", "-1", "1e-3", "0.1", "2")
_ODD_SCALES: Final = ("inf", "nan", "-inf", "1e5", "7e4", "1e-30", "0.0")


class Products(Drawing):
    def product(self, scope: Scope) -> Value | None:
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

    def matmul(self, scope: Scope, n: int | None = None) -> Value:
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

    def dot_general(self, scope: Scope) -> Value:
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

    def einsum(self, scope: Scope) -> Value:
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

    def with_vector(self, scope: Scope) -> Value:
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

    def batched(self, scope: Scope) -> Value:
        x = self.array(scope, 3, 5)
        n = self.columns(x.count)
        if x.count // max(x.shape[-2], 1) * n > MAX_COUNT or math.prod(x.shape[:-1]) * n > MAX_COUNT:
            return self.matmul(scope)
        y = self.need(scope, (*x.shape[:-2], x.shape[-1], n), x.dtype, 0.5)
        return self.emit(scope, "{0} @ {1}", [x, y], (*x.shape[:-1], n), x.dtype, x.size * math.sqrt(x.shape[-1]) * 0.5)

    def with_itself(self, scope: Scope) -> Value:
        x = self.array(scope)
        m, k = x.shape[-2:]
        if x.ndim == 2 and self.chance(0.5):
            return self.emit(scope, "{0}.T @ {0}", [x], (k, k), x.dtype, x.size**2 * math.sqrt(m) + 1)
        text = "{0} @ jnp.swapaxes({0}, -1, -2)"
        return self.emit(scope, text, [x], (*x.shape[:-1], m), x.dtype, x.size**2 * math.sqrt(k) + 1)

    def of_bytes(self, scope: Scope) -> Value:
        """Integers, exactly, then scaled; or weights that are integers."""
        form = self.rng.integers(7)
        if form == 6:
            return self.of_integer_vectors(scope)
        if form == 5:
            return self.quantized(scope)
        if form == 4:
            dtype = self.choose(("uint8", "int16", "int32", "uint16", "uint32"))
            shape, n = self.shape(2), self.dim()
            a, b = self.need(scope, shape, dtype), self.need(scope, (shape[-1], n), dtype)
            return self.emit(scope, "{0} @ {1}", [a, b], (shape[0], n), dtype)
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

    def of_integer_vectors(self, scope: Scope) -> Value:
        """Which XLA adds up in steps, if they are long."""
        n = int(self.choose(("40", "700", "1024", "5000", "33000")))
        a_type, b_type = (self.choose(("int8", "uint8", "int16")) for _ in range(2))
        a, b = self.need(scope, (n,), a_type), self.need(scope, (n,), b_type)
        form = self.rng.integers(4)
        if form == 0:
            return self.emit(scope, "jnp.sum({0}.astype(jnp.int32) * {1}.astype(jnp.int32))", [a, b], (), "int32")
        if form == 1:
            text = "lax.dot_general({0}, {1}, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)"
            return self.emit(scope, text, [a, b], (), "int32")
        if form == 2:
            c = self.need(scope, (n,), "int32")
            return self.emit(scope, "jnp.vdot({0}.astype(jnp.int32), {1}) + {1}[0]", [a, c], (), "int32")
        rows = self.emit(scope, "{0}.reshape(2, -1)", [a], (2, n // 2), a_type)
        text = f"jnp.sum({{0}}.astype(jnp.int32) * {{1}}[:{n // 2}].astype(jnp.int32), axis=1)"
        return self.emit(scope, text, [rows, b], (2,), "int32")

    def quantized(self, scope: Scope) -> Value:
        """Rounded to bytes with a scale for each row, multiplied, and scaled back."""
        x = self.array(scope)
        k, n = x.shape[-1], self.columns(x.count)
        w = self.need(scope, (k, n), "int8")
        one = (*x.shape[:-1], 1)
        s = self.emit(scope, "jnp.mean(jnp.abs({0}), -1, keepdims=True) / 40 + 1e-2", [x], one, x.dtype, x.size / 40)
        text = "jnp.clip(jnp.round({0} / {1}), -127, 127).astype(jnp.int8)"
        q = self.emit(scope, text, [x, s], x.shape, "int8")
        text = "jnp.matmul({0}, {1}, preferred_element_type=jnp.int32)"
        y = self.emit(scope, text, [q, w], (*x.shape[:-1], n), "int32")
        text = f"({{0}}.astype(jnp.float32) * {{1}}.astype(jnp.float32) * 0.01).astype(jnp.{x.dtype})"
        return self.emit(scope, text, [y, s], y.shape, x.dtype, x.size * math.sqrt(k))

    def of_two_dtypes(self, scope: Scope) -> Value:
        x = self.array(scope)
        other = self.choose([y for y in (*FLOATS, *(("float64",) if self.x64 else ())) if y != x.dtype])
        k, n = x.shape[-1], self.columns(x.count)
        w = self.need(scope, (k, n), other, 0.5)
        dtype = "float64" if "float64" in (x.dtype, other) else "float32"
        return self.emit(scope, "{0} @ {1}", [x, w], (*x.shape[:-1], n), dtype, x.size * math.sqrt(k) * 0.5)

    def custom(self, scope: Scope) -> Value:
        if self.forward:
            return self.matmul(scope)
        x = self.array(scope)
        k, n = x.shape[-1], self.columns(x.count)
        w = self.need(scope, (k, n), x.dtype, 0.5)
        return self.emit(scope, "custom({0}, {1})", [x, w], (*x.shape[:-1], n), x.dtype, x.size * math.sqrt(k) * 0.5)

    def convolution(self, scope: Scope) -> None:
        """Of an image, or of what has four dimensions, and mostly a dense layer after it."""
        x = self.pick(scope, lambda x: x.is_float and x.ndim == 4 and min(x.shape) > 0) if self.chance(0.4) else None
        if x is None:
            n, h, w = (min(max(self.dim(), 1), most) for most in (4, 12, 12))
            x = self.need(scope, (n, h, w, int(self.rng.integers(1, 5))), self.dtype)
        size, features, stride = (
            int(self.rng.integers(1, 4)),
            int(self.rng.integers(1, 9)),
            int(self.rng.integers(1, 3)),
        )
        if x.count * features * size**2 > MAX_WORK or x.count * features > MAX_COUNT:
            return
        w = self.need(scope, (size, size, x.shape[3], features), x.dtype, 0.5)
        shape = (x.shape[0], *(-(-s // stride) for s in x.shape[1:3]), features)
        text = (
            f'lax.conv_general_dilated({{0}}, {{1}}, ({stride}, {stride}), "SAME",'
            ' dimension_numbers=("NHWC", "HWIO", "NHWC"))'
        )
        y = self.emit(scope, text, [x, w], shape, x.dtype, x.size * size * math.sqrt(x.shape[3]) * 0.5)
        if self.chance(0.5):
            y = self.activation(scope, y)
        if self.chance(0.7):
            flat = (shape[0], math.prod(shape[1:]))
            y = self.emit(scope, f"{{0}}.reshape({flat})", [y], flat, y.dtype, y.size)
            v = self.need(scope, (flat[1], self.columns(y.count)), y.dtype, 0.2)
            text = "{0} @ {1}"
            self.emit(scope, text, [y, v], (flat[0], v.shape[1]), y.dtype, y.size * math.sqrt(flat[1]) * 0.2)

    def layer(self, scope: Scope) -> None:
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
