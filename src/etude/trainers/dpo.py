"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its variants.

The policy learns to prefer as the data does, measured against a reference: `math.preference` has the losses,
`reference` what they are measured against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from etude.math import preference
from etude.math.likelihood import imitation_loss, policy_weights, sequence_sums, verbosity_weights
from etude.trainers.data_trainer import Model
from etude.trainers.dpo_config import DPOConfig
from etude.trainers.preference import Comparison, Pairs, PreferenceTrainer
from etude.trainers.reference import Reference
from etude.trainers.reference_trainer import ReferenceTrainer, require_no_reference


class DPOTrainer(ReferenceTrainer, PreferenceTrainer):
    """Train a language model, decoder or encoder-decoder, on pairs of answers.

    The arguments are those of `ReferenceTrainer`.
    """

    method = "dpo"
    config_class = DPOConfig
    on_the_card = ("beta", "loss_type", "loss_weights", "f_divergence_type")

    args: DPOConfig

    def make_reference(self, model: Model) -> Reference | None:
        if self.args.reference_free:
            require_no_reference(self.given_reference)
            return None
        return super().make_reference(model)

    def reference_logprobs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        if "ref_logprobs" in batch:
            found: Tensor = batch["ref_logprobs"]
            return found
        if self.reference is None:
            return None
        return self.of_answers(self.reference.logprobs(model, batch), list(batch["counts"]))

    def score_rows(self, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
        policy: Any = self.model
        found = self.reference_logprobs(policy, self._prepare_inputs(self.collate(rows)))
        assert found is not None
        chosen, rejected = found.chunk(2)
        return {"ref_chosen_logps": chosen.tolist(), "ref_rejected_logps": rejected.tolist()}

    def scoring_settings(self) -> Any:
        return self.args.ld_alpha

    def of_answers(self, values_M: Tensor, counts: list[int]) -> Tensor:
        if self.args.ld_alpha is not None:
            pairs = len(counts) // 2
            others = [*counts[pairs:], *counts[:pairs]]
            values_M = values_M * verbosity_weights(counts, others, self.args.ld_alpha).to(values_M)
        return sequence_sums(values_M, counts)

    @property
    def other_temperatures(self) -> tuple[float, ...]:
        return (0.5,) if self.args.use_weighting else ()

    def weights(self, logprobs_M: Tensor, others: Sequence[Tensor], counts: list[int]) -> Tensor | None:
        if not self.args.use_weighting:
            return None
        # At temperature ½, log π_½ = 2 log π − log Σ π²: that gives the sum without a look at the vocabulary.
        collisions_M = 2 * logprobs_M - others[0]
        chosen, rejected = policy_weights(logprobs_M, collisions_M, counts).chunk(2)
        return chosen * rejected

    def compare(self, pairs: Pairs) -> Comparison:
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        losses = torch.zeros_like(chosen)
        for kind, weight in self.args.weighted_losses:
            losses = losses + weight * pair_losses(kind, pairs, self.args)
        if pairs.weights is not None:
            losses = losses * pairs.weights
        return Comparison(losses, self.args.beta * chosen, self.args.beta * rejected)


def pair_losses(kind: str, pairs: Pairs, config: DPOConfig) -> Tensor:
    """The losses [B] of one kind among `loss_type`."""
    beta, smoothing = config.beta, config.label_smoothing
    chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    divergence = config.f_divergence_type, config.f_alpha_divergence_coef
    chosen_score = preference.divergence_score(chosen, *divergence)
    rejected_score = preference.divergence_score(rejected, *divergence)
    margin = chosen_score - rejected_score
    # Of averages over each answer's tokens.
    mean_margin = chosen_score / pairs.chosen_lengths - rejected_score / pairs.rejected_lengths
    match kind:
        case "sigmoid":
            return preference.sigmoid_loss(margin, beta, smoothing)
        case "sigmoid_norm":
            return preference.sigmoid_loss(mean_margin, beta, smoothing)
        case "hinge":
            return preference.hinge_loss(margin, beta)
        case "ipo":
            return preference.ipo_loss(mean_margin, beta)
        case "exo_pair":
            return preference.exo_loss(margin, beta, smoothing)
        case "robust":
            return preference.robust_loss(margin, beta, smoothing)
        case "discopop":
            return preference.discopop_loss(margin, beta, config.discopop_tau)
        case "nca_pair":
            return preference.nca_loss(chosen, rejected, beta)
        case "bco_pair":
            return preference.bco_loss(chosen, rejected, beta)
        case "sppo_hard":
            return preference.sppo_loss(chosen, rejected, beta)
        case "apo_zero":
            return preference.apo_zero_loss(chosen, rejected, beta)
        case "apo_down":
            return preference.apo_down_loss(chosen, rejected, beta)
        case "aot":
            policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
            return preference.aot_loss(policy, reference, beta, smoothing)
        case "aot_unpaired":
            return preference.aot_unpaired_loss(chosen, rejected, beta, smoothing)
    assert kind == "sft"
    return imitation_loss(pairs.chosen, pairs.chosen_lengths)
