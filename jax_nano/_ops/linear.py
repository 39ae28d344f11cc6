"""The primitive of `linear`: a product with an epilogue, which is applied while the sums are in registers.

    activation(scale * product + bias) + residual

is computed in float32 where the result is narrower, and rounded to it once. `composition` computes the same in JAX's
own operations: the primitive is lowered to it where nothing can be fused, and some of its rules are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla

from jax_nano._core import activations, contraction
from jax_nano._core import jax_compat as compat
from jax_nano._core.contraction import Labels
from jax_nano._core.signatures import Precision
from jax_nano._ops.dot_general import bind_labels, dot_general_p

linear_p = Primitive("jax_nano_linear")
linear_p.def_impl(partial(xla.apply_primitive, linear_p))


class Epilogue(NamedTuple):
    """What is done to sums. A bias lies along the result's last dimension, a residual has the result's shape."""

    activation: str
    scale: float
    bias: bool
    residual: bool

    @property
    def operands(self) -> int:
        """How many operands follow the two of the product."""
        return int(self.bias) + int(self.residual)

    def split(self, extras: Sequence[Any]) -> tuple[Any, Any]:
        """Bias and residual among the further operands, None where there is none."""
        return extras[0] if self.bias else None, extras[-1] if self.residual else None


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that a result is computed in."""
    return np.dtype(np.float32) if jnp.issubdtype(dtype, np.floating) and dtype.itemsize < 4 else dtype


def bind(
    x: Array, w: Array, *extras: Array, labels: Labels, epilogue: Epilogue, precision: Precision, dtype: np.dtype
) -> Array:
    """The product of x and w by labels, with its epilogue. All arguments are canonical."""
    operands = compat.match_varying_axes(x, w, *extras)
    out: Array = linear_p.bind(*operands, labels=labels, epilogue=epilogue, precision=precision, dtype=dtype)
    return out


def finish(sums: Array, *extras: Array, epilogue: Epilogue, dtype: np.dtype) -> Array:
    """The epilogue in JAX's own operations. `sums` are of `sum_dtype`."""
    bias, residual = epilogue.split(extras)
    y = sums if epilogue.scale == 1 else sums * np.asarray(epilogue.scale, sums.dtype)
    y = y if bias is None else y + bias.astype(y.dtype)
    y = activations.FUNCTIONS[epilogue.activation](y)
    y = y if residual is None else y + residual.astype(y.dtype)
    return y.astype(dtype)


def composition(
    x: Array,
    w: Array,
    *extras: Array,
    labels: Labels,
    epilogue: Epilogue,
    precision: Precision,
    dtype: np.dtype,
    product: Callable[..., Array] = bind_labels,
) -> Array:
    """What the primitive means: `product`, then `finish`."""
    sums = product(x, w, labels, precision=precision, preferred_element_type=sum_dtype(dtype))
    return finish(sums, *extras, epilogue=epilogue, dtype=dtype)


@linear_p.def_abstract_eval
def _abstract_eval(
    x: ShapedArray,
    w: ShapedArray,
    *extras: ShapedArray,
    labels: Labels,
    epilogue: Epilogue,
    precision: Precision,
    dtype: np.dtype,
) -> ShapedArray:
    dimension_numbers, out_perm = contraction.dimension_numbers_of(labels)
    params = {"precision": precision, "preferred_element_type": dtype, "out_sharding": None}
    out, _ = dot_general_p.abstract_eval(x, w, dimension_numbers=dimension_numbers, out_perm=out_perm, **params)
    bias, residual = epilogue.split(extras)
    for name, have, want in (("bias", bias, out.shape[-1:]), ("residual", residual, out.shape)):
        if have is not None and (have.shape != want or have.dtype != out.dtype):
            raise TypeError(f"linear's {name} is {have.str_short()}, expected {out.dtype}{list(want)}")
    return out


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Array, Any]:
    """One call if the activation's slope follows from the result; else a call without activation, then the rest."""
    x, w, *extras = primals
    epilogue, dtype = params["epilogue"], params["dtype"]
    bias, residual = epilogue.split(extras)
    of_result = epilogue.activation in ("none", "relu", *activations.SLOPES_OF_RESULT)
    slope: Array | None = None
    if epilogue.activation == "none":
        out = bind(*primals, **params)
    elif of_result and residual is None:
        out = bind(*primals, **params)
        slope = _slope_of_result(epilogue.activation, out)
    else:
        wide = sum_dtype(dtype)
        linear = epilogue._replace(activation="none", residual=False)
        biases = () if bias is None else (bias.astype(wide),)
        before = bind(x, w, *biases, **{**params, "epilogue": linear, "dtype": wide})
        function = activations.FUNCTIONS[epilogue.activation]
        after, slope = jax.jvp(function, (before,), (jnp.ones_like(before),))
        slope = before > 0 if epilogue.activation == "relu" else slope.astype(dtype)
        out = (after if residual is None else after + residual.astype(wide)).astype(dtype)
    return out, _tangent(primals, tangents, slope, out.shape, **params)


def _slope_of_result(activation: str, y: Array) -> Array:
    return y > 0 if activation == "relu" else activations.SLOPES_OF_RESULT[activation](y)


def _tangent(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    slope: Array | None,
    shape: tuple[int, ...],
    *,
    labels: Labels,
    epilogue: Epilogue,
    precision: Precision,
    dtype: np.dtype,
) -> Any:
    """The tangent of the result of that shape. ``slope`` is the activation's, or a mask of where it is 1 and not 0."""
    x, w, *_ = primals
    dx, dw, *rest = tangents
    dbias, dresidual = epilogue.split(rest)
    params: dict[str, Any] = {"precision": precision, "preferred_element_type": dtype}
    terms = []
    for pair, d in (((dx, w), dx), ((x, dw), dw)):
        if not _is_zero(d):
            term = bind_labels(pair[0], pair[1], labels, **params)
            terms.append(term if epilogue.scale == 1 else term * np.asarray(epilogue.scale, dtype))
    if not _is_zero(dbias):
        terms.append(dbias if terms else jnp.broadcast_to(dbias, shape))
    tangent: Any = None
    for term in terms:
        tangent = term if tangent is None else tangent + term
    if tangent is not None and slope is not None:
        tangent = jnp.where(slope, tangent, 0) if slope.dtype == np.bool_ else slope * tangent
    if not _is_zero(dresidual):
        tangent = dresidual if tangent is None else tangent + dresidual
    return tangent


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, ad.Zero)


def _batch(args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> tuple[Array, int]:
    x, w, *extras = args
    x_dim, w_dim, *rest = dims
    labels, epilogue, dtype = params["labels"], params["epilogue"], params["dtype"]
    bias, residual = epilogue.split(extras)
    bias_dim, residual_dim = epilogue.split(rest)
    if bias_dim is not None:  # a call takes one row of biases, so nothing can be fused
        return jax.vmap(partial(composition, **params), in_axes=tuple(dims))(*args), 0
    batched = x_dim is not None or w_dim is not None
    if batched:
        params["labels"] = contraction.batched(labels, x_dim, w_dim)
    if residual is None or (batched and residual_dim is not None):
        moved = extras if residual is None else [*extras[:-1], jnp.moveaxis(residual, residual_dim, 0)]
        return bind(x, w, *moved, **params), 0
    # One residual for all products, or one product for all residuals: added by itself, rather than copied.
    wide = sum_dtype(dtype)
    biases = () if bias is None else (bias.astype(wide),)
    y = bind(x, w, *biases, **{**params, "epilogue": epilogue._replace(residual=False), "dtype": wide})
    moved_residual = residual if residual_dim is None else jnp.moveaxis(residual, residual_dim, 0)
    return (y + moved_residual.astype(wide)).astype(dtype), 0


ad.primitive_jvps[linear_p] = _jvp
batching.primitive_batchers[linear_p] = _batch
