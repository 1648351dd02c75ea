"""Multi-turn rollouts with tools, episodes per second: ours against TRL 0.7.4's `TextEnvironment`.

The same model, the same episodes to the token, one thread, both sides in one run that take turns. The
result is printed last, one line per tool latency:

    ratio rollout_trl074_0ms VALUE

which is our episodes per second divided by theirs (medians). What is forced and why: `scripted.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from benchmarks import common
from benchmarks.peers import install
from benchmarks.scripted import Shape, load_script, save_script, write_script

PEER = "trl074"
CHECKPOINT = common.RESULTS / "models" / "llama-10m"
SCRIPTS = common.RESULTS / "scripts"


def main() -> None:
    options = parse_options()
    shape = Shape(episodes=options.episodes)
    install.ensure(PEER)
    make_checkpoint()
    scripts = make_scripts(shape, number=1 + options.runs * len(options.tools))

    with ExitStack() as stack:
        ours = stack.enter_context(
            common.Side("etude", Path(sys.executable), "benchmarks.etude_rollout", str(CHECKPOINT))
        )
        theirs = stack.enter_context(
            common.Side(PEER, install.python(PEER), f"benchmarks.peers.{PEER}_rollout", str(CHECKPOINT))
        )
        check_comparable(ours, theirs)
        results = measure([ours, theirs], shape, scripts, options.tools, options.runs)
        report = {
            "benchmark": "rollout",
            "settings": {**asdict(shape), "tools_ms": options.tools, "runs": options.runs},
            "tokens_per_run": count_tokens(scripts[0]),
            "worker_environment": common.WORKER_ENVIRONMENT,
            "host": common.host(),
            "sides": {side.name: side.about for side in (ours, theirs)},
            "results": results,
        }

    if options.json:
        common.write_json(options.json, report)
    for name, result in results.items():
        print(f"ratio {name} {result['ratio']:.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tools", type=int, nargs="+", default=[0], metavar="MS", help="tool latencies (0)")
    parser.add_argument("--episodes", type=int, default=32, help="episodes of a run (32)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side (3)")
    parser.add_argument("--quick", action="store_true", help="4 episodes, 1 run: not a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, versions, runs here")
    options = parser.parse_args()
    if min(options.tools) < 0 or options.episodes < 1 or options.runs < 1:
        parser.error("expected --tools >= 0, --episodes >= 1 and --runs >= 1")
    if options.quick:
        options.episodes, options.runs = 4, 1
    return options


def make_checkpoint() -> None:
    """Model and tokenizer, written by the peer so that both sides can read them."""
    command = [str(install.python(PEER)), "-m", f"benchmarks.peers.{PEER}_model", str(CHECKPOINT)]
    subprocess.run(command, cwd=common.ROOT, env={**os.environ, **common.WORKER_ENVIRONMENT}, check=True)


def make_scripts(shape: Shape, number: int) -> list[Path]:
    """One script per run: the same lengths, other words."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    paths = [SCRIPTS / f"rollout-{seed}.json" for seed in range(number)]
    for seed, path in enumerate(paths):
        save_script(path, write_script(tokenizer, shape, seed))
    return paths


def count_tokens(script: Path) -> common.Json:
    episodes = load_script(script)
    return {
        "total": sum(len(episode.token_ids) for episode in episodes),
        "by_model": sum(sum(episode.mask) for episode in episodes),
    }


def check_comparable(ours: common.Side, theirs: common.Side) -> None:
    """One thread each, and the same logits from the same tokens."""
    if not ours.about["threads"] == theirs.about["threads"] == 1:
        raise SystemExit("a side doesn't run on one thread: the ratio would compare cores")
    pairs = zip(ours.about["probe_logits"], theirs.about["probe_logits"], strict=True)
    if not all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in pairs):
        raise SystemExit("the two sides compute different logits: they don't run the same model")


def measure(
    sides: list[common.Side], shape: Shape, scripts: list[Path], tools_ms: list[int], runs: int
) -> dict[str, common.Json]:
    """Warm both sides up, then time them at each latency."""

    def request(script: Path, tool_ms: int) -> common.Json:
        return {"script": str(script), "tool_ms": tool_ms, "turns": shape.turns}

    ours, theirs = sides
    remaining = iter(scripts)
    print("warm-up, not counted")
    common.alternate(sides, [request(next(remaining), 0)])
    results: dict[str, common.Json] = {}
    for tool_ms in tools_ms:
        print(f"{shape.episodes} episodes of {shape.turns} turns, tools of {tool_ms} ms")
        answers = common.alternate(sides, [request(next(remaining), tool_ms) for _ in range(runs)])
        rates = {
            name: shape.episodes / median(answer["seconds"] for answer in side_answers)
            for name, side_answers in answers.items()
        }
        print("  " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()) + " episodes per second")
        results[f"rollout_{PEER}_{latency(tool_ms)}"] = {
            "ratio": rates[ours.name] / rates[theirs.name],
            "episodes_per_second": rates,
            "runs": answers,
        }
    return results


def latency(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds}s" if seconds and not rest else f"{milliseconds}ms"


if __name__ == "__main__":
    main()
