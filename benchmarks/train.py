"""The update's memory at a vocabulary of 150,000: with whole logits, and with ours in chunks.

The peak of resident memory, over that of the process before the model is made, of one batch observed and
learnt from. Weights, gradients and Adam's moments are in it on both sides. Half of the tokens are sampled;
whole logits, too, are computed for these only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.common import Json, Options, Row, Side, SideError
from benchmarks.update import packed_bound, shared_prefix

# glibc's own: what the other benchmarks set keeps freed memory for ever, and would be measured instead.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def update_memory(options: Options) -> Json:
    """Bytes of an update on 16 episodes of 256 tokens in one pass: with whole logits over in chunks."""
    request = {"episodes": 2 if options.quick else 16, "tokens": 256}
    runs: dict[str, list[Json]] = {"chunks": [], "whole": []}
    about: Json = {}
    for _ in range(options.runs):
        sides = []
        for name, arguments in (("chunks", []), ("whole", ["--whole"])):
            with our_side(name, arguments) as side:  # one after the other: a peak is measured once
                runs[name] += common.alternate([side], [request])[name]
            sides.append(side)
        common.check_comparable(*sides)
        about = {side.name: side.about for side in sides}
    losses = [answer["loss"] for answers in runs.values() for answer in answers]
    if not all(math.isclose(loss, losses[0], rel_tol=1e-4, abs_tol=1e-5) for loss in losses):
        raise SideError(f"the updates have different losses ({losses}): not the same work")
    peaks = {name: median(answer["bytes"] for answer in answers) for name, answers in runs.items()}
    print("  " + ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items()))
    return {
        "ratio": peaks["whole"] / peaks["chunks"],
        "peak_bytes": peaks,
        "settings": request,
        "sides": about,
        "runs": runs,
    }


def our_side(name: str, arguments: Sequence[str]) -> Side:
    return Side(name, Path(sys.executable), "benchmarks.etude_train", *arguments, environment=ALLOCATOR)


ROWS: dict[str, Row] = {
    "update_memory_full": update_memory,
    "shared_prefix": shared_prefix,
    "packed_bound": packed_bound,
}

if __name__ == "__main__":
    common.main("python -m benchmarks.train", __doc__, ROWS)
