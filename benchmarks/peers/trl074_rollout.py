"""TRL 0.7.4's side of the rollout benchmark: its `TextEnvironment` in a worker process."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, TextEnvironment

from benchmarks.common import Answer, serve
from benchmarks.scripted import describe, timed_rollout


def start(checkpoint: str) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trunk = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(trunk).eval()  # what its environment takes
    return describe(trunk, "trl", "accelerate"), partial(timed_rollout, TextEnvironment, model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    serve(partial(start, parser.parse_args().checkpoint))


if __name__ == "__main__":
    main()
