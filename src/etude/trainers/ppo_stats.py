"""The statistics that `PPOTrainer.step` returns, under TRL 0.7.4's keys."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.math.masked import masked_mean, masked_var
from etude.trainers.credit import Credit
from etude.trainers.experience import Experience, UpdateLog

# Means over mini-batches of what the loss reports.
_MEANS = (
    "loss/policy",
    "loss/value",
    "loss/total",
    "policy/entropy",
    "policy/approxkl",
    "policy/policykl",
    "policy/clipfrac",
    "policy/advantages_mean",
    "returns/mean",
    "returns/var",
    "val/vpred",
    "val/error",
    "val/clipfrac",
    "val/mean",
    "val/var",
)


def step_stats(
    experience: Experience, credit: Credit, scores_B: Tensor, log: UpdateLog, kl_coef: float
) -> dict[str, Any]:
    """Numbers, and per-token arrays where TRL gives arrays (padded with 0).

    Raises:
        DataError: nothing was sampled in the whole batch.
    """
    mask = experience.mask
    kl_B = ((experience.logprobs - experience.ref_logprobs) * mask).sum(1)
    lengths = _lengths(experience)
    stats: dict[str, Any] = {
        "objective/kl": kl_B.mean().item(),
        "objective/kl_dist": _array(kl_B),
        "objective/kl_penalty": (experience.kl * mask).sum(1).mean().item(),
        "objective/logprobs": _array(experience.logprobs),
        "objective/ref_logprobs": _array(experience.ref_logprobs),
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-experience.logprobs * mask).sum(1).mean().item(),
        "ppo/mean_non_score_reward": masked_mean(credit.kl_rewards, mask).item(),
        "ppo/mean_scores": scores_B.mean().item(),
        "ppo/std_scores": scores_B.std().item() if len(scores_B) > 1 else 0.0,
        **lengths,
        **{f"ppo/{name}": log.mean(name).item() for name in _MEANS},
        "ppo/policy/advantages": _array(log.concatenated("policy/advantages")),
        "ppo/policy/ratio": _array(log.concatenated("policy/ratio")),
    }
    variance = stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / variance if variance > 0 else 0.0
    if log.gradient_norms:
        stats["ppo/gradient_norm"] = torch.stack(log.gradient_norms).mean().item()
    if stats["objective/kl"] < -1.0:
        warnings.warn(
            f"the KL to the reference is {stats['objective/kl']:.2f}. Its k1 estimate can be negative when "
            "responses were not sampled from the policy itself: check temperature, top_k, top_p, and that "
            "min_length and forced tokens are off",
            stacklevel=3,
        )
    return stats


def without_reference(stats: dict[str, Any]) -> dict[str, Any]:
    """NaN for what is measured to a reference: 0 would say that the policy hadn't moved from one."""
    unknown = ("objective/kl", "objective/kl_dist", "objective/kl_penalty", "objective/ref_logprobs")
    return {name: stats[name] * math.nan for name in unknown if name in stats}


def minibatch_stats(
    *,
    policy_loss: Tensor,
    value_loss: Tensor,
    total_loss: Tensor,
    entropies: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    advantages: Tensor,
    returns: Tensor,
    values: Tensor,
    old_values: Tensor,
    value_clipped: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Means over a mini-batch's sampled tokens; everything but the losses is [B, N]."""
    moved = logprobs - old_logprobs
    return {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/total": total_loss,
        "policy/entropy": masked_mean(entropies, mask),
        "policy/approxkl": masked_mean(0.5 * moved**2, mask),
        "policy/policykl": masked_mean(-moved, mask),
        "policy/clipfrac": masked_mean(clipped.float(), mask),
        "policy/advantages_mean": masked_mean(advantages, mask),
        "policy/advantages": advantages[mask],
        "policy/ratio": ratio[mask],
        "returns/mean": masked_mean(returns, mask),
        "returns/var": masked_var(returns, mask),
        "val/vpred": masked_mean(values, mask),
        "val/error": masked_mean((values - returns) ** 2, mask),
        "val/clipfrac": masked_mean(value_clipped.float(), mask),
        "val/mean": masked_mean(old_values, mask),
        "val/var": masked_var(old_values, mask),
    }


def _lengths(experience: Experience) -> dict[str, Any]:
    queries = torch.tensor([float(t.query_length) for t in experience.trajectories])
    responses = torch.tensor([float(t.response_length) for t in experience.trajectories])
    lengths: dict[str, Any] = {}
    for name, values in (("queries", queries), ("responses", responses)):
        lengths[f"tokens/{name}_len_mean"] = values.mean().item()
        lengths[f"tokens/{name}_len_std"] = values.std().item() if len(values) > 1 else 0.0
        lengths[f"tokens/{name}_dist"] = values.numpy()
    return lengths


def _array(values: Tensor) -> np.ndarray[Any, Any]:
    return values.detach().float().cpu().numpy()
