"""The settings of supervised fine-tuning. Beside the trainer, so that reading them loads no model code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from etude.errors import ConfigError


@dataclass
class SFTConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what supervised fine-tuning adds.

    Attributes:
        learning_rate: of AdamW; 2e-5 unless given.
        logging_steps: 10 unless given.
        logging_nan_inf_filter: False unless given: a loss of NaN is shown as it is.
        remove_unused_columns: False unless given: the dataset holds what the loss needs and nothing else.
        label_names: the dataset's own column of labels.
        max_length: longer rows lose their end, and it is said how many did. None keeps everything.
        completion_only_loss: learn the completion only. None: True where rows have one (prompt and
            completion, segments).
        assistant_only_loss: in messages, learn what the assistant says only.
        append_eos: end texts, completions and segments with the end-of-sequence token.
        pad_to_multiple_of: rounds the length of each batch up.
        dataset_num_proc: processes that tokenise.
        model_init_kwargs: for `from_pretrained`, where the model is given by name.
    """

    learning_rate: float = 2e-5
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    max_length: int | None = 1024
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = True
    append_eos: bool = True
    pad_to_multiple_of: int | None = None
    dataset_num_proc: int | None = None
    model_init_kwargs: dict[str, Any] | None = None

    # `TrainingArguments` reads these from JSON where they come as strings.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; expected None or at least 2: one to read, one to learn"
            )
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns
