"""What the SFT benchmarks train on, and how a side is timed: the same for all sides but for the trainer.

Rows of text whose words are a token each, so that every library makes the same ids of them, each in its own
way from the text on. One optimizer step learns from all rows, and the next one from the same again: whatever
a side packs, batches or sorts, a step is the same work.

Runs under every side's interpreter: torch and `transformers` only.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from random import Random
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
    set_seed,
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
    max_position_embeddings=4096,
    initializer_range=0.1,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=1,
)
MODELS = {"narrow": NARROW_VOCABULARY, "wide": wide.WIDE_VOCABULARY}
LONGEST = 1024


def uneven_lengths(count: int) -> list[int]:
    """Lognormal, 268 tokens in the mean, the end-of-sequence token among them."""
    lengths = Random(0)
    return [max(16, min(LONGEST, round(lengths.lognormvariate(5.3, 0.8)))) for _ in range(count)]


def write_rows(path: Path, lengths: list[int], vocabulary: int, *, prompts: bool) -> Path:
    """Rows of so many tokens, end-of-sequence included; with `prompts`, half of each row is one."""
    words = Random(0)
    rows = []
    for length in lengths:
        text = [f"w{words.randrange(2, vocabulary)}" for _ in range(length - 1)]
        split = length // 2
        if prompts:
            rows.append({"prompt": " ".join(text[:split]) + " ", "completion": " ".join(text[split:])})
        else:
            rows.append({"text": " ".join(text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    ids = {"<end>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


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


def make_model(name: str, attention: str | None = None) -> LlamaForCausalLM:
    """A random model of `MODELS`, the same each time."""
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(MODELS[name], attn_implementation=attention)
    return model


def settings_of(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Of `transformers.TrainingArguments`: one optimizer step per epoch, in float32, nothing beside it."""
    return {
        "output_dir": folder,
        "num_train_epochs": request["steps"],
        "gradient_accumulation_steps": request["rows"],  # at least as many as there are batches
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
        "max_length": LONGEST,
        **request["settings"],
    }


def train(
    trainer_class: Any, config_class: Any, model: LlamaForCausalLM, request: dict[str, Any]
) -> dict[str, Any]:
    """Train `model` for "steps" steps on the rows in the file "path".

    Returns:
        Time and tokens of the steps after the first one, and loss and gradient norm of the first.
    """
    rows = json.loads(Path(request["path"]).read_text())
    clock = Clock()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=config_class(**settings_of({**request, "rows": len(rows)}, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(model.config.vocab_size),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert clock.steps == request["steps"], f"{clock.steps} steps instead of {request['steps']}"
    first = trainer.state.log_history[0]
    words = [" ".join(row.values()).split() for row in rows]
    return {
        **clock.watch.times,
        "tokens": sum(len(row) + 1 for row in words) * (clock.steps - 1),
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
    }
