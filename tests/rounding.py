"""How far apart two runs of a program may be that differ in nothing but rounding: derived by perturbation.

`reference` bounds the error of one product. What a program makes of the errors of all of its products, forward and
backward, is measured: the program is evaluated again with noise added to the result of every operation that rounds,
uniform between plus and minus that operation's own bound (for a product, `reference`'s; for an elementary
operation, a unit in the last place). To first order this is the sum of all errors, each times the derivative of the
result by it; as the bounds are eight standard deviations of real roundings and the noise is most of a bound, real
differences stay well inside. The method is known as Monte Carlo arithmetic (Parker, 1997; Vignes' CESTAC before it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

DRAWS = 4
"""Evaluations with different noise."""

MARGIN = 2.0
"""Of the largest deviation among the draws: a result that is one number may have been lucky in all of them."""

_TABLE = 2**20
"""Random numbers in a draw, more than any array of a program has elements."""

# fmt: off
_MOVES = frozenset((
    "abs", "argmax", "broadcast_in_dim", "concatenate", "copy", "device_put", "dynamic_slice",
    "dynamic_update_slice", "expand_dims", "gather", "max", "min", "neg", "pad", "reduce_max", "reduce_min",
    "reshape", "rev", "select_n", "sign", "slice", "sort", "split", "squeeze", "stop_gradient", "transpose",
))
# fmt: on
"""Operations that pass values on without rounding."""


def deviations(fun: Callable[..., Any], want: Any, *args: Any) -> Any:
    """For each array of `want`, which is fun(*args), how far rounding may move it: a tree of floats."""
    closed = jax.make_jaxpr(fun)(*args)
    plain, tree = jax.tree.flatten(want)
    leaves = jax.tree.leaves(args)

    def perturbed(table: jax.Array, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return _Perturbed(table).run(closed.jaxpr, closed.consts, leaves)

    draws = [np.random.default_rng(i).uniform(-1, 1, _TABLE).astype(np.float32) for i in range(DRAWS)]
    # Unoptimised: the program is large, and runs only these few times.
    program = jax.jit(perturbed).lower(draws[0], leaves).compile({"xla_backend_optimization_level": 0})
    results = [program(draw, leaves) for draw in draws]
    return jax.tree.unflatten(
        tree, [max(distance(x, exact) for x in drawn) for *drawn, exact in zip(*results, plain, strict=True)]
    )


def check(got: Any, want: Any, deviation: Any) -> None:
    """AssertionError unless every array is as near to the one wanted as rounding allows."""
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, x), y, allowed in zip(paths, jax.tree.leaves(got), jax.tree.leaves(deviation), strict=True):
        name = jax.tree_util.keystr(path)
        assert (y.shape, y.dtype) == (x.shape, x.dtype), name
        apart, scale = distance(y, x), float(np.abs(np.asarray(x, np.float64)).max(initial=0))
        assert np.isfinite(apart), f"{name}: not finite where the other is"
        assert apart <= MARGIN * allowed, f"{name}: {apart:.2e} apart, {allowed:.2e} explained, largest {scale:.2e}"


def distance(x: Any, y: Any) -> float:
    """The largest difference between two arrays; infinite if one is not finite where the other is."""
    x, y = (np.asarray(each).astype(np.float64) for each in (x, y))
    if not x.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        apart = np.where(same, 0, np.abs(x - y))
    return float(np.where(np.isnan(apart), np.inf, apart).max())


class _Perturbed:
    """Evaluates a jaxpr with noise from a table."""

    def __init__(self, table: jax.Array) -> None:
        self._table = table
        self._loops = 0  # around what is evaluated now
        self._places = itertools.count(1)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        for equation in jaxpr.eqns:
            operands = [x.val if isinstance(x, Literal) else values[x] for x in equation.invars]
            results = self._equation(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
        return [x.val if isinstance(x, Literal) else values[x] for x in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            return self._cond(operands, **params)
        if name in ("scan", "while"):
            self._loops += 1
            results = (self._scan if name == "scan" else self._while)(operands, **params)
            self._loops -= 1
            return results
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None:  # jit, checkpoint, custom_jvp_call and their like
            return self._closed(inner)(*operands)
        results = equation.primitive.bind(*operands, **params)
        if equation.primitive.multiple_results or name in _MOVES or not jnp.issubdtype(results.dtype, jnp.floating):
            return results if equation.primitive.multiple_results else [results]
        bound = self._bound(equation, operands, results)
        return [results + (self._noise(results) * bound).astype(results.dtype)]

    def _closed(self, inner: Jaxpr | ClosedJaxpr) -> Callable[..., list[Any]]:
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        return lambda *args: self.run(jaxpr, consts, args)

    def _scan(self, operands: list[Any], *, jaxpr: ClosedJaxpr, **params: Any) -> list[Any]:
        if "ft_in" in params:  # JAX 0.12
            num_consts, num_carry, _ = (len(list(part.vals)) for part in params["ft_in"].unpack())
        else:
            num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts = operands[:num_consts]
        carry = operands[num_consts : num_consts + num_carry]
        body = self._closed(jaxpr)

        def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            results = body(*consts, *carry, *xs)
            return results[: len(carry)], results[len(carry) :]

        xs = operands[len(consts) + len(carry) :]
        last, ys = lax.scan(step, carry, xs, params["length"], params["reverse"])
        return [*last, *ys]

    def _while(self, operands: list[Any], *, cond_jaxpr: ClosedJaxpr, body_jaxpr: ClosedJaxpr, **params: Any) -> Any:
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        condition, body = self._closed(cond_jaxpr), self._closed(body_jaxpr)
        return lax.while_loop(
            lambda state: condition(*operands[:first], *state)[0],
            lambda state: body(*operands[first:second], *state),
            operands[second:],
        )

    def _cond(self, operands: list[Any], *, branches: Sequence[ClosedJaxpr], **_: Any) -> Any:
        return lax.switch(operands[0], [self._closed(branch) for branch in branches], *operands[1:])

    def _bound(self, equation: Any, operands: list[Any], result: jax.Array) -> jax.Array:
        """Of the error of one operation, in float32 or wider."""
        name, params = equation.primitive.name, equation.params
        acc = wide = jnp.promote_types(result.dtype, jnp.float32)
        last_place = float(reference.finfo(result.dtype).eps) * jnp.abs(result).astype(wide)
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            terms = math.prod(operands[0].shape[i] for i in contracting)
            params = {**params, "preferred_element_type": wide}
        elif name == "reduce_sum":
            terms = operands[0].size // max(result.size, 1)
        elif name == "conv_general_dilated":
            terms = operands[1].size // operands[1].shape[params["dimension_numbers"].rhs_spec[0]]
            params = {**params, "preferred_element_type": wide}
        elif name in ("scatter-add", "scatter_add"):
            acc = result.dtype
            terms = operands[1].size // operands[1].shape[-1]  # at most that many updates of one place
        else:
            return last_place
        sizes = [jnp.abs(x).astype(acc) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in operands]
        magnitude = equation.primitive.bind(*sizes, **params).astype(wide)
        return reference.relative_error(terms, acc) * magnitude + last_place

    def _noise(self, like: jax.Array) -> jax.Array:
        """Uniform in -1..1: a part of the table, another one for each place in the program.

        In a loop, whose body is the same place in every trip, for each value too.
        """
        place = next(self._places) * 0x9E3779B9 % 2**32
        if self._loops:
            first = lax.bitcast_convert_type(like.ravel()[0].astype(jnp.float32), jnp.uint32)
            start = (((first ^ np.uint32(place)) * np.uint32(0x85EBCA6B)) >> 8) % (self._table.size - like.size)
            part = lax.dynamic_slice(self._table, [start], [like.size])
        else:
            start = (place >> 8) % (self._table.size - like.size)
            part = lax.slice(self._table, [start], [start + like.size])
        return part.reshape(like.shape).astype(jnp.promote_types(like.dtype, jnp.float32))
