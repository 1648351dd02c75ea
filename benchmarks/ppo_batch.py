"""A PPO step on tool episodes that are written beforehand: the part of the benchmark that both sides share.

`PPOTrainer.step` has the same signature in TRL 0.7.4 and here, so one function serves both, with either
library's classes. Every request builds a trainer anew, from the same weights and the same value head, so that
a step never continues another one; only `step` is timed.

Runs under every side's interpreter: torch and `transformers` only, as old as the oldest peer's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any

import torch

from benchmarks.common import Stopwatch

FIRST_TOKEN = 2  # below are the tokenizer's special ones

# λ = 1: TRL runs GAE through the tools' tokens, which then changes nothing, and the losses can be compared.
SETTINGS = {"learning_rate": 1e-5, "gamma": 1.0, "lam": 1.0, "cliprange": 0.2, "vf_coef": 0.1, "seed": 0}


@dataclass(frozen=True)
class Shape:
    """How much there is to do, in tokens; ranges with both ends.

    Attributes:
        episodes: in the batch.
        length: of the shortest and the longest episode, prompt included; between them, the quantiles of a
            lognormal.
        prompt, turn, answer: of the prompt, each turn of the model, each answer of a tool.
    """

    episodes: int = 16
    length: tuple[int, int] = (60, 700)
    prompt: tuple[int, int] = (20, 50)
    turn: tuple[int, int] = (24, 96)
    answer: tuple[int, int] = (8, 24)


def write_batch(path: Path, shape: Shape, vocabulary: int, seed: int) -> Path:
    """Write a batch for `step`: its lengths depend on the shape alone, tokens and scores on `seed`."""
    lengths, words = Random(0), Random(seed)

    def tokens(count: int) -> list[int]:
        return [words.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)]

    def one_episode(total: int) -> dict[str, Any]:
        prompt = lengths.randint(*shape.prompt)
        mask: list[int] = []
        while len(mask) < total - prompt:
            mask += [1] * lengths.randint(*shape.turn) + [0] * lengths.randint(*shape.answer)
        mask = mask[: total - prompt]
        return {"query": tokens(prompt), "response": tokens(len(mask)), "mask": mask, "score": words.random()}

    totals = lognormal_quantiles(shape.episodes, *shape.length)
    lengths.shuffle(totals)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shape": asdict(shape), "rows": [one_episode(total) for total in totals]}))
    return path


def lognormal_quantiles(count: int, shortest: int, longest: int) -> list[int]:
    """`count` lengths at even steps of probability, the first and last as given; ascending."""
    normal = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    centre, spread = math.log(shortest * longest) / 2, math.log(longest / shortest) / 2
    return [round(math.exp(centre + spread * z / normal[-1])) for z in normal]


def count_tokens(path: Path) -> dict[str, int]:
    rows = json.loads(path.read_text())["rows"]
    return {
        "total": sum(len(row["query"]) + len(row["response"]) for row in rows),
        "sampled": sum(sum(row["mask"]) for row in rows),
        "longest": max(len(row["query"]) + len(row["response"]) for row in rows),
    }


def timed_step(make_trainer: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> dict[str, Any]:
    """One `step`, timed.

    Args:
        make_trainer: a fresh `PPOTrainer` for settings of `PPOConfig`.
        request: {"batch": path, "settings": of `PPOConfig` beside `SETTINGS`}.
    """
    rows = json.loads(Path(request["batch"]).read_text())["rows"]
    trainer = make_trainer({**SETTINGS, "batch_size": len(rows), **request["settings"]})
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    with Stopwatch() as watch:
        stats = trainer.step(columns["query"], columns["response"], columns["score"], columns["mask"])
    names = {
        "loss": "ppo/loss/total",
        "value_loss": "ppo/loss/value",
        "moved": "ppo/policy/approxkl",
        "kl": "objective/kl",
    }
    return {**watch.times, "steps": 1, **{name: float(stats[key]) for name, key in names.items()}}


def same_value_head(model: Any) -> Any:
    """Give a value-head model the weights of a head that all sides have; `model` itself."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.v_head.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
