"""TRL 0.7.4's side of the PPO-step benchmark: its `PPOTrainer` in a worker process."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from benchmarks.common import Answer, serve
from benchmarks.ppo_batch import same_value_head, timed_step
from benchmarks.scripted import describe


def start(checkpoint: str) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.padding_side = "right"  # its step can't take response masks with padding on the left

    def make_trainer(settings: dict[str, Any]) -> PPOTrainer:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(checkpoint)
        return PPOTrainer(PPOConfig(**settings), same_value_head(model), tokenizer=tokenizer)

    trunk = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return describe(trunk, "trl", "accelerate"), partial(timed_step, make_trainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    serve(partial(start, parser.parse_args().checkpoint))


if __name__ == "__main__":
    main()
