"""Sampling's attention on CUDA: each token of a flat step over its own slot of the cache, in Triton.

A token reads the keys of its slot up to its own position, which a tensor holds: nothing is padded to the
longest of the step, query heads that share keys read them once, and nothing depends on values that Python
sees, so that a step of whatever prompts and single tokens can be captured. Few tokens with long histories
are split over the keys, and the parts put together by their log-sum-exps (Dao et al. 2023, "Flash-Decoding").
Windows, soft caps and sinks are served. Not covered: gradients, float64, and long prompts, whose queries
would each read all before them; `attention` gives these to the fused kernels of torch.

Needs Triton, which torch brings along on CUDA: imported by `attention` where a step is on such a device.
"""

# Kernels are no Python to a type checker.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # that a program reads at a time
PROGRAMS = 512  # at least so many, by splitting keys: four for each of an H100's multiprocessors
SPLITS = 16  # at most


@triton.jit
def _write(
    key, value, keys, values, slots, positions,
    k_h, k_t, v_h, v_t, ks_s, ks_h, ks_p, vs_s, vs_h, vs_p,
    HEADS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr, SIZE: tl.constexpr, V_SIZE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    slot = tl.load(slots + t)
    position = tl.load(positions + t)
    i = tl.arange(0, SIZE)
    h, d = i // DIM, i % DIM
    new = tl.load(key + h * k_h + t * k_t + d, mask=h < HEADS)
    tl.store(keys + slot * ks_s + h * ks_h + position * ks_p + d, new, mask=(h < HEADS) & (slot >= 0))
    i = tl.arange(0, V_SIZE)
    h, d = i // V_DIM, i % V_DIM
    new = tl.load(value + h * v_h + t * v_t + d, mask=h < HEADS)
    tl.store(values + slot * vs_s + h * vs_h + position * vs_p + d, new, mask=(h < HEADS) & (slot >= 0))


@triton.jit
def _attend(
    q, keys, values, slots, positions, out, parts, tops, totals, scaling, softcap,
    q_h, q_t, ks_s, ks_h, ks_p, vs_s, vs_h, vs_p, heads,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, V_DIM: tl.constexpr,
    VD: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(slots + t)
    end = tl.where(slot < 0, 0, tl.load(positions + t) + 1)
    first = tl.maximum(0, end - WINDOW) if WINDOW else 0 * end
    share = tl.cdiv(tl.cdiv(end - first, BLOCK), PARTS) * BLOCK
    first = first + part * share
    end = tl.minimum(end, first + share)
    g, d, e = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, VD)
    n = tl.arange(0, BLOCK)
    head = kv_head * GROUPS + g
    q_RD = tl.load(
        q + head[:, None] * q_h + t * q_t + d[None, :],
        mask=(g < GROUPS)[:, None] & (d < DIM)[None, :],
        other=0,
    )
    keys += slot * ks_s + kv_head * ks_h
    values += slot * vs_s + kv_head * vs_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VD], tl.float32)
    for start in range(first, end, BLOCK):
        here = start + n
        seen = here < end
        k = tl.load(
            keys + here[:, None] * ks_p + d[None, :], mask=seen[:, None] & (d < DIM)[None, :], other=0
        )
        v = tl.load(
            values + here[:, None] * vs_p + e[None, :], mask=seen[:, None] & (e < V_DIM)[None, :], other=0
        )
        scores = tl.dot(q_RD, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            doubled = tl.exp(2 * tl.abs(scores / softcap) * -1)
            size = (1 - doubled) / (1 + doubled)
            scores = softcap * tl.where(scores < 0, -size, size)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        faded = tl.exp(top - higher)
        total = total * faded + tl.sum(weights, 1)
        sums = sums * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    kept = g < GROUPS
    if PARTS == 1:
        place = out + (t * heads + head[:, None]) * V_DIM + e[None, :]
        total = tl.where(end == 0, 1.0, total)  # a token that takes no part
        tl.store(
            place, (sums / total[:, None]).to(out.dtype.element_ty), mask=kept[:, None] & (e < V_DIM)[None, :]
        )
    else:
        row = (t * heads + head) * PARTS + part
        tl.store(parts + row[:, None] * VD + e[None, :], sums, mask=kept[:, None])
        tl.store(tops + row, top, mask=kept)
        tl.store(totals + row, total, mask=kept)


@triton.jit
def _put_together(
    parts, tops, totals, sinks, out, heads,
    V_DIM: tl.constexpr, VD: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, e = tl.arange(0, PARTS), tl.arange(0, VD)
    top = tl.load(tops + row * PARTS + p)
    highest = tl.maximum(tl.max(top, 0), -1e38)  # -inf of a token that takes no part
    if SINKS:
        sink = tl.load(sinks + row % heads).to(tl.float32)
        highest = tl.maximum(highest, sink)
    weight = tl.exp(top - highest)
    total = tl.sum(tl.load(totals + row * PARTS + p) * weight, 0)
    if SINKS:
        total += tl.exp(sink - highest)
    sums = tl.load(parts + (row * PARTS + p)[:, None] * VD + e[None, :])
    mean = tl.sum(sums * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * V_DIM + e, mean.to(out.dtype.element_ty), mask=e < V_DIM)


def write(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots_T: Tensor, positions_T: Tensor
) -> None:
    """`key` and `value` [H_kv, T, d] to each token's place in `keys`/`values` [slots, H_kv, length, d]."""
    assert key.stride(2) == value.stride(2) == 1
    heads, tokens, dim = key.shape
    v_dim = value.shape[2]
    _write[(tokens,)](
        key, value, keys, values, slots_T, positions_T,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *keys.stride()[:3], *values.stride()[:3],
        HEADS=heads, DIM=dim, V_DIM=v_dim,
        SIZE=triton.next_power_of_2(heads * dim), V_SIZE=triton.next_power_of_2(heads * v_dim),
    )  # fmt: skip


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Each of the queries [H, T, d] over its slot of `keys`/`values` up to its position. [H, T, d] out."""
    q = q if q.stride(2) == 1 else q.contiguous()
    heads, tokens, dim = q.shape
    kv_heads, v_dim = keys.shape[1], values.shape[3]
    groups, wide = heads // kv_heads, triton.next_power_of_2(v_dim)
    count = 2 if sinks_H is not None else 1
    while count < SPLITS and tokens * kv_heads * count < PROGRAMS:
        count *= 2
    out = q.new_empty(tokens, heads, v_dim)
    parts = tops = totals = out  # not touched by one part
    if count > 1:
        parts = q.new_empty(tokens, heads, count, wide, dtype=torch.float32)
        tops, totals = q.new_empty(2, tokens, heads, count, dtype=torch.float32)
    _attend[(tokens, kv_heads, count)](
        q, keys, values, slots_T, positions_T, out, parts, tops, totals,
        dim**-0.5 if scaling is None else scaling, softcap or 0.0,
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3], heads,
        GROUPS=groups, ROWS=max(16, triton.next_power_of_2(groups)),
        DIM=dim, D=max(16, triton.next_power_of_2(dim)),
        V_DIM=v_dim, VD=wide, BLOCK=KEYS, WINDOW=window or 0, CAPPED=softcap is not None, PARTS=count,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if count > 1:
        _put_together[(tokens * heads,)](
            parts, tops, totals, out if sinks_H is None else sinks_H, out, heads,
            V_DIM=v_dim, VD=wide, PARTS=count, SINKS=sinks_H is not None, num_warps=2,
        )  # fmt: skip
    return out.transpose(0, 1)
