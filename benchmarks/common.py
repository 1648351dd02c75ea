"""How the benchmarks measure: sides that take turns, medians, ratios.

A side is one library under test. It lives in a worker process with an interpreter of its own, loads its
model once, and then answers requests, one line of JSON each, over its standard input and output. Only one
side computes at a time. A row is a function that measures one comparison and returns its ratio with all that
explains it. Standard library only, because peers' interpreters import this too.

Not covered: what a side does with a request (`etude_….py`, `peers/`) and which requests make a row
(`rollout.py`, `sampling.py`, `gpu.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

# The same for every side. One thread, so that a ratio says what the library does and not how the cores were
# shared. glibc's defaults hand big buffers back to the kernel at each free; growing KV caches then pay for
# the same pages at every token, which would flatter the side that preallocates.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        runs: timed runs of each side.
        quick: a tenth of the work in one run: does it work? Not a figure.
        device: where the rows for an accelerator run.
    """

    runs: int = 3
    quick: bool = False
    device: str = "cuda"


class NotMeasurableError(RuntimeError):
    """This machine can't measure the row; the message says why."""


Row = Callable[[Options], Json]


class SideError(RuntimeError):
    """A side can't be measured: its worker ended, or it does other work than the others."""


class Side:
    """One library under test, in a worker process that `serve` runs.

    Args:
        name: what to call it in the output.
        python: the interpreter that has the library.
        module: the worker module, run with `-m`.
        arguments: for the worker's command line.
        environment: variables that this library asks for, besides those that all sides get.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **WORKER_ENVIRONMENT, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: Json = self._read()

    def ask(self, request: Mapping[str, Any]) -> Json:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Json:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SideError(
                f"{self.name} ended with exit status {self.process.wait()}: see its traceback above"
            )
        answer: Json = json.loads(line)
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()  # end of input ends the worker


SideFactory = Callable[[], Side]


class Stopwatch:
    """Wall and CPU seconds of a `with` block; CPU seconds above the wall's mean that a second core worked."""

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._start
        self.times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


Answer = Callable[[Json], Mapping[str, Any]]


def serve(start: Callable[[], tuple[Mapping[str, Any], Answer]]) -> None:
    """The worker's loop: start, say what this side is, then answer requests until the input ends.

    Args:
        start: loads what the side needs; returns what it says of itself and the function that answers.
    """
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # whatever a library prints, while it loads or later, must not look like a reply
        about, answer = start()
        for reply in _replies(about, answer):
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


def _replies(about: Mapping[str, Any], answer: Answer) -> Iterator[Mapping[str, Any]]:
    yield about
    for line in sys.stdin:
        yield answer(json.loads(line))


def alternate(sides: Sequence[Side], requests: Sequence[Mapping[str, Any]]) -> dict[str, list[Json]]:
    """Every request to every side, the sides taking turns so that a slow minute of the machine hits both.

    Returns:
        Each side's answers by the side's name, in the order of the requests.
    """
    answers: dict[str, list[Json]] = {side.name: [] for side in sides}
    for number, request in enumerate(requests, start=1):
        for side in sides:
            answer = side.ask(request)
            answers[side.name].append(answer)
            print(f"  {side.name:<14} run {number}  {answer['seconds']:8.2f} s", flush=True)
    return answers


def peaks(sides: Mapping[str, SideFactory], request: Mapping[str, Any], runs: int) -> Json:
    """Each side's "bytes", median over runs, each run in a process of its own: a peak is measured once."""
    answers: dict[str, list[Json]] = {name: [] for name in sides}
    about: Json = {}
    for _ in range(runs):
        started = []
        for name, start in sides.items():
            with start() as side:
                answers[name] += alternate([side], [request])[name]
            started.append(side)
        check_comparable(*started)
        about = {side.name: side.about for side in started}
    bytes_ = {name: median(answer["bytes"] for answer in runs_) for name, runs_ in answers.items()}
    print("  " + ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in bytes_.items()))
    return {"peak_bytes": bytes_, "settings": dict(request), "sides": about, "runs": answers}


def check_comparable(*sides: Side) -> None:
    """One thread each, and the same log-probabilities of the same tokens."""
    first = sides[0]
    for side in sides:
        if side.about["threads"] != 1:
            raise SideError(f"{side.name} doesn't run on one thread: the ratio would compare cores")
        pairs = zip(first.about["probe_logprobs"], side.about["probe_logprobs"], strict=True)
        tolerance = 1e-3 if first.about["dtype"] == "torch.float32" else 0.1
        if not all(math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) for a, b in pairs):
            raise SideError(f"{first.name} and {side.name} compute different probabilities: not one model")


def rates(answers: Mapping[str, Sequence[Json]], unit: str) -> dict[str, float]:
    """Each side's `unit` per second: that of its median run."""
    per_second = {
        name: median(answer[unit] / answer["seconds"] for answer in runs) for name, runs in answers.items()
    }
    print("  " + ", ".join(f"{name} {rate:.2f}" for name, rate in per_second.items()) + f" {unit} per second")
    return per_second


def main(program: str, description: str, rows: Mapping[str, Row]) -> None:
    """Measure the rows that the command line asks for; their ratios are printed last."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ", ".join(rows)
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW", help=names)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each side (3)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, 1 run: not a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, versions, runs here")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # to try the gpu rows without one
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}; expected at least 1")
    results: dict[str, Json] = {}
    failed: list[str] = []
    for name in options.rows:
        print(f"{name}", flush=True)
        try:
            results[name] = rows[name](
                Options(1 if options.quick else options.runs, options.quick, options.device)
            )
        except NotMeasurableError as reason:
            print(f"  skipped: {reason}")
        except (SideError, subprocess.CalledProcessError) as error:  # the other rows may still be measured
            print(f"  failed: {error}")
            failed.append(name)
    if options.json:
        report = {"worker_environment": WORKER_ENVIRONMENT, "host": host(), "rows": results}
        write_json(options.json, report)
    for name, result in results.items():
        print(f"ratio {name} {result['ratio']:.2f}")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def host() -> Json:
    """The machine, as far as it explains a figure."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "load_average": os.getloadavg(),
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
