"""Our side of the PPO-step benchmark: `etude.PPOTrainer` in a worker process."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import Answer, serve
from benchmarks.ppo_batch import same_value_head, timed_step
from benchmarks.scripted import describe
from etude import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def start(checkpoint: str) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def make_trainer(settings: dict[str, Any]) -> PPOTrainer:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(checkpoint)
        return PPOTrainer(PPOConfig(**settings), same_value_head(model), tokenizer=tokenizer)

    trunk = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return describe(trunk, "etude"), partial(timed_step, make_trainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    serve(partial(start, parser.parse_args().checkpoint))


if __name__ == "__main__":
    main()
