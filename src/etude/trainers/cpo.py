"""Contrastive preference optimisation (CPO, Xu et al. 2024, arXiv:2401.08417), with SLiC-HF, IPO and SimPO.

A loss of log-probabilities, without a reference, and imitation of the chosen answer beside it.
"""

from __future__ import annotations

from torch import Tensor

from etude.math.likelihood import imitation_loss, simpo_loss
from etude.math.preference import hinge_loss, ipo_loss, power_score, sigmoid_loss
from etude.trainers.preference import Comparison, Pairs, PreferenceTrainer
from etude.trainers.preference_config import CPOConfig


class CPOTrainer(PreferenceTrainer):
    """The arguments are those of `DataTrainer`."""

    method = "cpo"
    config_class = CPOConfig
    on_the_card = ("beta", "loss_type", "cpo_alpha")

    args: CPOConfig

    def compare(self, pairs: Pairs) -> Comparison:
        args = self.args
        by_token = args.loss_type in ("ipo", "simpo", "alphapo")
        chosen = pairs.chosen_means if by_token else pairs.chosen
        rejected = pairs.rejected_means if by_token else pairs.rejected
        imitation = imitation_loss(pairs.chosen, pairs.chosen_lengths)
        losses = contrast(chosen, rejected, args)
        if args.cpo_alpha:  # at 0, infinite likelihoods of one term don't spoil the other
            losses = losses + args.cpo_alpha * imitation
        return Comparison(
            losses,
            args.beta * power_score(chosen, args.alpha),
            args.beta * power_score(rejected, args.alpha),
            {"nll_loss": imitation},
        )


def contrast(chosen: Tensor, rejected: Tensor, config: CPOConfig) -> Tensor:
    """The losses [B] of two answers' log-probabilities [B], sums or means as `loss_type` has it."""
    smoothing = config.label_smoothing
    margin = power_score(chosen, config.alpha) - power_score(rejected, config.alpha)
    match config.loss_type:
        case "sigmoid":
            return sigmoid_loss(margin, config.beta, smoothing)
        case "hinge":
            return hinge_loss(margin, config.beta)
        case "ipo":
            return ipo_loss(margin, config.beta)
    return simpo_loss(
        chosen, rejected, config.beta, config.simpo_gamma, label_smoothing=smoothing, alpha=config.alpha
    )
