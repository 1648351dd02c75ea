"""Supervised fine-tuning: `transformers.Trainer` on demonstrations.

Rows of any format in `data.formats` are tokenised once, before training, into token ids and labels; the loss
is the cross entropy of the tokens to imitate, divided by their number in the whole update: over processes and
accumulation steps alike.

Not covered: packing, encoder-decoder models, images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from etude.data.collate import IGNORED, pad_supervised, supervised_labels
from etude.data.files import Rows, load_rows
from etude.data.formats import detect_format, to_episode
from etude.errors import ConfigError, DataError, ModelError
from etude.runtime.model_card import write_model_card
from etude.trainers.sft_config import SFTConfig

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ON_THE_CARD = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "max_length", "completion_only_loss", "assistant_only_loss", "seed",
)  # fmt: skip


class SFTTrainer(Trainer):
    """Fine-tune a causal language model on demonstrations.

    Args:
        model: a model, or the name or path of one.
        args: settings; default `SFTConfig(output_dir="<model>-sft")`.
        train_dataset: anything `load_rows` takes: a file, a folder, a hub id, a list, a `Dataset`.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the tokenizer; default: the model's own.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics: as in `transformers.Trainer`.
        peft_config: train an adapter of this kind, not the model itself.

    Raises:
        DataError: a dataset can't be read, has the wrong columns, or leaves nothing to learn.
        ModelError: the model doesn't fit the tokenizer or isn't a causal language model.
        ConfigError: `args` are another trainer's.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        name = model if isinstance(model, str) else str(model.config.name_or_path or "")
        if args is None:
            args = SFTConfig(output_dir=f"{Path(name).name or 'model'}-sft")
        if not isinstance(args, SFTConfig):
            raise ConfigError(f"args are a {type(args).__name__}; expected an SFTConfig")
        if processing_class is None and not name:
            raise ConfigError(
                "the model doesn't say where it came from; pass its tokenizer as processing_class"
            )
        tokenizer = AutoTokenizer.from_pretrained(name) if processing_class is None else processing_class
        set_seed(args.seed)  # before an adapter draws its weights
        model = _prepare_model(model, tokenizer, args, peft_config)
        self.base_model_name = name

        evaluated: Any = eval_dataset
        if isinstance(eval_dataset, Mapping):
            evaluated = {key: tokenize_rows(rows, tokenizer, args) for key, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            evaluated = tokenize_rows(eval_dataset, tokenizer, args)
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # any: what is padded is masked
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(
                _collate,
                pad_id=next(i for i in pad_ids if i is not None),
                pad_to_multiple_of=args.pad_to_multiple_of,
            ),
            train_dataset=None if train_dataset is None else tokenize_rows(train_dataset, tokenizer, args),
            eval_dataset=evaluated,
            processing_class=tokenizer,
            compute_loss_func=partial(supervised_loss, label_smoothing=args.label_smoothing_factor),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, the tokenizer and a model card."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_card(output_dir or str(self.args.output_dir))

    def create_model_card(  # type: ignore[override]  # without the arguments that the card has no place for
        self,
        *,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tags: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        license: str | None = None,
        language: str | None = None,
    ) -> None:
        """Write the model card of `args.output_dir`, as `push_to_hub` does, which passes its arguments on."""
        if self.is_world_process_zero():
            self._write_card(
                str(self.args.output_dir),
                model_name,
                finetuned_from,
                tags=_as_list(tags),
                datasets=_as_list(dataset_tags),
                license=license,
                language=language,
            )

    def _write_card(
        self, directory: str, model_name: str | None = None, base_model: str | None = None, **more: Any
    ) -> None:
        write_model_card(
            directory,
            model_name=model_name or Path(self.args.hub_model_id or str(self.args.output_dir)).resolve().name,
            trainer="SFTTrainer",
            method="sft",
            base_model=base_model or self.base_model_name,
            config_summary={name: getattr(self.args, name) for name in _ON_THE_CARD},
            library_name="peft" if hasattr(self.model, "peft_config") else "transformers",
            **more,
        )


def supervised_loss(
    outputs: Mapping[str, Any],
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of the labels, each predicted at the position before it, in float32 or better.

    Models' own losses differ (some old ones don't shift, or take the mean of each small batch alone).

    Args:
        outputs: of the model; `logits` is [B, T, V].
        labels: [B, T], -100 where there is nothing to learn.
        num_items_in_batch: divides the sum; None divides by the number of labels here.
        label_smoothing: share of the probability that is spread over the vocabulary.
    """
    next_BT = labels[:, 1:]
    learned_BT = next_BT != IGNORED
    logits_NV = outputs["logits"][:, :-1][learned_BT]
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    total = cross_entropy(logits_NV, next_BT[learned_BT], reduction="sum", label_smoothing=label_smoothing)
    return total / (learned_BT.sum() if num_items_in_batch is None else num_items_in_batch)


def tokenize_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, config: SFTConfig) -> Dataset:
    """Rows of any accepted format → a dataset of `input_ids` and `labels`.

    Rows that `max_length` cuts are counted in a warning, and so are rows without anything to learn, which are
    left out.

    Raises:
        DataError: the columns or a row are wrong (named by its number), or no row has anything to learn.
    """
    dataset = load_rows(rows)
    detect_format(dataset.column_names)
    with config.main_process_first(desc="tokenising"):  # the others read what it cached
        tokenized = dataset.map(
            _tokenize_row,
            with_indices=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "max_length": config.max_length,
                "completion_only_loss": config.completion_only_loss,
                "assistant_only_loss": config.assistant_only_loss,
                "append_eos": config.append_eos,
            },
            remove_columns=dataset.column_names,
            num_proc=config.dataset_num_proc,
            desc="Tokenizing",
        )
    total, cut = len(tokenized), sum(tokenized["cut"])
    if cut:
        logger.warning(
            "%d of %d rows are longer than max_length=%s and lose their end", cut, total, config.max_length
        )
    useful = [index for index, learned in enumerate(tokenized["learned"]) if learned]
    if not useful:
        raise DataError(
            f"none of the {total} rows has a token to learn: max_length={config.max_length} cuts {cut} of "
            "them, and what is left has no completion and no assistant message (completion_only_loss="
            f"{config.completion_only_loss}, assistant_only_loss={config.assistant_only_loss})"
        )
    if len(useful) < total:
        logger.warning("%d of %d rows have nothing to learn and are left out", total - len(useful), total)
        tokenized = tokenized.select(useful)
    return tokenized.remove_columns(["cut", "learned"])


def _tokenize_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    **options: Any,
) -> dict[str, Any]:
    try:
        episode = to_episode(row, tokenizer, **options)
    except DataError as error:
        raise type(error)(f"row {index}: {error}") from error
    labels = supervised_labels(episode)[:max_length]
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing comes before the first token
    return {
        "input_ids": episode.token_ids[:max_length],
        "labels": labels,
        "cut": max_length is not None and len(episode) > max_length,
        "learned": any(label != IGNORED for label in labels),
    }


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _collate(rows: Sequence[Mapping[str, list[int]]], **padding: Any) -> dict[str, Tensor]:
    return pad_supervised([row["input_ids"] for row in rows], [row["labels"] for row in rows], **padding)


def _prepare_model(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **(config.model_init_kwargs or {}))
    elif config.model_init_kwargs:
        raise ConfigError("model_init_kwargs are for a model given by name; this one is already loaded")
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model; SFTTrainer trains causal language models. "
            "Use transformers.Seq2SeqTrainer"
        )
    if getattr(model.config, "output_router_logits", False):
        raise ModelError(
            "the load-balancing loss of mixture-of-experts models is not computed here; set "
            "model.config.output_router_logits = False to train without it"
        )
    known: Any = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {known}; call "
            "model.resize_token_embeddings(len(tokenizer)) after adding tokens"
        )
    if peft_config is None:
        return model
    if hasattr(model, "peft_config"):
        raise ConfigError("the model already has an adapter; leave peft_config out to go on training it")
    return get_peft_model(model, peft_config)
