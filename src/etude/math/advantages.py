"""Generalised advantage estimation over the tokens that the policy sampled.

Covered: GAE with a critic, for padded rows in which sampled tokens may be interrupted by others (tool
responses, forced text, padding). Not covered: what the rewards are and which stop reasons bootstrap (the
trainers decide), group baselines without a critic, and whitening (`masked.masked_whiten`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.errors import ConfigError, DataError, RewardError
from etude.math.masked import require_same_shape


@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns at the sampled tokens.

    Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation",
    eq. 16: A_k = Σ_l (γλ)^l δ_{k+l} with δ_k = r_k + γ V_{k+1} − V_k. Here k counts *sampled* tokens: the
    tokens between two of them are no actions, so value and λ-trace are carried across them instead of
    through them, and one discount separates a tool call's last token from the first token after the
    response, however long that is.

    Args:
        rewards_BT: [B, T], 0 where the mask is. A terminal reward belongs on the last sampled token.
        values_BT: [B, T], V of the state in which the token at t was sampled; ignored where not sampled.
        mask_BT: [B, T], nonzero where this run's policy sampled the token.
        gamma: discount per sampled token, in [0, 1].
        lam: λ, in [0, 1]: 0 is the one-step error δ, 1 the discounted return minus the value.
        bootstrap_B: [B], the value of the state after the last sampled token, for episodes that were
            interrupted; 0 for those that ended. None is 0 for all.

    Returns:
        (advantages_BT, returns_BT), without gradient, in float32 (float64 for float64 values): returns are
        advantages plus values, and both are 0 where nothing was sampled.

    Raises:
        RewardError: a reward sits where nothing was sampled, and would be lost.
        ConfigError: gamma or lam is outside [0, 1].
        DataError: the shapes don't fit.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ConfigError(f"{name} is {factor}; expected a number in [0, 1]")
    sampled_BT = mask_BT.bool()
    _check(rewards_BT, values_BT, sampled_BT, bootstrap_B)

    dtype = torch.promote_types(values_BT.dtype, torch.float32)
    rewards_BT, values_BT = rewards_BT.to(dtype), values_BT.to(dtype)
    trace_B = values_BT.new_zeros(len(values_BT))
    next_value_B = torch.zeros_like(trace_B) if bootstrap_B is None else bootstrap_B.to(trace_B)
    advantages_BT = torch.zeros_like(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        sampled_B, value_B = sampled_BT[:, t], values_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - value_B
        trace_B = torch.where(sampled_B, delta_B + gamma * lam * trace_B, trace_B)
        next_value_B = torch.where(sampled_B, value_B, next_value_B)
        advantages_BT[:, t] = torch.where(sampled_B, trace_B, 0)
    return advantages_BT, torch.where(sampled_BT, advantages_BT + values_BT, 0)


def _check(rewards_BT: Tensor, values_BT: Tensor, sampled_BT: Tensor, bootstrap_B: Tensor | None) -> None:
    require_same_shape(rewards=rewards_BT, values=values_BT, mask=sampled_BT)
    if rewards_BT.ndim != 2:
        raise DataError(f"rewards have shape {tuple(rewards_BT.shape)}; expected [rows, tokens]")
    if bootstrap_B is not None and bootstrap_B.shape != rewards_BT.shape[:1]:
        raise DataError(
            f"bootstrap has shape {tuple(bootstrap_B.shape)}; expected one value for each of "
            f"{len(rewards_BT)} rows"
        )
    lost_N2 = ((rewards_BT != 0) & ~sampled_BT).nonzero()
    if len(lost_N2):
        row, position = lost_N2[0].tolist()
        raise RewardError(
            f"row {row} has a reward of {rewards_BT[row, position].item():g} at position {position}, which "
            f"the policy did not sample ({len(lost_N2)} such in all): it would be lost. Put a reward on a "
            "sampled token, a terminal one on the last of them"
        )
