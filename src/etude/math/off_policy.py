"""Weights that correct for tokens sampled by another policy than the one that is trained.

A sampler computes in other shapes, another precision or with older weights than the trainer, so that what it
sampled is slightly off-policy from the first step on. Covered: the importance weight of each token. Not
covered: the policy ratio within an update (`losses`), and distributions that were cut (top-k, top-p).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from etude.errors import ConfigError
from etude.math.masked import require_same_shape

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@torch.no_grad()
def importance_weights(
    logprobs_BN: Tensor, sampler_logprobs_BN: Tensor, mask_BN: Tensor, *, mode: Correction, cap: float
) -> Tensor:
    """w = π(token) / π_sampler(token), bounded by `cap`; a weight for the token's loss.

    "token" weighs each token by its own ratio, which has little variance and a bias; "sequence" gives all
    tokens of a sequence the ratio of the whole, the product of theirs: unbiased before it is bounded.
    "truncate" takes min(w, cap) (Ionides 2008, "Truncated importance sampling"; Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"); "mask" gives weight 0 to what is
    above the cap instead (at token level Ling Team 2025, "Every step evolves", IcePop, with a bound below,
    too; at sequence level Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the
    training-inference mismatch").

    Args:
        logprobs_BN: [B, N], log π under the weights that are about to be trained.
        sampler_logprobs_BN: the same shape, as the sampler recorded them.
        mask_BN: the same shape; nonzero where there is a token. Elsewhere the others may hold anything.
        mode: see above; "none" weighs all tokens the same.
        cap: largest weight, >= 1.

    Returns:
        [B, N], without gradient; 1 where there is no token.

    Raises:
        ConfigError: the mode is unknown, or the cap below 1.
        DataError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs_BN, sampler_logprobs=sampler_logprobs_BN, mask=mask_BN)
    if mode not in get_args(Correction):
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(get_args(Correction))}")
    if not cap >= 1:
        raise ConfigError(
            f"cap is {cap}; expected a number >= 1: 1 is the weight of a token that is on policy"
        )
    if mode == "none":
        return torch.ones_like(logprobs_BN)
    level, _, bound = mode.partition("_")
    moved_BN = torch.where(mask_BN.bool(), logprobs_BN - sampler_logprobs_BN, 0)
    if level == "sequence":
        moved_BN = moved_BN.sum(-1, keepdim=True).expand_as(moved_BN)
    weights_BN = moved_BN.exp()
    if bound == "truncate":
        weights_BN = weights_BN.clamp_max(cap)
    else:
        weights_BN = torch.where(weights_BN <= cap, weights_BN, 0)
    return torch.where(mask_BN.bool(), weights_BN, 1)
