"""Advantages without a critic: an episode's score against those of its group, or of its batch.

Covered: one advantage per episode, for RLOO, GRPO, Dr. GRPO, GDPO (several rewards) and REINFORCE with a
batch baseline; with rewards at steps, one per token (GRPO). Not covered: what a score is (a KL penalty in
it, say), how an episode's advantage is spread over its tokens, statistics over several processes (gather
first).

Members that were dropped (our side failed, nothing was sampled) take part in no mean, no deviation and no
count, and have advantage 0. A group whose kept scores are all equal says nothing about what to do better:
its advantages are exactly 0, by comparing the scores and not a rounded deviation. So are those of a group
of which one member is left.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from etude.errors import ConfigError, DataError
from etude.math.masked import masked_var, require_same_shape

RewardScale = Literal["group", "batch", "none"]

# As TRL has it: scores that differ by rounding only don't become advantages of ±1.
_EPSILON = 1e-4


@torch.no_grad()
def leave_one_out_advantages(scores_B: Tensor, groups_B: Tensor, kept_B: Tensor | None = None) -> Tensor:
    """RLOO: A_i = R_i − mean of the group's other scores.

    Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE-style optimization for learning from human
    feedback in LLMs", section 3.1 (Kool et al. 2019). The others' mean doesn't depend on episode i, so the
    gradient is unbiased. With n members it equals n / (n − 1) · (R_i − mean of all).

    Args:
        scores_B: [B], floating point, finite where kept.
        groups_B: [B], int64 ≥ 0: episodes of one task have the same number.
        kept_B: [B], bool, false for dropped members; None keeps all.

    Returns:
        [B], 0 for dropped members and in constant groups.

    Raises:
        ConfigError: a group has a single member, dropped ones counted.
        DataError: the shapes differ.
    """
    scores_B, kept_B = _checked(scores_B, groups_B, kept_B)
    counts_B = _group_sum(kept_B.to(scores_B), groups_B)
    others_B = (_group_sum(scores_B, groups_B) - scores_B) / (counts_B - 1).clamp_min(1)
    return torch.where(_telling(scores_B, groups_B, kept_B), scores_B - others_B, 0)


@torch.no_grad()
def group_advantages(
    scores_B: Tensor, groups_B: Tensor, kept_B: Tensor | None = None, *, scale: RewardScale = "group"
) -> Tensor:
    """GRPO: A_i = (R_i − mean) / (std + 1e-4), mean and (unbiased) deviation of the group.

    Shao et al. 2024, "DeepSeekMath: pushing the limits of mathematical reasoning in open language models",
    section 4.1.2. Dividing by a group's own deviation gives tasks that are nearly always or never solved the
    largest steps; Liu et al. 2025, "Understanding R1-Zero-like training: a critical perspective", section
    3.2, leave it out (Dr. GRPO): `scale="none"`. `scale="batch"` divides by the deviation of all kept scores.

    Args:
        scores_B, groups_B, kept_B: as for `leave_one_out_advantages`.
        scale: whose deviation divides.

    Returns:
        [B], 0 for dropped members and in constant groups.

    Raises:
        ConfigError: a group has a single member, dropped ones counted; the scale is unknown.
        DataError: the shapes differ.
    """
    scores_B, kept_B = _checked(scores_B, groups_B, kept_B)
    return _normalised(scores_B, groups_B, kept_B, scale)


@torch.no_grad()
def decoupled_advantages(
    rewards_BK: Tensor, weights_K: Tensor, groups_B: Tensor, kept_B: Tensor | None = None
) -> Tensor:
    """GDPO: several rewards, each compared within its group before they are added up.

        S_i = Σ_k w_k (r_ik − mean_k) / (std_k + 1e-4), mean and deviation of reward k in the group
        A_i = (S_i − mean) / (std + 1e-4), mean and deviation of the batch

    Liu et al. 2026, "GDPO: group reward-decoupled normalization policy optimization for multi-reward RL
    optimization", section 3.1, with weights. Sums of rewards that differ may be equal, and the reward with
    the largest spread decides; here each has a say by its weight alone. Deviations are unbiased, and small
    ones damped, as in `group_advantages` (the same as TRL's `normalize_then_sum`).

    Args:
        rewards_BK: [B, K], floating point; NaN where reward k doesn't apply to episode i: it then takes no
            part in the group's mean and deviation, and adds 0.
        weights_K: [K].
        groups_B, kept_B: as for `leave_one_out_advantages`.

    Returns:
        [B]. A reward that is constant in a group adds exactly 0 there; 0 for dropped members and for those
        to which no reward applies, which don't count in the batch's deviation.

    Raises:
        ConfigError: a group has a single member, dropped ones counted.
        DataError: the shapes differ.
    """
    if rewards_BK.ndim != 2 or weights_K.shape != rewards_BK.shape[1:]:
        raise DataError(
            f"rewards have shape {tuple(rewards_BK.shape)} and weights {tuple(weights_K.shape)}; expected "
            "[B, K] and [K]"
        )
    applies_BK = ~rewards_BK.isnan()
    if kept_B is not None:
        require_same_shape(groups=groups_B, kept=kept_B)
        applies_BK = applies_BK & kept_B.bool()[:, None]
    sums_B = rewards_BK.new_zeros(len(rewards_BK))
    for rewards_B, applies_B, weight in zip(rewards_BK.T, applies_BK.T, weights_K, strict=True):
        sums_B = sums_B + weight * group_advantages(rewards_B, groups_B, applies_B)
    if not sums_B.any():
        return sums_B
    # Their mean is 0 already, in each group, and what is exactly 0 has to stay so.
    return sums_B / (masked_var(sums_B, applies_BK.any(1)).sqrt() + _EPSILON)


@torch.no_grad()
def batch_advantages(scores_B: Tensor, kept_B: Tensor | None = None) -> Tensor:
    """REINFORCE with the mean of the batch as its baseline: A_i = R_i − mean.

    Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning", section 4.

    Args:
        scores_B: [B], floating point, finite where kept.
        kept_B: [B], bool, false for dropped members; None keeps all.

    Returns:
        [B], 0 for dropped members and where all kept scores are equal.

    Raises:
        DataError: the shapes differ.
    """
    one_group_B = torch.zeros(len(scores_B), dtype=torch.long, device=scores_B.device)
    kept_B = torch.ones_like(scores_B, dtype=torch.bool) if kept_B is None else kept_B.bool()
    require_same_shape(scores=scores_B, kept=kept_B)
    scores_B = torch.where(kept_B, scores_B, 0)
    telling_B = _telling(scores_B, one_group_B, kept_B)
    if not telling_B.any():
        return torch.zeros_like(scores_B)
    return torch.where(kept_B, scores_B - scores_B.sum() / kept_B.sum(), 0)


@torch.no_grad()
def process_advantages(
    rewards_BN: Tensor, given_BN: Tensor, groups_B: Tensor, *, scale: RewardScale = "group"
) -> Tensor:
    """GRPO with process supervision: A_{i,t} = the sum of i's normalised rewards at t and later.

    Shao et al. 2024, "DeepSeekMath", section 4.1.3: each reward is normalised with the mean and (unbiased)
    deviation of all rewards of the group, at whatever step they were given.

    Args:
        rewards_BN: [B, N], floating point.
        given_BN: [B, N], true where a reward was given; elsewhere `rewards_BN` isn't looked at.
        groups_B: as for `leave_one_out_advantages`.
        scale: whose deviation divides, as for `group_advantages`.

    Returns:
        [B, N], 0 after an episode's last reward. In groups whose rewards are all equal, all 0.

    Raises:
        ConfigError: the scale is unknown.
        DataError: the shapes differ.
    """
    given_BN = given_BN.bool()
    require_same_shape(rewards=rewards_BN, given=given_BN)
    normalised_BN = torch.zeros_like(rewards_BN)
    rewards_R, groups_R = rewards_BN[given_BN], groups_B[:, None].expand_as(given_BN)[given_BN]
    if len(rewards_R):
        everything = torch.ones_like(rewards_R, dtype=torch.bool)
        normalised_BN[given_BN] = _normalised(rewards_R, groups_R, everything, scale)
    return normalised_BN.flip(1).cumsum(1).flip(1)


def _normalised(scores_B: Tensor, groups_B: Tensor, kept_B: Tensor, scale: RewardScale) -> Tensor:
    """Less the group's mean, over a deviation; 0 where dropped and in constant groups."""
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"scale is {scale!r}; expected group, batch or none")
    counts_B = _group_sum(kept_B.to(scores_B), groups_B)
    centred_B = torch.where(kept_B, scores_B - _group_sum(scores_B, groups_B) / counts_B.clamp_min(1), 0)
    telling_B = _telling(scores_B, groups_B, kept_B)
    if scale == "group":
        std_B = (_group_sum(centred_B**2, groups_B) / (counts_B - 1).clamp_min(1)).sqrt()
        centred_B = centred_B / (std_B + _EPSILON)
    elif scale == "batch" and telling_B.any():
        centred_B = centred_B / (masked_var(scores_B, kept_B).sqrt() + _EPSILON)
    return torch.where(telling_B, centred_B, 0)


def _checked(scores_B: Tensor, groups_B: Tensor, kept_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores, 0 where dropped, and what is kept."""
    kept_B = torch.ones_like(scores_B, dtype=torch.bool) if kept_B is None else kept_B.bool()
    require_same_shape(scores=scores_B, groups=groups_B, kept=kept_B)
    if scores_B.ndim != 1:
        raise DataError(f"scores have shape {tuple(scores_B.shape)}; expected one per episode, [B]")
    single_B = _group_sum(torch.ones_like(scores_B), groups_B) == 1
    if single_B.any():
        raise ConfigError(
            f"group {int(groups_B[single_B][0])} has a single episode, and nothing to compare it with; play "
            "each task at least twice (num_generations)"
        )
    return torch.where(kept_B, scores_B, 0), kept_B


def _telling(scores_B: Tensor, groups_B: Tensor, kept_B: Tensor) -> Tensor:
    """Kept members of groups whose kept scores are not all equal."""
    low_B = _group_extreme(scores_B.masked_fill(~kept_B, torch.inf), groups_B, "amin")
    high_B = _group_extreme(scores_B.masked_fill(~kept_B, -torch.inf), groups_B, "amax")
    return kept_B & (low_B < high_B)


def _group_sum(values_B: Tensor, groups_B: Tensor) -> Tensor:
    """The sum over each one's group, [B]."""
    sums_G = values_B.new_zeros(_groups(groups_B)).index_add(0, groups_B, values_B)
    return sums_G[groups_B]


def _group_extreme(values_B: Tensor, groups_B: Tensor, reduce: str) -> Tensor:
    extremes_G = values_B.new_zeros(_groups(groups_B))
    return extremes_G.scatter_reduce(0, groups_B, values_B, reduce, include_self=False)[groups_B]


def _groups(groups_B: Tensor) -> int:
    return int(groups_B.max()) + 1 if len(groups_B) else 0
