"""How a side of the SFT benchmarks trains and is timed: the same for all sides but for the trainer.

Rows are text whose words are a token each, so that every library makes the same ids of them, each in its own
way from the text on. Runs under every side's interpreter.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks import wide
from benchmarks.common import Stopwatch

# 10.1 M parameters.
NARROW_VOCABULARY = LlamaConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.1,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=1,
)
MODELS = {"narrow": NARROW_VOCABULARY, "wide": wide.WIDE_VOCABULARY}


class Clock(TrainerCallback):
    """Runs from the end of the first step to the end of the last one: batches are made in between, too."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.steps == 0:
            self.watch.__enter__()
        self.steps += 1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.watch.__exit__()


def make_model(name: str) -> LlamaForCausalLM:
    """A random model of `MODELS`, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(MODELS[name])


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    ids = {"<end>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def train(
    make_trainer: Callable[..., Any], make_config: Callable[..., Any], model: str, request: dict[str, Any]
) -> dict[str, Any]:
    """Train a fresh `model` for "steps" steps, each on all rows in the file "path", with "settings".

    Returns:
        Time and tokens of the steps after the first one, and loss and gradient norm of the first.
    """
    rows = json.loads(Path(request["path"]).read_text())
    tokenizer = make_tokenizer(MODELS[model].vocab_size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            **{
                "output_dir": folder,
                "num_train_epochs": request["steps"],
                "gradient_accumulation_steps": len(rows),  # all that there are: a step is an epoch
                "train_sampling_strategy": "sequential",
                "lr_scheduler_type": "constant",
                "learning_rate": 1e-5,
                "optim": "adamw_torch",
                "bf16": False,
                "use_cpu": True,
                "gradient_checkpointing": False,
                "dataloader_pin_memory": False,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "log_level": "error",
                **request["settings"],
            }
        )
        trainer = make_trainer(
            make_model(model),
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert clock.steps == request["steps"], f"{clock.steps} steps instead of {request['steps']}"
    first = trainer.state.log_history[0]
    tokens = sum(len("".join(row.values()).split()) + 1 for row in rows)
    return {
        **clock.watch.times,
        "tokens": tokens * (clock.steps - 1),
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
    }
