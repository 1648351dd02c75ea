"""Sampling without tools, tokens per second: our engine against other engines and against the bare model.

256 prompts of uneven length, each continued by an uneven number of tokens (`workload.py`), on one thread:
ours against the two ways of `transformers` 5 and against vLLM. And two rows on what decoding costs in the
steady state, where every row is full: against the bare forward, and how that grows with the history.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks import common, workload
from benchmarks.common import Json, Options, Row, Side
from benchmarks.peers import install
from benchmarks.rollout import make_checkpoint

WORKLOADS = common.RESULTS / "workloads"
VOCABULARY = 8192
SLOTS = 64
SHAPE = workload.Shape()
WARM_UP = replace(SHAPE, episodes=64)


def our_side(checkpoint: Path, device: str = "cpu") -> Side:
    """On a GPU with compiled layers, which every session of a training run has after its first seconds."""
    arguments = [str(checkpoint), "--device", device, *(["--compiled"] if device == "cuda" else [])]
    return Side("etude", Path(sys.executable), "benchmarks.etude_sampling", *arguments)


def transformers_side(way: str, checkpoint: Path, device: str = "cpu") -> Side:
    module = "benchmarks.peers.transformers_sampling"
    return Side(way, Path(sys.executable), module, str(checkpoint), way, "--device", device)


def vllm_side(checkpoint: Path) -> Side:
    install.ensure("vllm")
    python = install.python("vllm")
    module = "benchmarks.peers.vllm_sampling"
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # its documentation asks for this one
    environment = {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
    return Side("vllm", python, module, str(checkpoint), "--slots", str(SLOTS), environment=environment)


def engines(
    options: Options,
    *,
    peer: Callable[[Path], Side],
    tuned: bool,
    make_model: Callable[[], Path] = make_checkpoint,
) -> Json:
    """Tokens per second over a whole workload, ours over the peer's.

    Args:
        tuned: the peer tries its settings on a smaller workload first and keeps the fastest.
    """
    shape = replace(SHAPE, episodes=SHAPE.episodes // 10) if options.quick else SHAPE
    few = replace(WARM_UP, episodes=16) if options.quick else WARM_UP
    checkpoint = make_model()
    with ExitStack() as stack:
        sides = [stack.enter_context(side) for side in (our_side(checkpoint), peer(checkpoint))]
        common.check_comparable(*sides)
        ours, theirs = sides
        first = make_request(few, seed=0)
        ours.ask(first)
        settings = theirs.ask({**first, "kind": "tune"} if tuned else first)
        requests = [make_request(shape, seed) for seed in range(1, options.runs + 1)]
        answers = common.alternate(sides, requests)
    rates = common.rates(answers, "tokens")
    return {
        "ratio": rates[ours.name] / rates[theirs.name],
        "tokens_per_second": rates,
        "settings": {**asdict(shape), "slots": SLOTS},
        "tuning": settings.get("tried", []),
        "sides": {side.name: side.about for side in sides},
        "runs": answers,
    }


def make_request(
    shape: workload.Shape,
    seed: int,
    vocabulary: int = VOCABULARY,
    *,
    slots: int = SLOTS,
    tool_ms: float = 0,
    **options: Any,
) -> Json:
    path = workload.write(WORKLOADS / f"workload-{seed}.json", shape, vocabulary, seed)
    return {"kind": "play", "workload": str(path), "slots": slots, "tool_ms": tool_ms, "options": options}


def steady(options: Options) -> Json:
    """64 full rows from 128 to 256 tokens of history, ours over the bare forward's argmax."""
    answers, about = decode_both(options, rows=64, history=128, steps=16 if options.quick else 128)
    rates = common.rates(answers, "tokens")
    return {
        "ratio": rates["etude"] / rates["bare"],
        "tokens_per_second": rates,
        "sides": about,
        "runs": answers,
    }


def history_growth(options: Options) -> Json:
    """How much slower a token is after 1,024 tokens than after 128: the bare forward's factor over ours."""
    steps = 16 if options.quick else 64
    seconds: dict[str, dict[int, float]] = {"etude": {}, "bare": {}}
    runs: dict[int, dict[str, list[Json]]] = {}
    about: Json = {}
    for history in (128, 1024):
        answers, about = decode_both(options, rows=16, history=history - steps // 2, steps=steps)
        runs[history] = answers
        for name, side_answers in answers.items():
            seconds[name][history] = median(a["seconds"] / a["tokens"] for a in side_answers)
    growth = {name: at[1024] / at[128] for name, at in seconds.items()}
    print("  " + ", ".join(f"{name} {factor:.2f}" for name, factor in growth.items()) + " times slower")
    return {"ratio": growth["bare"] / growth["etude"], "growth": growth, "sides": about, "runs": runs}


def decode_both(options: Options, rows: int, history: int, steps: int) -> tuple[dict[str, list[Json]], Json]:
    """`steps` tokens for each of `rows` rows that have `history` tokens, on both sides; and who they are."""
    checkpoint = make_checkpoint()
    asked = {"kind": "decode", "rows": rows, "history": history, "steps": steps}
    with ExitStack() as stack:
        both = our_side(checkpoint), transformers_side("bare", checkpoint)
        sides = [stack.enter_context(side) for side in both]
        common.check_comparable(*sides)
        for side in sides:
            side.ask({**asked, "seed": 0, "steps": 2})
        answers = common.alternate(sides, [{**asked, "seed": seed} for seed in range(1, options.runs + 1)])
        return answers, {side.name: side.about for side in sides}


def make_encoder_decoder(family: str) -> Path:
    """An untrained T5 or BART of some 11 million parameters, with the tokenizer of the others."""
    path = common.RESULTS / "models" / f"{family}-11m"
    if not (path / "config.json").is_file():
        torch.manual_seed(0)
        model = {"t5": _t5, "bart": _bart}[family]()
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(make_checkpoint()).save_pretrained(path)
    return path


def _t5() -> T5ForConditionalGeneration:
    layers = {"num_layers": 4, "num_heads": 4, "d_kv": 64, "d_model": 256, "d_ff": 1024}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **layers))


def _bart() -> BartForConditionalGeneration:
    layers = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 4, "attention_heads": 4, "ffn_dim": 1024}.items()
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=VOCABULARY, d_model=256, max_position_embeddings=256, **layers, **ids)
    config.forced_bos_token_id = config.forced_eos_token_id = None
    return BartForConditionalGeneration(config)


ROWS: dict[str, Row] = {
    "sample_generate": partial(engines, peer=partial(transformers_side, "generate"), tuned=True),
    "sample_generate_batch": partial(engines, peer=partial(transformers_side, "generate_batch"), tuned=True),
    "sample_vllm": partial(engines, peer=vllm_side, tuned=False),
    "sample_bare": steady,
    "history_growth": history_growth,
    **{
        name: partial(
            engines,
            peer=partial(transformers_side, "generate"),
            tuned=True,
            make_model=partial(make_encoder_decoder, family),
        )
        for name, family in {"seq2seq_generate": "t5", "seq2seq_generate_bart": "bart"}.items()
    },
}

if __name__ == "__main__":
    common.main("python -m benchmarks.sampling", __doc__, ROWS)
