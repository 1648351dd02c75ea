"""Supervised fine-tuning on demonstrations.

Rows of any format in `data.formats` are tokenised once, before training, into token ids and labels; the loss
is the cross entropy of the tokens to imitate, divided by their number in the whole update: over processes and
accumulation steps alike. Nothing is padded (`models.scorer`), and logits are computed for tokens to imitate
only, in chunks.

Not covered: images, data that streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from etude.data.collate import IGNORED, pack, supervised_labels
from etude.data.conversions import convert
from etude.data.files import Rows, load_rows
from etude.data.formats import DEMONSTRATIONS, to_episodes
from etude.data.packing import best_fit
from etude.data.source_target import to_source_target
from etude.errors import ConfigError, DataError
from etude.models.scorer import TokenScorer
from etude.trainers.data_trainer import DataTrainer, Model
from etude.trainers.means import Sums
from etude.trainers.sft_config import SFTConfig
from etude.trainers.tokenizing import map_rows


class SFTTrainer(DataTrainer):
    """Fine-tune a language model, decoder or encoder-decoder, on demonstrations.

    The arguments are those of `DataTrainer`, and:

    Args:
        formatting_func: makes of each row a text, or a row in one of the formats.
    """

    method = "sft"
    config_class = SFTConfig
    on_the_card = ("completion_only_loss", "assistant_only_loss", "packing", "loss_type")

    def __init__(
        self,
        model: str | Model,
        args: SFTConfig | None = None,
        *,
        formatting_func: Callable[[dict[str, Any]], str | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.formatting_func = formatting_func
        super().__init__(model, args, **options)
        self.neftune_noise_alpha = None  # the scorer adds the noise: it knows where sequences begin

    def prepare(self, model: Model) -> None:
        self.scorer = TokenScorer(model)
        if self.scorer.is_encoder_decoder and (self.args.packing or self.args.neftune_noise_alpha):
            raise ConfigError("packing and neftune_noise_alpha are for decoders; leave them out here")

    def tokenize(self, rows: Rows) -> Dataset:
        return self._tokenize(rows, self.args.max_length)

    def tokenize_for_training(self, rows: Rows) -> Dataset | PackedRows:
        if not self.args.packing:
            return self.tokenize(rows)
        cut_up = self.args.packing_strategy == "bfd_split"
        return PackedRows(
            self._tokenize(rows, None if cut_up else self.args.max_length), self.args.max_length
        )

    def _tokenize(self, rows: Rows, max_length: int | None) -> Dataset:
        return tokenize_rows(
            rows,
            self.tokenizer,
            self.args,
            formatting_func=self.formatting_func,
            max_length=max_length,
            seq2seq=self.scorer.is_encoder_decoder,
        )

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        flat = [row for item in rows for row in (item if isinstance(item, list) else [item])]
        sources = [row["source_ids"] for row in flat] if self.scorer.is_encoder_decoder else None
        batch = pack([row["input_ids"] for row in flat], [row["labels"] for row in flat], sources=sources)
        return {**batch, "labels": batch["targets"]}

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Sums]:
        noise = self.args.neftune_noise_alpha if model.training else None
        if smoothing := self.args.label_smoothing_factor:
            logits_MV = self.scorer.logits(model, batch, noise or 0.0)
            return smoothed_loss(logits_MV, batch["targets"], smoothing), {}
        weigh = torch.exp if self.args.loss_type == "dft" else torch.ones_like
        scores = self.scorer.total(model, batch, weigh, noise or 0.0)
        assert scores.total is not None
        count = len(scores.logprobs)
        return -scores.total, {
            "mean_token_accuracy": (scores.hits.sum(), count),
            "entropy": (scores.entropies.sum(), count),
        }

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return self.scorer.padded_logits(model, batch)


def smoothed_loss(logits_MV: Tensor, targets_M: Tensor, label_smoothing: float) -> Tensor:
    """The sum of cross entropies with a share of the probability spread over the vocabulary.

    Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision", section 7.
    """
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    return cross_entropy(logits_MV, targets_M, reduction="sum", label_smoothing=label_smoothing)


class PackedRows(torch.utils.data.Dataset[list[dict[str, list[int]]]]):
    """A tokenised dataset in bins of at most `capacity` tokens; rows that are longer are cut in pieces.

    An item is the list of rows of a bin.
    """

    def __init__(self, dataset: Dataset, capacity: int) -> None:
        self.dataset = dataset
        self.capacity = capacity
        lengths = [len(ids) for ids in dataset["input_ids"]]
        pieces = [(row, start) for row, n in enumerate(lengths) for start in range(0, n, capacity)]
        sizes = [min(capacity, lengths[row] - start) for row, start in pieces]
        self.bins = [[pieces[i] for i in members] for members in best_fit(sizes, capacity)]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        rows = self.dataset[[row for row, _ in self.bins[index]]]
        return [
            {name: rows[name][i][start : start + self.capacity] for name in ("input_ids", "labels")}
            for i, (_, start) in enumerate(self.bins[index])
        ]


_TOKENIZING = ("completion_only_loss", "assistant_only_loss", "append_eos")


def tokenize_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    *,
    formatting_func: Callable[[dict[str, Any]], str | Mapping[str, Any]] | None = None,
    max_length: int | None = None,
    seq2seq: bool = False,
) -> Dataset:
    """Rows of any accepted format → a dataset of `input_ids` and `labels`.

    For an encoder-decoder (`seq2seq`) prompts become `source_ids`, and each side is cut by itself. Rows that
    `max_length` cuts are counted in a warning, and so are rows without anything to learn, which are left out.

    Raises:
        DataError: the columns or a row are wrong (named by its number), or no row has anything to learn.
    """
    dataset = load_rows(rows)
    if formatting_func is None:
        formats = ("prompt-completion",) if seq2seq else DEMONSTRATIONS
        dataset = convert(dataset, formats, num_proc=config.dataset_num_proc)
    options: dict[str, Any] = {
        "formatting_func": formatting_func,
        "tokenizer": tokenizer,
        "max_length": max_length,
    }
    if seq2seq:
        if config.completion_only_loss is False:
            raise ConfigError("an encoder-decoder imitates completions only; leave completion_only_loss out")
        return map_rows(dataset, _tokenize_pair, config, **options)
    options |= {name: getattr(config, name) for name in _TOKENIZING}
    return map_rows(dataset, _tokenize_row, config, **options)


def _tokenize_row(
    row: Mapping[str, Any],
    formatting_func: Callable[..., str | Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    **options: Any,
) -> list[dict[str, Any]]:
    tokenized = []
    for episode in to_episodes(_formatted(row, formatting_func), tokenizer, **options):
        labels = supervised_labels(episode)[:max_length]
        labels[:1] = [IGNORED] * len(labels[:1])  # nothing comes before the first token
        tokenized.append(
            {
                "input_ids": episode.token_ids[:max_length],
                "labels": labels,
                "cut": max_length is not None and len(episode) > max_length,
                "learned": any(label != IGNORED for label in labels),
            }
        )
    return tokenized


def _tokenize_pair(
    row: Mapping[str, Any],
    formatting_func: Callable[..., str | Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> dict[str, Any]:
    source, target = to_source_target(_formatted(row, formatting_func), tokenizer)
    return {
        "source_ids": source[:max_length],
        "input_ids": target[:max_length],
        "labels": target[:max_length],
        "cut": max_length is not None and max(len(source), len(target)) > max_length,
        "learned": bool(target),
    }


def _formatted(
    row: Mapping[str, Any], formatting_func: Callable[..., str | Mapping[str, Any]] | None
) -> Mapping[str, Any]:
    if formatting_func is None:
        return row
    formatted = formatting_func(dict(row))
    if not isinstance(formatted, str | Mapping):
        raise DataError(
            f"formatting_func returned a {type(formatted).__name__}; expected a text, or a row (a dict) in "
            "one of the formats"
        )
    return {"text": formatted} if isinstance(formatted, str) else formatted
