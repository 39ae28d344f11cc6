"""What the gradients of attention must be, in float64, and ways to call the generated kernels without XLA."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
from attention import (
    HUGE,
    Case,
    address,
    allowed,
    at_index,
    bits,
    broadcast,
    call_function,
    einsum,
    operands,
    packed_panels,
    packed_row,
    rooms_of,
    round_up,
    rs_scores_of,
    scores_of,
    steps_of,
    strides,
    window,
)

from jax_nano import _runtime
from jax_nano._core import spec

LOG2_E = float(np.log2(np.e))


@dataclass(frozen=True)
class Given:
    """What gradients are computed from, beside the operands: cotangents, maxima, logarithms and deltas [B, T, N]."""

    dout: np.ndarray
    maxima: np.ndarray
    logs: np.ndarray
    delta: np.ndarray


def given(x: Case, dout: np.ndarray, dlse: np.ndarray | None = None) -> Given:
    """Maxima, logarithms and deltas as float32 numbers, from float64."""
    _, _, v = operands(x)
    with np.errstate(all="ignore"):
        scores = np.where(allowed(x), scores_of(x)[0], x.masked)
        top = scores.max(-1, keepdims=True).astype(np.float32).astype(np.float64)
        exps = np.exp(scores - top)
        total = exps.sum(-1, keepdims=True)
        delta = (einsum("bnts,bsnh->btnh", exps / total, v) * dout.astype(np.float64)).sum(-1)
        maxima, logs = (np.moveaxis(a[..., 0], 1, 2) for a in (top, np.log(total)))
    if dlse is not None:
        delta = delta - dlse
    if x.q_lengths is not None:
        here = np.arange(x.q.shape[1])[None, :, None] < x.q_lengths[:, None, None]
        maxima, delta = np.where(here, maxima, x.masked), np.where(here, delta, 0)
    return Given(dout, *(np.ascontiguousarray(a, np.float32) for a in (maxima, logs, delta)))


def expected(x: Case, g: Given) -> dict[str, reference.Expected]:
    """dq, dk, dv and, if there is a bias, dbias, from these logarithms and deltas.

    The bound: a weight is off, relatively, by what its score is, by its exponential and by the rounding of operands; a
    score's cotangent by that of its weight, and by the product it comes from; then come sums over keys or queries, and
    the rounding of the result.
    """
    b, n, t, s = x.scores_shape
    kv_heads, group = x.k.shape[2], n // x.k.shape[2]
    q, k, v = operands(x)
    dout = g.dout.astype(np.float64)
    maxima, logs, delta = (np.moveaxis(a.astype(np.float64), 2, 1)[..., None] for a in (g.maxima, g.logs, g.delta))
    taken = allowed(x)
    eps = float(reference.finfo(np.float32).eps)
    narrow = float(reference.finfo(x.k.dtype).eps) if x.k.dtype != np.float32 else 0.0
    present = np.ones((b, 1, t, 1), bool)
    if x.q_lengths is not None:
        present = np.arange(t)[:, None] < x.q_lengths[:, None, None, None]
    with np.errstate(all="ignore"):
        scores, terms = scores_of(x)
        scores = np.where(taken, scores, x.masked)
        weights = np.exp((scores - maxima) - logs)
        weights = np.where(np.broadcast_to(present, weights.shape), weights, 0)
        off = reference.relative_error(q.shape[-1] + 2, np.float32) * np.where(weights > 0, terms, 0)
        size = np.where(np.abs(maxima) < HUGE, np.abs(maxima), 0) + np.where(np.isfinite(logs), np.abs(logs), 0)
        off = 2 * (off + 2 * eps * size) + 1e-6
        error = weights * off
        products = einsum("btnh,bsnh->bnts", dout, v)
        magnitude = einsum("btnh,bsnh->bnts", np.abs(dout), np.abs(v))
        counts = taken & present
        dscores = np.where(counts, weights * (products - delta), 0)
        by = reference.relative_error(v.shape[-1] + 1, np.float32) * magnitude + eps * np.abs(delta)
        derror = np.where(counts, error * np.abs(products - delta) + weights * by + eps * np.abs(dscores), 0)

        def summed(subscripts: str, w: np.ndarray, e: np.ndarray, a: np.ndarray, terms: int) -> tuple[Any, Any]:
            e = e + narrow * np.abs(w)
            # Zeros for what a row does not see, whatever is there.
            clean = np.where(np.isfinite(a), a, 0)
            value, size = (einsum(subscripts, i, j) for i, j in ((w, clean), (np.abs(w), np.abs(clean))))
            off = einsum(subscripts, e, np.abs(clean)) + reference.relative_error(terms, np.float32) * size
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
    operands = (x.q, x.k, x.v, g.dout, x.bias, x.mask, x.q_lengths, x.kv_lengths, g.maxima, g.logs, g.delta)
    arrays = (*operands, out["dq"], out["dk"], out["dv"], out.get("dbias"))
    assert all(a is None or a.flags.c_contiguous for a in arrays[8:])
    _runtime.attention_gradients(
        name,
        addresses=[address(a) for a in arrays],
        sizes=[b, t, x.k.shape[1], n, x.k.shape[2], h, x.v.shape[3]],
        strides=[strides(a) for a in (x.q, x.k, x.v, g.dout)],
        bias=broadcast(x.bias),
        mask=broadcast(x.mask),
        dbias=list(x.bias.shape[:3]) if dbias and x.bias is not None else None,
        scale=x.scale,
        masked=x.masked,
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
        [strides(a) for a in (x.q, x.k, x.v, x.q)],
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
    mr, nr = info["mr"], info["nr"]
    slack = spec.PACK_SLACK_BYTES
    rows, keys = round_up(chunk, mr), round_up(block, nr)
    rs_dq, rs_dv = round_up(h, nr), round_up(width, nr)
    rs_scores = rs_scores_of(keys + nr)

    sizes = {
        "q_pack": rows * packed_row(info, h) + slack,
        "dout_pack": rows * packed_row(info, width) + slack,
        "q_panels": packed_panels(info, chunk, h) if info["converts"] else 0,
        "dout_panels": packed_panels(info, chunk, width) if info["converts"] else 0,
        "kt_pack": packed_panels(info, h, block),
        "vt_pack": packed_panels(info, width, block),
        "k_pack": packed_panels(info, block, h),
        "weights": rows * rs_scores * 4,
        "dscores": rows * rs_scores * 4,
        "turned": 0,
        "dq": round_up(t, mr) * rs_dq * 4,
        "dk": (keys + mr) * rs_dq * 4,
        "dv": (keys + mr) * rs_dv * 4,
    }
    if info["converts"]:
        sizes["turned"] = max(round_up(keys + mr, mr) * packed_row(info, chunk), mr * packed_row(info, block)) + slack
    names, row_names = spec.names(spec.GRADIENT_ARGS), spec.names(spec.GRADIENT_ROW)

    def run_step(**fields: int) -> None:
        call_function(function, names, fields)

    general = x.bias is not None or x.mask is not None
    base = 1.0 if general else LOG2_E
    with contextlib.ExitStack() as regions:
        rooms = rooms_of(sizes, regions, at)
        if "dbias" in out:
            out["dbias"][...] = 0
        for batch in range(b):
            for head in range(n):
                table = np.zeros((t, len(row_names)), np.int64)
                for r in range(t):
                    maximum, log = (float(a[batch, r, head]) for a in (g.maxima, g.logs))
                    row = {
                        "q": at_index(x.q, (batch, r, head)),
                        "dout": at_index(g.dout, (batch, r, head)),
                        **window(x, r),
                        "maximum": bits(maximum * base),
                        "log": bits(log * LOG2_E),
                        "delta": bits(float(g.delta[batch, r, head])),
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
                        **steps_of(x),
                        "k": at_index(x.k, (batch, s0, head)),
                        "v": at_index(x.v, (batch, s0, head)),
                        "cols": cols,
                        "s0": s0,
                        "cso": g.dout.strides[3] // g.dout.itemsize,
                        "rs_scores": rs_scores,
                        "rs_dq": rs_dq,
                        "rs_dk": rs_dq,
                        "rs_dv": rs_dv,
                        "scale": bits(x.scale),
                        "scale2": bits(x.scale * LOG2_E),
                        "masked": bits(x.masked),
                        "general": int(general),
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
                            rs_dq=round_up(size, nr),
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
