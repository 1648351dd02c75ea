"""Simple preference optimisation (SimPO, Meng et al. 2024, arXiv:2405.14734), and AlphaPO's shape of its
reward.

An answer's reward is its mean log-probability per token, the chosen one's is to be higher by a margin; there
is no reference.
"""

from __future__ import annotations

from etude.math.likelihood import simpo_loss
from etude.math.preference import power_score
from etude.trainers.preference import Comparison, Pairs, PreferenceTrainer
from etude.trainers.preference_config import SimPOConfig


class SimPOTrainer(PreferenceTrainer):
    """The arguments are those of `DataTrainer`."""

    method = "simpo"
    config_class = SimPOConfig
    on_the_card = ("beta", "simpo_gamma")

    args: SimPOConfig

    def compare(self, pairs: Pairs) -> Comparison:
        args = self.args
        chosen, rejected = pairs.chosen_means, pairs.rejected_means
        losses = simpo_loss(
            chosen,
            rejected,
            args.beta,
            args.simpo_gamma,
            label_smoothing=args.label_smoothing,
            alpha=args.alpha,
        )
        return Comparison(
            losses, args.beta * power_score(chosen, args.alpha), args.beta * power_score(rejected, args.alpha)
        )
