"""`RLOOTrainer`: REINFORCE with a leave-one-out baseline.

    RLOOTrainer(model, RLOOConfig(output_dir="runs/rloo"), environment=env, train_dataset=tasks).train()

Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE-style optimization for learning from human
feedback in LLMs". An episode is one action: its reward is the score less `beta` × KL (k1, summed over its
tokens), its advantage the reward less the mean of the group's others, its probability the product of its
tokens'. The ratio is clipped as in TRL; in the first step on a batch it is 1, and the gradient that of
REINFORCE.
"""

from __future__ import annotations

from torch import Tensor

from etude.math.group import leave_one_out_advantages
from etude.math.losses import aggregate, sequence_policy_loss
from etude.trainers.experience import Minibatch
from etude.trainers.group import Scores
from etude.trainers.group_config import RLOOConfig
from etude.trainers.reinforce import ReinforceTrainer


class RLOOTrainer(ReinforceTrainer):
    """RLOO. The arguments are those of `GroupTrainer`."""

    method = "rloo"
    config_class = RLOOConfig
    config: RLOOConfig

    def credit(self, scores: Scores) -> Tensor:
        """Scores less the mean of the group's others."""
        return leave_one_out_advantages(scores.scores, scores.groups, scores.kept)

    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over episodes of the clipped loss, with one ratio each."""
        observed = minibatch.observed
        loss_BN, ratio_BN, clipped_BN = sequence_policy_loss(
            minibatch.logprobs,
            observed.logprobs,
            advantages_BN,
            observed.mask,
            clip_low=self.config.epsilon,
            clip_high=self.config.epsilon_high,
            normalise=False,
        )
        loss = aggregate(loss_BN, observed.mask, mode="sequence", denominator=minibatch.sequences)
        return loss, ratio_BN, clipped_BN
