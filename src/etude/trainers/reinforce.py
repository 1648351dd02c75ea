"""`ReinforceTrainer`: the policy gradient itself.

    ReinforceTrainer(model, ReinforceConfig(output_dir="runs/reinforce"), environment=env, …).train()

Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
∇J = E[Σ_t ∇log π(a_t) (G_t − b)]: each sampled token's log-probability goes up by what followed it, G_t, less
a baseline b, the batch's mean score. The reward is the score less `beta` × KL (k1, summed over the episode).
A batch is good for one step: there is no ratio, so nothing would say that the policy has moved.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from etude.math.group import batch_advantages
from etude.math.losses import aggregate, reinforce_loss
from etude.trainers.credit import deviation
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.group import GroupTrainer, Scores
from etude.trainers.group_config import GroupConfig, ReinforceConfig, RLOOConfig


class ReinforceTrainer(GroupTrainer):
    """REINFORCE. The arguments are those of `GroupTrainer`."""

    method = "reinforce"
    config_class: ClassVar[type[GroupConfig]] = ReinforceConfig
    kl_kind = "k1"
    config: ReinforceConfig | RLOOConfig

    def penalised(self, scores_B: Tensor, experience: Experience) -> Tensor:
        """R(x, y) = score − β log(π(y|x) / π_ref(y|x)) (Ahmadian et al. 2024, eq. 3)."""
        return scores_B - self.config.beta * (experience.kl * experience.mask).sum(1)

    def credit(self, scores: Scores) -> Tensor:
        """Scores less the mean of all."""
        return batch_advantages(scores.scores, scores.kept)

    def spread(self, advantages_B: Tensor, experience: Experience) -> Tensor:
        advantages_BN = super().spread(advantages_B, experience)
        if self.config.normalize_advantages:
            advantages_BN = advantages_BN / deviation(advantages_B, experience, self.accelerator)
        return advantages_BN

    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """−A log π, summed over an episode's tokens, averaged over episodes."""
        mask_BN = minibatch.observed.mask
        loss_BN = reinforce_loss(minibatch.logprobs, advantages_BN)
        loss = aggregate(loss_BN, mask_BN, mode="constant", denominator=minibatch.sequences)
        return loss, torch.ones_like(loss_BN), torch.zeros_like(mask_BN)
