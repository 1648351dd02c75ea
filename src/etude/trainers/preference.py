"""Training on preferences: what DPO and its relatives have in common.

A row is a prompt with a chosen and a rejected answer. Both are scored in one pass, their prompt once; a
method is a loss of what comes out, one for each pair (`compare`), and perhaps a reference. The loss is a mean
over the pairs of a whole optimizer step, and what is logged is a mean over pairs, too.

Not covered: answers without another to compare them with (`kto`), images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from etude.data.collate import IGNORED, pack, supervised_labels
from etude.data.conversions import convert
from etude.data.files import Rows, load_rows
from etude.data.preferences import to_preference
from etude.data.source_target import to_source_targets
from etude.data.truncation import truncate_pair
from etude.math.likelihood import sequence_sums
from etude.models.scorer import TokenScorer
from etude.trainers.data_trainer import DataTrainer, Model
from etude.trainers.means import Sums
from etude.trainers.preference_config import PreferenceConfig
from etude.trainers.tokenizing import map_rows
from etude.types import Episode


@dataclass(frozen=True)
class Pairs:
    """What a model gives the answers of B pairs; everything is [B].

    Attributes:
        chosen, rejected: log π(y|x), summed over each answer's tokens, with gradient.
        chosen_lengths, rejected_lengths: their tokens.
        ref_chosen, ref_rejected: the same as the first two under the reference; 0 without one.
        weights: of each pair's loss.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    weights: Tensor | None = None

    @property
    def chosen_means(self) -> Tensor:
        return self.chosen / self.chosen_lengths

    @property
    def rejected_means(self) -> Tensor:
        return self.rejected / self.rejected_lengths


@dataclass(frozen=True)
class Comparison:
    """What a method makes of pairs.

    Attributes:
        losses: [B], with gradient.
        chosen_rewards, rejected_rewards: [B], what the method takes for the answers' rewards.
        more: further metrics by name, [B].
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)


class PreferenceTrainer(DataTrainer):
    """Base of the trainers on pairs of answers; the arguments are those of `DataTrainer`."""

    on_the_card: ClassVar[tuple[str, ...]] = ("beta",)

    args: Any  # of a `PreferenceConfig`

    def prepare(self, model: Model) -> None:
        self.scorer = TokenScorer(model)

    def tokenize(self, rows: Rows) -> Dataset:
        return tokenize_pairs(rows, self.tokenizer, self.args, self.scorer.is_encoder_decoder)

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Chosen answers, then rejected ones; "labels" counts pairs."""
        sides = ("chosen", "rejected")
        batch = pack(
            [row[f"{side}_ids"] for side in sides for row in rows],
            [row[f"{side}_labels"] for side in sides for row in rows],
            share=True,
            sources=[row["source_ids"] for _ in sides for row in rows] if "source_ids" in rows[0] else None,
        )
        if "ref_chosen_logps" in rows[0]:
            references = [row[f"ref_{side}_logps"] for side in sides for row in rows]
            batch["ref_logprobs"] = torch.tensor(references)
        return {**batch, "labels": torch.zeros(len(rows), dtype=torch.long)}

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Sums]:
        reference_N = self.reference_logprobs(model, batch)
        scores, *others = self.scorer.at_temperatures(model, batch, self.other_temperatures)
        counts = list(batch["counts"])
        pairs = len(counts) // 2
        chosen, rejected = self.of_answers(scores.logprobs, counts).chunk(2)
        chosen_lengths, rejected_lengths = torch.tensor(counts, device=chosen.device).chunk(2)
        if reference_N is None:
            reference_N = torch.zeros(2 * pairs, device=chosen.device)
        ref_chosen, ref_rejected = reference_N.to(chosen.dtype).chunk(2)
        compared = self.compare(
            Pairs(
                chosen,
                rejected,
                chosen_lengths,
                rejected_lengths,
                ref_chosen,
                ref_rejected,
                self.weights(scores.logprobs, [other.logprobs for other in others], counts),
            )
        )
        first = sum(counts[:pairs])
        metrics = {
            "rewards/chosen": compared.chosen_rewards,
            "rewards/rejected": compared.rejected_rewards,
            "rewards/margins": compared.chosen_rewards - compared.rejected_rewards,
            "rewards/accuracies": (compared.chosen_rewards > compared.rejected_rewards).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            **compared.more,
        }
        return compared.losses.sum(), {
            **{name: (values.detach().sum(), pairs) for name, values in metrics.items()},
            "entropy": (scores.entropies.sum(), len(scores.entropies)),
            "mean_token_accuracy": (scores.hits[:first].sum(), first),
        }

    # ---- what a method is ----

    @abstractmethod
    def compare(self, pairs: Pairs) -> Comparison:
        """The losses of pairs, and what is logged of them."""

    def reference_logprobs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """Of each answer under the reference [2B], chosen ones first; None without a reference."""
        return None

    def of_answers(self, values_M: Tensor, counts: list[int]) -> Tensor:
        """Log-probabilities of tokens [M] → of answers [2B]."""
        return sequence_sums(values_M, counts)

    @property
    def other_temperatures(self) -> tuple[float, ...]:
        """Temperatures besides 1 at which `weights` needs log-probabilities."""
        return ()

    def weights(self, logprobs_M: Tensor, others: Sequence[Tensor], counts: list[int]) -> Tensor | None:
        """Of the pairs' losses [B], from log-probabilities of tokens; None where all weigh the same."""
        return None


def tokenize_pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, config: PreferenceConfig, is_encoder_decoder: bool = False
) -> Dataset:
    """Rows of preferences → a dataset of token ids and labels of either answer, with the prompt before it.

    Of an encoder-decoder the answers stand by themselves, and the prompt is `source_ids`. Rows that
    `max_length` cuts are counted in a warning, and so are rows of which that leaves an answer empty, which
    are left out.

    Raises:
        DataError: the columns or a row are wrong (named by its number), or no row is left.
    """
    dataset = convert(load_rows(rows), ["preference"], num_proc=config.dataset_num_proc)
    row = _tokenize_sources if is_encoder_decoder else partial(_tokenize_pair, **decoder_options(config))
    what = "have an answer without a token to compare"
    return map_rows(dataset, row, config, what, tokenizer=tokenizer, max_length=config.max_length)


def _tokenize_pair(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    mode: Any,
    append_eos: bool,
) -> dict[str, Any]:
    whole = to_preference(row, tokenizer, append_eos=append_eos)
    pair = truncate_pair(whole, max_length, mode)
    sides = {"chosen": (whole.chosen, pair.chosen), "rejected": (whole.rejected, pair.rejected)}
    answers = {side: answer_of(kept) for side, (_, kept) in sides.items()}
    return {
        **{f"{side}_ids": ids for side, (ids, _) in answers.items()},
        **{f"{side}_labels": labels for side, (_, labels) in answers.items()},
        "cut": any(len(kept) < len(before) for before, kept in sides.values()),
        "learned": all(set(labels) - {IGNORED} for _, labels in answers.values()),
    }


def decoder_options(config: PreferenceConfig) -> dict[str, Any]:
    """Settings by which answers are tokenised behind their prompts, and not by themselves."""
    return {"mode": config.truncation_mode, "append_eos": config.append_eos}


def answer_of(episode: Episode) -> tuple[list[int], list[int]]:
    """Its token ids, and their labels: the tokens themselves where they are the answer, else -100."""
    labels = supervised_labels(episode)
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing comes before the first token
    return episode.token_ids, labels


def _tokenize_sources(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Any]:
    chosen, rejected = to_source_targets(row, tokenizer)
    whole = {"source": chosen.input_ids, "chosen": chosen.labels, "rejected": rejected.labels}
    cut = {name: ids[:max_length] for name, ids in whole.items()}
    return {
        **{f"{name}_ids": ids for name, ids in cut.items()},
        "chosen_labels": cut["chosen"],
        "rejected_labels": cut["rejected"],
        "cut": cut != whole,
        "learned": True,
    }
