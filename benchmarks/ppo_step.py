"""A whole `PPOTrainer.step` on tool episodes of uneven length: TRL 0.7.4's time over ours.

Observe (policy, values, reference), credit, four epochs of mini-batches of four. The same weights, episodes,
masks and scores on both sides, one thread, sides that take turns. That both do the same work is shown
beforehand, where order plays no part: one mini-batch, two epochs, equal losses.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.common import Json, Options, Row, Side, SideError
from benchmarks.peers import install
from benchmarks.ppo_batch import Shape, count_tokens, write_batch
from benchmarks.rollout import make_checkpoint

PEER = "trl074"
BATCHES = common.RESULTS / "scripts"
VOCABULARY = 8192

# Four episodes per optimizer step, in the ways to cut them up; each side is given its fastest.
STEP = {"ppo_epochs": 4}
CUTS = [{"mini_batch_size": size, "gradient_accumulation_steps": 4 // size} for size in (4, 2, 1)]


def ppo_step(options: Options) -> Json:
    """Seconds of a step, theirs over ours."""
    shape = Shape(episodes=4, length=(60, 200)) if options.quick else Shape()
    checkpoint = make_checkpoint()
    with ExitStack() as stack:
        sides = [
            stack.enter_context(
                Side("etude", Path(sys.executable), "benchmarks.etude_ppo_step", str(checkpoint))
            ),
            stack.enter_context(
                Side(PEER, install.python(PEER), f"benchmarks.peers.{PEER}_step", str(checkpoint))
            ),
        ]
        common.check_comparable(*sides)
        same_work = check_losses(sides)
        cuts = {side.name: fastest_cut(side) for side in sides}
        batches = [batch(shape, seed) for seed in range(options.runs)]
        answers: dict[str, list[Json]] = {side.name: [] for side in sides}
        for path in batches:
            for side in sides:
                settings = {**STEP, **cuts[side.name]}
                asked = [{"batch": str(path), "settings": settings}]
                answers[side.name] += common.alternate([side], asked)[side.name]
    seconds = {name: median(answer["seconds"] for answer in runs) for name, runs in answers.items()}
    print("  " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()) + " a step")
    return {
        "ratio": seconds[PEER] / seconds["etude"],
        "seconds": seconds,
        "settings": {**asdict(shape), **STEP, "cuts": cuts},
        "tokens": count_tokens(batches[0]),
        "same_work": same_work,
        "sides": {side.name: side.about for side in sides},
        "runs": answers,
    }


def check_losses(sides: list[Side]) -> dict[str, Json]:
    """Two epochs over a batch that is one mini-batch: losses, KL and how far the policy moved are equal."""
    few = batch(replace(Shape(), episodes=4, length=(60, 200)), seed=1000)
    settings = {"ppo_epochs": 2, "mini_batch_size": 4}
    answers = {side.name: side.ask({"batch": str(few), "settings": settings}) for side in sides}
    first, *others = (numbers(answer) for answer in answers.values())
    for other in others:
        if not all(math.isclose(first[name], other[name], rel_tol=0.01, abs_tol=1e-5) for name in first):
            raise SideError(f"the sides don't do the same work: {answers}")
    return answers


def numbers(answer: Mapping[str, Any]) -> dict[str, float]:
    return {name: answer[name] for name in ("loss", "value_loss", "moved", "kl")}


def fastest_cut(side: Side) -> Json:
    """Not counted, and a warm-up: a small batch cut up in each way."""
    path = batch(replace(Shape(), episodes=8), seed=1001)
    asked = [{"batch": str(path), "settings": {"ppo_epochs": 1, **cut}} for cut in (CUTS[0], *CUTS)]
    _, *seconds = (side.ask(request)["seconds"] for request in asked)
    return min(zip(seconds, CUTS, strict=True), key=lambda pair: pair[0])[1]


def batch(shape: Shape, seed: int) -> Path:
    return write_batch(BATCHES / f"ppo-{shape.episodes}-{seed}.json", shape, VOCABULARY, seed)


ROWS: dict[str, Row] = {"ppo_step_trl074": ppo_step}

if __name__ == "__main__":
    common.main("python -m benchmarks.ppo_step", __doc__, ROWS)
