"""What TRL 1.16's SFTTrainer computes, as numbers that `test_trl1_sft.py` compares ours with:
`trl1_sft.json` beside this.

Runs in the peer's environment, by `make test-peers`; with the name of a file to write, by itself.

TRL's own trainer is built around a tiny model, prepares rows of each format its own way, and trains for one
optimizer step on all of them.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from written import write

WORDS = "abcdefghijklmnop"
ADDED = ("<end>", "<user>", "<model>")
CHAT_TEMPLATE = (
    "{% if tools %}<user>{% for tool in tools %} {{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<model> {% generation %}{{ message.content }} <end>{% endgeneration %}"
    "{% else %}<user> {{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<model> {% endif %}"
)
MODEL = {
    "vocab_size": len(WORDS) + len(ADDED),
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": len(WORDS),
    "pad_token_id": len(WORDS),
}
TOOL = {
    "type": "function",
    "function": {"name": "k", "description": "", "parameters": {"type": "object", "properties": {}}},
}

# name → rows, and settings of TRL's SFTConfig.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "text, cut": ("text", {"max_length": 5}),
    "text, accumulated": ("text", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "text, padding-free": ("text", {"padding_free": True, "max_length": None}),
    "text, bfd": ("text", {"packing": True, "max_length": 12}),
    "text, bfd, cut": ("text", {"packing": True, "max_length": 5}),
    "text, bfd_split": ("text", {"packing": True, "packing_strategy": "bfd_split", "max_length": 4}),
    "text, dft": ("text", {"loss_type": "dft"}),
    "text, smoothed": ("text", {"label_smoothing_factor": 0.1}),
    "text, in chunks": ("text", {}),
    "completion": ("completion", {}),
    "completion, cut": ("completion", {"max_length": 7}),
    "completion, whole": ("completion", {"completion_only_loss": False}),
    "completion, bfd": ("completion", {"packing": True, "max_length": 16}),
    "completion, accumulated": (
        "completion",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ),
    "completion, dft, in chunks": ("completion", {"loss_type": "dft"}),
    "completion, smoothed": ("completion", {"label_smoothing_factor": 0.25}),
    "chat, whole": ("chat", {}),
    "chat, assistant": ("chat", {"assistant_only_loss": True}),
    "chat, assistant, bfd": ("chat", {"assistant_only_loss": True, "packing": True, "max_length": 24}),
    "chat completion": ("chat completion", {}),
    "chat completion, assistant": ("chat completion", {"assistant_only_loss": True}),
}


def make_rows() -> dict[str, list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))

    def turns(*counts: int) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": words(count)} for i, count in enumerate(counts)]

    return {
        "text": [{"text": words(count)} for count in (3, 9, 2, 6, 1)],
        "completion": [
            {"prompt": words(asked) + " ", "completion": words(answered)}
            for asked, answered in ((2, 5), (6, 1), (4, 3), (1, 7))
        ],
        "chat": [
            {"messages": turns(*counts), "tools": json.dumps([TOOL]) if i == 1 else None}
            for i, counts in enumerate([(2, 3), (1, 4, 3, 2), (5, 1)])
        ],
        "chat completion": [
            {"prompt": turns(*asked), "completion": [{"role": "assistant", "content": words(answered)}]}
            for asked, answered in (((3,), 2), ((2, 2, 1), 4))
        ],
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=ADDED[0], pad_token=ADDED[0], chat_template=CHAT_TEMPLATE
    )


def case(name: str, folder: str) -> dict[str, Any]:
    kind, settings = CASES[name]
    in_chunks = "in chunks" in name
    trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE = 5 if in_chunks else 4096
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = 6 if in_chunks else 32768
    rows = Dataset.from_list(make_rows()[kind])
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 16,  # more than there are rows, or pieces of them
        "eval_packing": False,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.01,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        SFTConfig(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
    )
    evaluated = trainer.evaluate()
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    metrics = ("mean_token_accuracy", "entropy")
    return {
        "rows": kind,
        "settings": settings,
        "bins": [unpacked(row) for row in trainer.train_dataset],
        **{name: first[name] for name in ("loss", "grad_norm", *metrics)},
        "evaluated": {name: evaluated[f"eval_{name}"] for name in ("loss", *metrics)},
    }


def unpacked(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The rows of the data, or pieces of them, that share a row of the batch."""
    tokens, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    lengths = row.get("seq_lengths", [len(tokens)])
    pairs = zip(tokens.split(lengths), labels.split(lengths), strict=True)
    return [{"input_ids": ids.tolist(), "labels": learned.tolist()} for ids, learned in pairs]


def values(folder: str) -> dict[str, Any]:
    """Everything there is to compare."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model.save_pretrained(folder)
    return {
        "model": {
            "config": MODEL,
            "weights": {name: weight.tolist() for name, weight in model.state_dict().items()},
        },
        "tokenizer": make_tokenizer().backend_tokenizer.to_str(),
        "special": {"eos_token": ADDED[0], "pad_token": ADDED[0], "chat_template": CHAT_TEMPLATE},
        "rows": make_rows(),
        "cases": {name: case(name, folder) for name in CASES},
    }


if __name__ == "__main__":
    write(values)
