"""TRL 0.7.4's side of the learning comparison: its `TextEnvironment` and `PPOTrainer` in the usual loop."""

from __future__ import annotations

import json
import random
from itertools import count
from pathlib import Path
from typing import Any

import torch
from examples.calculator import exact_answer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TextEnvironment

from benchmarks.learning_watch import Watch, serve_runs
from etude.tools.calculator import calculator  # the tool itself: no library in it


def train(request: dict[str, Any]) -> dict[str, Any]:
    start = Path(request["start"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(start / "model/tokenizer.json"),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",  # its step can't take response masks with padding on the left
        clean_up_tokenization_spaces=False,
    )
    trunk = AutoModelForCausalLM.from_pretrained(start / "model")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(trunk)
    config, watch = PPOConfig(seed=request["seed"], **request["settings"]), Watch(trunk, request)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    trainer = PPOTrainer(
        config, model, tokenizer=tokenizer, optimizer=optimizer, lr_scheduler=watch.schedule(optimizer)
    )
    environment = TextEnvironment(
        model,
        tokenizer,
        {"calculator": calculator},
        scored,
        prompt="",
        max_turns=2,
        max_tool_reponse=24,
        generation_kwargs={
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": 24,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    rows = [json.loads(line) for line in (start / "data/train.jsonl").read_text().splitlines()]
    random.Random(request["seed"]).shuffle(rows)
    watch.start()
    for first in count(0, config.batch_size):
        batch = [rows[i % len(rows)] for i in range(first, first + config.batch_size)]
        queries, responses, masks, rewards, _ = environment.run(
            [row["prompt"] for row in batch], answer=[row["answer"] for row in batch]
        )
        trainer.step(queries, responses, rewards, masks)
        if watch.iteration(torch.stack(rewards).mean().item()):
            break
    return watch.save(Path(request["folder"]))


def scored(segments: list[str], answer: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(score) for score in exact_answer(segments, answer)]


if __name__ == "__main__":
    serve_runs({"train": train}, "trl", "accelerate")
