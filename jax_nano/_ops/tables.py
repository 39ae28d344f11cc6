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
from jax.extend.core import Primitive
from jax.interpreters import ad

from jax_nano._core import contraction
from jax_nano._core import jax_compat as compat
from jax_nano._ops import linear as _linear
from jax_nano._ops import quantized as _quantized
from jax_nano._ops.attention import attention_p
from jax_nano._ops.attention import composition as attention_composition
from jax_nano._ops.attention_gradients import attention_gradients_p
from jax_nano._ops.attention_gradients import composition as gradients_composition
from jax_nano._ops.dot_general import dot_general_p
from jax_nano._ops.linear import linear_p
from jax_nano._ops.quantized import quantized_p

_PRODUCTS = (dot_general_p, linear_p, quantized_p)
_COMPOSED: dict[Primitive, Callable[..., Any]] = {
    linear_p: _linear.composition,
    quantized_p: _quantized.composition,
    attention_p: attention_composition,
    attention_gradients_p: gradients_composition,
}
"""What primitives mean that no rule for lax.dot_general fits."""


def _dimension_numbers(params: dict[str, Any], avals: Sequence[Any]) -> contraction.DimensionNumbers:
    """Those of a primitive's product."""
    if "labels" in params:
        return contraction.dimension_numbers_of(params["labels"])[0]
    if "options" in params:
        labels = _quantized.labels(len(avals[0].shape), along_k=params["options"].along_k)
        return contraction.dimension_numbers_of(labels)[0]
    numbers: contraction.DimensionNumbers = params["dimension_numbers"]
    return numbers


def _like_dot_general(params: dict[str, Any], avals: Sequence[Any]) -> dict[str, Any]:
    """The parameters of a primitive with those that lax.dot_general has."""
    return {
        "precision": None,
        "preferred_element_type": None,
        "out_sharding": None,
        **params,
        "dimension_numbers": _dimension_numbers(params, avals),
    }


def _cost_of_product(rule: Any, ctx: Any, *args: Any, **params: Any) -> Any:
    """What lax.dot_general costs by JAX's rule; epilogues, scales, and the reading of others are not counted."""
    numbers = _dimension_numbers(params, ctx.avals_in)
    return rule(replace(ctx, avals_in=ctx.avals_in[:2]), *args[:2], dimension_numbers=numbers)


def _checkify(checkify: Any) -> None:
    for primitive in (dot_general_p, *_COMPOSED):
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

    for primitive, composition in _COMPOSED.items():
        jet.jet_rules[primitive] = partial(composed, composition)


def _sparse(transform: Any) -> None:
    from jax.experimental import sparse

    def product(of: Any, lhs: Any, rhs: Any, *, out_perm: Any, **params: Any) -> Any:
        out = of(lhs, rhs, **params)
        if out_perm is None:
            return out
        return jax.lax.transpose(out, out_perm) if isinstance(out, Array) else out.transpose(out_perm)

    def composed(composition: Callable[..., Any], *operands: Any, **params: Any) -> Any:
        return transform.sparsify(partial(composition, **params))(*operands)

    for rules, of in (
        (transform.sparse_rules_bcoo, sparse.bcoo_dot_general),
        (transform.sparse_rules_bcsr, sparse.bcsr_dot_general),
    ):
        rules[dot_general_p] = transform._standard_sparse_rule(dot_general_p, partial(product, of))
        for primitive in (linear_p, quantized_p):
            rule = partial(composed, _COMPOSED[primitive])
            rules[primitive] = transform._standard_sparse_rule(primitive, rule)


def _roofline(rooflines: Any) -> None:
    for primitive in _PRODUCTS:
        rooflines.roofline.register_roofline(primitive)(partial(_cost_of_product, rooflines._dot_general_roofline))


def _pallas(cost_estimate: Any) -> None:
    for primitive in _PRODUCTS:
        cost_estimate.register_cost_rule(primitive, partial(_cost_of_product, cost_estimate.dot_general_cost_rule))


def _transpose(primitive: Primitive, cotangents: Any, *operands: Any, **params: Any) -> list[Any]:
    """Of the operands that are not known, if the primitive is linear in them: else JAX's error says what is not.

    Of several results only the first one may depend on them: what attention's scores are computed from is known.
    """
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    out: list[Any] = [None] * len(operands)
    several = primitive.multiple_results
    cotangent = cotangents[0] if several else cotangents
    if isinstance(cotangent, ad.Zero):
        return out

    def function(*chosen: Array) -> Array:
        filled = list(operands)
        for i, x in zip(unknown, chosen, strict=True):
            filled[i] = x
        found = _COMPOSED[primitive](*filled, **params)
        return found[0] if several else found

    found = jax.linear_transpose(function, *(operands[i].aval for i in unknown))(cotangent)
    for i, x in zip(unknown, found, strict=True):
        out[i] = x
    return out


def enter() -> None:
    """Enters the primitives in every table, now or when the module that holds it is imported."""
    for primitive in (linear_p, quantized_p, attention_p):
        ad.primitive_transposes[primitive] = partial(_transpose, primitive)
    for primitive in _PRODUCTS:
        compat.treat_as_dot_general(primitive, _like_dot_general)
    compat.when_tables_exist(checkify=_checkify, jet=_jet, sparse=_sparse, roofline=_roofline, cost_estimate=_pallas)


enter()
