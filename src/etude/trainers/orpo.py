"""Odds-ratio preference optimisation (ORPO, Hong et al. 2024, arXiv:2403.07691): imitation and preference at
once.

The chosen answer is imitated, and its odds are raised over the rejected one's; there is no reference. The
imitation term is the paper's: of the answer, not of the prompt.
"""

from __future__ import annotations

from etude.math.likelihood import imitation_loss, log_odds, odds_ratio_loss
from etude.trainers.preference import Comparison, Pairs, PreferenceTrainer
from etude.trainers.preference_config import ORPOConfig


class ORPOTrainer(PreferenceTrainer):
    """The arguments are those of `DataTrainer`."""

    method = "orpo"
    config_class = ORPOConfig

    args: ORPOConfig

    def compare(self, pairs: Pairs) -> Comparison:
        chosen, rejected = pairs.chosen_means, pairs.rejected_means
        imitation = imitation_loss(pairs.chosen, pairs.chosen_lengths)
        odds_ratio = odds_ratio_loss(chosen, rejected)
        beta = self.args.beta
        return Comparison(
            imitation + beta * odds_ratio,
            beta * chosen,
            beta * rejected,
            {
                "nll_loss": imitation,
                "log_odds_ratio": -odds_ratio,
                "log_odds_chosen": log_odds(chosen) - log_odds(rejected),
            },
        )
