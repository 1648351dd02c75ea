"""Credit: from scores to an advantage for each sampled token, and what credit rules have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from etude.math.advantages import gae
from etude.math.masked import masked_var, masked_whiten
from etude.trainers.experience import Experience


@dataclass(slots=True)
class Credit:
    """Per sampled token, [B, N].

    Attributes:
        advantages: whitened over the batch.
        returns: what values are trained towards.
        kl_rewards: the part of the rewards that the KL penalty gave.
    """

    advantages: Tensor
    returns: Tensor
    kl_rewards: Tensor


def gae_credit(
    experience: Experience,
    scores_B: Tensor,
    *,
    score_scale: Tensor | float,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    accelerator: Accelerator,
) -> Credit:
    """PPO's credit for language models: KL penalty per token, score on the last, advantages by GAE.

    r_t = −β·KL_t + [t is the last sampled token]·score (Ziegler et al. 2019, section 2.2); advantages by
    generalised advantage estimation (Schulman et al. 2016), carried across tokens that weren't sampled. What
    of the score came at earlier tokens, in units of 1 / `score_scale` (of all, or [B]), is a reward there.
    """
    mask_BN = experience.mask
    kl_rewards_BN = -kl_coef * experience.kl * mask_BN
    rewards_BN = kl_rewards_BN + token_rewards(experience, scores_B, score_scale)
    if whiten_rewards:
        rewards_BN = whiten(rewards_BN, mask_BN, accelerator, shift_mean=False)
    advantages_BN, returns_BN = gae(
        rewards_BN, experience.values, mask_BN, gamma=gamma, lam=lam, bootstrap_B=experience.last_values
    )
    return Credit(whiten(advantages_BN, mask_BN, accelerator), returns_BN, kl_rewards_BN)


def early_rewards(experience: Experience) -> Tensor:
    """What was earned at each sampled token before the end [B, N]: rewards of turns and tokens."""
    rewards_BN = torch.zeros_like(experience.logprobs)
    for row_N, trajectory in zip(rewards_BN, experience.trajectories, strict=True):
        for token, reward in trajectory.early_rewards.items():
            row_N[token] = reward
    return rewards_BN


def where_rewarded(experience: Experience) -> Tensor:
    """Where an episode that is compared with others was given a reward, even one of 0 [B, N]."""
    given_BN = torch.zeros_like(experience.mask)
    for row_N, trajectory in zip(given_BN, experience.trajectories, strict=True):
        if not trajectory.compared:
            continue
        row_N[list(trajectory.early_rewards)] = True
        terminal = [r for r in trajectory.rewards if r.position is None and r.value is not None]
        if terminal or not trajectory.rewards:
            row_N[len(trajectory.sampled) - 1] = True
    return given_BN & experience.mask


def token_rewards(experience: Experience, scores_B: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """What was earned at each sampled token [B, N]: what of the score didn't come early comes at the end.

    Args:
        scores_B: the episodes' scores, perhaps divided by `scale`.
        scale: by which early rewards are divided, of all episodes or of each [B].
    """
    rewards_BN = early_rewards(experience)
    rewards_BN = rewards_BN / torch.as_tensor(scale, device=rewards_BN.device).view(-1, 1)
    counts_B = experience.mask.sum(1)
    acting = counts_B > 0
    rewards_BN[acting, counts_B[acting] - 1] += (scores_B - rewards_BN.sum(1))[acting]
    return rewards_BN


def deviation(advantages_B: Tensor, experience: Experience, accelerator: Accelerator) -> Tensor:
    """Of the advantages of all processes' episodes that are learned from, damped as TRL does; 1 for zeros."""
    everyone_B = gathered(advantages_B, accelerator)
    kept_B = gathered(experience.mask.any(1), accelerator)
    if not (everyone_B * kept_B).any():
        return torch.ones_like(everyone_B.sum())
    return masked_var(everyone_B, kept_B).sqrt() + 1e-4


def whiten(values_BN: Tensor, mask_BN: Tensor, accelerator: Accelerator, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` by the statistics of all processes."""
    everyone, mask = gathered(values_BN, accelerator), gathered(mask_BN, accelerator)
    if not mask.any():
        return values_BN
    return own_part(masked_whiten(everyone, mask, shift_mean), values_BN, accelerator)


def gathered(values_BN: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, padded with 0 to the longest; of one number per row, [B], too."""
    if accelerator.num_processes == 1:
        return values_BN
    # Not every backend gathers flags.
    plain = values_BN.float() if values_BN.dtype == torch.bool else values_BN
    everyone: Tensor = accelerator.gather(accelerator.pad_across_processes(plain, dim=1))
    return everyone.to(values_BN.dtype)


def own_part(everyone: Tensor, values_BN: Tensor, accelerator: Accelerator) -> Tensor:
    """Of what was computed from `gathered(values_BN)`, this process's rows."""
    rows, width = values_BN.shape
    first = accelerator.process_index * rows
    return everyone[first : first + rows, :width]
