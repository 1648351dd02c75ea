"""Attention of one sequence, or of rows alike, in torch: what the packed attention is put together from.

Soft-capped scores and attention sinks, which the fused kernels don't know, are computed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Scores:
    """What is done to q·k before the softmax, and beside it.

    Attributes:
        scaling: the factor of q·k; 1/√d if None.
        softcap: scores are squashed into ±softcap, softcap · tanh(score / softcap) (Gemma 2).
        sinks_H: per head, the score of a key that every query sees and that has no value (GPT-OSS).
        dropout: the share of weights that is left out.
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_H is None


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores, window: int | None) -> Tensor:
    """One sequence: `q` [H, n, d] are its last n positions, `k`/`v` [H_kv, m, d] all that they may see."""
    heads, n, dim = q.shape
    kv_heads, m = k.shape[0], k.shape[1]
    if scores.plain and n == m and n > 1 and not (window and window < m):
        gqa = heads != kv_heads
        return scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            dropout_p=scores.dropout,
            scale=scores.scaling,
            is_causal=True,
            enable_gqa=gqa,
        )[0]
    # Query heads that share a key head are stacked as more queries of it: no copy of keys is made.
    groups = heads // kv_heads
    mask = None
    if n > 1:
        mask = looks_back(n, m, window, q.device).repeat(groups, 1)
    stacked = q.reshape(kv_heads, groups * n, dim)
    out = grouped(stacked[None], k[None], v[None], mask, scores)
    return out.reshape(heads, n, v.shape[-1])


def looks_back(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """[n, m], true where the last n of m positions may look."""
    age = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return age >= 0 if not window else (age >= 0) & (age < window)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """`q` [B, H_kv, G·n, d], where G query heads of n positions each lie under the key head they share."""
    if scores.plain:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=scores.dropout, scale=scores.scaling
        )
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
    return dropped((logits - total).exp().to(v.dtype), scores.dropout) @ v


def computing(tensor: Tensor) -> Tensor:
    """In autocast's precision, where it is in force."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
