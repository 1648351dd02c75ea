"""Multi-turn rollouts with tools, episodes per second: ours against TRL 0.7.4's `TextEnvironment`.

The same model, the same episodes to the token, one thread, sides that take turns. What is forced and why:
`scripted.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks import common
from benchmarks.common import Json, Options, Row, Side
from benchmarks.peers import install
from benchmarks.scripted import Shape, load_script, save_script, write_script

PEER = "trl074"
CHECKPOINT = common.RESULTS / "models" / "llama-10m"
SCRIPTS = common.RESULTS / "scripts"

LONG_TURNS = Shape(tasks=32)
FEW_SHOT = Shape(tasks=4, samples=8, turns=3, prompt_words=(8, 24), turn_words=(1, 6), examples=10)
TOOL_MS = 200  # of the row that hides them


def against_trl(options: Options, *, shape: Shape, tool_ms: int = 0, runs: int | None = None) -> Json:
    """Episodes per second, ours over theirs.

    Args:
        runs: at most this many, where the peer mostly sleeps.
    """
    if options.quick:
        shape = replace(shape, tasks=max(1, shape.tasks // 8))
    scripts = make_scripts(shape)
    with ExitStack() as stack:
        sides = [stack.enter_context(side) for side in (our_side(), trl_side())]
        common.check_comparable(*sides)
        warm_up(sides, shape)
        requests = [
            request(next(scripts), shape, tool_ms) for _ in range(min(options.runs, runs or options.runs))
        ]
        answers = common.alternate(sides, requests)
    rates = common.rates(answers, "episodes")
    return {
        "ratio": rates["etude"] / rates[PEER],
        "episodes_per_second": rates,
        "settings": {**asdict(shape), "tool_ms": tool_ms},
        "tokens_per_run": count_tokens(requests[0]),
        "sides": {side.name: side.about for side in sides},
        "runs": answers,
    }


def hide_tools(options: Options) -> Json:
    """Our wall time with tools that answer at once, over that with slow ones: 1 where these cost nothing."""
    shape = Shape(tasks=8 if options.quick else 64)
    scripts = make_scripts(shape)
    with our_side() as ours:
        warm_up([ours], shape)
        runs: dict[int, list[Json]] = {0: [], TOOL_MS: []}
        for _ in range(options.runs):
            for tool_ms, answers in runs.items():
                played = request(next(scripts), shape, tool_ms, slots=shape.episodes)
                answers += common.alternate([ours], [played])[ours.name]
    rates = common.rates({f"tools of {ms} ms": answers for ms, answers in runs.items()}, "episodes")
    at_once, slow = rates.values()
    return {
        "ratio": slow / at_once,
        "episodes_per_second": rates,
        "settings": {**asdict(shape), "slots": shape.episodes},
        "sides": {ours.name: ours.about},
        "runs": runs,
    }


def our_side() -> Side:
    make_checkpoint()
    return Side("etude", Path(sys.executable), "benchmarks.etude_rollout", str(CHECKPOINT))


def trl_side() -> Side:
    return Side(PEER, install.python(PEER), f"benchmarks.peers.{PEER}_rollout", str(CHECKPOINT))


@cache
def make_checkpoint() -> Path:
    """Model and tokenizer, written by the oldest peer so that all sides can read them."""
    install.ensure(PEER)
    command = [str(install.python(PEER)), "-m", f"benchmarks.peers.{PEER}_model", str(CHECKPOINT)]
    subprocess.run(command, cwd=common.ROOT, env={**os.environ, **common.WORKER_ENVIRONMENT}, check=True)
    return CHECKPOINT


def make_scripts(shape: Shape) -> Iterator[Path]:
    """One script after the other: the same lengths, other words."""
    make_checkpoint()
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    seed = 0
    while True:
        path = SCRIPTS / f"rollout-{seed}.json"
        save_script(path, write_script(tokenizer, shape, seed))
        yield path
        seed += 1


def warm_up(sides: Sequence[Side], shape: Shape) -> None:
    """Not counted: a few episodes of the same kind, for what is only built when it is first needed."""
    few = replace(shape, tasks=max(1, 8 // shape.samples))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    path = SCRIPTS / "warm-up.json"
    save_script(path, write_script(tokenizer, few, seed=-1))
    for side in sides:
        side.ask(request(path, few, tool_ms=0))


def request(script: Path, shape: Shape, tool_ms: int, **options: Any) -> Json:
    return {"script": str(script), "tool_ms": tool_ms, "turns": shape.turns, "options": options}


def count_tokens(asked: Json) -> Json:
    episodes = load_script(Path(asked["script"])).episodes
    return {
        "total": sum(len(episode.token_ids) for episode in episodes),
        "by_model": sum(sum(episode.mask) for episode in episodes),
    }


ROWS: dict[str, Row] = {
    "rollout_trl074_0ms": partial(against_trl, shape=LONG_TURNS),
    "rollout_trl074_200ms": partial(against_trl, shape=LONG_TURNS, tool_ms=200),
    "rollout_trl074_1s": partial(against_trl, shape=LONG_TURNS, tool_ms=1000, runs=2),
    "rollout_trl074_fewshot": partial(against_trl, shape=FEW_SHOT),
    "hide_tools": hide_tools,
}

if __name__ == "__main__":
    common.main("python -m benchmarks.rollout", __doc__, ROWS)
