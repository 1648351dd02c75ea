"""Our side of the SFT benchmarks, in a worker process: the time of steps, or the memory of some.

A process measures memory once: what it took, it doesn't give back.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import psutil
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import sft_work, wide
from benchmarks.common import Answer, serve
from benchmarks.scripted import describe
from etude import SFTConfig, SFTTrainer


class WholeLogits(SFTTrainer):
    """With the logits of all tokens at once, as a plain loss has them."""

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        logits_MV = self.scorer.logits(model, batch)
        return cross_entropy(logits_MV, batch["targets"], reduction="sum"), {}


def answer(trainer: type[SFTTrainer], model: str, before: int, request: dict[str, Any]) -> dict[str, Any]:
    return {
        **sft_work.train(trainer, SFTConfig, model, request),
        "bytes": wide.peak_bytes() - before,
    }


def start(model: str, whole: bool) -> tuple[dict[str, Any], Answer]:
    before = psutil.Process().memory_info().rss
    trainer = WholeLogits if whole else SFTTrainer
    return describe(sft_work.make_model(model), "etude"), partial(answer, trainer, model, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sft_work.MODELS)
    parser.add_argument("--whole", action="store_true", help="all logits of a pass at once")
    arguments = parser.parse_args()
    serve(partial(start, arguments.model, arguments.whole))


if __name__ == "__main__":
    main()
