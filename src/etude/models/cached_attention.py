"""Sampling's attention: each sequence of a flat step over its slot of the cache.

On CUDA by a kernel for single tokens (`token_attention`). Elsewhere rows that add one token each go together,
over a block of neighbouring slots, those that begin alike read the common part once, and prompts go one by
one.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from etude.models.plans import Decoding, PackedPlan, SharedPrefix, StaticPlan, TokenPlan
from etude.models.single_attention import Scores, attend, grouped


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackedPlan | TokenPlan | StaticPlan,
    layer: int,
    scores: Scores,
    window: int | None,
) -> Tensor:
    """Put `key` and `value` [H_kv, T, d] where the plan says, and attend to what is there. [H, T, d] out."""
    assert plan.cache is not None
    keys, values = plan.cache.layer(layer, key, value)
    if (kernels := token_kernels(query.device, query.dtype)) is not None:
        kernels.write(key, value, keys, values, plan.slots_T, plan.positions_T)
    elif isinstance(plan, TokenPlan):
        part = (plan.slots_T >= 0).nonzero()[:, 0]
        plan.cache.write(layer, key[:, part], value[:, part], plan.slots_T[part], plan.positions_T[part])
    else:
        plan.cache.write(layer, key, value, plan.slots_T, plan.positions_T)
    if isinstance(plan, StaticPlan):
        return attend_block(query, keys, values, plan.decoding, scores, plan.decoding.mask(window))
    if isinstance(plan, TokenPlan):
        return _attend_tokens(query, keys, values, plan.slots_T, plan.positions_T, scores, window)
    return _attend_to_cache(query, keys, values, plan, scores, window)


def _attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, plan: PackedPlan, scores: Scores, window: int | None
) -> Tensor:
    """Sampling: each sequence attends to its slot of `keys`/`values` [slots, H_kv, length, d]."""
    if token_kernels(q.device, q.dtype) is not None:
        return _attend_by_tokens(q, keys, values, plan, scores, window)
    shared = plan.shared if scores.plain and not window else []
    together = plan.unshared if shared else plan.decoding
    if together is not None:
        decoded = attend_block(q, keys, values, together, scores, together.mask(window))
        if len(together.members) == len(plan.lengths) and together.dense:
            return decoded
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    done: set[int] = set()
    if together is not None:
        out[:, together.tokens] = decoded
        done |= together.members
    for group in shared:
        out[:, group.tokens] = _attend_after_prefix(q[:, group.tokens], keys, values, group, scores.scaling)
        done |= group.members
    for i in range(len(plan.lengths)):
        if i not in done:
            _attend_one(out, q, keys, values, plan, i, scores, window)
    return out


def _attend_by_tokens(
    q: Tensor, keys: Tensor, values: Tensor, plan: PackedPlan, scores: Scores, window: int | None
) -> Tensor:
    """By the kernel for tokens; long prompts, whose tokens would each read all before them, by others."""
    if not plan.long_prompts:
        return _attend_tokens(q, keys, values, plan.slots_T, plan.positions_T, scores, window)
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    short_T = plan.short_T
    if len(short_T):
        slots_T, positions_T = plan.slots_T[short_T], plan.positions_T[short_T]
        out[:, short_T] = _attend_tokens(q[:, short_T], keys, values, slots_T, positions_T, scores, window)
    for i in plan.long_prompts:
        _attend_one(out, q, keys, values, plan, i, scores, window)
    return out


def _attend_one(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: PackedPlan,
    i: int,
    scores: Scores,
    window: int | None,
) -> None:
    """The i-th sequence of a step over its slot, into its place in `out`."""
    start, length, past, slot = plan.starts[i], plan.lengths[i], plan.past[i], plan.slots[i]
    seen = slice(max(0, past + 1 - window) if window else 0, past + length)
    own = slice(start, start + length)
    out[:, own] = attend(q[:, own], keys[slot, :, seen], values[slot, :, seen], scores, window)


def _attend_tokens(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    scores: Scores,
    window: int | None,
) -> Tensor:
    """Each token over its own slot up to its own position. [H, T, d] in and out."""
    if (kernels := token_kernels(q.device, q.dtype)) is not None:
        options = {"scaling": scores.scaling, "softcap": scores.softcap, "sinks_H": scores.sinks_H}
        out: Tensor = kernels.attend(q, keys, values, slots_T, positions_T, **options, window=window)
        return out
    slots_T, width = slots_T.clamp(min=0), int(positions_T.max()) + 1
    age_TN = positions_T[:, None] - torch.arange(width, device=q.device)
    visible_TN = age_TN >= 0 if not window else (age_TN >= 0) & (age_TN < window)
    k, v = keys[slots_T, :, :width], values[slots_T, :, :width]
    stacked = q.transpose(0, 1).unflatten(1, (keys.shape[1], -1))  # heads that share keys, as queries
    return grouped(stacked, k, v, visible_TN[:, None, None], scores).flatten(1, 2).transpose(0, 1)


def token_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernels for tokens by themselves, where they run."""
    if device.type != "cuda" or dtype == torch.float64 or not _has_triton():
        return None
    from etude.models import token_attention

    return token_attention


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _attend_after_prefix(
    q: Tensor, keys: Tensor, values: Tensor, group: SharedPrefix, scaling: float | None
) -> Tensor:
    """Rows with a common beginning: it is read once for all of them. `q` [H, R, d], [H, R, d] out.

    Juravsky et al. 2024, "Hydragen", section 3.1, with one softmax over both parts.
    """
    heads, rows, dim = q.shape
    kv_heads = keys.shape[1]
    q = q * (dim**-0.5 if scaling is None else scaling)
    before, after = slice(group.length), slice(group.length, group.width)
    q_KGRd = q.unflatten(0, (kv_heads, -1))
    q_RKGd = q_KGRd.permute(2, 0, 1, 3)
    first = q_KGRd.flatten(1, 2) @ keys[group.holder, :, before].transpose(-1, -2)  # [K, G·R, P]
    rest = q_RKGd @ keys[group.slots, :, after].transpose(-1, -2)  # [R, K, G, S]
    rest = rest.masked_fill(~group.visible_RS[:, None, None], -torch.inf)
    first = first.unflatten(1, (-1, rows)).permute(2, 0, 1, 3)  # [R, K, G, P]
    scores = torch.cat([first, rest], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(values.dtype)
    first, rest = weights.split([group.length, group.width - group.length], dim=-1)
    out = rest @ values[group.slots, :, after]  # [R, K, G, d]
    common = first.permute(1, 2, 0, 3).flatten(1, 2) @ values[group.holder, :, before]  # [K, G·R, d]
    out = out.permute(1, 2, 0, 3) + common.unflatten(1, (-1, rows))
    return out.reshape(heads, rows, -1)


def attend_block(
    q: Tensor, keys: Tensor, values: Tensor, block: Decoding, scores: Scores, mask: Tensor
) -> Tensor:
    """The rows that add one token each, in one call over their neighbouring slots. [H, R, d]

    Args:
        mask: [count, 1 or H, 1, width], what each may see, or what is added to its scores.
    """
    slots = slice(block.first, block.first + block.count)
    k, v = keys[slots, :, : block.width], values[slots, :, : block.width]
    if block.dense:
        q_block = q[:, : block.count].transpose(0, 1)
    else:
        q_block = q.new_zeros(block.count, *q[:, 0].shape)
        q_block[block.places] = q[:, block.tokens].transpose(0, 1)
    stacked = q_block.unflatten(1, (keys.shape[1], -1))  # heads that share keys, as queries
    out = grouped(stacked, k, v, mask, scores).flatten(1, 2)
    return (out if block.dense else out[block.places]).transpose(0, 1)
