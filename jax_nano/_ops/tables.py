"""Our primitives in JAX's tables over primitives that do not belong to grad, vmap or lowering.

Checkify looks for NaN only after primitives that it knows, jet and sparsify refuse others, cost estimates leave them
out, and policies of `jax.checkpoint` save the results of those they name. Ours are entered wherever lax.dot_general is,
when the module that holds the table is imported. tests/api/test_tables.py searches all of JAX for such tables, and
lists those in which ours do not belong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.interpreters import ad

from jax_nano._core import contraction
from jax_nano._core import jax_compat as compat
from jax_nano._ops import linear as _linear
from jax_nano._ops.attention import attention_p
from jax_nano._ops.attention import composition as attention_composition
from jax_nano._ops.attention_gradients import attention_gradients_p
from jax_nano._ops.attention_gradients import composition as gradients_composition
from jax_nano._ops.dot_general import dot_general_p
from jax_nano._ops.linear import linear_p


def _dimension_numbers(params: dict[str, Any]) -> contraction.DimensionNumbers:
    """Those of either primitive's product."""
    if "labels" in params:
        return contraction.dimension_numbers_of(params["labels"])[0]
    numbers: contraction.DimensionNumbers = params["dimension_numbers"]
    return numbers


def _like_dot_general(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of either primitive with those that lax.dot_general has."""
    return {
        "preferred_element_type": None,
        "out_sharding": None,
        **params,
        "dimension_numbers": _dimension_numbers(params),
    }


def _cost_of_product(rule: Any, ctx: Any, *args: Any, **params: Any) -> Any:
    """What lax.dot_general costs by JAX's rule; epilogues, and the reading of bias and residual, are not counted."""
    return rule(replace(ctx, avals_in=ctx.avals_in[:2]), *args[:2], dimension_numbers=_dimension_numbers(params))


def _checkify(checkify: Any) -> None:
    for primitive in (dot_general_p, linear_p, attention_p, attention_gradients_p):
        checkify.error_checks[primitive] = partial(checkify.nan_error_check, primitive)


def _jet(jet: Any) -> None:
    jet.jet_rules[dot_general_p] = partial(jet._bilinear_taylor_rule, dot_general_p)

    def composed(
        composition: Callable[..., Any], primals: Sequence[Array], series: Sequence[Any], **params: Any
    ) -> tuple[Any, Any]:
        # A rule takes and gives coefficients of powers, jet itself takes and gives derivatives; none of booleans and
        # integers, which are masks and lengths.
        floats = [i for i, x in enumerate(primals) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)]

        def function(*chosen: Array) -> Any:
            filled = list(primals)
            for i, x in zip(floats, chosen, strict=True):
                filled[i] = x
            return composition(*filled, **params)

        derivatives = [[x * math.factorial(n) for n, x in enumerate(series[i], 1)] for i in floats]
        out, terms = jet.jet(function, tuple(primals[i] for i in floats), tuple(derivatives))

        def coefficients(terms: Sequence[Array]) -> list[Array]:
            return [x / math.factorial(n) for n, x in enumerate(terms, 1)]

        return out, [coefficients(x) for x in terms] if isinstance(out, tuple) else coefficients(terms)

    jet.jet_rules[linear_p] = partial(composed, _linear.composition)
    jet.jet_rules[attention_p] = partial(composed, attention_composition)
    jet.jet_rules[attention_gradients_p] = partial(composed, gradients_composition)


def _sparse(transform: Any) -> None:
    from jax.experimental import sparse

    def product(of: Any, lhs: Any, rhs: Any, *, out_perm: Any, **params: Any) -> Any:
        out = of(lhs, rhs, **params)
        if out_perm is None:
            return out
        return jax.lax.transpose(out, out_perm) if isinstance(out, Array) else out.transpose(out_perm)

    def linear(*operands: Any, **params: Any) -> Any:
        return transform.sparsify(partial(_linear.composition, **params))(*operands)

    for rules, of in (
        (transform.sparse_rules_bcoo, sparse.bcoo_dot_general),
        (transform.sparse_rules_bcsr, sparse.bcsr_dot_general),
    ):
        rules[dot_general_p] = transform._standard_sparse_rule(dot_general_p, partial(product, of))
        rules[linear_p] = transform._standard_sparse_rule(linear_p, linear)


def _roofline(rooflines: Any) -> None:
    for primitive in (dot_general_p, linear_p):
        rooflines.roofline.register_roofline(primitive)(partial(_cost_of_product, rooflines._dot_general_roofline))


def _pallas(cost_estimate: Any) -> None:
    for primitive in (dot_general_p, linear_p):
        cost_estimate.register_cost_rule(primitive, partial(_cost_of_product, cost_estimate.dot_general_cost_rule))


def _transpose_linear(cotangent: Any, *operands: Any, **params: Any) -> list[Any]:
    """Of the operands that are not known, if linear is linear in them: else JAX's error says what is not."""
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]

    def function(*chosen: Array) -> Array:
        filled = list(operands)
        for i, x in zip(unknown, chosen, strict=True):
            filled[i] = x
        return _linear.composition(*filled, **params)

    found = jax.linear_transpose(function, *(operands[i].aval for i in unknown))(cotangent)
    out: list[Any] = [None] * len(operands)
    for i, x in zip(unknown, found, strict=True):
        out[i] = x
    return out


def enter() -> None:
    """Enters the primitives in every table, now or when the module that holds it is imported."""
    ad.primitive_transposes[linear_p] = _transpose_linear
    for primitive in (dot_general_p, linear_p):
        compat.treat_as_dot_general(primitive, _like_dot_general)
    compat.when_tables_exist(checkify=_checkify, jet=_jet, sparse=_sparse, roofline=_roofline, cost_estimate=_pallas)


enter()
