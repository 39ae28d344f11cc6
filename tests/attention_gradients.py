"""What the gradients of attention must be, in float64, and ways to call the generated kernels without XLA."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
from attention import MASKED, Case, _address, _broadcast, _round_up, _strides, visible
from guarded import Region

from jax_nano import _runtime
from jax_nano._core import spec

LOG2_E = float(np.log2(np.e))

MASKED_LSE = np.float32(-0.7) * np.finfo(np.float32).max
"""The logarithm of a query that sees no key."""


@dataclass(frozen=True)
class Given:
    """What gradients are computed from, beside the operands: cotangents, logarithms and deltas [B, T, N]."""

    dout: np.ndarray
    lse: np.ndarray
    delta: np.ndarray


def given(x: Case, dout: np.ndarray, dlse: np.ndarray | None = None) -> Given:
    """Logarithms and deltas as float32 numbers, from float64."""
    group = x.q.shape[2] // x.k.shape[2]
    q, k, v, cotangents = (a.astype(np.float64) for a in (x.q, x.k, x.v, dout))
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    with np.errstate(all="ignore"):
        scores = _einsum("btnh,bsnh->bnts", q, k) * x.scale
        if x.bias is not None:
            scores = scores + x.bias
        scores = np.where(_allowed(x), scores, MASKED)
        top = scores.max(-1, keepdims=True)
        exps = np.exp(scores - top)
        total = exps.sum(-1, keepdims=True)
        delta = (_einsum("bnts,bsnh->btnh", exps / total, v) * cotangents).sum(-1)
        lse = np.moveaxis((np.log(total) + top)[..., 0], 1, 2)
    lse = np.where(lse <= 0.99 * MASKED, MASKED_LSE, lse)
    if dlse is not None:
        delta = delta - dlse
    if x.q_lengths is not None:
        here = np.arange(x.q.shape[1])[None, :, None] < x.q_lengths[:, None, None]
        lse, delta = np.where(here, lse, MASKED_LSE), np.where(here, delta, 0)
    return Given(dout, *(np.ascontiguousarray(a, np.float32) for a in (lse, delta)))


def _einsum(subscripts: str, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """np.einsum of arrays with the batch dimensions b and n and one contracted dimension, by NumPy's products."""
    of_lhs, of_rhs, of_out = subscripts.replace("->", ",").split(",")
    contracted = next(c for c in of_lhs if c not in of_out)
    free = [next(c for c in dims if c not in f"bn{contracted}") for dims in (of_lhs, of_rhs)]
    a = lhs.transpose([of_lhs.index(c) for c in f"bn{free[0]}{contracted}"])
    b = rhs.transpose([of_rhs.index(c) for c in f"bn{contracted}{free[1]}"])
    return (a @ b).transpose([f"bn{free[0]}{free[1]}".index(c) for c in of_out])


def _allowed(x: Case) -> np.ndarray:
    allowed = np.broadcast_to(visible(x), x.scores_shape)
    return allowed if x.mask is None else allowed & x.mask


def expected(x: Case, g: Given) -> dict[str, reference.Expected]:
    """dq, dk, dv and, if there is a bias, dbias, from these logarithms and deltas.

    The bound: a weight is off, relatively, by what its score is, by its exponential and by the rounding of operands; a
    score's cotangent by that of its weight, and by the product it comes from; then come sums over keys or queries, and
    the rounding of the result.
    """
    b, n, t, s = x.scores_shape
    kv_heads, group = x.k.shape[2], n // x.k.shape[2]
    q, k, v, dout = (a.astype(np.float64) for a in (x.q, x.k, x.v, g.dout))
    k, v = (np.repeat(a, group, axis=2) for a in (k, v))
    lse, delta = (np.moveaxis(a.astype(np.float64), 2, 1)[..., None] for a in (g.lse, g.delta))
    allowed = _allowed(x)
    eps = float(reference.finfo(np.float32).eps)
    narrow = float(reference.finfo(x.k.dtype).eps) if x.k.dtype != np.float32 else 0.0
    present = np.ones((b, 1, t, 1), bool)
    if x.q_lengths is not None:
        present = np.arange(t)[:, None] < x.q_lengths[:, None, None, None]
    uniform = lse == float(MASKED_LSE)
    with np.errstate(all="ignore"):
        scores = _einsum("btnh,bsnh->bnts", q, k) * x.scale
        terms = _einsum("btnh,bsnh->bnts", np.abs(q), np.abs(k)) * abs(x.scale)
        if x.bias is not None:
            scores, terms = scores + x.bias, terms + np.abs(np.where(np.isfinite(x.bias), x.bias, 0))
        weights = np.where(allowed, np.exp(scores - lse), 0)
        weights = np.where(uniform, 1 / s, weights) * present
        weights = np.where(np.broadcast_to(present, weights.shape), weights, 0)
        off = reference.relative_error(q.shape[-1] + 2, np.float32) * np.where(weights > 0, terms, 0)
        off = 2 * (off + 2 * eps * np.where(np.isfinite(lse), np.abs(np.where(uniform, 0, lse)), 0)) + 1e-6
        error = weights * off
        products = _einsum("btnh,bsnh->bnts", dout, v)
        magnitude = _einsum("btnh,bsnh->bnts", np.abs(dout), np.abs(v))
        counts = allowed & ~uniform & present
        dscores = np.where(counts, weights * (products - delta), 0)
        by = reference.relative_error(v.shape[-1] + 1, np.float32) * magnitude + eps * np.abs(delta)
        derror = np.where(counts, error * np.abs(products - delta) + weights * by + eps * np.abs(dscores), 0)

        def summed(subscripts: str, w: np.ndarray, e: np.ndarray, a: np.ndarray, terms: int) -> tuple[Any, Any]:
            e = e + narrow * np.abs(w)
            # Zeros for what a row does not see, whatever is there.
            clean = np.where(np.isfinite(a), a, 0)
            value, size = (_einsum(subscripts, i, j) for i, j in ((w, clean), (np.abs(w), np.abs(clean))))
            off = _einsum(subscripts, e, np.abs(clean)) + reference.relative_error(terms, np.float32) * size
            return value, off

        dq = summed("bnts,bsnh->btnh", dscores, derror, k, s)
        dk = summed("bnts,btnh->bsnh", dscores, derror, q, t * group)
        dv = summed("bnts,btnh->bsnh", weights, error, dout, t * group)
    heads = lambda a: a.reshape(*a.shape[:2], kv_heads, group, a.shape[-1]).sum(3)  # noqa: E731
    found = {
        "dq": (dq[0] * x.scale, dq[1] * abs(x.scale), x.q.dtype),
        "dk": (heads(dk[0]) * x.scale, heads(dk[1]) * abs(x.scale), x.k.dtype),
        "dv": (heads(dv[0]), heads(dv[1]), x.v.dtype),
    }
    if x.bias is not None:
        over = tuple(i for i in range(3) if x.bias.shape[i] == 1)
        count = int(np.prod([x.scores_shape[i] for i in over]))
        size = np.abs(dscores).sum(over, keepdims=True)
        error = derror.sum(over, keepdims=True) + reference.relative_error(count, np.float32) * size
        found["dbias"] = (dscores.sum(over, keepdims=True), error, np.dtype(np.float32))
    out = {}
    for name, (value, bound, dtype) in found.items():
        info = reference.finfo(dtype)
        rounding = np.maximum(float(info.eps) * np.abs(value), float(info.smallest_subnormal))
        # Weights and their cotangents below the smallest normal number are zero.
        out[name] = reference.Expected(value, bound + rounding + 1e-36)
    return out


def results(x: Case, *, dbias: bool) -> dict[str, np.ndarray]:
    """Room for the results, full of NaN."""
    found = {"dq": x.q, "dk": x.k, "dv": x.v}
    out = {name: np.full(a.shape, np.nan, a.dtype) for name, a in found.items()}
    if dbias:
        assert x.bias is not None
        out["dbias"] = np.full(x.bias.shape, np.nan, np.float32)
    return out


def run(
    name: str,
    x: Case,
    g: Given,
    *,
    threads: int = 1,
    dbias: bool = False,
    out: dict[str, np.ndarray] | None = None,
    trips: int = 1,
) -> dict[str, np.ndarray]:
    """The gradients by one kernel, in memory full of NaN beforehand."""
    out = results(x, dbias=dbias) if out is None else out
    b, t, n, h = x.q.shape
    operands = (x.q, x.k, x.v, g.dout, x.bias, x.mask, x.q_lengths, x.kv_lengths, g.lse, g.delta)
    arrays = (*operands, out["dq"], out["dk"], out["dv"], out.get("dbias"))
    assert all(a is None or a.flags.c_contiguous for a in arrays[8:])
    _runtime.attention_gradients(
        name,
        addresses=[_address(a) for a in arrays],
        sizes=[b, t, x.k.shape[1], n, x.k.shape[2], h, x.v.shape[3]],
        strides=[_strides(a) for a in (x.q, x.k, x.v, g.dout)],
        bias=_broadcast(x.bias),
        mask=_broadcast(x.mask),
        dbias=list(x.bias.shape[:3]) if dbias and x.bias is not None else None,
        scale=x.scale,
        left=x.left,
        right=x.right,
        threads=threads,
        trips=trips,
    )
    return out


def plan(name: str, x: Case, *, dbias: bool = False) -> dict[str, Any]:
    """How `run` goes about it."""
    b, t, n, h = x.q.shape
    return _runtime.plan_attention_gradients(
        name,
        [b, t, x.k.shape[1], n, x.k.shape[2], h, x.v.shape[3]],
        [_strides(a) for a in (x.q, x.k, x.v, x.q)],
        list(x.bias.shape[:3]) if dbias and x.bias is not None else None,
    )


def call(
    info: dict[str, Any], function: Any, x: Case, g: Given, *, block: int, chunk: int, at: str = "end"
) -> dict[str, np.ndarray]:
    """The gradients by a generated function itself, for blocks of keys and chunks of rows of these sizes.

    The workspace is exactly as large as csrc/run/attention_gradients.cc makes it, between guard pages, full of NaN.
    Heads of queries must be as many as those of keys.
    """
    (b, t, n, h), s, width = x.q.shape, x.k.shape[1], x.v.shape[3]
    assert n == x.k.shape[2]
    out = results(x, dbias=x.bias is not None)
    packed, mr, nr, kr = (info[name] for name in ("pack_bytes", "mr", "nr", "kr"))
    slack = spec.PACK_SLACK_BYTES
    rows, keys = _round_up(chunk, mr), _round_up(block, nr)
    rs_dq, rs_dv = _round_up(h, nr), _round_up(width, nr)
    rs_scores = (-(-(keys + nr) * 4 // 64) | 1) * 16

    def packed_row(elements: int) -> int:
        return (-(-_round_up(elements, kr) * packed // 64) | 1) * 64

    def panels(k: int, cols: int) -> int:
        return _round_up(cols, nr) * _round_up(k, kr) * packed + slack

    sizes = {
        "q_pack": rows * packed_row(h) + slack,
        "dout_pack": rows * packed_row(width) + slack,
        "q_panels": panels(chunk, h) if info["converts"] else 0,
        "dout_panels": panels(chunk, width) if info["converts"] else 0,
        "kt_pack": panels(h, block),
        "vt_pack": panels(width, block),
        "k_pack": panels(block, h),
        "weights": rows * rs_scores * 4,
        "dscores": rows * rs_scores * 4,
        "turned": 0,
        "dq": _round_up(t, mr) * rs_dq * 4,
        "dk": (keys + mr) * rs_dq * 4,
        "dv": (keys + mr) * rs_dv * 4,
    }
    if info["converts"]:
        sizes["turned"] = max(_round_up(keys + mr, mr) * packed_row(chunk), mr * packed_row(block)) + slack
    names, row_names = spec.names(spec.GRADIENT_ARGS), spec.names(spec.GRADIENT_ROW)

    def bits(value: float) -> int:
        return int(np.array(value, np.float64).view(np.int64))

    def run_step(**fields: int) -> None:
        function((ctypes.c_int64 * len(names))(*(fields.get(name, 0) for name in names)))

    def at_index(array: np.ndarray, index: tuple[int, ...]) -> int:
        steps = zip(index, array.strides, array.shape, strict=False)
        return _address(array) + sum(0 if size == 1 else i * j for i, j, size in steps)

    with contextlib.ExitStack() as regions:
        rooms = {}
        for name, size in sizes.items():
            if size == 0:
                rooms[name] = 0
                continue
            region = regions.enter_context(Region(size))
            rooms[name] = (region.end - size) // 64 * 64 if at == "end" else region.begin
            ctypes.memset(region.begin, 0xFF, region.end - region.begin)
        if "dbias" in out:
            out["dbias"][...] = 0
        for batch in range(b):
            for head in range(n):
                table = np.zeros((t, len(row_names)), np.int64)
                for r in range(t):
                    lo, hi = max(0, r - x.left), min(s, r + x.right + 1)
                    lse = float(g.lse[batch, r, head])
                    row = {
                        "q": at_index(x.q, (batch, r, head)),
                        "dout": at_index(g.dout, (batch, r, head)),
                        "lo": lo,
                        "hi": max(lo, hi),
                        "lse": bits(lse * LOG2_E),
                        "delta": bits(float(g.delta[batch, r, head])),
                        "uniform": bits(0.0),
                    }
                    for name, array in (("bias", x.bias), ("mask", x.mask), ("dbias", out.get("dbias"))):
                        if array is not None:
                            row[name] = at_index(array, (batch, head, r))
                    for name, value in row.items():
                        table[r, row_names.index(name)] = value
                ctypes.memset(rooms["dq"], 0, t * rs_dq * 4)
                for s0 in range(0, s, block):
                    cols = min(block, s - s0)
                    ctypes.memset(rooms["dk"], 0, cols * rs_dq * 4)
                    ctypes.memset(rooms["dv"], 0, cols * rs_dv * 4)
                    fields = {
                        **rooms,
                        "k": at_index(x.k, (batch, s0, head)),
                        "v": at_index(x.v, (batch, s0, head)),
                        "cols": cols,
                        "s0": s0,
                        "depth": h,
                        "width": width,
                        "csq": x.q.strides[3] // x.q.itemsize,
                        "cso": g.dout.strides[3] // g.dout.itemsize,
                        "rsk": x.k.strides[1] // x.k.itemsize,
                        "csk": x.k.strides[3] // x.k.itemsize,
                        "rsv": x.v.strides[1] // x.v.itemsize,
                        "csv": x.v.strides[3] // x.v.itemsize,
                        "rs_scores": rs_scores,
                        "rs_dq": rs_dq,
                        "rs_dk": rs_dq,
                        "rs_dv": rs_dv,
                        "scale": bits(x.scale * LOG2_E),
                        "general": int(x.bias is not None or x.mask is not None),
                    }
                    run_step(**fields, step=0)
                    for first in range(0, t, chunk):
                        here = {
                            "rows": table.ctypes.data + first * table.strides[0],
                            "count": min(chunk, t - first),
                            "dq": rooms["dq"] + first * rs_dq * 4,
                        }
                        run_step(**(fields | here), step=1)
                        run_step(**(fields | here), step=2)
                    for name, size, by in (("dk", h, x.scale), ("dv", width, 1.0)):
                        result = out[name]
                        run_step(
                            step=4,
                            dq=rooms[name],
                            rs_dq=_round_up(size, nr),
                            out=at_index(result, (batch, s0, head)),
                            rs_out=result.strides[1] // result.itemsize,
                            count=cols,
                            depth=size,
                            scale=bits(by),
                        )
                result = out["dq"]
                run_step(
                    step=3,
                    dq=rooms["dq"],
                    rs_dq=rs_dq,
                    out=at_index(result, (batch, 0, head)),
                    rs_out=result.strides[1] // result.itemsize,
                    count=t,
                    depth=h,
                    scale=bits(x.scale),
                )
    return out
