"""Policy and value losses per token, and the ways to average them.

Covered: the losses of PPO, GSPO, REINFORCE and CISPO as functions of one token (or one sequence), and
`aggregate`, which turns a loss per token into a number. Not covered: entropy and KL terms
(`logprobs.entropy`, `kl`), supervised, preference and reward-model losses.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from etude.errors import ConfigError, DataError
from etude.math.masked import require_same_shape

AggregateMode = Literal["token", "sequence", "constant"]


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """max(−A ρ, −A clip(ρ, 1 − clip_low, 1 + clip_high)) with ρ = exp(log π − log π_old).

    Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7, as a loss to minimise. The two
    ends of the range can differ (Yu et al. 2025, "DAPO", "Clip-Higher").

    Args:
        logprobs: any shape, log π(token) now; the only input that takes part in the gradient.
        old_logprobs: the same shape, log π(token) before the first update on this batch.
        advantages: the same shape.
        clip_low: how far below 1 the ratio still counts, >= 0.
        clip_high: how far above 1, >= 0; None is `clip_low`.

    Returns:
        (loss, ratio, clipped), each of the same shape; ratio without gradient; clipped is true where the
        clipped term was the larger one, so that the token has no gradient.

    Raises:
        ConfigError: a clip range is negative.
        DataError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    clip_high = clip_low if clip_high is None else clip_high
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        _require_not_negative(name, clip)
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(unclipped_loss, clipped_loss), ratio.detach(), clipped_loss > unclipped_loss


def sequence_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    normalise: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`clipped_policy_loss` with one ratio per sequence, given to each of its tokens.

    - `normalise=True`: ρ = exp(mean over tokens of log π − log π_old), the geometric mean of the tokens'
      ratios (Zheng et al. 2025, "Group sequence policy optimization", eq. 7; the loss is eq. 5).
    - `normalise=False`: ρ = exp(sum of them), the ratio of the sequence's own probabilities: the sequence
      is one action (Ahmadian et al. 2024, section 3, for RLOO).

    `aggregate(mode="sequence")` of it is the mean over sequences of these papers.

    Args:
        logprobs_BT: [B, T], log π(token) now; the only input that takes part in the gradient.
        old_logprobs_BT, advantages_BT: the same shape.
        mask_BT: the same shape; nonzero where there is a token. Elsewhere the others may hold anything.
        clip_low, clip_high: as for `clipped_policy_loss`.

    Returns:
        As `clipped_policy_loss`, [B, T] each.

    Raises:
        ConfigError: a clip range is negative.
        DataError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs_BT, old_logprobs=old_logprobs_BT, mask=mask_BT)
    mask_BT = mask_BT.bool()
    moved_B = torch.where(mask_BT, logprobs_BT - old_logprobs_BT.detach(), 0).sum(-1)
    if normalise:
        moved_B = moved_B / mask_BT.sum(-1).clamp_min(1)
    moved_BT = moved_B[:, None].expand_as(logprobs_BT)
    return clipped_policy_loss(
        moved_BT, torch.zeros_like(moved_BT), advantages_BT, clip_low=clip_low, clip_high=clip_high
    )


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """−A log π(token): its gradient is the policy gradient itself, without ratio and clipping.

    Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning", eq. 11. Only right for one step on tokens that the present policy sampled.

    Args:
        logprobs: any shape, log π(token) now; the only input that takes part in the gradient.
        advantages: the same shape.

    Raises:
        DataError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, advantages=advantages)
    return -advantages.detach() * logprobs


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """−sg(clip(ρ, 1 − clip_low, 1 + clip_high)) A log π: weights are clipped, every token has a gradient.

    MiniMax 2025, "MiniMax-M1: scaling test-time compute efficiently with lightning attention", eq. 4 and 5
    (CISPO). PPO's clip silences rare tokens that moved far in one step; this bounds their weight instead.

    Args:
        logprobs: any shape, log π(token) now; the only input that takes part in the gradient.
        old_logprobs, advantages: the same shape.
        clip_low: how far below 1 the weight may be, >= 0; from 1 on no bound, as in the paper's own runs.
        clip_high: how far above 1, >= 0.

    Returns:
        (loss, ratio, clipped), each of the same shape; ratio without gradient; clipped is true where the
        weight isn't the ratio.

    Raises:
        ConfigError: a clip range is negative.
        DataError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        _require_not_negative(name, clip)
    ratio = torch.exp(logprobs - old_logprobs).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return reinforce_loss(logprobs, weight * advantages), ratio, weight != ratio


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (V_clip − R)²) with V_clip kept within `clip` of the old value.

    Schulman et al. 2016 (GAE), section 5, fit the value by squared error; the clipping is that of OpenAI
    baselines' PPO2, written down in Engstrom et al. 2020, "Implementation matters in deep policy
    gradients", section 3.

    Args:
        values: any shape, V now; the only input that takes part in the gradient.
        old_values: the same shape, V before the first update on this batch.
        returns: the same shape.
        clip: largest change of the value that still counts, >= 0; None is no clipping.

    Returns:
        (loss, clipped), each of the same shape; clipped is true where the clipped term was the larger one,
        so that the token has no gradient.

    Raises:
        ConfigError: the clip range is negative.
        DataError: the shapes differ.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    old_values, returns = old_values.detach(), returns.detach()
    squares = (values - returns) ** 2
    if clip is None:
        return squares / 2, torch.zeros_like(squares, dtype=torch.bool)
    _require_not_negative("clip", clip)
    clipped_squares = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return torch.maximum(squares, clipped_squares) / 2, clipped_squares > squares


def aggregate(
    loss_BT: Tensor,
    mask_BT: Tensor,
    *,
    mode: AggregateMode,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """One number out of a loss per token.

    - "token": sum over tokens ÷ number of tokens. Each token weighs the same (Yu et al. 2025, "DAPO",
      "Token-Level Policy Gradient Loss").
    - "sequence": mean over rows of each row's mean; rows without a token don't count. Each sequence weighs
      the same (Shao et al. 2024, "DeepSeekMath", eq. 3).
    - "constant": sum over tokens ÷ `denominator`, usually rows × token limit, so that a token's weight
      depends on no length at all (Liu et al. 2025, "Understanding R1-Zero-like training", Dr. GRPO).

    A batch that is split over ranks or accumulation steps has a mean of its own only as a whole: count
    tokens (or rows with a token) over all parts and pass that as `denominator` to each. The parts then
    *add up* to the loss of the whole batch, gradients too. (DDP averages gradients over ranks: multiply by
    their number.)

    Args:
        loss_BT: [..., T], a sequence in each row.
        mask_BT: the same shape; nonzero where the loss counts. Elsewhere the loss may hold anything.
        mode: see above.
        denominator: above 0; None counts in this tensor, which "constant" can't do. A part without any
            token is 0 if a denominator is passed.

    Returns:
        A scalar.

    Raises:
        ConfigError: the mode is unknown, or "constant" has no denominator.
        DataError: the shapes differ, the denominator is not above 0, or there is no token to average over.
    """
    require_same_shape(loss=loss_BT, mask=mask_BT)
    if mode not in get_args(AggregateMode):
        raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(get_args(AggregateMode))}")
    mask_BT = mask_BT.bool()
    sum_B = torch.where(mask_BT, loss_BT, 0).sum(-1)
    tokens_B = mask_BT.sum(-1)
    total = (sum_B / tokens_B.clamp_min(1)).sum() if mode == "sequence" else sum_B.sum()
    if denominator is None:
        if mode == "constant":
            raise ConfigError("mode 'constant' has no denominator; pass one, usually rows × token limit")
        denominator = tokens_B.sum() if mode == "token" else (tokens_B > 0).sum()
    if not denominator > 0:
        raise DataError(
            f"the denominator is {float(denominator):g}: there is nothing to average over; expected at least "
            "one token in the mask. Skip the update when no episode of the batch has a token to train on"
        )
    return total / denominator


def _require_not_negative(name: str, clip: float) -> None:
    if not clip >= 0:
        raise ConfigError(f"{name} is {clip}; expected a number >= 0")
