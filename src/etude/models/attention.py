"""The one attention function that sampler and trainer share.

Both lay their sequences end to end in a flat step of shape [1, T], with no padding, and hand the model a
`PackedPlan` that says where each sequence lies. The trainer's plan has no cache: each sequence attends to
itself, causally, and to the prefix that it goes on from, which several may have in common. The sampler's plan
has one: new keys and values are written into the sequence's slot, and its queries attend to all the slot
holds. One function, so that both compute the same numbers.

The plan travels as an extra keyword of the model's forward, which `transformers` passes down to the
attention function. Calls without a plan (`generate`, a plain forward) go to the implementation the
model had before. Soft-capped scores and attention sinks, which the fused kernels don't know, are computed
explicitly, one sequence at a time. Not covered: families that don't use the attention interface, and
whatever mixes tokens outside attention (convolutions, recurrent states). `models.packing` refuses those.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from etude.errors import ModelError
from etude.models.plans import PLAN, Branches, Decoding, PackedPlan, SharedPrefix, StaticPlan, TokenPlan

QKV = tuple[Tensor, ...]  # queries, keys, values

_PREFIX = "etude_"
_KNOWN_TENSORS = ("position_ids", "cache_position")  # that families hand on, and attention needn't know


@dataclass(frozen=True)
class Scores:
    """What is done to q·k before the softmax, and beside it.

    Attributes:
        scaling: the factor of q·k; 1/√d if None.
        softcap: scores are squashed into ±softcap, softcap · tanh(score / softcap) (Gemma 2).
        sinks_H: per head, the score of a key that every query sees and that has no value (GPT-OSS).
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_H is None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackedPlan | TokenPlan | StaticPlan,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Attention of each sequence in a flat step. `query` [1, H, T, d], `key`/`value` [1, H_kv, T, d].

    Without dropout, whatever the model's mode: a policy's update needs the very distribution that sampled.

    Returns [1, T, H, d], the layout that attention functions of `transformers` return.

    Raises:
        ModelError: the layer hands over a tensor that is not known here (a position bias, say).
    """
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and name not in _KNOWN_TENSORS:
            raise ModelError(f"packed attention doesn't serve {name!r} ({type(module).__name__})")
    # Rotations leave autocast's precision, which the products below would return to: the cache is smaller so.
    query, key, value = (_computing(tensor[0]) for tensor in (query, key, value))
    scores = Scores(scaling, softcap, s_aux)
    layer: int | None = getattr(module, "layer_idx", None)
    if layer is not None:
        plan.windows[layer] = sliding_window
    if plan.cache is None:
        assert isinstance(plan, PackedPlan)
        output = _attend_to_self(query, key, value, plan, scores, sliding_window)
    elif layer is None:
        raise ModelError(f"{type(module).__name__} has no layer_idx, by which the cache keeps its keys")
    else:
        keys, values = plan.cache.layer(layer, key, value)
        if (kernels := token_kernels(query.device, query.dtype)) is not None:
            kernels.write(key, value, keys, values, plan.slots_T, plan.positions_T)
        elif isinstance(plan, TokenPlan):
            part = (plan.slots_T >= 0).nonzero()[:, 0]
            plan.cache.write(layer, key[:, part], value[:, part], plan.slots_T[part], plan.positions_T[part])
        else:
            plan.cache.write(layer, key, value, plan.slots_T, plan.positions_T)
        if isinstance(plan, StaticPlan):
            output = _attend_block(query, keys, values, plan.decoding, scores, sliding_window)
        elif isinstance(plan, TokenPlan):
            output = _attend_tokens(
                query, keys, values, plan.slots_T, plan.positions_T, scores, sliding_window
            )
        else:
            output = _attend_to_cache(query, keys, values, plan, scores, sliding_window)
    return output.transpose(0, 1).contiguous().unsqueeze(0)  # some families take a view of it


def _computing(tensor: Tensor) -> Tensor:
    """In autocast's precision, where it is in force."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _attend_to_self(
    q: Tensor, k: Tensor, v: Tensor, plan: PackedPlan, scores: Scores, window: int | None
) -> Tensor:
    """Training: each sequence attends to its own tokens, and to those of its prefix. [H, T, d] in and out."""
    if not plan.branches:
        return _attend_roots((q, k, v), plan, scores, window)
    # Split, not sliced: the backward pass of a slice is as large as what it was cut from.
    sections = [sum(plan.roots), *(sum(branches.lengths) for branches in plan.branches)]
    roots, *owns = zip(*(tensor.split(sections, dim=1) for tensor in (q, k, v)), strict=True)
    prefixes = list(zip(*(tensor.split(plan.roots, dim=1) for tensor in roots), strict=True))
    parts = [_attend_roots(roots, plan, scores, window)]
    for branches, own in zip(plan.branches, owns, strict=True):
        parts.append(_attend_branches(prefixes[branches.prefix], own, branches, scores, window))
    return torch.cat(parts, dim=1)


def _attend_roots(qkv: QKV, plan: PackedPlan, scores: Scores, window: int | None) -> Tensor:
    """What goes on from nothing. [H, n, d] in and out for all of it."""
    cells = plan.rectangle
    uneven = cells is None or not cells.full or (window and window < cells.width)
    if scores.plain and uneven and len(plan.roots) > 1 and _has_varlen(qkv):
        return _attend_varlen(qkv, plan, scores.scaling, window)
    if cells is None or not scores.plain or (window and window < cells.width):
        parts = zip(*(tensor.split(plan.roots, dim=1) for tensor in qkv), strict=True)
        return torch.cat([_attend(q, k, v, scores, window) for q, k, v in parts], dim=1)
    q, k, v = (cells.rows_of(tensor) for tensor in qkv)
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, scale=scores.scaling, is_causal=True, enable_gqa=gqa)
    return cells.flat_of(out)


def _has_varlen(qkv: QKV) -> bool:
    """Whether torch's kernels for sequences of different lengths serve these."""
    q, k, v = qkv
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    same = q.shape[-1] == v.shape[-1] and q.shape[-1] <= 256
    return q.device.type == "cuda" and half and same and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _attend_varlen(qkv: QKV, plan: PackedPlan, scaling: float | None, window: int | None) -> Tensor:
    """Each root by itself, in one call without padding. [H, n, d] in and out."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv
    longest, options = max(plan.roots), {}
    if "enable_gqa" in _parameters(varlen_attn):
        options["enable_gqa"] = len(q) != len(k)
    else:
        k, v = (tensor.repeat_interleave(len(q) // len(tensor), dim=0) for tensor in (k, v))
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    looks_back = (window - 1, 0) if window else (-1, 0)
    starts = plan.root_starts
    out = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scaling, window_size=looks_back, **options
    )
    return out.transpose(0, 1)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _attend_branches(prefix: QKV, own: QKV, branches: Branches, scores: Scores, window: int | None) -> Tensor:
    """What goes on from one prefix of P tokens [H, P, d]. [H, n, d] in and out for their own n."""
    cells, longest, past = branches.rectangle, max(branches.lengths), prefix[0].shape[1]
    fused = scores.plain and not (window and window < past + longest)
    # A causal kernel skips what a mask only hides: it pays to ask a short prefix's queries again.
    again = fused and 2 * past < longest
    if fused and cells is not None:
        shared = (tensor.expand(cells.rows, -1, -1, -1) for tensor in prefix)
        rows = [cells.rows_of(tensor) for tensor in own]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(shared, rows, strict=True))
        if again:
            gqa = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(q, k, v, scale=scores.scaling, is_causal=True, enable_gqa=gqa)
            return cells.flat_of(out[:, :, past:])
        stacked = rows[0].unflatten(1, (k.shape[1], -1))  # as in _attend
        mask = _looks_back(cells.width, past + cells.width, None, q.device).repeat(stacked.shape[2], 1)
        out = _grouped(stacked.flatten(2, 3), k, v, mask, scores)
        return cells.flat_of(out.unflatten(2, (-1, cells.width)).flatten(1, 2))
    first = max(0, past + 1 - window) if window else 0  # of the prefix, as far as anyone looks back
    seen = [tensor[:, first:] for tensor in prefix]
    parts = []
    for each in zip(*(tensor.split(branches.lengths, dim=1) for tensor in own), strict=True):
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(seen, each, strict=True))
        out = _attend(q if again else each[0], k, v, scores, window)
        parts.append(out[:, -each[0].shape[1] :])
    return torch.cat(parts, dim=1)


def _attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, plan: PackedPlan, scores: Scores, window: int | None
) -> Tensor:
    """Sampling: each sequence attends to its slot of `keys`/`values` [slots, H_kv, length, d]."""
    if token_kernels(q.device, q.dtype) is not None:
        return _attend_by_tokens(q, keys, values, plan, scores, window)
    shared = plan.shared if scores.plain and not window else []
    together = plan.unshared if shared else plan.decoding
    if together is not None:
        decoded = _attend_block(q, keys, values, together, scores, window)
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
    """The same by a kernel for tokens; long prompts, whose tokens would each read all before them, by others."""
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
    out[:, own] = _attend(q[:, own], keys[slot, :, seen], values[slot, :, seen], scores, window)


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
    grouped = q.transpose(0, 1).unflatten(
        1, (keys.shape[1], -1)
    )  # heads that share keys are stacked as queries
    return _grouped(grouped, k, v, visible_TN[:, None, None], scores).flatten(1, 2).transpose(0, 1)


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


def _attend_block(
    q: Tensor, keys: Tensor, values: Tensor, block: Decoding, scores: Scores, window: int | None
) -> Tensor:
    """The rows that add one token each, in one call over their neighbouring slots. [H, R, d]"""
    slots = slice(block.first, block.first + block.count)
    k, v = keys[slots, :, : block.width], values[slots, :, : block.width]
    if block.dense:
        q_block = q[:, : block.count].transpose(0, 1)
    else:
        q_block = q.new_zeros(block.count, *q[:, 0].shape)
        q_block[block.places] = q[:, block.tokens].transpose(0, 1)
    grouped = q_block.unflatten(1, (keys.shape[1], -1))  # heads that share keys are stacked as queries
    out = _grouped(grouped, k, v, block.mask(window), scores).flatten(1, 2)
    return (out if block.dense else out[block.places]).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores, window: int | None) -> Tensor:
    """One sequence: `q` [H, n, d] are its last n positions, `k`/`v` [H_kv, m, d] all that they may see."""
    heads, n, dim = q.shape
    kv_heads, m = k.shape[0], k.shape[1]
    if scores.plain and n == m and n > 1 and not (window and window < m):
        gqa = heads != kv_heads
        return scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scores.scaling, is_causal=True, enable_gqa=gqa
        )[0]
    # Query heads that share a key head are stacked as more queries of it: no copy of keys is made.
    groups = heads // kv_heads
    mask = None
    if n > 1:
        mask = _looks_back(n, m, window, q.device).repeat(groups, 1)
    stacked = q.reshape(kv_heads, groups * n, dim)
    out = _grouped(stacked[None], k[None], v[None], mask, scores)
    return out.reshape(heads, n, v.shape[-1])


def _looks_back(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """[n, m], true where the last n of m positions may look."""
    age = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return age >= 0 if not window else (age >= 0) & (age < window)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """`q` [B, H_kv, G·n, d], where G query heads of n positions each lie under the key head they share."""
    if scores.plain:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scaling)
    scaling = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    logits = q @ k.transpose(-1, -2) * scaling
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    if scores.sinks_H is not None:
        sinks = scores.sinks_H.to(logits.dtype).unflatten(0, (q.shape[1], -1))
        repeats = q.shape[-2] // sinks.shape[1]
        total = torch.logaddexp(total, sinks.repeat_interleave(repeats, dim=1).unsqueeze(-1))
    return (logits - total).exp().to(v.dtype) @ v


def install(model: PreTrainedModel) -> None:
    """Make `model` compute a call that carries a plan by `packed_attention`, and any other call as before."""
    current = model.config._attn_implementation or "eager"
    if is_packed(current):
        return
    name = _PREFIX + current
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _dispatch(current))
        if current in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[current])
    model.set_attn_implementation(name)


def is_packed(implementation: str | None) -> bool:
    """Whether an attention implementation is one of those that `install` registers."""
    return (implementation or "").startswith(_PREFIX)


def _dispatch(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        plan = kwargs.pop(PLAN, None)
        if plan is not None:
            return packed_attention(module, query, key, value, plan, **kwargs), None
        if original == "eager":  # each modelling file has its own
            forward = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        else:
            forward = ALL_ATTENTION_FUNCTIONS[original]
        return forward(module, query, key, value, attention_mask, **kwargs)

    return attention
