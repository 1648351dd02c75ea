"""Reward models: scores that say which of two answers people prefer.

The loss is Bradley–Terry's (`math.reward_model`), a mean over the pairs of the whole optimizer step. Decoders
compute what both answers of a pair begin with once, and nothing is padded; encoders are padded on the right.
The score of an answer is that of its last token, whatever the padding token (`models.score_reader`).

Not covered: rankings of more than two answers, models that score steps (`prm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from etude.data.files import Rows, load_rows
from etude.data.formats import detect_format
from etude.data.preferences import to_preference
from etude.data.scored import answered_ids, pack_scored, scored_ids
from etude.math.calibration import brier, reliability_bins
from etude.math.reward_model import centring_penalty, pair_loss, pair_probabilities
from etude.models.positions import length_limit
from etude.models.reward_model import add_scoring_adapter, load_reward_model
from etude.models.score_head import Kind, with_score_head
from etude.models.score_reader import ScoreReader
from etude.models.wrappers import trunk_of
from etude.trainers.data_trainer import DataTrainer, Model
from etude.trainers.means import Sums
from etude.trainers.reward_config import RewardConfig
from etude.trainers.tokenizing import map_rows

_BINS = 10
_GAP = "calibration_gap_"  # of a bin; their absolute values sum up to the calibration error


class ScoreTrainer(DataTrainer):
    """What reward models and process reward models have in common: a model with a score head.

    Args:
        model: a classifier of transformers' with as many labels as scores; a causal language model or an
            encoder, which gets a fresh head; a value-head model or a `ValueModel`, whose head becomes the
            score head. Or the name or path of one of them, or of a LoRA adapter.
    """

    kind: Kind

    def load_model(self, name: str, **options: Any) -> Model:
        return load_reward_model(name, self.kind, fresh=True, **options)

    def adopt(self, model: nn.Module) -> Model:
        return with_score_head(model, self.kind)

    def add_adapter_to(self, model: Model, peft_config: PeftConfig) -> Model:
        return add_scoring_adapter(trunk_of(model), peft_config)

    def prepare(self, model: Model) -> None:
        self.reader = ScoreReader(model)
        self.limit = length_limit(self.tokenizer, trunk_of(model).config, self.args.max_length)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, the tokenizer and a model card.

        Transformers itself finds a text's last token by the padding token of the model's configuration. One
        that also ends texts would hide their end, and isn't written: without any, a batch of texts is refused
        there, not scored one token too early. Encoder-decoders need theirs: their decoder begins with it.
        """
        trained: Any = self.model
        config = trunk_of(trained).config.get_text_config()
        pad, eos = config.pad_token_id, self.tokenizer.eos_token_id
        if pad == eos and not config.is_encoder_decoder:
            config.pad_token_id = None
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            config.pad_token_id = pad

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        gaps = [abs(value) for name, value in means.items() if name.startswith(_GAP)]
        kept = {name: value for name, value in means.items() if not name.startswith(_GAP)}
        return {**kept, "calibration_error": sum(gaps)} if gaps else kept


class RewardTrainer(ScoreTrainer):
    """Train a reward model on preferences: rows of `[prompt,] chosen, rejected [, margin]`.

    The other arguments are those of `DataTrainer`. Metrics, over pairs: `accuracy` (the chosen answer scores
    higher), `margin` (by how much), `mean_reward` of all answers; of the probability that the model gives
    each preference, the `brier` score and the expected `calibration_error`.
    """

    method = "reward"
    config_class = RewardConfig
    kind = "sequence"
    on_the_card = ("center_rewards_coefficient", "append_eos", "disable_dropout")

    def tokenize(self, rows: Rows) -> Dataset:
        dataset = load_rows(rows)
        detect_format(dataset.column_names, ("preference",))
        return map_rows(
            dataset,
            _tokenize_pair,
            self.args,
            what="have two answers that are the same as far as they are read",
            tokenizer=self.tokenizer,
            append_eos=self.args.append_eos,
            max_length=self.limit,
        )

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        answers = [row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]
        batch = pack_scored(answers, [[len(ids) - 1] for ids in answers], share=self.reader.packs)
        margins = torch.tensor([row["margin"] for row in rows])
        return {**batch, "margins": margins, "labels": torch.ones(len(rows), dtype=torch.long)}

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Sums]:
        chosen_P, rejected_P = self._scores(model, batch).unbind(1)
        losses_P = pair_loss(chosen_P, rejected_P, batch["margins"].to(chosen_P))
        if self.args.center_rewards_coefficient:
            losses_P = losses_P + self.args.center_rewards_coefficient * centring_penalty(
                chosen_P, rejected_P
            )
        return losses_P.sum(), self._metrics(chosen_P.detach(), rejected_P.detach())

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Scores [P, 2] of chosen and rejected, and 0, the place of the better one."""
        scores_P2 = self._scores(model, batch)
        return scores_P2, torch.zeros(len(scores_P2), dtype=torch.long, device=scores_P2.device)

    def _scores(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.reader(model, batch).view(-1, 2)

    def _metrics(self, chosen_P: Tensor, rejected_P: Tensor) -> Sums:
        count = len(chosen_P)
        probabilities_P = pair_probabilities(chosen_P, rejected_P)
        return {
            "accuracy": ((chosen_P > rejected_P).sum(), count),
            "margin": ((chosen_P - rejected_P).sum(), count),
            "mean_reward": ((chosen_P + rejected_P).sum(), 2 * count),
            **calibration_sums(probabilities_P, torch.ones_like(probabilities_P)),
        }


def calibration_sums(probabilities_N: Tensor, outcomes_N: Tensor) -> Sums:
    """Sums that the Brier score and the calibration error of a whole dataset are made of."""
    count = len(probabilities_N)
    bins = reliability_bins(probabilities_N, outcomes_N, _BINS)
    gaps = (bins.right - bins.confidence).unbind()
    return {
        "brier": (brier(probabilities_N, outcomes_N).sum(), count),
        **{f"{_GAP}{k}": (gap, count) for k, gap in enumerate(gaps)},
    }


def _tokenize_pair(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
    max_length: int | None,
) -> dict[str, Any]:
    preference = to_preference(row, tokenizer, append_eos=False, scored=True)
    chosen, rejected = (
        scored_ids(answered_ids(episode), tokenizer, append_eos=append_eos, max_length=max_length)
        for episode in (preference.chosen, preference.rejected)
    )
    return {
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "margin": preference.margin or 0.0,
        "cut": bool(chosen.dropped or rejected.dropped),
        "learned": chosen.ids != rejected.ids,
    }
