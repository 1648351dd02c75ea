"""GRPO against TRL 1.16 (transformers backend): a whole step with tools, and the memory of its update.

The same model, the same episodes to the token, one thread, sides that take turns. Loss and gradient norm of
the two sides are compared: it is the same update.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import common, rollout
from benchmarks.common import Json, Options, Row, Side, SideError, SideFactory
from benchmarks.peers import install
from benchmarks.scripted import Shape
from benchmarks.wide import ALLOCATOR

PEER = "trl1"

# Two groups. A turn ends with one token: TRL ends turns at tokens, which the model names, and not at strings.
EPISODES = Shape(tasks=2, samples=8, call_end="$", answer_end="#")
# TRL is fastest in passes of so few (16: 1.4 times as long); ours takes as long in any.
EPISODES_PER_PASS = 4


def grpo_step(options: Options, *, tool_ms: int = 0) -> Json:
    """Seconds of a step: 16 episodes of 4 turns played, scored and learnt from; theirs over ours."""
    shape = Shape(**{**asdict(EPISODES), "samples": 4}) if options.quick else EPISODES
    checkpoint = str(rollout.make_checkpoint())
    scripts = rollout.make_scripts(shape)
    request = {
        "turns": shape.turns,
        "samples": shape.samples,
        "pass": EPISODES_PER_PASS,
        "beta": 0.0,
        "tool_ms": tool_ms,
        "call_end": shape.call_end,
        "answer_end": shape.answer_end,
    }
    with ExitStack() as stack:
        sides = [stack.enter_context(side({}, checkpoint)()) for side in (our_side, their_side)]
        common.check_comparable(*sides)
        requests = [{**request, "script": str(next(scripts))} for _ in range(options.runs + 1)]
        warm_up, *requests = requests
        common.alternate(sides, [warm_up])
        runs = common.alternate(sides, requests)
    check_same_update(runs)
    seconds = {name: median(answer["seconds"] for answer in answers) for name, answers in runs.items()}
    return {
        "ratio": seconds[PEER] / seconds["etude"],
        "seconds": seconds,
        "settings": {**asdict(shape), **request},
        "tokens_per_run": rollout.count_tokens(requests[0]),
        "sides": {side.name: side.about for side in sides},
        "runs": runs,
    }


def update_memory(options: Options) -> Json:
    """Bytes of two updates on 16 episodes of 256 tokens, half of them sampled; theirs over ours.

    Two, because the optimizer's state exists from the end of the first one on.
    """
    request: Json = {
        "episodes": 4 if options.quick else 16,
        "tokens": 256,
        "pass": EPISODES_PER_PASS,
        "updates": 2,
        "checkpointing": False,
    }
    result = common.peaks({"etude": our_side(ALLOCATOR), PEER: their_side(ALLOCATOR)}, request, options.runs)
    check_same_update(result["runs"])
    peaks = result["peak_bytes"]
    return {"ratio": peaks[PEER] / peaks["etude"], **result}


def check_same_update(runs: Mapping[str, Sequence[Json]]) -> None:
    """The same gradient from the same episodes: of each run, the loss where it says it, and the norm."""
    for answers in zip(*runs.values(), strict=True):
        for name in ("loss", "grad_norm"):
            ours, theirs = (answer.get(name, 0.0) for answer in answers)
            if not math.isclose(ours, theirs, rel_tol=1e-3):
                raise SideError(f"{name} is {ours} on our side and {theirs} on theirs: not the same update")


def our_side(environment: Mapping[str, str], *arguments: str) -> SideFactory:
    return partial(
        Side, "etude", Path(sys.executable), "benchmarks.etude_grpo", *arguments, environment=environment
    )


def their_side(environment: Mapping[str, str], *arguments: str) -> SideFactory:
    install.ensure(PEER)
    silenced = {**environment, "TRL_EXPERIMENTAL_SILENCE": "1"}
    worker = f"benchmarks.peers.{PEER}_grpo"
    return partial(Side, PEER, install.python(PEER), worker, *arguments, environment=silenced)


ROWS: dict[str, Row] = {
    "grpo_step_trl1": grpo_step,
    "grpo_step_trl1_200ms": partial(grpo_step, tool_ms=200),
    "update_memory_trl1": update_memory,
}
