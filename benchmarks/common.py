"""How the benchmarks measure: sides that take turns, medians, ratios.

A side is one library under test. It lives in a worker process with an interpreter of its own, loads its
model once, and then answers requests, one line of JSON each, over its standard input and output. Only one
side computes at a time. Standard library only, because peers' interpreters import this too.

Not covered: what a side does with a request (`etude_rollout.py`, `peers/`) and which requests make a
benchmark (`rollout.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
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


class SideError(RuntimeError):
    """A worker process ended before it answered; its own traceback is on standard error."""


class Side:
    """One library under test, in a worker process that `serve` runs.

    Args:
        name: what to call it in the output.
        python: the interpreter that has the library.
        module: the worker module, run with `-m`.
        arguments: for the worker's command line.
    """

    def __init__(self, name: str, python: Path, module: str, *arguments: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **WORKER_ENVIRONMENT},
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


def serve(about: Mapping[str, Any], answer: Callable[[Json], Mapping[str, Any]]) -> None:
    """The worker's loop: say what this side is, then answer requests until the input ends."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # whatever a library prints must not look like a reply
        for reply in _replies(about, answer):
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


def _replies(
    about: Mapping[str, Any], answer: Callable[[Json], Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
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
            print(f"  {side.name:<8} run {number}  {answer['seconds']:8.2f} s", flush=True)
    return answers


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
