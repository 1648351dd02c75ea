"""Credit rules: from scores to an advantage for each sampled token."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from etude.math.advantages import gae
from etude.math.masked import masked_whiten
from etude.trainers.learner import Experience


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
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    accelerator: Accelerator,
) -> Credit:
    """PPO's credit for language models: KL penalty per token, score on the last, advantages by GAE.

    r_t = −β·KL_t + [t is the last sampled token]·score (Ziegler et al. 2019, section 2.2); advantages by
    generalised advantage estimation (Schulman et al. 2016), carried across tokens that weren't sampled.
    """
    mask_BN = experience.mask
    kl_rewards_BN = -kl_coef * experience.kl * mask_BN
    rewards_BN = kl_rewards_BN.clone()
    counts_B = mask_BN.sum(1)
    acting = counts_B > 0
    rewards_BN[acting, counts_B[acting] - 1] += scores_B[acting]
    if whiten_rewards:
        rewards_BN = whiten(rewards_BN, mask_BN, accelerator, shift_mean=False)
    advantages_BN, returns_BN = gae(
        rewards_BN, experience.values, mask_BN, gamma=gamma, lam=lam, bootstrap_B=experience.last_values
    )
    return Credit(whiten(advantages_BN, mask_BN, accelerator), returns_BN, kl_rewards_BN)


def whiten(values_BN: Tensor, mask_BN: Tensor, accelerator: Accelerator, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` by the statistics of all processes."""
    if accelerator.num_processes == 1:
        return masked_whiten(values_BN, mask_BN, shift_mean) if mask_BN.any() else values_BN
    rows, width = values_BN.shape
    everyone = [
        accelerator.gather(accelerator.pad_across_processes(tensor, dim=1))
        for tensor in (values_BN, mask_BN.to(values_BN.dtype))
    ]
    if not everyone[1].any():
        return values_BN
    whitened = masked_whiten(everyone[0], everyone[1].bool(), shift_mean)
    first = accelerator.process_index * rows
    return whitened[first : first + rows, :width]
