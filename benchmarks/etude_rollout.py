"""Our side of the rollout benchmark: `etude.TextEnvironment` in a worker process."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import Answer, serve
from benchmarks.scripted import describe, timed_rollout
from etude import TextEnvironment


def start(checkpoint: str) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return describe(model, "etude"), partial(timed_rollout, TextEnvironment, model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    serve(partial(start, parser.parse_args().checkpoint))


if __name__ == "__main__":
    main()
