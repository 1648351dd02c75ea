"""Learning from single answers, each judged good or bad: KTO (Ethayarajh et al. 2024, arXiv:2402.01306).

An answer counts by how far its log-ratio is from a reference point, the policy's KL from its reference. That
is estimated from mismatched pairs: each row's prompt with the answer to another prompt, the same one
throughout, so that a row is worth the same in whatever batch it comes. The estimate is of all rows of an
optimizer step, over processes and accumulation steps; in evaluation, of the whole dataset.

Pairs of answers become two rows. Not covered: images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from etude.data.collate import IGNORED, pack
from etude.data.conversions import convert
from etude.data.files import Rows, load_rows
from etude.data.preferences import to_rating
from etude.data.source_target import to_source_target
from etude.data.truncation import truncate
from etude.errors import DataError
from etude.math.likelihood import sequence_sums
from etude.math.unpaired import kto_baseline, kto_loss
from etude.trainers.kto_config import KTOConfig
from etude.trainers.means import Sums
from etude.trainers.preference import answer_of, decoder_options
from etude.trainers.reference import evaluation_mode
from etude.trainers.reference_trainer import ReferenceTrainer
from etude.trainers.tokenizing import map_rows

logger = logging.getLogger(__name__)


class KTOTrainer(ReferenceTrainer):
    """Train a language model, decoder or encoder-decoder, on answers that are good or bad.

    The arguments are those of `ReferenceTrainer`.
    """

    method = "kto"
    config_class = KTOConfig
    on_the_card = ("beta", "loss_type", "desirable_weight", "undesirable_weight")

    args: KTOConfig
    baseline: Tensor | None = None  # of the dataset that is evaluated

    @property
    def measures_kl(self) -> bool:
        return self.args.loss_type == "kto"

    # ---- data ----

    def tokenize(self, rows: Rows) -> Dataset:
        dataset = tokenize_ratings(rows, self.tokenizer, self.args, self.scorer.is_encoder_decoder)
        return with_mismatches(dataset, self.args.max_length) if self.measures_kl else dataset

    def tokenize_for_training(self, rows: Rows) -> Dataset:
        dataset = self.tokenize(rows)
        _check_balance(sum(dataset["desirable"]), len(dataset), self.args)
        return dataset

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The answers; as "mismatched", those of other prompts; "labels" counts rows."""
        batch = _packed(rows, "")
        batch["desirable"] = torch.tensor([bool(row["desirable"]) for row in rows])
        if self.measures_kl:
            batch["mismatched"] = _packed(rows, "other_")
        for name, place in (("ref_logps", batch), ("ref_KL_logps", batch.get("mismatched"))):
            if name in rows[0] and place is not None:
                place["ref_logprobs"] = torch.tensor([row[name] for row in rows])
        return {**batch, "labels": torch.zeros(len(rows), dtype=torch.long)}

    # ---- the loss ----

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Sums]:
        args, desirable = self.args, batch["desirable"]
        baseline = batch.get("baseline", self.baseline)
        if self.measures_kl and baseline is None:
            baseline = self._baseline(model, [(batch, True)])
        reference = self._reference_logprobs(model, batch)
        scores = self.scorer(model, batch)
        logprobs = sequence_sums(scores.logprobs, list(batch["counts"]))
        log_ratio = logprobs - reference.to(logprobs.dtype)
        losses = kto_loss(
            log_ratio,
            desirable,
            0.0 if baseline is None else baseline,
            args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )
        metrics: dict[str, tuple[Any, Any]] = {"entropy": (scores.entropies.sum(), len(scores.entropies))}
        if baseline is not None:
            metrics["kl"] = (baseline * len(losses), len(losses))
        for name, kept in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"rewards/{name}"] = (args.beta * log_ratio.detach()[kept].sum(), kept.sum())
            metrics[f"logps/{name}"] = (logprobs.detach()[kept].sum(), kept.sum())
        return losses.sum(), metrics

    def _reference_logprobs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if "ref_logprobs" in batch:
            found: Tensor = batch["ref_logprobs"]
            return found
        assert self.reference is not None
        return sequence_sums(self.reference.logprobs(model, batch), list(batch["counts"]))

    @torch.no_grad()
    def _baseline(self, model: nn.Module, batches: Iterable[tuple[Mapping[str, Any], bool]]) -> Tensor:
        """The reference point, of those batches on all processes that count."""
        total, count = torch.zeros((), device=self.args.device), 0
        with self.accelerator.autocast(), evaluation_mode(model):
            for batch, counts in batches:
                pairs: Any = self._prepare_inputs(batch["mismatched"])
                logprobs = sequence_sums(self.scorer(model, pairs).logprobs, list(pairs["counts"]))
                log_ratio = logprobs - self._reference_logprobs(model, pairs)
                total = total + log_ratio.sum() * counts
                count += len(logprobs) * counts
        sums = torch.stack([total, torch.full_like(total, count)])
        total, everywhere = self.accelerator.reduce(sums, "sum")
        return kto_baseline(total / everywhere.clamp_min(1))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """As the base's; each batch of the step has the reference point of all of them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.measures_kl:
            baseline = self._baseline(self.model_wrapped, ((batch, True) for batch in batches))
            batches = [{**batch, "baseline": baseline} for batch in batches]
        return batches, items

    def evaluation_loop(self, dataloader: Any, *args: Any, **options: Any) -> EvalLoopOutput:
        """As the base's, with the reference point of the whole dataset."""
        if self.measures_kl:
            self.baseline = self._baseline(self.model_wrapped, map(self.own_batch, dataloader))
        try:
            return super().evaluation_loop(dataloader, *args, **options)
        finally:
            self.baseline = None

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        if not {"rewards/chosen", "rewards/rejected"} <= means.keys():
            return means
        return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}

    def score_rows(self, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
        policy: Any = self.model
        batch: Any = self._prepare_inputs(self.collate(rows))
        columns = {"ref_logps": self._reference_logprobs(policy, batch).tolist()}
        if self.measures_kl:
            columns["ref_KL_logps"] = self._reference_logprobs(policy, batch["mismatched"]).tolist()
        return columns


def _packed(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    return pack(
        [row[f"{prefix}ids"] for row in rows],
        [row[f"{prefix}labels"] for row in rows],
        share=True,
        sources=[row["source_ids"] for row in rows] if "source_ids" in rows[0] else None,
    )


def tokenize_ratings(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, config: KTOConfig, is_encoder_decoder: bool = False
) -> Dataset:
    """Rows of judged answers, or of pairs → a dataset of token ids, labels and `desirable`.

    Of an encoder-decoder the answer stands by itself, and the prompt is `source_ids`. Rows that `max_length`
    cuts are counted in a warning, and so are rows whose answer that leaves empty, which are left out.

    Raises:
        DataError: the columns or a row are wrong (named by its number), or no row is left.
    """
    dataset = convert(load_rows(rows), ["unpaired-preference"], num_proc=config.dataset_num_proc)
    row = _tokenize_source if is_encoder_decoder else partial(_tokenize_rating, **decoder_options(config))
    what = "have an answer without a token to judge"
    return map_rows(dataset, row, config, what, tokenizer=tokenizer, max_length=config.max_length)


def _tokenize_rating(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    mode: Any,
    append_eos: bool,
) -> dict[str, Any]:
    rating = to_rating(row, tokenizer, append_eos=append_eos)
    episode = truncate(rating.episode, max_length, mode)
    ids, labels = answer_of(episode)
    return {
        "ids": ids,
        "labels": labels,
        "desirable": rating.desirable,
        "cut": len(episode) < len(rating.episode),
        "learned": bool(set(labels) - {IGNORED}),
    }


def _tokenize_source(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Any]:
    whole = to_source_target(row, tokenizer)
    source, answer = whole.input_ids[:max_length], whole.labels[:max_length]
    if row["label"] not in (True, False):
        raise DataError(f"label is {row['label']!r}; expected true (wanted) or false")
    return {
        "ids": answer,
        "labels": answer,
        "source_ids": source,
        "desirable": bool(row["label"]),
        "cut": len(source) < len(whole.input_ids) or len(answer) < len(whole.labels),
        "learned": True,
    }


# ---- mismatched pairs ----


def with_mismatches(dataset: Dataset, max_length: int | None) -> Dataset:
    """The dataset with `other_ids` and `other_labels`: each row's prompt with the answer to another prompt.

    The answer is that of the nearest row before it whose prompt is another one; the first rows take the last.

    Raises:
        DataError: all prompts are the same.
    """
    has_source = "source_ids" in dataset.column_names
    keys = [
        tuple(row["source_ids"]) if has_source else tuple(row["ids"][: _start(row["labels"])])
        for row in dataset
    ]
    others = dataset.select(mismatches(keys)).select_columns(["ids", "labels"])
    others = others.rename_columns({"ids": "other_ids", "labels": "other_labels"})
    joined = concatenate_datasets([dataset, others], axis=1)
    if has_source:
        return joined
    return joined.map(_behind_own_prompt, fn_kwargs={"max_length": max_length}, desc="Mismatching")


def mismatches(prompts: Sequence[Any]) -> list[int]:
    """For each prompt, the place of the nearest one before it, cyclically, that differs from it.

    Raises:
        DataError: none does.
    """
    last = next((i for i in reversed(range(len(prompts))) if prompts[i] != prompts[0]), None)
    if last is None:
        raise DataError(
            "all rows have the same prompt, so no answer belongs to another one, from which the KL is "
            "estimated; give rows of several prompts, or loss_type=apo_zero_unpaired, which needs no estimate"
        )
    found: list[int] = []
    for i, prompt in enumerate(prompts):
        before = prompts[i - 1] != prompt
        found.append((i - 1) % len(prompts) if before else found[-1] if found else last)
    return found


def _behind_own_prompt(row: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    prompt, start = row["ids"][: _start(row["labels"])], _start(row["other_labels"])
    answer, labels = row["other_ids"][start:], row["other_labels"][start:]
    return {
        "other_ids": [*prompt, *answer][:max_length],
        "other_labels": [*[IGNORED] * len(prompt), *labels][:max_length],
    }


def _start(labels: Sequence[int]) -> int:
    """Where the answer begins."""
    return next(i for i, label in enumerate(labels) if label != IGNORED)


def _check_balance(good: int, rows: int, config: KTOConfig) -> None:
    """Good answers should weigh as much as bad ones, or up to a third more (the paper's section 4.2)."""
    heavy, light = good * config.desirable_weight, (rows - good) * config.undesirable_weight
    if not 0.999 * light <= heavy <= 1.334 * light:
        logger.warning(
            "%d answers are good and %d bad, and weigh %g and %g in all; the paper advises that good ones "
            "weigh 1 to 4/3 times as much as bad ones (desirable_weight, undesirable_weight)",
            good,
            rows - good,
            heavy,
            light,
        )
