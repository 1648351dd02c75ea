"""`GRPOTrainer`: group relative policy optimisation, with the variants that its settings name.

    GRPOTrainer(model, GRPOConfig(output_dir="runs/grpo"), environment=env, train_dataset=tasks).train()

Shao et al. 2024, "DeepSeekMath: pushing the limits of mathematical reasoning in open language models",
section 4.1. An episode's advantage is its score against its group's, on all of its tokens; PPO's clipped
loss; the KL to the reference, where `beta` asks for one, by k3 in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude.math.group import decoupled_advantages, group_advantages, process_advantages
from etude.math.kl import kl_estimate
from etude.math.losses import aggregate, cispo_loss, clipped_policy_loss, sequence_policy_loss
from etude.trainers.credit import gathered, own_part, token_rewards, where_rewarded
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.group import GroupTrainer, Scores
from etude.trainers.group_config import GRPOConfig


class GRPOTrainer(GroupTrainer):
    """GRPO. The arguments are those of `GroupTrainer`."""

    method = "grpo"
    config_class = GRPOConfig
    kl_kind = "k3"
    penalises = False
    config: GRPOConfig

    def credit(self, scores: Scores) -> Tensor:
        """Scores less their group's mean, over its deviation or whatever `scale_rewards` says."""
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            rewards_BK, weights_K = self.objectives(scores)
            return decoupled_advantages(rewards_BK, weights_K, scores.groups, scores.kept)
        return group_advantages(scores.scores, scores.groups, scores.kept, scale=self.config.reward_scale)

    def spread(self, advantages_B: Tensor, experience: Experience) -> Tensor:
        """Rewards of turns and tokens are compared one by one (process supervision, section 4.1.3)."""
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            return (
                advantages_B[:, None] * experience.mask
            )  # an episode's rewards of one name count by their sum
        early = torch.tensor(
            any(t.early_rewards for t in experience.trajectories), device=self.current_device
        )
        if not gathered(early[None], self.accelerator).any():
            return super().spread(advantages_B, experience)
        scores_B = advantages_B.new_tensor([t.score for t in experience.trajectories])
        rewards = gathered(token_rewards(experience, scores_B), self.accelerator)
        given = gathered(where_rewarded(experience), self.accelerator)
        advantages = process_advantages(
            rewards, given, self.groups(len(rewards)), scale=self.config.reward_scale
        )
        return own_part(advantages, experience.logprobs, self.accelerator) * experience.mask

    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The policy loss + `beta` × KL (Shao et al. 2024, eq. 3 and 4), averaged as `loss_type` says."""
        config, observed = self.config, minibatch.observed
        policies = (minibatch.logprobs, observed.logprobs, advantages_BN)
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        if config.loss_type == "cispo":
            parts = cispo_loss(*policies, clip_low=config.epsilon, clip_high=high)
        elif config.importance_sampling_level == "sequence":
            parts = sequence_policy_loss(*policies, observed.mask, clip_low=config.epsilon, clip_high=high)
        else:
            parts = clipped_policy_loss(*policies, clip_low=config.epsilon, clip_high=high)
        loss_BN, ratio_BN, clipped_BN = parts
        if config.beta:
            kl_BN = kl_estimate(minibatch.logprobs, observed.ref_logprobs, "k3")
            if config.use_bias_correction_kl:
                kl_BN = kl_BN * torch.exp(minibatch.logprobs - observed.logprobs)
            loss_BN = loss_BN + config.beta * kl_BN
        return self._averaged(loss_BN, minibatch), ratio_BN, clipped_BN

    def _averaged(self, loss_BN: Tensor, minibatch: Minibatch) -> Tensor:
        mask_BN, episodes = minibatch.observed.mask, minibatch.sequences
        match self.config.loss_type:
            case "grpo":  # Shao et al. 2024, eq. 3: episodes weigh the same
                return aggregate(loss_BN, mask_BN, mode="sequence", denominator=episodes)
            case "dr_grpo":  # Liu et al. 2025: no length has a say
                longest = self.config.max_completion_length
                assert longest is not None
                return aggregate(loss_BN, mask_BN, mode="constant", denominator=episodes * longest)
            case _:  # Yu et al. 2025 (DAPO), eq. 12: tokens weigh the same
                return aggregate(loss_BN, mask_BN, mode="token", denominator=minibatch.denominator)
