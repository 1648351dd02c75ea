"""TRL 1.16's side of the SFT benchmarks, in a worker process: the time of steps, or the memory of some."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import psutil
from trl import SFTConfig, SFTTrainer

from benchmarks import sft_work, wide
from benchmarks.common import Answer, serve
from benchmarks.scripted import describe


def answer(model: str, before: int, request: dict[str, Any]) -> dict[str, Any]:
    return {
        **sft_work.train(SFTTrainer, SFTConfig, model, request),
        "bytes": wide.peak_bytes() - before,
    }


def start(model: str) -> tuple[dict[str, Any], Answer]:
    before = psutil.Process().memory_info().rss
    return describe(sft_work.make_model(model), "trl", "accelerate"), partial(answer, model, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sft_work.MODELS)
    serve(partial(start, parser.parse_args().model))


if __name__ == "__main__":
    main()
