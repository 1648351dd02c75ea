"""Our side of the rollout benchmark: `etude.TextEnvironment` in a worker process."""

from __future__ import annotations

import argparse
from functools import partial

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import serve
from benchmarks.scripted import describe, timed_rollout
from etude import TextEnvironment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    checkpoint = parser.parse_args().checkpoint
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    serve(describe(model, "etude"), partial(timed_rollout, TextEnvironment, model, tokenizer))


if __name__ == "__main__":
    main()
