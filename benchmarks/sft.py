"""Supervised fine-tuning against TRL 1.16's SFTTrainer, and its memory against whole logits.

Both sides train by `train()`, from the same text on, in float32 on one thread. Times are processor seconds of
the steps after the first one, which a machine's other work disturbs least; making the data isn't in them. A
step learns from all rows of the data, so it is the same work however a side packs, sorts or batches them:
loss and gradient norm of the first step are compared. TRL's side is tried in several arrangements on fewer
rows, before the clock starts; its fastest is timed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.common import Json, Options, Row, Side, SideError, SideFactory
from benchmarks.peers import install
from benchmarks.wide import ALLOCATOR

PEER = "trl1"
VOCABULARY = {"narrow": 8192, "wide": 150_000}
LONGEST = 512
STEPS = 4

OURS: Json = {"packing": True, "max_length": 2 * LONGEST, "per_device_train_batch_size": 1}

# TRL's own options. Not among them: packing "wrapped", where texts read their neighbours, which is another
# loss (and slower than rows by themselves); flash attention, which needs a GPU. Its head in chunks is fixed.
PACKED: dict[str, Json] = {
    "bfd, bins of 512": {"packing": True, "max_length": LONGEST, "per_device_train_batch_size": 1},
    "bfd, bins of 1024": {"packing": True, "max_length": 2 * LONGEST, "per_device_train_batch_size": 1},
    "bfd, two bins of 512": {"packing": True, "max_length": LONGEST, "per_device_train_batch_size": 2},
}
UNPACKED: dict[str, Json] = {
    "rows by themselves": {"per_device_train_batch_size": 1},
    **{
        f"{count} of like length": {
            "per_device_train_batch_size": count,
            "train_sampling_strategy": "group_by_length",
        }
        for count in (2, 4, 8)
    },
    "2 without padding": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 2},
    "4 without padding": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
}


def tokens_per_second(
    options: Options, *, prompts: bool = False, arrangements: Mapping[str, Json] = PACKED | UNPACKED
) -> Json:
    """Tokens of text per processor second of training, prompts included; ours over theirs.

    Args:
        prompts: the first half of each row isn't learned.
        arrangements: TRL's settings that are tried.
    """
    rows = 4 if options.quick else 32
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(side("narrow", {})()) for side in (our_side, their_side))
        common.check_comparable(ours, theirs)
        chosen, trials = fastest(theirs, arrangements, max(4, rows // 3), prompts)
        requests = [
            {"path": str(write_rows("narrow", uneven_lengths(rows), prompts, seed)), "steps": STEPS}
            for seed in range(options.runs + 1)
        ]
        runs: dict[str, list[Json]] = {}
        for request in requests:
            for side, settings in ((ours, OURS), (theirs, arrangements[chosen])):
                answers = common.alternate([side], [{**request, "settings": settings}])
                runs.setdefault(side.name, []).extend(answers[side.name])
    check_same_loss(runs)
    timed = {name: answers[1:] for name, answers in runs.items()}  # the first ones pay for buffers
    rates = {
        name: median(answer["tokens"] / answer["cpu_seconds"] for answer in answers)
        for name, answers in timed.items()
    }
    print(f"  {PEER}'s fastest: {chosen}")
    print("  " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()) + " tokens per second")
    return {
        "ratio": rates[ours.name] / rates[theirs.name],
        "tokens_per_cpu_second": rates,
        "settings": {"rows": rows, "steps": STEPS, "ours": OURS, "theirs": arrangements[chosen]},
        "trials": trials,
        "sides": {side.name: side.about for side in (ours, theirs)},
        "runs": runs,
    }


def fastest(
    side: Side, arrangements: Mapping[str, Json], rows: int, prompts: bool
) -> tuple[str, dict[str, float]]:
    """The name of the fastest arrangement, and tokens per processor second of each, the better of two."""
    path = write_rows("narrow", uneven_lengths(rows), prompts, seed=-1)
    rates = dict.fromkeys(arrangements, 0.0)
    for _ in range(2):
        for name, settings in arrangements.items():
            answer = side.ask({"path": str(path), "steps": 2, "settings": settings})
            rates[name] = max(rates[name], answer["tokens"] / answer["cpu_seconds"])
    for name, rate in rates.items():
        print(f"  {side.name}, {name:<24} {rate:8.0f} tokens per second", flush=True)
    return max(rates, key=rates.__getitem__), rates


def memory_full(options: Options) -> Json:
    """Bytes of two steps at a vocabulary of 150,000: whole logits and `cross_entropy` over ours."""
    whole = our_side("wide", ALLOCATOR, "--whole", name="whole")
    return compare_memory(options, "whole", whole, checkpointing=False)


def memory_trl(options: Options) -> Json:
    """The same with checkpointed layers, TRL's default and its leanest; TRL's over ours."""
    return compare_memory(options, PEER, their_side("wide", ALLOCATOR), checkpointing=True)


def compare_memory(options: Options, name: str, other: SideFactory, *, checkpointing: bool) -> Json:
    """8 rows of 256 tokens in one pass. Two steps: the optimizer's state exists from the end of the first."""
    lengths = [256] * (2 if options.quick else 8)
    request: Json = {
        "path": str(write_rows("wide", lengths, prompts=False, seed=0)),
        "steps": 2,
        "settings": {
            "per_device_train_batch_size": len(lengths),
            "gradient_checkpointing": checkpointing,
        },
    }
    result = common.peaks({"etude": our_side("wide", ALLOCATOR), name: other}, request, options.runs)
    check_same_loss(result["runs"])
    peaks = result["peak_bytes"]
    return {"ratio": peaks[name] / peaks["etude"], **result}


def check_same_loss(runs: Mapping[str, Sequence[Json]]) -> None:
    """Of each run's first step, before the sides' weights can part."""
    for answers in zip(*runs.values(), strict=True):
        for name in ("loss", "grad_norm"):
            ours, theirs = (answer[name] for answer in answers)
            if not math.isclose(ours, theirs, rel_tol=1e-4):
                raise SideError(f"{name} is {ours} on our side and {theirs} on the other: not the same step")


def uneven_lengths(count: int) -> list[int]:
    """Lognormal, 150 tokens in the mean, the end-of-sequence token among them."""
    lengths = Random(0)
    return [max(16, min(LONGEST, round(lengths.lognormvariate(4.8, 0.8)))) for _ in range(count)]


def write_rows(model: str, lengths: Sequence[int], prompts: bool, seed: int) -> Path:
    """Rows of so many tokens, an end of sequence included; with `prompts`, half of each is one."""
    words = Random(seed)
    rows = []
    for length in lengths:
        text = [f"w{words.randrange(2, VOCABULARY[model])}" for _ in range(length - 1)]
        split = length // 2
        prompt, completion = " ".join(text[:split]) + " ", " ".join(text[split:])
        rows.append(
            {"prompt": prompt, "completion": completion} if prompts else {"text": prompt + completion}
        )
    path = common.RESULTS / "sft" / f"{model}-{'prompts' if prompts else 'text'}-{len(rows)}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def our_side(model: str, environment: Mapping[str, str], *arguments: str, name: str = "etude") -> SideFactory:
    return _side(name, Path(sys.executable), "benchmarks.etude_sft", model, *arguments, **environment)


def their_side(model: str, environment: Mapping[str, str]) -> SideFactory:
    install.ensure(PEER)
    silenced = {**environment, "TRL_EXPERIMENTAL_SILENCE": "1"}
    return _side(PEER, install.python(PEER), f"benchmarks.peers.{PEER}_sft", model, **silenced)


def _side(name: str, python: Path, module: str, *arguments: str, **environment: Any) -> SideFactory:
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    return partial(Side, name, python, module, *arguments, environment=environment)


ROWS: dict[str, Row] = {
    "sft_tokens_trl1": tokens_per_second,
    "sft_packed_trl1": partial(tokens_per_second, arrangements=PACKED),
    "sft_completion_trl1": partial(tokens_per_second, prompts=True),
    "sft_memory_full": memory_full,
    "sft_memory_trl1": memory_trl,
}

if __name__ == "__main__":
    common.main("python -m benchmarks.sft", __doc__, ROWS)
