"""Rows on one optimizer step: what a shared prompt saves, and what a bare forward and backward would take.

Times are processor seconds of one thread, which a machine's other work disturbs least.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median

from benchmarks import common
from benchmarks.common import Json, Options, Side, SideError


def shared_prefix(options: Options) -> Json:
    """Observing and learning from 8 samples of 128 tokens on a prompt of 600: prompt 8 times over once."""
    groups = [{"prompt": 60 if options.quick else 600, "answers": [128] * 8}]
    return compare("apart", "shared", {"groups": groups, "observe": True}, options)


def packed_bound(options: Options) -> Json:
    """An optimizer step on 32 episodes of uneven lengths, clipping and Adam included: bare over ours."""
    lengths = Random(0)
    groups = [
        {"prompt": lengths.randint(16, 128), "answers": [min(512, round(lengths.lognormvariate(4.8, 0.8)))]}
        for _ in range(4 if options.quick else 32)
    ]
    return compare("bare", "shared", {"groups": groups, "observe": False}, options)


def compare(slower: str, faster: str, work: Mapping[str, object], options: Options) -> Json:
    """Processor seconds of the way that is named first over those of the second, on the same steps."""
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(way, Path(sys.executable), "benchmarks.etude_update", way))
            for way in (slower, faster)
        ]
        common.check_comparable(*sides)
        requests = [{**work, "seed": seed} for seed in range(options.runs + 1)]
        runs = common.alternate(sides, requests)
    for one, other in zip(runs[slower], runs[faster], strict=True):
        if not math.isclose(one["loss"], other["loss"], rel_tol=1e-4):
            raise SideError(f"losses {one['loss']} and {other['loss']}: not the same work")
    # The first run of each pays for buffers that the others find there.
    seconds = {way: median(answer["cpu_seconds"] for answer in answers[1:]) for way, answers in runs.items()}
    print("  " + ", ".join(f"{way} {value:.2f} s" for way, value in seconds.items()))
    return {
        "ratio": seconds[slower] / seconds[faster],
        "cpu_seconds": seconds,
        "settings": dict(work),
        "sides": {side.name: side.about for side in sides},
        "runs": runs,
    }
