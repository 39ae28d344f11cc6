"""Random products with quantised weights: `(q - zero) * scale` in forms that calls read, and in forms that are near.

Drawn are the storage of the weights, zero points, scales of columns, of groups, along K or of elements, where they
multiply or divide, the dtype in which the matrix is made, what is multiplied with it, and what else a program does with
weights, matrix and result: reads them, updates them afterwards, multiplies with the matrix in a loop.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .attentions import Attentions
from .drawing import MAX_COUNT, MAX_WORK, Scope
from .program import Value


class _Matrix(NamedTuple):
    """A float matrix of weights, (K, N), as an expression of its operands, which begin at some number."""

    text: str
    operands: list[Value]
    size: float


class Quantised(Attentions):
    def quantised(self, scope: Scope) -> None:
        """A product with quantised weights, and what may happen before and after."""
        x = self.array(scope, 2, 3)
        k = x.shape[-1]
        n = max(1, self.dim())
        if k < 1 or x.count * n > MAX_WORK or k * n > MAX_COUNT or x.count // k * n > MAX_COUNT:
            return
        along_k = self.chance(0.3)
        q = self.need(scope, (n, k) if along_k else (k, n), "uint8" if self.chance(0.2) else "int8", reuse=0.3)
        dtype = x.dtype if self.chance(0.9) else self.choose(("float32", "bfloat16"))
        how = self.rng.random()
        if how < 0.25:
            y = self._scaled_after(scope, x, q, n, dtype, along_k=along_k)
        elif how < 0.4:
            y = self._in_a_loop(scope, x, q, n, dtype, along_k=along_k)
        else:
            matrix = self._matrix(scope, q, k, n, dtype, 1, along_k=along_k)
            convert = "" if dtype == x.dtype else f".astype(jnp.{x.dtype})"
            size = x.size * matrix.size * math.sqrt(k)
            if self.chance(0.5):
                w = self.emit(scope, matrix.text.replace("{1}", "{0}").replace("{2}", "{1}").replace("{3}", "{2}"),
                              matrix.operands, (k, n), dtype, matrix.size)  # fmt: skip
                preferred, result = self.result(x.dtype) if not convert else ("", x.dtype)
                text = f"jnp.matmul({{0}}, {{1}}{convert}{preferred})"
                y = self.emit(scope, text, [x, w], (*x.shape[:-1], n), result, size)
                self._matrix_again(scope, x, w, convert, size)
            else:
                text = f"{{0}} @ ({matrix.text}){convert}"
                y = self.emit(scope, text, [x, *matrix.operands], (*x.shape[:-1], n), x.dtype, size)
        if self.chance(0.15):
            self.updated(scope, q)
        if self.chance(0.5):
            y = self.emit(
                scope, "{0} + {1}", [y, self.need(scope, y.shape[-1:], y.dtype)], y.shape, y.dtype, y.size + 1
            )
        if self.chance(0.5):
            self.activation(scope, y)

    def _scale(self, scope: Scope, shape: tuple[int, ...]) -> Value:
        return self.need(scope, shape, "float32" if self.chance(0.6) else self.dtype, 0.02, reuse=0.4)

    def _matrix(self, scope: Scope, q: Value, k: int, n: int, dtype: str, first: int, *, along_k: bool) -> _Matrix:
        """Operands are numbered from `first` on."""
        sizes = [g for g in (16, 32, 48, 8, 3, k) if k % g == 0]
        group = sizes[self.rng.integers(len(sizes))]
        kind = self.rng.random()
        grouped = kind > 0.5
        blocks = (n, k // group, group) if along_k else (k // group, group, n)
        place = "[..., None]" if along_k else "[:, None]"
        spread = "[:, None]" if along_k else ""
        shape: tuple[int, ...] = (n, k // group) if along_k else (k // group, n)
        if not grouped:
            shape, place, blocks = (n,), spread, q.shape
        if kind < 0.06:  # a scale for each value of K, or each element
            shape, place = ((k,), "" if along_k else "[:, None]") if kind < 0.03 else (q.shape, "")
        s = self._scale(scope, shape)
        operands = [q, s]
        w = f"{{{first}}}.astype(jnp.{dtype})"
        if self.chance(0.15):
            w = f"{{{first}}}.astype(jnp.int32).astype(jnp.{dtype})"
        w = f"{w}.reshape({blocks})"
        if self.chance(0.3):
            zero = self.rng.random()
            if zero < 0.3:
                w = f"({w} - {self.choose(('8', '128', '7.5', '-3'))})"
            else:
                z = self.need(scope, shape, q.dtype if zero < 0.9 else "float32")
                operands.append(z)
                w = f"({w} - {{{first + 2}}}.astype(jnp.{dtype}){place})"
        factor = f"{{{first + 1}}}.astype(jnp.{dtype}){place}"
        w = f"{w} * {factor}" if self.chance(0.7) else f"{factor} * {w}"
        w = f"({w}).reshape({q.shape})" + (".T" if along_k else "")
        return _Matrix(w, operands, 70 * s.size)

    def _matrix_again(self, scope: Scope, x: Value, w: Value, convert: str, size: float) -> None:
        """The matrix may be read by something else."""
        form = self.rng.random()
        if form < 0.12:
            self.emit(scope, "{0} * 2", [w], w.shape, w.dtype, 2 * w.size)
        elif form < 0.24:
            text = f"jnp.tanh({{0}}) @ {{1}}{convert}"
            self.emit(scope, text, [x, w], (*x.shape[:-1], w.shape[1]), x.dtype, size)

    def _scaled_after(self, scope: Scope, x: Value, q: Value, n: int, dtype: str, *, along_k: bool) -> Value:
        s = self._scale(scope, (n,))
        text = f"({{0}} @ {{1}}{'.T' if along_k else ''}.astype({{0}}.dtype)) * {{2}}.astype({{0}}.dtype)"
        size = x.size * 70 * s.size * math.sqrt(x.shape[-1])
        return self.emit(scope, text, [x, q, s], (*x.shape[:-1], n), x.dtype, size)

    def _in_a_loop(self, scope: Scope, x: Value, q: Value, n: int, dtype: str, *, along_k: bool) -> Value:
        """Each step multiplies with the same matrix, which XLA makes in front of the loop."""
        k = x.shape[-1]
        matrix = self._matrix(scope, q, k, n, x.dtype, 1, along_k=along_k)
        step = f"jnp.tanh(h @ ({matrix.text}))"
        # As wide as x again: columns are repeated.
        back = f"jnp.concatenate([{step}] * {-(-k // n)}, -1)[..., :{k}]" if n != k else step
        text = f"lax.fori_loop(0, 3, lambda i, h: ({back}).astype(h.dtype), {{0}})"
        return self.emit(scope, text, [x, *matrix.operands], x.shape, x.dtype, 1)
