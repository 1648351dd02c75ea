"""The settings that all training on data has in common. Beside the trainers, so that reading is cheap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from etude.errors import ConfigError
from etude.runtime.processes import several_on_cpu
from etude.trainers.data_checks import check_trackers

_LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "seed": 0,
}


@dataclass
class DataConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what training on rows of data adds.

    Attributes:
        learning_rate: of AdamW; 2e-5 unless given.
        logging_steps: 10 unless given.
        logging_nan_inf_filter: False unless given: a loss of NaN is shown as it is.
        remove_unused_columns: False unless given: the dataset holds what the loss needs and nothing else.
        label_names: the batch's own entry with one label for each item that the loss is a mean over.
        overwrite_output_dir: start anew in a directory that holds an earlier run; its curves and checkpoints
            go.
        max_length: longer rows are cut, and it is said how many were. None keeps everything. A model with a
            table of positions (GPT-2, OPT, BART) lowers it to what the table holds.
        chat_template_path: a Jinja file, or the directory or hub id of a tokenizer, whose template renders
            messages; for base models, which have none. It is saved with the tokenizer.
        append_eos: end texts and completions with the end-of-sequence token.
        disable_dropout: train without dropout.
        early_stopping_patience: evaluations without a better metric_for_best_model (the loss, unless given)
            after which training ends; the best checkpoint is loaded then. Each better evaluation leaves one,
            whatever save_strategy says besides; save_total_limit drops the others.
        dataset_num_proc: processes that tokenise.
        model_init_kwargs: for `from_pretrained`, where the model is given by name.
    """

    overwrite_output_dir: bool = False
    learning_rate: float = 2e-5
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    max_length: int | None = 1024
    chat_template_path: str | None = None
    append_eos: bool = True
    disable_dropout: bool = False
    early_stopping_patience: int | None = None
    dataset_num_proc: int | None = None
    model_init_kwargs: dict[str, Any] | None = None

    # `TrainingArguments` reads these from JSON where they come as strings.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; expected None or at least 2: one to read, one to learn"
            )
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            raise ConfigError("fp16 does nothing without a GPU; set bf16, or leave it out")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1 or self.eval_strategy == "no":
                raise ConfigError(
                    "early_stopping_patience counts evaluations: give at least 1, and set eval_strategy to "
                    "steps or epoch"
                )
            if self.save_strategy == "no":
                raise ConfigError(
                    "early_stopping_patience goes back to the best checkpoint, and save_strategy no keeps "
                    "none; leave save_strategy out, or set it to best"
                )
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            # transformers would have checkpoints at the steps of evaluations only (see `BestSoFar`).
            self.load_best_model_at_end = False
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if several_on_cpu():
            self.use_cpu = True
        super().__post_init__()
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        check_trackers(self.report_to or ())
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns
