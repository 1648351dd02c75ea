"""Training: the memory of updates, and whole steps, against whole logits and other libraries.

Here: the update's memory at a vocabulary of 150,000, with whole logits and with ours in chunks. The peak of
resident memory, over that of the process before the model is made, of one batch observed and learnt from.
Weights, gradients and Adam's moments are in it on both sides. Half of the tokens are sampled; whole logits,
too, are computed for these only. Other rows: `update.py`, `ppo_step.py` (TRL
0.7.4), `trl1.py` (TRL 1.16).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import common, ppo_step, trl1
from benchmarks.common import Json, Options, Row, Side, SideError
from benchmarks.update import packed_bound, shared_prefix
from benchmarks.wide import ALLOCATOR

SIDES: dict[str, Sequence[str]] = {"chunks": [], "whole": ["--whole"]}


def update_memory(options: Options) -> Json:
    """Bytes of an update on 16 episodes of 256 tokens in one pass: with whole logits over in chunks."""
    request = {"episodes": 2 if options.quick else 16, "tokens": 256}
    sides = {name: partial(our_side, name, arguments) for name, arguments in SIDES.items()}
    result = common.peaks(sides, request, options.runs)
    losses = [answer["loss"] for answers in result["runs"].values() for answer in answers]
    if not all(math.isclose(loss, losses[0], rel_tol=1e-4, abs_tol=1e-5) for loss in losses):
        raise SideError(f"the updates have different losses ({losses}): not the same work")
    peaks = result["peak_bytes"]
    return {"ratio": peaks["whole"] / peaks["chunks"], **result}


def our_side(name: str, arguments: Sequence[str]) -> Side:
    return Side(name, Path(sys.executable), "benchmarks.etude_train", *arguments, environment=ALLOCATOR)


ROWS: dict[str, Row] = {
    "update_memory_full": update_memory,
    "shared_prefix": shared_prefix,
    "packed_bound": packed_bound,
    **ppo_step.ROWS,
    **trl1.ROWS,
}

if __name__ == "__main__":
    common.main("python -m benchmarks.train", __doc__, ROWS)
