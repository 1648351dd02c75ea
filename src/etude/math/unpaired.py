"""Losses over single answers, each judged good or bad, measured against a reference policy.

As in `preference`, h(y) = log π(y|x) − log π_ref(y|x), summed over the answer's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.math.masked import require_same_shape


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    beta: float,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """λ (1 − σ(β (h − z))) for a good answer, λ (1 − σ(β (z − h))) for a bad one.

    Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization", eq. 8: gains and losses
    are felt against a reference point z, the KL of the policy from its reference (`kto_baseline`), and less
    the larger they are.

    Args:
        log_ratio: any shape, h; the only input that takes part in the gradient.
        desirable: the same shape, nonzero where the answer is good.
        baseline: z, one number, >= 0. With 0 the loss is APO-zero's for single answers (D'Oosterlinck et al.
            2024, "Anchored preference optimization and contrastive revisions", eq. 7, each of its two parts
            by itself).
        beta: > 0.
        desirable_weight, undesirable_weight: λ of good and of bad answers.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(log_ratio=log_ratio, desirable=desirable)
    good = desirable.bool()
    gain = torch.where(good, log_ratio - baseline, baseline - log_ratio)
    weight = torch.where(good, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * gain)


def kto_baseline(log_ratio: Tensor) -> Tensor:
    """z = max(0, mean of h over answers that belong to *other* prompts), without gradient.

    Ethayarajh et al. 2024, section 4.1: a cheap, biased stand-in for KL(π ‖ π_ref), which would need samples.

    Args:
        log_ratio: any shape, not empty: h(y′) of prompts x, each with an answer y′ to another one.
    """
    return log_ratio.detach().mean().clamp_min(0)
