"""Practice against more imitation, for encoder–decoders: a small T5 and a small BART, two tasks.

    translation   numbers, days and prices in five languages, in words and figures
    summaries     descriptions of Debian packages, long to short

What is imitated, at first and by the side that goes on so, is careless in a way: of most translations the
last two digits are the wrong way round, and most summaries are a text's first words. From one undertrained
supervised start per task, family and seed, one side practises by PPO (chrF of a translation; mean of ROUGE-1
and ROUGE-L of a summary) and the other imitates on. Both have the same time, a thread and a core each, at the
same time as each other; from seed to seed they swap cores. The learning rate falls linearly with the clock to
zero. Measured on 300 held-out tasks, sampled and greedy.

`ratio …` is PPO's mean over the imitator's. Intervals are Student's, over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks import common
from benchmarks.common import Json
from benchmarks.robustness import shown

FOLDER = common.RESULTS / "encoder_decoders"
TASKS = ("translation", "summaries")
FAMILIES = ("t5", "bart")
SIDES = ("ppo", "sft")


def ask(requests: Sequence[Json]) -> list[Json]:
    """Answer requests at once, each in a process and on a core of its own."""
    running = []
    for core, request in enumerate(requests):
        answer = FOLDER / f"answer-{core}.json"
        answer.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.encoder_decoder_worker",
            json.dumps(request),
            str(answer),
        ]
        log = (FOLDER / f"log-{core}.txt").open("w")
        environment = {**os.environ, **common.WORKER_ENVIRONMENT}
        process = subprocess.Popen(command, cwd=common.ROOT, env=environment, stdout=log, stderr=log)
        running.append((process, answer, log))
    answers = []
    for process, answer, log in running:
        code = process.wait()
        log.close()
        if code:
            raise SystemExit(f"a side ended with {code}:\n{Path(log.name).read_text()[-3000:]}")
        answers.append(json.loads(answer.read_text("utf-8")))
    return answers


def request(side: str, task: str, family: str, seed: int, core: int, **more: object) -> Json:
    directory = FOLDER / f"{task}-{family}-{seed}"
    return {
        "side": side,
        "task": task,
        "family": family,
        "seed": seed,
        "core": core % (os.cpu_count() or 1),
        "directory": str(directory),
        "run": str(directory / "run"),
        **more,
    }


def play_seed(seed: int, seconds: float, clock: str) -> Json:
    """Starts, two at a time; then both sides of each."""
    pairs = [(task, family) for task in TASKS for family in FAMILIES]
    for first in range(0, len(pairs), 2):
        ask([request("start", *pair, seed, core) for core, pair in enumerate(pairs[first : first + 2])])
    results = {}
    for task, family in pairs:
        both = [
            request(side, task, family, seed, number + seed, seconds=seconds, clock=clock)
            for number, side in enumerate(SIDES)
        ]
        results[f"{task} {family}"] = dict(zip(SIDES, ask(both), strict=True))
        told = results[f"{task} {family}"]
        print(
            f"  seed {seed} {task} {family}: sampled {told['ppo']['before']['sampled']:.3f} → ppo "
            f"{told['ppo']['after']['sampled']:.3f}, sft {told['sft']['after']['sampled']:.3f}; greedy "
            f"{told['ppo']['before']['greedy']:.3f} → ppo {told['ppo']['after']['greedy']:.3f}, sft "
            f"{told['sft']['after']['greedy']:.3f}",
            flush=True,
        )
    return results


def summarise(results: Sequence[Json]) -> Json:
    """Print the table; its figures."""
    print(f"\n{'':<34}{'start':>16}{'then PPO':>18}{'more SFT':>18}{'difference':>20}")
    summary: Json = {}
    for pair in results[0]:
        for name in results[0][pair]["ppo"]["after"]:
            before = [each[pair]["ppo"]["before"][name] for each in results]
            after = {side: [each[pair][side]["after"][name] for each in results] for side in SIDES}
            ahead = [a - b for a, b in zip(after["ppo"], after["sft"], strict=True)]
            columns = [shown(before), shown(after["ppo"]), shown(after["sft"]), shown(ahead, signed=True)]
            print(f"{pair + ' ' + name:<34}" + "".join(f"{column:>18}" for column in columns))
            ratio = mean(after["ppo"]) / mean(after["sft"]) if mean(after["sft"]) else float("nan")
            summary[f"{pair} {name}"] = {"ratio": ratio, "before": before, **after}
        steps = {side: mean(each[pair][side]["steps"] for each in results) for side in SIDES}
        print(f"  {steps['ppo']:.0f} iterations of PPO, {steps['sft']:.0f} steps of SFT")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_decoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of either side in a run (60)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine")
    parser.add_argument("--json", type=Path, default=FOLDER / "encoder_decoders.json", metavar="FILE")
    given = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    print(f"{given.seeds} seeds, {given.seconds:g} s for either side ({given.clock} clock)")
    results = [play_seed(seed, given.seconds, given.clock) for seed in range(given.seeds)]
    summary = summarise(results)
    settings = {"seconds": given.seconds, "clock": given.clock, "environment": common.WORKER_ENVIRONMENT}
    record = {"settings": settings, "host": common.host(), "summary": summary, "seeds": results}
    common.write_json(given.json, record)
    print(f"\nwrote {given.json}")
    for name, each in summary.items():
        print(f"ratio {name.replace(' ', '_')} {each['ratio']:.2f}")


if __name__ == "__main__":
    main()
