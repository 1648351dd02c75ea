"""`ReinforcePlusPlusTrainer`: PPO's loss and token-wise KL, and advantages scaled over the whole batch.

    ReinforcePlusPlusTrainer(model, ReinforcePlusPlusConfig(output_dir="runs/r"), environment=env, …).train()

Hu et al. 2025, "REINFORCE++: stabilizing critic-free policy optimization with global normalization". Its two
variants:

- one episode per task: A_t = score − β Σ_{i ≥ t} KL_i (k1), normalised over all tokens of the batch;
- several ("with baseline"): A = score − the group's mean, normalised likewise; the KL by k2 in the loss.
"""

from __future__ import annotations

from torch import Tensor

from etude.math.group import group_advantages
from etude.math.kl import kl_estimate
from etude.math.losses import aggregate, clipped_policy_loss
from etude.trainers.credit import whiten
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.group import GroupTrainer, Scores
from etude.trainers.group_config import ReinforcePlusPlusConfig


class ReinforcePlusPlusTrainer(GroupTrainer):
    """REINFORCE++. The arguments are those of `GroupTrainer`."""

    method = "reinforce_plus_plus"
    config_class = ReinforcePlusPlusConfig
    kl_kind = "k1"
    config: ReinforcePlusPlusConfig

    def credit(self, scores: Scores) -> Tensor:
        """Scores, or what they are above their group's mean."""
        if self.plays == 1:
            return scores.scores * scores.kept
        return group_advantages(scores.scores, scores.groups, scores.kept, scale="none")

    def spread(self, advantages_B: Tensor, experience: Experience) -> Tensor:
        """What follows each token, less the KL penalty that follows it; normalised over tokens."""
        advantages_BN = super().spread(advantages_B, experience)
        if self.plays == 1:
            penalties_BN = self.config.beta * experience.kl * experience.mask
            advantages_BN = advantages_BN - penalties_BN.flip(1).cumsum(1).flip(1)
        return whiten(advantages_BN, experience.mask, self.accelerator)

    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """PPO's clipped loss, a mean over tokens."""
        config, observed = self.config, minibatch.observed
        loss_BN, ratio_BN, clipped_BN = clipped_policy_loss(
            minibatch.logprobs,
            observed.logprobs,
            advantages_BN,
            clip_low=config.epsilon,
            clip_high=config.epsilon_high,
        )
        if self.plays > 1 and config.beta:
            loss_BN = loss_BN + config.beta * kl_estimate(minibatch.logprobs, observed.ref_logprobs, "k2")
        loss = aggregate(loss_BN, observed.mask, mode="token", denominator=minibatch.denominator)
        return loss, ratio_BN, clipped_BN
