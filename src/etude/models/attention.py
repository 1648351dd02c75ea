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
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from etude.errors import ModelError
from etude.models.cached_attention import attend_cached
from etude.models.cross_attention import attend_decoder
from etude.models.plans import PLAN, Branches, PackedPlan, StaticPlan, TokenPlan
from etude.models.single_attention import Scores, attend, computing, grouped, looks_back

QKV = tuple[Tensor, ...]  # queries, keys, values

STEADY = "steady_kernels"  # the keyword that asks for those of `steady_kernels`
_PREFIX = "etude_"
_STEADY_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_KNOWN_TENSORS = ("position_ids", "cache_position")  # that families hand on, and attention needn't know


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
    dropout: float = 0.0,
    **others: Any,
) -> Tensor:
    """Attention of each sequence in a flat step. `query` [1, H, T, d], `key`/`value` [1, H_kv, T, d].

    Without dropout unless the plan asks for it, whatever the model's mode: a policy's update needs the very
    distribution that sampled.

    Returns [1, T, H, d], the layout that attention functions of `transformers` return.

    Raises:
        ModelError: the layer hands over a tensor that is not known here (a position bias, say).
    """
    decodes = isinstance(plan, PackedPlan) and plan.cross is not None
    bias = others.pop("position_bias", None) if decodes else None
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and name not in _KNOWN_TENSORS:
            raise ModelError(f"packed attention doesn't serve {name!r} ({type(module).__name__})")
    keeps_all = plan.cache is not None or not plan.dropout
    scores = Scores(scaling, softcap, s_aux, 0.0 if keeps_all else dropout)
    layer: int | None = getattr(module, "layer_idx", None)
    if plan.cache is not None and layer is None:
        raise ModelError(f"{type(module).__name__} has no layer_idx, by which the cache keeps its keys")
    # Rotations leave autocast's precision, which the products below would return to: the cache is smaller so.
    if decodes:
        assert isinstance(plan, PackedPlan)
        assert layer is not None
        output = attend_decoder(module, computing(query[0]), key, value, plan, layer, scores, bias)
        return output.transpose(0, 1).contiguous().unsqueeze(0)
    query, key, value = (computing(tensor[0]) for tensor in (query, key, value))
    if layer is not None:
        plan.windows[layer] = sliding_window
    if plan.cache is None:
        assert isinstance(plan, PackedPlan)
        output = _attend_to_self(query, key, value, plan, scores, sliding_window)
    else:
        assert layer is not None
        output = attend_cached(query, key, value, plan, layer, scores, sliding_window)
    return output.transpose(0, 1).contiguous().unsqueeze(0)  # some families take a view of it


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
    if scores.plain and not scores.dropout and uneven and len(plan.roots) > 1 and _has_varlen(qkv):
        return _attend_varlen(qkv, plan, scores.scaling, window)
    if cells is None or not scores.plain or (window and window < cells.width):
        parts = zip(*(tensor.split(plan.roots, dim=1) for tensor in qkv), strict=True)
        return torch.cat([attend(q, k, v, scores, window) for q, k, v in parts], dim=1)
    q, k, v = (cells.rows_of(tensor) for tensor in qkv)
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(
        q, k, v, dropout_p=scores.dropout, scale=scores.scaling, is_causal=True, enable_gqa=gqa
    )
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
    longest = max(plan.roots)
    options: dict[str, Any] = {}
    if "enable_gqa" in _parameters(varlen_attn):
        options["enable_gqa"] = len(q) != len(k)
    else:
        k, v = (tensor.repeat_interleave(len(q) // len(tensor), dim=0) for tensor in (k, v))
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    looks_back = (window - 1, 0) if window else (-1, 0)
    starts = plan.root_starts
    out: Any = varlen_attn(
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
            out = scaled_dot_product_attention(
                q, k, v, dropout_p=scores.dropout, scale=scores.scaling, is_causal=True, enable_gqa=gqa
            )
            return cells.flat_of(out[:, :, past:])
        stacked = rows[0].unflatten(1, (k.shape[1], -1))  # as in _attend
        mask = looks_back(cells.width, past + cells.width, None, q.device).repeat(stacked.shape[2], 1)
        out = grouped(stacked.flatten(2, 3), k, v, mask, scores)
        return cells.flat_of(out.unflatten(2, (-1, cells.width)).flatten(1, 2))
    first = max(0, past + 1 - window) if window else 0  # of the prefix, as far as anyone looks back
    seen = [tensor[:, first:] for tensor in prefix]
    parts = []
    for each in zip(*(tensor.split(branches.lengths, dim=1) for tensor in own), strict=True):
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(seen, each, strict=True))
        out = attend(q if again else each[0], k, v, scores, window)
        parts.append(out[:, -each[0].shape[1] :])
    return torch.cat(parts, dim=1)


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


def steady_kernels(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords under which a model with position biases (T5) rounds alike whether there is a gradient or not.

    On a CPU the kernel that `scaled_dot_product_attention` takes without gradient knows none of a bias, so
    that a policy would be observed by another one than it is updated by: in bfloat16 the first ratios of a
    batch would be off by several percent. Empty for models that add no bias.
    """
    if not any(getattr(module, "has_relative_attention_bias", False) for module in model.modules()):
        return {}
    if not model._can_set_attn_implementation():  # computes all of it itself
        return {}
    install(model)
    return {STEADY: True}


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
        with sdpa_kernel(_STEADY_KERNELS) if kwargs.pop(STEADY, False) else nullcontext():
            return forward(module, query, key, value, attention_mask, **kwargs)

    return attention
