"""What is learnt in equal wall time: three pairs of trainers, several seeds each.

    calculator_ppo    `TextEnvironment` + `PPOTrainer`, ours and TRL 0.7.4's
    calculator_grpo   `GRPOTrainer` with a tool, ours and TRL 1.16's
    sentiment_rloo    `RLOOTrainer` on film reviews that a classifier scores, ours and TRL 1.16's

Both sides of a pair go on from one supervised start per seed, on the same tasks, with the same reward, and
train for the same time, one thread and one core each, at the same time as each other; from seed to seed they
swap cores. What they had learnt at each of seven times is then measured by one evaluation: held-out tasks,
sampled at temperature 1. The clock starts with training: loading isn't counted, a run directory (ours) is.
The learning rate falls linearly with the clock to zero, for both sides alike.

A seed has collapsed where it ends with less reward than it started with.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

from benchmarks import common
from benchmarks.common import Json, Side
from benchmarks.learning_curves import write_curves
from benchmarks.peers import install

OURS = "etude"
FOLDER = common.RESULTS / "learning"
MARKS = 6  # times at which a run is measured, the start not counted


@dataclass(frozen=True)
class Pair:
    """Two trainers and what they are given.

    Attributes:
        task: "calculator" or "reviews".
        peer: the other side's environment.
        algorithm: "ppo", "grpo" or "rloo".
        settings: of both sides' configuration, where they mean the same in both.
        own: what only one side's configuration has, or where each has its own best.
        well_formed: what the evaluation's column of that name counts.
    """

    task: str
    peer: str
    algorithm: str
    settings: Json
    own: Mapping[str, Json]
    well_formed: str


PAIRS = {
    "calculator_ppo": Pair(
        task="calculator",
        peer="trl074",
        algorithm="ppo",
        settings={
            "learning_rate": 3e-4,
            "batch_size": 128,
            "mini_batch_size": 32,
            "ppo_epochs": 2,
            "gamma": 1.0,
            "lam": 1.0,
            "cliprange": 0.2,
            "vf_coef": 0.5,
            "init_kl_coef": 0.0,
            "adap_kl_ctrl": False,
            "max_grad_norm": 1.0,
        },
        own={OURS: {"steps": 10**9, "slots": 128}, "trl074": {}},
        well_formed="tool used",
    ),
    "calculator_grpo": Pair(
        task="calculator",
        peer="trl1",
        algorithm="grpo",
        settings={
            "learning_rate": 2e-4,
            "num_generations": 8,
            "per_device_train_batch_size": 32,
            "steps_per_generation": 4,
            "num_iterations": 2,
            "epsilon": 0.2,
            "beta": 0.0,
            "max_grad_norm": 1.0,
        },
        own={OURS: {"max_steps": 10**9, "slots": 128}, "trl1": {}},
        well_formed="tool used",
    ),
    "sentiment_rloo": Pair(
        task="reviews",
        peer="trl1",
        algorithm="rloo",
        settings={
            "learning_rate": 3e-4,
            "num_generations": 4,
            "per_device_train_batch_size": 128,
            "steps_per_generation": 1,
            "num_iterations": 1,
            "beta": 0.05,
            "max_grad_norm": 1.0,
        },
        own={OURS: {"max_steps": 10**9, "slots": 128}, "trl1": {}},
        well_formed="grammatical",
    ),
}


TRIED = ("learning_rate", "max_grad_norm")  # settings that the command line can change


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        seconds: of training in each run.
        clock: "wall", or "cpu" for each process's own time.
        tasks: held-out tasks per measurement.
    """

    seeds: int
    seconds: float
    clock: str
    tasks: int

    @property
    def marks(self) -> list[float]:
        return [self.seconds * number / MARKS for number in range(1, MARKS + 1)]


@dataclass
class Lanes:
    """Two cores, each with one side at a time.

    Attributes:
        cores: which ones.
        ask: puts a request to a side: (its name, the request) → its answer.
    """

    cores: Sequence[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0))[:2])
    ask: Callable[[str, Json], Json] = field(default_factory=lambda: ask)

    def both(self, swap: bool, requests: Mapping[str, Json]) -> dict[str, Json]:
        """Every side's answer to its request, side by side where there are two cores."""
        cores = [*self.cores, self.cores[0]][:2]
        placed = zip(requests.items(), reversed(cores) if swap else cores, strict=True)
        with ThreadPoolExecutor(len(set(cores))) as pool:
            futures = {
                name: pool.submit(self.ask, request.pop("side", name), {**request, "core": core})
                for (name, request), core in placed
            }
            return {name: future.result() for name, future in futures.items()}


def ask(side: str, request: Json) -> Json:
    """One request to a worker of its own."""
    module = "benchmarks.etude_learning" if side == OURS else f"benchmarks.peers.{side}_learning"
    python = Path(sys.executable) if side == OURS else install.python(side)
    paths = {"PYTHONPATH": f"{common.ROOT / 'src'}{os.pathsep}{common.ROOT}"}  # for the tool and the reward
    with Side(side, python, module, environment=paths) as worker:
        return {**worker.ask(request), "about": worker.about}


def compare(name: str, pair: Pair, options: Options) -> list[Json]:
    """One result per seed: for each side its measures by time, what it did, and versions."""
    install.ensure(pair.peer)
    lanes, results = Lanes(), []
    make_starts(pair.task, options.seeds, lanes)
    for seed in range(options.seeds):
        folder, start = FOLDER / name / str(seed), start_of(pair.task, seed)
        shared = {"task": pair.task, "start": str(start), "seed": seed}
        runs = lanes.both(
            bool(seed % 2),
            {
                side: {
                    **shared,
                    "kind": "train",
                    "algorithm": pair.algorithm,
                    "settings": {**pair.settings, **pair.own[side]},
                    "folder": str(folder / side),
                    "marks": options.marks,
                    "clock": options.clock,
                }
                for side in (OURS, pair.peer)
            },
        )
        measured = lanes.both(
            False,
            {
                side: {
                    **shared,
                    "side": OURS,
                    "kind": "evaluate",
                    "tasks": options.tasks,
                    "snapshots": {"0": None, **run["snapshots"]},
                }
                for side, run in runs.items()
            },
        )
        results.append({side: {**runs[side], "marks": measured[side]["marks"]} for side in runs})
        print(
            f"  seed {seed}: " + ", ".join(describe(side, run) for side, run in results[-1].items()),
            flush=True,
        )
    return results


def describe(side: str, run: Json) -> str:
    return f"{side} {first(run):.3f} → {final(run):.3f} in {run['iterations']} iterations"


def make_starts(task: str, seeds: int, lanes: Lanes) -> None:
    """The supervised starts that aren't there yet, two at a time."""
    missing = [seed for seed in range(seeds) if not (start_of(task, seed) / "done").exists()]
    for pair in zip(missing[::2], [*missing[1::2], None][: len(missing[::2])], strict=True):
        now = [seed for seed in pair if seed is not None]
        print(f"  supervised start of {task}, seeds {', '.join(map(str, now))}", flush=True)
        requests = {str(seed): start_request(task, seed) for seed in now}
        if len(requests) == 1:
            (request,) = requests.values()
            lanes.ask(request.pop("side"), {**request, "core": lanes.cores[0]})
        else:
            lanes.both(False, requests)
        for seed in now:
            (start_of(task, seed) / "done").touch()


def start_request(task: str, seed: int) -> Json:
    folder = str(start_of(task, seed))
    return {"side": OURS, "kind": "start", "task": task, "seed": seed, "folder": folder}


def start_of(task: str, seed: int) -> Path:
    return FOLDER / "starts" / f"{task}-{seed}"


# What it came to.


def first(run: Json) -> float:
    return float(next(iter(run["marks"].values()))["reward"])


def final(run: Json) -> float:
    return float(list(run["marks"].values())[-1]["reward"])


def summarise(name: str, pair: Pair, results: Sequence[Json]) -> Json:
    """Print the pair's table; its figures."""
    sides = (OURS, pair.peer)
    finals = {side: [final(result[side]) for result in results] for side in sides}
    print(f"\n{name}: reward at the end (start), KL to the start, {pair.well_formed}, iterations")
    for seed, result in enumerate(results):
        print(f"  seed {seed}  " + "   ".join(cells(side, result[side]) for side in sides))
    for side in sides:
        course = mean(measured["reward"] for result in results for measured in result[side]["marks"].values())
        print(
            f"  {side:<8} {mean(finals[side]):.3f} ± {spread(finals[side]):.3f} at the end, "
            f"{course:.3f} on average over the run"
        )
    ahead = [ours - theirs for ours, theirs in zip(*finals.values(), strict=True)]
    error = spread(ahead) / math.sqrt(len(ahead))
    print(f"  difference at the end {mean(ahead):+.3f} ± {error:.3f} (standard error)")
    collapsed = {
        side: [n for n, r in enumerate(results) if final(r[side]) < first(r[side])] for side in sides
    }
    print("  collapsed seeds: " + ", ".join(f"{side} {collapsed[side] or 'none'}" for side in sides))
    return {
        "ratio": over(mean(finals[OURS]), mean(finals[pair.peer])),
        "final": finals,
        "mean": {side: mean(finals[side]) for side in sides},
        "std": {side: spread(finals[side]) for side in sides},
        "collapsed": collapsed,
        "seeds": list(results),
    }


def cells(side: str, run: Json) -> str:
    last = list(run["marks"].values())[-1]
    return (
        f"{side} {last['reward']:.3f} ({first(run):.3f})  {last['kl']:5.2f}  {last['well_formed']:.2f}"
        f"  {run['iterations']:4d}"
    )


def over(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each side of a pair (5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training in a run (60)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine")
    parser.add_argument("--quick", action="store_true", help="1 seed, 6 s, few tasks: not a figure")
    parser.add_argument("--json", type=Path, default=FOLDER / "learning.json", metavar="FILE")
    parser.add_argument("--curves", type=Path, default=FOLDER / "learning.svg", metavar="FILE")
    for option in TRIED:
        parser.add_argument(f"--{option}", type=float, help="of both sides, instead of the file's: to try")
    arguments = parser.parse_args()
    options = (
        Options(seeds=1, seconds=6.0, clock=arguments.clock, tasks=32)
        if arguments.quick
        else Options(arguments.seeds, arguments.seconds, arguments.clock, tasks=500)
    )
    print(
        f"{options.seeds} seeds, {options.seconds:g} s of training ({options.clock} clock), {options.tasks} "
        "held-out tasks; both sides at once, on a core each that they swap from seed to seed"
    )
    tried = {name: vars(arguments)[name] for name in TRIED if vars(arguments)[name] is not None}
    pairs = {
        name: replace(PAIRS[name], settings={**PAIRS[name].settings, **tried}) for name in arguments.pairs
    }
    results = {}
    for name, pair in pairs.items():
        print(name, flush=True)
        results[name] = compare(name, pair, options)
    summaries = {name: summarise(name, pair, results[name]) for name, pair in pairs.items()}
    common.write_json(
        arguments.json,
        {
            "options": {**vars(options), "marks": options.marks},
            "worker_environment": common.WORKER_ENVIRONMENT,
            "host": common.host(),
            "pairs": {
                name: {"settings": {**pairs[name].settings, "own": dict(pairs[name].own)}, **summary}
                for name, summary in summaries.items()
            },
        },
    )
    write_curves(arguments.curves, results)
    print(f"\nwrote {arguments.json} and {arguments.curves}")
    for name, summary in summaries.items():
        print(f"ratio learning_{name} {summary['ratio']:.2f}")


if __name__ == "__main__":
    main()
