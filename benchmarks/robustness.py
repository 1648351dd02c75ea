"""Practice against more imitation, at equal compute: how robust, how adaptable, how efficient.

Both sides begin with the same supervised start per seed, the calculator example's. Then one practises by PPO
with the calculator, the other goes on imitating: fresh demonstrations, made as the first ones were. Both have
the same time, one thread and one core each, at the same time as each other; from seed to seed they swap
cores. The learning rate falls linearly with the clock to zero.

    success       on 500 held-out tasks, clean and under each noise (`etude.evaluate`), sampled and greedy
    adaptability  success on a second task, with another tool, after a few more seconds of imitating
                  demonstrations of it; and what is left on the first
    efficiency    success against seconds of training: curves, and their mean

`ratio robustness_…` is PPO's mean over the imitator's. Intervals are Student's, over seeds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks import common
from benchmarks.common import Json, Side
from benchmarks.learning import PAIRS, Lanes, final, make_starts, over, start_of
from benchmarks.learning_curves import write_curves

FOLDER = common.RESULTS / "robustness"
SIDES = ("ppo", "sft")
START = "wordings"  # what the supervised starts are called
MARKS = 6  # times at which success is measured, the start not counted

PRACTICE = {**PAIRS["calculator_ppo"].settings, **PAIRS["calculator_ppo"].own["etude"]}
IMITATION = {"learning_rate": 1e-3}
ADAPTATION = {"learning_rate": 5e-4}

# Student's t, two-sided 95 %, by degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        seconds: of practice, and of more imitation.
        adaptation: seconds of imitating the second task.
        clock: "wall", or "cpu" for each process's own time.
        tasks: held-out tasks per measurement.
    """

    seeds: int
    seconds: float
    adaptation: float
    clock: str
    tasks: int


def ask(side: str, request: Json) -> Json:
    """One request to a worker of its own."""
    paths = {"PYTHONPATH": f"{common.ROOT / 'src'}{os.pathsep}{common.ROOT}"}
    module = "benchmarks.robustness_worker"
    with Side(side, Path(sys.executable), module, environment=paths) as worker:
        return {**worker.ask(request), "about": worker.about}


def play_seed(seed: int, options: Options, lanes: Lanes) -> Json:
    """One seed: for each side its success by time, under noise, and after the second task."""
    start, swap = start_of(START, seed), bool(seed % 2)
    shared = {
        "task": "calculator",
        "start": str(start),
        "seed": seed,
        "clock": options.clock,
        "tasks": options.tasks,
    }

    def folder(side: str) -> str:
        return str(FOLDER / str(seed) / side)

    training = {
        "ppo": {"kind": "practise", "algorithm": "ppo", "settings": PRACTICE},
        "sft": {"kind": "imitate", "settings": IMITATION},
    }
    marks = [options.seconds * number / MARKS for number in range(1, MARKS + 1)]
    runs = lanes.both(
        swap,
        {side: {**shared, **training[side], "marks": marks, "folder": folder(side)} for side in SIDES},
    )
    by_time = lanes.both(
        False,
        {
            side: {**shared, "kind": "evaluate", "snapshots": {"0": None, **run["snapshots"]}}
            for side, run in runs.items()
        },
    )
    weights = {side: list(run["snapshots"].values())[-1] for side, run in runs.items()}
    noisy = lanes.both(
        False,
        {side: {**shared, "kind": "noise", "weights": weights[side]} for side in SIDES},
    )
    adapted = lanes.both(
        swap,
        {
            side: {
                **shared,
                "kind": "adapt",
                "weights": weights[side],
                "settings": ADAPTATION,
                "marks": [options.adaptation],
                "folder": folder(f"{side}-adapted"),
            }
            for side in SIDES
        },
    )
    return {
        side: {
            **runs[side],
            "marks": by_time[side]["marks"],
            "noise": noisy[side],
            "adapted": adapted[side],
        }
        for side in SIDES
    }


# What it came to.


def figures(result: Json) -> dict[str, float]:
    """One side's numbers of one seed, by the names of the ratios."""
    by_time = [measured["reward"] for measured in result["marks"].values()]
    sampled = {name: each["success"]["value"] for name, each in result["noise"]["sampled"].items()}
    return {
        **sampled,
        "greedy": result["noise"]["greedy"]["clean"]["success"]["value"],
        "adaptation": result["adapted"]["second"]["clean"]["success"]["value"],
        "after_adaptation": result["adapted"]["first"]["clean"]["success"]["value"],
        "efficiency": mean(by_time),
    }


def summarise(results: Sequence[Json]) -> Json:
    """Print the table; its figures."""
    by_side = {side: [figures(result[side]) for result in results] for side in SIDES}
    print(f"\n{'success':<18}{'SFT, then PPO':>22}{'SFT only':>22}{'difference':>24}{'of clean':>14}")
    summary = {}
    for name in by_side["ppo"][0]:
        ours, theirs = ([each[name] for each in by_side[side]] for side in SIDES)
        clean = [mean(each["clean"] for each in by_side[side]) for side in SIDES]
        ahead = [a - b for a, b in zip(ours, theirs, strict=True)]
        kept = " ".join(
            f"{over(mean(each), whole):.2f}" for each, whole in zip((ours, theirs), clean, strict=True)
        )
        print(f"{name:<18}{shown(ours):>22}{shown(theirs):>22}{shown(ahead, signed=True):>24}{kept:>14}")
        summary[name] = {
            "ratio": over(mean(ours), mean(theirs)),
            "ppo": ours,
            "sft": theirs,
            "interval": {"ppo": half_width(ours), "sft": half_width(theirs), "difference": half_width(ahead)},
        }
    for side in SIDES:
        counts = [result[side]["iterations"] for result in results]
        print(f"{side}: {mean(counts):.0f} iterations")
    return summary


def shown(values: Sequence[float], signed: bool = False) -> str:
    text = f"{mean(values):+.3f}" if signed else f"{mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ± {half_width(values):.3f}"


def half_width(values: Sequence[float]) -> float:
    """Of Student's 95 % interval of the mean; NaN for a single value."""
    degrees = len(values) - 1
    if degrees < 1:
        return math.nan
    quantile = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else 1.96
    return quantile * stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training in a run (60)")
    parser.add_argument("--adaptation", type=float, default=6.0, help="seconds on the second task (6)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine")
    parser.add_argument("--quick", action="store_true", help="1 seed, 6 s, few tasks: not a figure")
    parser.add_argument("--json", type=Path, default=FOLDER / "robustness.json", metavar="FILE")
    parser.add_argument("--curves", type=Path, default=FOLDER / "robustness.svg", metavar="FILE")
    given = parser.parse_args()
    options = (
        Options(seeds=1, seconds=6.0, adaptation=2.0, clock=given.clock, tasks=32)
        if given.quick
        else Options(given.seeds, given.seconds, given.adaptation, given.clock, tasks=500)
    )
    print(
        f"{options.seeds} seeds, {options.seconds:g} s of training and {options.adaptation:g} s of "
        f"adaptation ({options.clock} clock), {options.tasks} held-out tasks; both sides at once, on a core "
        "each that they swap from seed to seed"
    )
    lanes, results = Lanes(ask=ask), []
    make_starts(START, options.seeds, lanes)
    for seed in range(options.seeds):
        results.append(play_seed(seed, options, lanes))
        print(f"  seed {seed}: " + ", ".join(describe(side, results[-1][side]) for side in SIDES), flush=True)
    summary = summarise(results)
    common.write_json(
        given.json,
        {
            "options": vars(options),
            "settings": {"ppo": PRACTICE, "sft": IMITATION, "adaptation": ADAPTATION},
            "worker_environment": common.WORKER_ENVIRONMENT,
            "host": common.host(),
            "summary": summary,
            "seeds": results,
        },
    )
    write_curves(given.curves, {"calculator": results})
    print(f"\nwrote {given.json} and {given.curves}")
    for name, each in summary.items():
        print(f"ratio robustness_{name} {each['ratio']:.2f}")


def describe(side: str, result: Mapping[str, Json]) -> str:
    return f"{side} {final(result):.3f}, second task {figures(result)['adaptation']:.3f}"


if __name__ == "__main__":
    main()
