"""What preference losses take of the policy's own likelihood, without a reference: sums, shapes, odds.

Covered: sums over an answer's tokens and the weights of these (LD-DPO, WPO), the imitation term, ORPO's odds
and SimPO's and AlphaPO's rewards. Not covered: the losses that these enter (`preference`, whose
`sigmoid_loss` of a margin is also CPO's and SimPO's, and `hinge_loss` SLiC's).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from etude.errors import DataError
from etude.math.masked import require_same_shape
from etude.math.preference import power_score, sigmoid_loss

# ---- tokens → answers ----


def sequence_sums(values_M: Tensor, counts_N: list[int]) -> Tensor:
    """Sums over runs of tokens that lie end to end.

    Args:
        values_M: [M], one per token.
        counts_N: how many tokens each of N sequences has; they add up to M.

    Returns:
        [N]; 0 for a sequence without tokens.

    Raises:
        DataError: the counts don't add up.
    """
    if sum(counts_N) != len(values_M):
        raise DataError(f"there are {len(values_M)} tokens, and the counts add up to {sum(counts_N)}")
    return torch.stack([part.sum() for part in values_M.split(counts_N)])


def verbosity_weights(counts_N: list[int], others_N: list[int], alpha: float) -> Tensor:
    """Weight 1 for the tokens that an answer has in common with the other of its pair in number, α beyond.

    Liu et al. 2024, "Length desensitization in direct preference optimization" (LD-DPO): log-probability
    that is due to length alone counts less.

    Args:
        counts_N: tokens of each answer.
        others_N: tokens of the other answer of the same pair.
        alpha: in [0, 1]; 1 is no weighting.

    Returns:
        [M], end to end, as the tokens lie.
    """
    weights = torch.ones(sum(counts_N))
    start = 0
    for count, other in zip(counts_N, others_N, strict=True):
        weights[start + min(count, other) : start + count] = alpha
        start += count
    return weights


def policy_weights(logprobs_M: Tensor, collisions_M: Tensor, counts_N: list[int]) -> Tensor:
    """w(y) = exp(mean over tokens of log π(y_t) − log Σ_v π(v)²), without gradient.

    Zhou et al. 2024, "WPO: enhancing RLHF with weighted preference optimization", eq. 2 with its sampled
    alignment: how likely the policy is to write this answer, 1 for what it samples on average. A pair's loss
    is multiplied by w(y_w) w(y_l), so that answers of others weigh little.

    Args:
        logprobs_M: [M], log π(y_t).
        collisions_M: [M], log Σ_v π(v)²: how likely two tokens drawn there are the same.
        counts_N: tokens of each answer.

    Raises:
        DataError: the shapes differ or the counts don't add up.
    """
    require_same_shape(logprobs=logprobs_M, collisions=collisions_M)
    sums_N = sequence_sums(logprobs_M.detach() - collisions_M.detach(), counts_N)
    return torch.exp(sums_N / torch.tensor(counts_N, device=sums_N.device).clamp_min(1))


# ---- terms of the policy alone ----


def imitation_loss(logprob: Tensor, length: Tensor) -> Tensor:
    """−log π(y|x) / |y|: the mean over its tokens of an answer's negative log-likelihood.

    The term that keeps the chosen answer likely: Pang et al. 2024, "Iterative reasoning preference
    optimization", eq. 1; Wang et al. 2024, "Enhancing the reasoning ability of multimodal large language
    models via mixed preference optimization" (MPO); Hong et al. 2024 (ORPO), eq. 3 and 6; Xu et al. 2024
    (CPO), which sums.

    Args:
        logprob: any shape, log π(y|x), the sum over tokens.
        length: the same shape, tokens of each answer.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(logprob=logprob, length=length)
    return -logprob / length


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(log odds(y_w) − log odds(y_l)), odds = P/(1 − P).

    Hong et al. 2024, "ORPO: monolithic preference optimization without reference model", eq. 4 and 7; P is
    the geometric mean of the tokens' probabilities.

    Args:
        chosen, rejected: any shape, the same: mean over tokens of log π, < 0.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprob: Tensor) -> Tensor:
    """log P − log(1 − P) at log P = `logprob` < 0; finite as long as P isn't 1 to the last digit of
    float32."""
    # log(1 − P) loses P's digits near 0, log(−expm1) those of 1 − P near 1; each is used where it has them.
    # The other's gradient has to be finite too: where() multiplies it by 0.
    near_one = logprob > -math.log(2)
    high = torch.where(near_one, logprob, -1.0).clamp_max(-torch.finfo(logprob.dtype).tiny)
    low = torch.where(near_one, -1.0, logprob)
    return logprob - torch.where(near_one, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    gamma: float,
    *,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """−log σ(β (r_w − r_l) − γ), r the mean over tokens of log π.

    Meng et al. 2024, "SimPO: simple preference optimization with a reference-free reward", eq. 6. With α,
    r = (1 − p^(−α))/α at log p = that mean: Gupta et al. 2025, "AlphaPO: reward shape matters for LLM
    alignment"; its limit at α = 0 is SimPO's.

    Args:
        chosen, rejected: any shape, the same: mean over tokens of log π.
        beta: > 0.
        gamma: how far apart the rewards are to be.
        label_smoothing: as for `sigmoid_loss`.
        alpha: shape of the reward.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    margin = power_score(chosen, alpha) - power_score(rejected, alpha)
    return sigmoid_loss(margin - gamma / beta, beta, label_smoothing)
