"""What a program computes, in float64, and how far rounding may move it.

A jaxpr is evaluated by NumPy several times at once: exactly, and with noise added to the result of every operation
that rounds, as in `rounding`, which explains why. It is done here without XLA: thousands of small programs would
spend their time in compiling what judges them, and an arbiter that XLA compiles may share its faults.

Where rounding decides about more than last places (a comparison of values that are nearly equal, a float16 that is
about to overflow), half of the noisy evaluations go one way, half the other: what depends on it may be either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import scipy.special
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Array = np.ndarray
Values = list[Array]
"""One value in all evaluations, the exact one first. Where there is no noise all are the same object."""

DRAWS: Final = 6
_NEAR: Final = 3.0
"""Two values are nearly equal if they differ by no more than this many times what noise made of them."""


class Judgement(NamedTuple):
    """What an array of a program must be, and how far off each of its elements may be."""

    value: Array
    spread: Array  # infinite where rounding decides whether it is finite


def evaluate(fun: Callable[..., Any], args: Sequence[Any], seed: int) -> list[Judgement]:
    """Judgements of the results of fun(*args)."""
    closed = jax.make_jaxpr(fun)(*args)
    machine = _Machine(seed)
    with np.errstate(all="ignore"):
        given = [[_wide(np.asarray(x))] * (1 + DRAWS) for x in jax.tree.leaves(args)]
        results = machine.closed(closed, given)
        return [_judged(values) for values in results]


def _judged(values: Values) -> Judgement:
    exact = values[0]
    if values[1] is exact:
        return Judgement(exact, np.zeros(exact.shape))
    wide = [x.astype(np.float64) for x in values]
    apart = [np.where((x == wide[0]) | (np.isnan(x) & np.isnan(wide[0])), 0, np.abs(x - wide[0])) for x in wide[1:]]
    spread = np.max(apart, axis=0)
    return Judgement(exact, np.where(np.isnan(spread), np.inf, spread))


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _wide(x: Array) -> Array:
    return x.astype(np.float64) if _is_float(x.dtype) else x


def _storage(dtype: Any) -> np.dtype:
    return np.dtype(np.float64) if _is_float(dtype) else np.dtype(dtype)


class _Machine:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def closed(self, closed: ClosedJaxpr | Jaxpr, args: Sequence[Values]) -> list[Values]:
        if not isinstance(closed, ClosedJaxpr):
            return self.run(closed, [], args)
        consts = [[_wide(np.asarray(x))] * (1 + DRAWS) for x in closed.consts]
        return self.run(closed.jaxpr, consts, args)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Values], args: Sequence[Values]) -> list[Values]:
        values: dict[Any, Values] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(x: Any) -> Values:
            if isinstance(x, Literal):
                dtype = x.aval.dtype
                return [_wide(np.asarray(x.val).astype(dtype) if _is_float(dtype) else np.asarray(x.val, dtype))] * (
                    1 + DRAWS
                )
            return values[x]

        for equation in jaxpr.eqns:
            operands = [read(x) for x in equation.invars]
            for target, result in zip(equation.outvars, self._equation(equation, operands), strict=True):
                values[target] = result
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Values]) -> Sequence[Values]:
        name, params = equation.primitive.name, equation.params
        if name in ("cond", "scan", "while"):
            return {"cond": self._cond, "scan": self._scan, "while": self._while}[name](operands, **params)
        for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
            if key in params:
                return self.closed(params[key], operands)
        if name in _SAME:
            return operands
        out = equation.outvars[0].aval
        if name in _COMPARISONS:
            return [self._compare(_COMPARISONS[name], name in ("eq", "ne"), *operands, same=_same(equation))]
        if name in ("sign", "round"):
            return [self._sign(operands[0]) if name == "sign" else self._round(operands[0])]
        if name == "bitcast_convert_type":
            return [self._bits(operands[0], equation.invars[0].aval.dtype, out.dtype)]
        rule = _RULES.get(name)
        if rule is None:
            raise NotImplementedError(f"the arbiter does not know {name}")
        results = self._each(lambda *xs: rule(xs, params, out), operands)
        if name == "split":
            return [[x[i] for x in results] for i in range(len(equation.outvars))]
        if not _is_float(out.dtype) or name in _EXACT:
            return [results]
        if name == "convert_element_type" and np.can_cast(equation.invars[0].aval.dtype, out.dtype, "safe"):
            return [results]
        return [self._noisy(results, self._bound(equation, [x[0] for x in operands], results[0]), out.dtype)]

    @staticmethod
    def _each(fun: Callable[..., Any], operands: Sequence[Values]) -> list[Any]:
        if all(x[1] is x[0] for x in operands):
            return [fun(*(x[0] for x in operands))] * (1 + DRAWS)
        return [fun(*xs) for xs in zip(*operands, strict=True)]

    def _noisy(self, values: Values, bound: Array, dtype: Any) -> Values:
        largest = float(ml_dtypes.finfo(dtype).max)
        noisy = [x + bound * self._rng.uniform(-1, 1, x.shape) for x in values[1:]]
        for i, x in enumerate(noisy):
            over = np.abs(x) > largest
            if over.any() and i % 2:
                noisy[i] = np.where(over, np.copysign(np.inf, x), x)
        return [values[0], *noisy]

    @staticmethod
    def _spread(values: Values) -> Array:
        if values[1] is values[0]:
            return np.zeros(())
        return np.max([np.abs(x - values[0]) for x in values[1:]], axis=0)

    def _compare(self, test: Callable[..., Array], equality: bool, a: Values, b: Values, *, same: bool) -> Values:
        results = self._each(test, [a, b])
        if same or not np.issubdtype(a[0].dtype, np.floating) or (a[1] is a[0] and b[1] is b[0]):
            return results
        spread = _NEAR * (self._spread(a) + self._spread(b))
        near = (np.abs(a[0] - b[0]) <= spread) & (spread > 0)
        if not near.any():
            return results
        return [results[0], *(np.where(near, bool(i % 2), x) for i, x in enumerate(results[1:]))]

    def _sign(self, x: Values) -> Values:
        results = self._each(np.sign, [x])
        spread = self._spread(x)
        near = (np.abs(x[0]) <= _NEAR * spread) & (spread > 0)
        if not near.any():
            return results
        return [results[0], *(np.where(near, 1.0 if i % 2 else -1.0, y) for i, y in enumerate(results[1:]))]

    def _round(self, x: Values) -> Values:
        results = self._each(np.round, [x])
        spread = self._spread(x)
        below = np.floor(x[0])
        near = (np.abs(x[0] - below - 0.5) <= _NEAR * spread) & (spread > 0)
        if not near.any():
            return results
        return [results[0], *(np.where(near, below + i % 2, y) for i, y in enumerate(results[1:]))]

    def _bits(self, x: Values, before: Any, after: Any) -> Values:
        """A value's bits in its own dtype: what JAX splits a number into leading and trailing parts with."""
        if np.dtype(before).itemsize != np.dtype(after).itemsize:
            raise NotImplementedError("the arbiter does not know bitcasts between widths")
        return self._each(lambda y: _wide(np.asarray(y).astype(before).view(after)), [x])

    def _bound(self, equation: Any, operands: list[Array], result: Array) -> Array:
        """Of the error of one operation."""
        name, params, dtype = equation.primitive.name, equation.params, equation.outvars[0].aval.dtype
        info = ml_dtypes.finfo(dtype)
        eps = float(info.eps)
        bound = eps * np.abs(result) * (4 if name in _SEVERAL_ULPS else 1) + float(info.tiny)
        acc = float(ml_dtypes.finfo(np.promote_types(dtype, np.float32)).eps)
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            terms = math.prod(operands[0].shape[i] for i in contracting)
            bound = bound + _relative(terms, acc) * _dot([np.abs(x) for x in operands], params, None)
        elif name == "conv_general_dilated":
            terms = operands[1].size // operands[1].shape[params["dimension_numbers"].rhs_spec[0]]
            bound = bound + _relative(terms, acc) * _convolved([np.abs(x) for x in operands], params, None)
        elif name in ("reduce_sum", "cumsum", "psum"):
            terms = operands[0].size // max(result.size, 1)
            bound = bound + _relative(terms, eps) * _RULES[name](
                [np.abs(operands[0])], params, equation.outvars[0].aval
            )
        elif name == "polynomial":
            bound = bound + 2 * len(operands) * eps * _polynomial([np.abs(x) for x in operands], params, None)
        elif name in ("scatter-add", "scatter_add"):
            x, i, y = operands
            sizes = _scatter([np.abs(x), i, np.abs(y)], params, np.add)
            bound = bound + _relative(max(y.size // max(y.shape[-1], 1), 1) if y.ndim else 1, eps) * sizes
        return np.where(np.isfinite(bound), bound, 0)

    # --- control flow ----------------------------------------------------------------------------

    def _scan(self, operands: list[Values], *, jaxpr: ClosedJaxpr, **params: Any) -> Sequence[Values]:
        if "ft_in" in params:  # JAX 0.12
            num_consts, num_carry, _ = (len(list(part.vals)) for part in params["ft_in"].unpack())
        else:
            num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, carry = operands[:num_consts], list(operands[num_consts : num_consts + num_carry])
        xs = operands[num_consts + num_carry :]
        stacks: list[tuple[int, list[Values]]] = []
        trips = range(params["length"])
        for i in reversed(trips) if params["reverse"] else trips:
            results = self.closed(jaxpr, [*consts, *carry, *(self._each(lambda x, i=i: x[i], [x]) for x in xs)])
            carry = results[:num_carry]
            stacks.append((i, results[num_carry:]))
        stacks.sort(key=lambda x: x[0])
        columns = zip(*(ys for _, ys in stacks), strict=True)
        return [*carry, *(self._each(lambda *ys: np.stack(ys), list(column)) for column in columns)]

    def _while(self, operands: list[Values], *, cond_jaxpr: ClosedJaxpr, body_jaxpr: ClosedJaxpr, **params: Any) -> Any:
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        state = operands[second:]
        while self.closed(cond_jaxpr, [*operands[:first], *state])[0][0]:
            state = self.closed(body_jaxpr, [*operands[first:second], *state])
        return state

    def _cond(self, operands: list[Values], *, branches: Sequence[ClosedJaxpr], **_: Any) -> Sequence[Values]:
        which = min(max(int(operands[0][0]), 0), len(branches) - 1)
        return self.closed(branches[which], operands[1:])


def _same(equation: Any) -> bool:
    a, b = equation.invars
    return a is b


def _relative(terms: int, eps: float) -> float:
    """As `reference.relative_error`, for any eps."""
    return min(terms, 4 * terms**0.5) * eps


# --- operations ----------------------------------------------------------------------------------


def _dot(operands: Sequence[Array], params: Any, out: Any) -> Array:
    (ka, kb), (ba, bb) = params["dimension_numbers"]
    a, b = operands

    def arranged(x: Array, batch: Sequence[int], contracting: Sequence[int], *, last: bool) -> tuple[Array, list[int]]:
        free = [i for i in range(x.ndim) if i not in (*batch, *contracting)]
        order = [*batch, *free, *contracting] if last else [*batch, *contracting, *free]
        sizes = [math.prod(x.shape[i] for i in part) for part in (batch, free, contracting)]
        shape = (sizes[0], sizes[1], sizes[2]) if last else (sizes[0], sizes[2], sizes[1])
        return np.transpose(x, order).reshape(shape).astype(np.float64), [x.shape[i] for i in free]

    left, rows = arranged(a, ba, ka, last=True)
    right, columns = arranged(b, bb, kb, last=False)
    product = np.matmul(left, right).reshape([*(a.shape[i] for i in ba), *rows, *columns])
    if out is None or _is_float(out.dtype):
        return product
    return product.astype(np.int64).astype(out.dtype)  # sums of integers this small are exact; conversions wrap


def _convolved(operands: Sequence[Array], params: Any, out: Any) -> Array:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x, w = np.transpose(operands[0], numbers.lhs_spec), np.transpose(operands[1], numbers.rhs_spec)
    assert params["batch_group_count"] == 1

    def dilated(x: Array, by: Sequence[int]) -> Array:
        spaced = np.zeros((*x.shape[:2], *((n - 1) * d + 1 for n, d in zip(x.shape[2:], by, strict=True))))
        spaced[(slice(None), slice(None), *(slice(None, None, d) for d in by))] = x
        return spaced

    x, w = dilated(x, params["lhs_dilation"]), dilated(w, params["rhs_dilation"])
    x = np.pad(x, [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in params["padding"])])
    cut = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(params["padding"], x.shape[2:], strict=True)]
    x = x[(slice(None), slice(None), *cut)]
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axes)
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in params["window_strides"]))]
    inner = tuple(range(x.ndim, 2 * x.ndim - 2))
    parts = []
    for part, kernel in zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True):
        product = np.tensordot(part, kernel, ((1, *inner), (1, *axes)))  # batch, space, features
        parts.append(np.moveaxis(product, -1, 1))
    return np.transpose(np.concatenate(parts, 1), np.argsort(numbers.out_spec))


def _axes_reduced(fun: Callable[..., Array]) -> Callable[..., Array]:
    def rule(operands: Sequence[Array], params: Any, out: Any) -> Array:
        result = fun(operands[0], axis=tuple(params["axes"]))
        return np.asarray(result).astype(_storage(out.dtype))

    return rule


def _broadcast_in_dim(operands: Sequence[Array], params: Any, out: Any) -> Array:
    x = operands[0]
    shape = [1] * len(params["shape"])
    for i, j in enumerate(params["broadcast_dimensions"]):
        shape[j] = x.shape[i]
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _convert(operands: Sequence[Array], params: Any, out: Any) -> Array:
    return operands[0].astype(_storage(out.dtype))


def _pad(operands: Sequence[Array], params: Any, out: Any) -> Array:
    x, value = operands
    result = np.full(out.shape, value, x.dtype)
    config = params["padding_config"]
    places, parts = [], []
    for (low, _, step), n, m in zip(config, x.shape, out.shape, strict=True):
        at = low + np.arange(n) * (step + 1)
        inside = (at >= 0) & (at < m)
        places.append(at[inside])
        parts.append(np.flatnonzero(inside))
    result[np.ix_(*places)] = x[np.ix_(*parts)]
    return result


def _slice(operands: Sequence[Array], params: Any, out: Any) -> Array:
    strides = params["strides"] or [1] * len(params["start_indices"])
    parts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return operands[0][tuple(slice(*part) for part in parts)]


def _starts(indices: Iterable[Array], shape: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """Slices of these sizes, moved so that they lie inside."""
    parts = []
    for i, n, size in zip(indices, shape, sizes, strict=True):
        start = min(max(int(i), 0), n - size)
        parts.append(slice(start, start + size))
    return tuple(parts)


def _dynamic_slice(operands: Sequence[Array], params: Any, out: Any) -> Array:
    x, *starts = operands
    return x[_starts(starts, x.shape, params["slice_sizes"])]


def _dynamic_update_slice(operands: Sequence[Array], params: Any, out: Any) -> Array:
    x, update, *starts = operands
    result = x.copy()
    result[_starts(starts, x.shape, update.shape)] = update
    return result


def _mode(params: Any) -> str:
    return str(params["mode"]).rsplit(".", maxsplit=1)[-1].upper()


def _gather(operands: Sequence[Array], params: Any, out: Any) -> Array:
    x, indices = operands
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    batch_out = [i for i in range(len(out.shape)) if i not in numbers.offset_dims]
    fill = params["fill_value"]
    fill = (
        (np.nan if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).max if x.dtype.kind == "u" else 0)
        if fill is None
        else fill
    )
    if fill == 0 and x.dtype.kind == "i" and params["fill_value"] is None:
        fill = np.iinfo(x.dtype).min
    result = np.empty(out.shape, x.dtype)
    for place in np.ndindex(*indices.shape[:-1]):
        start = [0] * x.ndim
        for i, d in zip(indices[place], numbers.start_index_map, strict=True):
            start[d] = int(i)
        for d, b in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            start[d] = place[b]
        inside = all(0 <= s <= n - size for s, n, size in zip(start, x.shape, sizes, strict=True))
        part = (
            x[_starts(start, x.shape, sizes)]
            if inside or "FILL" not in _mode(params)
            else np.full(sizes, fill, x.dtype)
        )
        part = part.reshape([n for d, n in enumerate(sizes) if d not in gone])
        at: list[Any] = [slice(None)] * len(out.shape)
        for d, i in zip(batch_out, place, strict=True):
            at[d] = i
        result[tuple(at)] = part
    return result


def _scatter(operands: Sequence[Array], params: Any, combine: Callable[[Array, Array], Array]) -> Array:
    x, indices, updates = operands
    numbers = params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = list(numbers.update_window_dims)
    batch = [i for i in range(updates.ndim) if i not in windows]
    kept = [d for d in range(x.ndim) if d not in gone]
    sizes = [1] * x.ndim
    for d, w in zip(kept, windows, strict=True):
        sizes[d] = updates.shape[w]
    result = x.copy()
    for place in np.ndindex(*(updates.shape[i] for i in batch)):
        start = [0] * x.ndim
        for i, d in zip(indices[place], numbers.scatter_dims_to_operand_dims, strict=True):
            start[d] = int(i)
        for d, b in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
            start[d] = place[b]
        inside = all(0 <= s <= n - size for s, n, size in zip(start, x.shape, sizes, strict=True))
        if not inside and "CLIP" not in _mode(params):
            continue
        at: list[Any] = [slice(None)] * updates.ndim
        for d, i in zip(batch, place, strict=True):
            at[d] = i
        where = _starts(start, x.shape, sizes)
        result[where] = combine(result[where], updates[tuple(at)].reshape(sizes))
    return result


def _iota(operands: Sequence[Array], params: Any, out: Any) -> Array:
    shape = [1] * len(params["shape"])
    shape[params["dimension"]] = -1
    line = np.arange(params["shape"][params["dimension"]], dtype=_storage(out.dtype))
    return np.broadcast_to(line.reshape(shape), params["shape"])


def _select(operands: Sequence[Array], params: Any, out: Any) -> Array:
    which, *cases = operands
    if len(cases) == 2 and which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(which, cases)


def _divide(operands: Sequence[Array], params: Any, out: Any) -> Array:
    a, b = operands
    if np.issubdtype(a.dtype, np.floating):
        return a / b
    return np.trunc(a / b).astype(a.dtype)


def _split(operands: Sequence[Array], params: Any, out: Any) -> list[Array]:
    return np.split(operands[0], np.cumsum(params["sizes"])[:-1], params["axis"])


def _cumulate(fun: Callable[..., Array]) -> Callable[..., Array]:
    def rule(operands: Sequence[Array], params: Any, out: Any) -> Array:
        x, axis = operands[0], params["axis"]
        if params["reverse"]:
            return np.flip(fun(np.flip(x, axis), axis), axis)
        return fun(x, axis)

    return rule


def _polynomial(operands: Sequence[Array], params: Any, out: Any) -> Array:
    """Coefficients from the constant term up."""
    x, *coefficients = operands
    result = np.zeros_like(x)
    for coefficient in reversed(coefficients):
        result = result * x + coefficient
    return result


def _elementwise(fun: Callable[..., Any]) -> Callable[..., Array]:
    return lambda operands, params, out: np.asarray(fun(*operands)).astype(_storage(out.dtype))


_RULES: Final[dict[str, Callable[..., Any]]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolved,
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _convert,
    "reduce_precision": _convert,
    "reshape": lambda x, p, out: x[0].reshape(out.shape),
    "squeeze": lambda x, p, out: x[0].reshape(out.shape),
    "expand_dims": lambda x, p, out: x[0].reshape(out.shape),
    "transpose": lambda x, p, out: np.transpose(x[0], p["permutation"]),
    "rev": lambda x, p, out: np.flip(x[0], p["dimensions"]),
    "concatenate": lambda x, p, out: np.concatenate(x, p["dimension"]),
    "split": _split,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": lambda x, p, out: _scatter(x, p, lambda _, new: new),
    "scatter-add": lambda x, p, out: _scatter(x, p, np.add),
    "scatter_add": lambda x, p, out: _scatter(x, p, np.add),
    "scatter-mul": lambda x, p, out: _scatter(x, p, np.multiply),
    "scatter_mul": lambda x, p, out: _scatter(x, p, np.multiply),
    "empty": lambda x, p, out: np.zeros(out.shape, _storage(out.dtype)),
    "empty2": lambda x, p, out: np.zeros(out.shape, _storage(out.dtype)),
    "iota": _iota,
    "psum": lambda x, p, out: np.sum(x[0], tuple(p["axes"])),
    "select_n": _select,
    "clamp": lambda x, p, out: np.minimum(np.maximum(x[1], x[0]), x[2]),
    "reduce_sum": _axes_reduced(np.sum),
    "reduce_prod": _axes_reduced(np.prod),
    "reduce_max": _axes_reduced(np.max),
    "reduce_min": _axes_reduced(np.min),
    "reduce_or": _axes_reduced(np.any),
    "reduce_and": _axes_reduced(np.all),
    "cumsum": _cumulate(np.cumsum),
    "cummax": _cumulate(np.maximum.accumulate),
    "div": _divide,
    "polynomial": _polynomial,
    **{
        name: _elementwise(fun)
        for name, fun in {
            "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
            "max": np.maximum, "min": np.minimum, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p,
            "expm1": np.expm1, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt,
            "rsqrt": lambda x: 1 / np.sqrt(x), "cbrt": np.cbrt, "logistic": scipy.special.expit,
            "erf": scipy.special.erf, "erfc": scipy.special.erfc, "pow": np.power, "square": np.square,
            "one_minus_square": lambda x: 1 - x * x, "not": np.invert, "and": np.bitwise_and,
            "or": np.bitwise_or, "xor": np.bitwise_xor, "is_finite": np.isfinite, "floor": np.floor, "rem": np.fmod,
        }.items()
    },
    "integer_pow": lambda x, p, out: x[0] ** p["y"] if p["y"] >= 0 else 1 / x[0] ** -p["y"],
}  # fmt: skip

_COMPARISONS: Final[dict[str, Callable[..., Array]]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "le_to": np.less_equal, "lt_to": np.less,
}  # fmt: skip

_SAME: Final = frozenset(("optimization_barrier", "copy", "copy_p", "device_put", "pvary", "name", "stop_gradient"))
"""What passes its operands on."""

# fmt: off
_EXACT: Final = frozenset((
    "abs", "broadcast_in_dim", "clamp", "concatenate", "cummax", "dynamic_slice", "dynamic_update_slice", "expand_dims",
    "floor", "gather", "iota", "max", "min", "neg", "pad", "reduce_max", "reduce_min", "reshape", "rev", "scatter",
    "select_n", "slice", "split", "squeeze", "transpose",
))
"""What does not round."""
# fmt: on

_SEVERAL_ULPS: Final = frozenset(
    ("cbrt", "cos", "erf", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sin", "tanh")
)
