"""The public functions. Each has the signature, the results and the errors of its namesake in JAX.

In shapes, capital letters are sizes and `...` are batch dimensions. Products of dtypes for which this CPU has kernels
run on them. XLA computes all others, those on other platforms, and those that it computes as fast (see
`jax_nano._dispatch.decision`), with exactly lax's result.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_nano._core import activations, contraction, native
from jax_nano._core import jax_compat as compat
from jax_nano._core.jax_compat import OutSharding
from jax_nano._ops import attention as _attention
from jax_nano._ops import einsum as _einsum
from jax_nano._ops import linear as _linear
from jax_nano._ops import tables as tables  # importing it enters the primitives in JAX's tables
from jax_nano._ops.attention_lowering import attention_p as attention_p  # importing it registers its lowering
from jax_nano._ops.dot_general import bind, bind_labels
from jax_nano._ops.linear_lowering import linear_p as linear_p
from jax_nano._ops.lowering import dot_general_p as dot_general_p

if TYPE_CHECKING:
    from jax.export import DisabledSafetyCheck

__all__ = [
    "dot",
    "dot_general",
    "dot_general_p",
    "dot_product_attention",
    "einsum",
    "export_checks",
    "inner",
    "linear",
    "matmul",
    "matvec",
    "tensordot",
    "vdot",
    "vecmat",
]

_P = ParamSpec("_P")


def _jit(*static: str) -> Callable[[Callable[_P, Array]], Callable[_P, Array]]:
    """Compiles a function with jax.jit, but calls it directly if its arguments are tracers.

    Called directly, it sees which operations its operands come from (transposes, which it can fold), and tracing is
    faster. Either way its equations are in the caller's program (`inline`), where remat policies see them.
    """

    def decorate(function: Callable[_P, Array]) -> Callable[_P, Array]:
        compiled = jax.jit(function, static_argnames=static, inline=compat.INLINE)

        @wraps(function)
        def call(*args: _P.args, **options: _P.kwargs) -> Array:
            for x in args:
                if isinstance(x, Tracer):
                    if all(isinstance(y, Array) for y in args):
                        return function(*args, **options)
                    break
            return compiled(*args, **options)

        return call

    return decorate


# The product of two arrays of one of these dtypes has the same dtype, whatever jax.config says. Asking JAX would take
# longer than the rest of tracing a matmul.
_SELF_PROMOTING = frozenset(
    np.dtype(x)
    for kinds in (
        (np.bool_, np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32),
        (np.float16, jnp.bfloat16, np.float32, np.complex64),
    )
    for x in kinds
)


def _result_type(name: str, preferred: DTypeLike | None, *arrays: Array) -> tuple[np.dtype, bool]:
    """dtype and weak type of a result, as jnp decides them."""
    if preferred is not None:
        return compat.check_and_canonicalize_user_dtype(preferred, name), False
    dtype = arrays[0].dtype
    if dtype in _SELF_PROMOTING and all(x.dtype == dtype and not x.weak_type for x in arrays):
        return dtype, False
    return jax.dtypes.result_type(*arrays, return_weak_type_flag=True)


def _index_tuple(x: Any) -> tuple[int, ...]:
    try:
        return (operator.index(x),)
    except TypeError:
        return tuple(map(operator.index, x))


def dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: OutSharding = None,
) -> Array:
    """`jax.lax.dot_general`: any product of two arrays. Fits `jnp.einsum(_dot_general=...)` and flax.

    Args:
      lhs, rhs: arrays of the shapes that dimension_numbers ask for.
      dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`, sequences of ints.
      precision: as in lax. On CPUs only a DotAlgorithm or its preset matters; XLA computes those.
      preferred_element_type: dtype of the result; by default that of the promoted operands.
      out_sharding: sharding of the result under explicit sharding.

    Returns:
      An array of shape (batch..., lhs free..., rhs free...). No operand is copied or transposed.

    Raises:
      TypeError, ValueError: what lax.dot_general raises for wrong dimension numbers, shapes or dtypes.
    """
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    out_sharding = compat.canonicalize_sharding(out_sharding, "dot_general")
    if preferred_element_type is not None:
        preferred_element_type = compat.check_and_canonicalize_user_dtype(preferred_element_type, "dot")
    return bind(
        lhs,
        rhs,
        (
            (_index_tuple(lhs_contracting), _index_tuple(rhs_contracting)),
            (_index_tuple(lhs_batch), _index_tuple(rhs_batch)),
        ),
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


@_jit("precision", "preferred_element_type", "out_sharding")
def matmul(
    a: ArrayLike,
    b: ArrayLike,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
) -> Array:
    """`jnp.matmul`: the matrix product, with leading dimensions broadcast.

    Args:
      a: shape (K,) or (..., M, K), any numeric or bool dtype.
      b: shape (K,) or (..., K, N).
      precision, preferred_element_type, out_sharding: as in `dot_general`.

    Returns:
      Shape (..., M, N), without M if a is 1-D, without N if b is. dtype: preferred_element_type, else
      that of the promoted operands. A broadcast operand is read where it is, not copied.

    Raises:
      TypeError: an operand is not an array, the contracting sizes differ, or a bad preferred_element_type.
      ValueError: an operand is 0-D, or the leading dimensions do not broadcast.
    """
    a, b = compat.ensure_arraylike("matmul", a, b)
    for i, x in enumerate((a, b)):
        if x.ndim < 1:
            raise ValueError(f"matmul input operand {i} must have ndim at least 1, but it has ndim {x.ndim}")
    dtype, weak_type = _result_type("matmul", preferred_element_type, a, b)
    layout = contraction.matmul_layout(a.shape, b.shape, *(compat.batch_sharding(x) for x in (a, b)))
    if layout is None:
        raise ValueError(f"Incompatible types for matmul arguments: {jax.typeof(a)} and {jax.typeof(b)}")
    dimension_numbers, out_perm = contraction.dimension_numbers_of(layout.labels)
    out_sharding = compat.canonicalize_sharding(out_sharding, "dot_general")
    if out_sharding is not None and out_perm is not None:
        # In jnp it is the sharding before a final transpose, which this product does not need.
        out_sharding = compat.permute_sharding(out_sharding, out_perm)
    out = bind(
        lax.squeeze(a, layout.lhs_squeeze) if layout.lhs_squeeze else a,
        lax.squeeze(b, layout.rhs_squeeze) if layout.rhs_squeeze else b,
        dimension_numbers,
        out_perm=out_perm,
        precision=compat.canonicalize_precision(precision),
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )
    if layout.expand:
        out = lax.expand_dims(out, layout.expand)
    return compat.convert_element_type(out, dtype, weak_type)


def linear(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    activation: str | Callable[[Array], Array] | None = None,
    residual: ArrayLike | None = None,
    scale: float = 1.0,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
) -> Array:
    """`activation(scale * (x @ w) + b) + residual`, on CPUs in one call that writes its result once.

    The sum and all that follows are computed in float32 where the result is narrower, and rounded to it once. Results
    of other dtypes than float32, bfloat16 and float16, and products that XLA computes, are a product followed by
    XLA's operations.

    Args:
      x: shape (..., K).
      w: shape (K, N).
      b: shape (N,), or None.
      activation: "relu", "gelu_tanh" (or "gelu"), "gelu_erf", "silu", "tanh", "sigmoid", None, or the function of
        jax.nn that is meant.
      residual: shape (..., N), or None.
      scale: a number, part of the program.
      precision: as in `dot_general`.
      preferred_element_type: dtype of the result; by default that of all operands promoted.
      out_sharding: as in `dot_general`, for explicit meshes; with it, a product is followed by XLA's operations.

    Returns:
      Shape (..., N).

    Raises:
      TypeError: an operand is not an array or has the wrong shape, or an activation or scale meets integers.
      ValueError: the activation is not known; x has no dimensions or w not two.
    """
    epilogue = _linear.Epilogue(activations.name_of(activation), float(scale), b is not None, residual is not None)
    extras = [v for v in (b, residual) if v is not None]
    options = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
    }
    return _run_linear(*compat.ensure_arraylike("linear", x, w, *extras), epilogue=epilogue, **options)


@_jit("epilogue", "precision", "preferred_element_type", "out_sharding")
def _run_linear(
    *operands: Array,
    epilogue: _linear.Epilogue,
    precision: Any,
    preferred_element_type: DTypeLike | None,
    out_sharding: OutSharding,
) -> Array:
    dtype, weak_type = _result_type("linear", preferred_element_type, *operands)
    x, w, *extras = operands
    if x.ndim == 0 or w.ndim != 2:
        raise ValueError(
            f"linear requires x of at least one dimension and w of two, got shapes {x.shape} and {w.shape}"
        )
    if not jnp.issubdtype(dtype, np.floating) and (epilogue.scale != 1 or epilogue.activation not in ("none", "relu")):
        raise TypeError(f"linear with an activation or a scale requires a floating-point result, got {dtype}")
    bias, residual = epilogue.split(extras)
    out_shape = (*x.shape[:-1], w.shape[1])
    for name, have, want in (("b", bias, out_shape[-1:]), ("residual", residual, out_shape)):
        if have is not None and have.shape != want:
            raise TypeError(f"linear requires {name} of shape {want}, got {have.shape}")
    rows = tuple(range(x.ndim - 1))
    sharding = compat.canonicalize_sharding(out_sharding, "linear")
    compute = _linear.bind
    if sharding is not None:
        compute = partial(_linear.composition, product=partial(bind_labels, out_sharding=sharding))
    out = compute(
        x,
        w,
        *(v.astype(dtype) for v in extras),
        labels=contraction.Labels((*rows, x.ndim - 1), (x.ndim - 1, x.ndim), (*rows, x.ndim)),
        epilogue=epilogue,
        precision=compat.canonicalize_precision(precision),
        dtype=dtype,
    )
    return compat.convert_element_type(out, dtype, weak_type)


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`: softmax(scale * Q K^T + bias) V, in one pass on CPUs.

    Scores and sums are float32, and no matrix of scores is formed. What a mask, a window or lengths exclude is skipped
    where whole blocks are; Inf and NaN in keys and values behind a length or outside a window reach no result. Reverse
    mode computes the weights once more, a block of keys at a time, in one pass too; its gradients have the same bits on
    any number of threads. Of other dtypes than float32, bfloat16 and float16, and on other platforms, it is the
    composition that is computed, as it is for forward-mode derivatives. Under jit, batches and heads that are sharded
    over several devices stay where they are; positions are gathered.

    Args:
      query: shape (B, T, N, H) or (T, N, H).
      key, value: shape (B, S, K, H) or (S, K, H), where K divides N, of the query's dtype; or, with a query of float32,
        both bfloat16 or both float16.
      bias: added to the scores, four dimensions that broadcast to (B, N, T, S).
      mask: bool, likewise; False excludes a score.
      scale: of the scores, by default 1 / sqrt(H): a number, or what broadcasts to (B, K, T, S). With one that differs
        between keys it is the composition that is computed.
      is_causal: query t sees no key behind t.
      query_seq_lengths, key_value_seq_lengths: int32, shape (B,): beyond them queries give zeros, and keys count not.
      local_window_size: (left, right) or one number for both: query t sees keys t - left to t + right.
      implementation: None. With another one, "xla" or "cudnn", it is jax.nn's function that is called.
      return_residual: whether to return the logarithms of the sums of exponentials too, (B, T, N) or (T, N) of the
        key's dtype, without a derivative.

    Returns:
      Shape and dtype of query.

    Raises:
      ValueError: what jax.nn.dot_product_attention raises for wrong shapes and dtypes.
    """
    if implementation is not None:
        other: Any = jax.nn.dot_product_attention  # its annotations know literals alone
        return other(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
        )
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    window, sides = None, {}
    if local_window_size is not None:
        left, right = local_window_size
        try:
            window = (operator.index(left), operator.index(right))
        except TypeError:  # known when the program runs
            sides = {"left": jnp.asarray(left), "right": jnp.asarray(right)}
    factor = _scale_of_attention(scale)
    named = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "q_lengths": query_seq_lengths,
        "kv_lengths": key_value_seq_lengths,
        **sides,
        "scale": scale if factor is None else None,
    }
    given = {name: jnp.asarray(x) for name, x in named.items() if x is not None}
    out, residual = _run_attention(
        *given.values(), names=tuple(given), scale=factor, is_causal=bool(is_causal), window=window
    )
    return (out, residual) if return_residual else out


def _scale_of_attention(scale: Any) -> float | None:
    """A scale as a number; None: there is none, or it is an operand, since it is traced or several numbers."""
    if scale is None or isinstance(scale, Tracer | Sequence) or np.ndim(scale):
        return None
    return float(scale)


@_jit("names", "scale", "is_causal", "window")
def _run_attention(
    *operands: Array,
    names: tuple[str, ...],
    scale: float | None,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> Any:
    given = dict(zip(names, operands, strict=False))
    for name in ("query", "key", "value", "bias", "mask"):
        if name in given and given[name].ndim < 4:
            x = given[name]
            given[name] = lax.expand_dims(x, tuple(range(4 - x.ndim)))
    q, k, v = (given[name] for name in ("query", "key", "value"))
    _check_attention(given)
    (b, t, n, h), s = q.shape, k.shape[1]
    bias, mask = (_broadcast_to_scores(given.get(name), name, (b, n, t, s)) for name in ("bias", "mask"))
    if "left" in given:
        inside = _window_mask(t, s, given["left"], given["right"])
        mask = inside if mask is None else mask & inside
    extras = {
        "bias": None if bias is None else bias.astype(np.float32),
        "mask": mask,
        "q_lengths": given.get("q_lengths"),
        "kv_lengths": given.get("kv_lengths"),
    }
    left, right = (_attention.UNBOUNDED,) * 2 if window is None else (max(-(2**30), min(x, 2**30)) for x in window)
    if is_causal:
        right = min(right, 0)
    factor = given.get("scale")
    if factor is not None:
        scale = 1.0
    elif scale is None:
        scale = 1 / math.sqrt(h) if h != 0 else math.inf
    options = _attention.Options(scale, left, right, *(x is not None for x in extras.values()))
    present = [x for x in extras.values() if x is not None]
    dtype = q.dtype
    if factor is not None:
        _check_scale(factor, (b, k.shape[2], t, s))
        if dtype.name in ("float32", "bfloat16", "float16") and (factor.ndim == 0 or factor.shape[-1] == 1):
            q, factor = q.astype(np.float32) * _of_queries(factor, k.shape[2], n), None
    if factor is not None:
        grouped = lax.expand_dims(factor, (factor.ndim - 2,)) if factor.ndim > 2 else factor
        out, maxima, logs = _attention.composition(q, k, v, *present, options=options, scale=grouped)
    else:
        out, maxima, logs = _attention.bind(q, k, v, *present, options=options)
    out = out.astype(dtype)
    residual = lax.stop_gradient((maxima + logs).astype(k.dtype))
    shape = operands[0].shape
    return out.reshape(shape), residual.reshape(shape[:-1])


def _window_mask(queries: int, keys: int, left: Array, right: Array) -> Array:
    """Which keys each query sees, of a window that is known when the program runs."""
    if left.ndim or right.ndim:
        raise ValueError(f"local_window_size should be two numbers, but got shapes {left.shape} and {right.shape}")
    at_q, at_k = jnp.arange(queries)[:, None], jnp.arange(keys)[None, :]
    return ((at_q <= at_k + left) & (at_q >= at_k - right))[None, None]


def _check_scale(scale: Array, scores: tuple[int, int, int, int]) -> None:
    """jax.nn multiplies scores (B, K, T, S) of one query head for each of the keys' heads."""
    if jnp.broadcast_shapes(scale.shape, scores) != scores:
        raise ValueError(f"scale of shape {scale.shape} does not broadcast to {scores}")


def _of_queries(scale: Array, kv_heads: int, heads: int) -> Array:
    """A scale that is the same for all keys as one of queries (B, T, N, H)."""
    wide = lax.expand_dims(scale.astype(np.float32), tuple(range(4 - scale.ndim)))
    wide = jnp.transpose(wide, (0, 2, 1, 3))
    return wide if wide.shape[2] == 1 else jnp.repeat(wide, heads // kv_heads, 2)


def _check_attention(given: dict[str, Array]) -> None:
    """The errors of jax.nn.dot_product_attention."""
    q, k = given["query"], given["key"]
    if k.ndim != 4:
        raise ValueError(f"not enough values to unpack (expected 4, got {k.ndim})")
    b, s, kv_heads, h = k.shape
    wider = q.dtype == np.float32 and k.dtype in (jnp.bfloat16, np.float16)
    for name, shape, dtype in (
        ("value", [b, s, kv_heads, h], k.dtype),
        ("query", [b, -1, -1, h], None if wider else k.dtype),
        ("mask", [-1] * 4, np.dtype(bool)),
        ("bias", [-1] * 4, None),
        ("q_lengths", [b], np.dtype(np.int32)),
        ("kv_lengths", [b], np.dtype(np.int32)),
    ):
        x = given.get(name)
        if x is None:
            continue
        shown = {"q_lengths": "query_seq_lengths", "kv_lengths": "key_value_seq_lengths"}.get(name, name)
        if x.ndim != len(shape):
            raise ValueError(f"{shown} ndim should be {len(shape)}, but got {x.ndim}")
        if dtype is not None and x.dtype != dtype:
            raise ValueError(f"{shown} dtype should be {dtype}, but got {x.dtype}")
        if any(want not in (-1, have) for want, have in zip(shape, x.shape, strict=True)):
            raise ValueError(f"{shown} shape should be {shape}: but got {x.shape}")
    if q.shape[-2] % kv_heads != 0:
        raise ValueError(
            f"The number of query heads must be a multiple of key/value heads, but got {q.shape[-2]} vs {kv_heads}"
        )


def _broadcast_to_scores(x: Array | None, name: str, scores: tuple[int, ...]) -> Array | None:
    """A bias or mask with all keys in its last dimension; the others may be 1."""
    if x is None:
        return None
    if any(have not in (1, want) for have, want in zip(x.shape, scores, strict=True)):
        raise ValueError(f"{name} of shape {x.shape} does not broadcast to {scores}")
    return jnp.broadcast_to(x, (*x.shape[:3], scores[3]))


@_jit("precision", "preferred_element_type", "out_sharding")
def dot(
    a: ArrayLike,
    b: ArrayLike,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
) -> Array:
    """`jnp.dot`: like `matmul`, but leading dimensions are stacked, and a scalar multiplies.

    Args:
      a: shape (), (K,) or (A..., K).
      b: shape (), (K,) or (B..., K, N).
      precision, preferred_element_type, out_sharding: as in `dot_general`.

    Returns:
      Shape (A..., B..., N), dtype as in `matmul`.

    Raises:
      TypeError: an operand is not an array, or the contracting sizes differ.
    """
    a, b = compat.ensure_arraylike("dot", a, b)
    dtype, weak_type = _result_type("dot", preferred_element_type, a, b)
    contracting: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if a.ndim and b.ndim:
        contracting = ((a.ndim - 1,), (max(b.ndim - 2, 0),))
    out = dot_general(a, b, (contracting, ((), ())), precision, dtype, out_sharding=out_sharding)
    return compat.convert_element_type(out, dtype, weak_type)


@_jit("precision", "preferred_element_type")
def vdot(
    a: ArrayLike,
    b: ArrayLike,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """`jnp.vdot`: the product of two flattened arrays of one size, the first conjugated.

    Returns:
      Shape (), dtype as in `matmul`.

    Raises:
      TypeError: an operand is not an array, or the sizes differ.
    """
    a, b = compat.ensure_arraylike("vdot", a, b)
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        a = jnp.conj(a)
    return dot(a.ravel(), b.ravel(), precision=precision, preferred_element_type=preferred_element_type)


@_jit("precision", "preferred_element_type")
def inner(
    a: ArrayLike,
    b: ArrayLike,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """`jnp.inner`: contracts the last dimension of each operand.

    Args:
      a: shape (A..., K), or a scalar, which multiplies.
      b: shape (B..., K), or a scalar.
      precision, preferred_element_type: as in `dot_general`.

    Returns:
      Shape (A..., B...), dtype as in `matmul`.

    Raises:
      TypeError: an operand is not an array, or the contracting sizes differ.
    """
    a, b = compat.ensure_arraylike("inner", a, b)
    if a.ndim and b.ndim:
        return tensordot(a, b, (-1, -1), precision=precision, preferred_element_type=preferred_element_type)
    if preferred_element_type is not None:
        a, b = a.astype(preferred_element_type), b.astype(preferred_element_type)
    return a * b


def tensordot(
    a: ArrayLike,
    b: ArrayLike,
    axes: int | Sequence[int] | Sequence[Sequence[int]] = 2,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
) -> Array:
    """`jnp.tensordot`: contracts the axes that are named, in pairs.

    Args:
      a, b: arrays.
      axes: how many last axes of a to contract with first axes of b; or a pair of axes or of sequences
        of axes, of a and of b.
      precision, preferred_element_type, out_sharding: as in `dot_general`.

    Returns:
      The axes of a that are left, then those of b; dtype as in `matmul`.

    Raises:
      TypeError: an operand is not an array, axes are malformed, or the contracting sizes differ.
      ValueError: an axis is out of range.
    """
    a, b = compat.ensure_arraylike("tensordot", a, b)
    dtype, weak_type = _result_type("tensordot", preferred_element_type, a, b)
    contracting = _tensordot_axes(a, b, axes)
    out = dot_general(a, b, (contracting, ((), ())), precision, dtype, out_sharding=out_sharding)
    return compat.convert_element_type(out, dtype, weak_type)


def _tensordot_axes(a: Array, b: Array, axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if type(axes) is int:
        if axes > min(a.ndim, b.ndim):
            raise TypeError(f"Number of tensordot axes (axes {axes}) exceeds input ranks ({a.shape} and {b.shape})")
        return tuple(range(a.ndim - axes, a.ndim)), tuple(range(axes))
    if not (isinstance(axes, tuple | list) and len(axes) == 2):
        raise TypeError("tensordot axes argument must be an int, a pair of ints, or a pair of lists/tuples of ints.")
    ax1, ax2 = axes
    if isinstance(ax1, int) and isinstance(ax2, int):
        ax1, ax2 = (ax1,), (ax2,)
    elif not (isinstance(ax1, tuple | list) and isinstance(ax2, tuple | list)):
        raise TypeError(f"tensordot requires both axes lists to be either ints, tuples or lists, got {ax1} and {ax2}")
    if len(ax1) != len(ax2):
        raise TypeError(f"tensordot requires axes lists to have equal length, got {ax1} and {ax2}.")
    return compat.canonicalize_axes(ax1, a.ndim), compat.canonicalize_axes(ax2, b.ndim)


@jax.jit
def matvec(x1: ArrayLike, x2: ArrayLike, /) -> Array:
    """`jnp.matvec`: matrices times vectors, with leading dimensions broadcast.

    Args:
      x1: shape (..., M, K).
      x2: shape (..., K).

    Returns:
      Shape (..., M), dtype as in `matmul`.

    Raises:
      TypeError: an operand is not an array.
      ValueError: an operand has too few dimensions, or sizes do not match.
    """
    x1, x2 = compat.ensure_arraylike("matvec", x1, x2)
    return jnp.vectorize(matmul, signature="(n,m),(m)->(n)")(x1, x2)


@jax.jit
def vecmat(x1: ArrayLike, x2: ArrayLike, /) -> Array:
    """`jnp.vecmat`: vectors, conjugated, times matrices, with leading dimensions broadcast.

    Args:
      x1: shape (..., K).
      x2: shape (..., K, N).

    Returns:
      Shape (..., N), dtype as in `matmul`.

    Raises:
      TypeError: an operand is not an array.
      ValueError: an operand has too few dimensions, or sizes do not match.
    """
    x1, x2 = compat.ensure_arraylike("matvec", x1, x2)
    return jnp.vectorize(matmul, signature="(n),(n,m)->(m)")(jnp.conj(x1), x2)


def einsum(
    subscripts: Any,
    /,
    *operands: Any,
    out: None = None,
    optimize: str | bool | list[tuple[int, ...]] = "auto",
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
) -> Array:
    """`jnp.einsum`: Einstein summation. A product stores its result in the order that is asked for.

    Args:
      subscripts: such as "bqhd,bkhd->bhqk", or anything else that jnp.einsum takes.
      *operands: arrays.
      out: not supported, as in JAX.
      optimize: the order of contraction for three operands and more.
      precision, preferred_element_type, out_sharding: as in `dot_general`.

    Returns:
      An array with the dimensions that subscripts name, dtype as in `matmul`.

    Raises:
      TypeError, ValueError: what jnp.einsum raises for malformed subscripts or shapes.
      NotImplementedError: `out` is given.
    """
    options = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
    }
    steps = None if out is not None else _einsum.steps(subscripts, operands, optimize, out_sharding)
    if steps is None:
        return jnp.einsum(subscripts, *operands, out=out, optimize=optimize, _dot_general=dot_general, **options)
    return _run_einsum(*compat.ensure_arraylike("einsum", *operands), steps=steps, **options)


@_jit("steps", "precision", "preferred_element_type", "out_sharding")
def _run_einsum(
    *operands: Array,
    steps: tuple[_einsum.Step, ...],
    precision: Any,
    preferred_element_type: DTypeLike | None,
    out_sharding: OutSharding,
) -> Array:
    dtype, weak_type = _result_type("einsum", preferred_element_type, *operands)
    params: dict[str, Any] = {
        "precision": compat.canonicalize_precision(precision),
        "preferred_element_type": dtype,
        "out_sharding": compat.canonicalize_sharding(out_sharding, "einsum"),
    }
    left = list(operands)
    for step in steps:
        arrays = [left.pop(i) for i in step.operands]
        if step.labels is not None:
            lhs, rhs = arrays
            left.append(bind_labels(lhs, rhs, step.labels, **params))
        else:
            left.append(jnp.einsum(step.subscripts, *arrays, _dot_general=dot_general, **params))
    return compat.convert_element_type(left[0], dtype, weak_type)


def export_checks() -> list[DisabledSafetyCheck]:
    """What to pass to `jax.export.export(..., disabled_checks=...)` for programs with our products.

    jax.export refuses custom calls that it does not know. The attributes of ours carry a version number,
    and every later jax_nano runs, or refuses by a clear error, a program that an earlier one exported.
    The process that runs such a program must have imported jax_nano, before or after JAX, and need do no more.
    """
    from jax.export import DisabledSafetyCheck

    names = (
        native.TARGET_NAME,
        native.LINEAR_TARGET_NAME,
        native.ATTENTION_TARGET_NAME,
        native.ATTENTION_GRADIENTS_TARGET_NAME,
        native.QUANTIZED_TARGET_NAME,
    )
    return [DisabledSafetyCheck.custom_call(name) for name in names]
