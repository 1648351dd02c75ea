"""Rows for a machine with a GPU: multi-turn sampling against `generate`, how much of its memory's speed
decoding reaches, and how much of its arithmetic an update.

The model is a random Qwen2 of 0.5 B parameters in bfloat16. Without a CUDA device the rows are skipped.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import common
from benchmarks.common import Json, NotMeasurableError, Options, Row, Side
from benchmarks.peers.trl074_model import train_tokenizer
from benchmarks.sampling import make_request, our_side, transformers_side
from benchmarks.workload import Shape

EPISODES = Shape(episodes=256, turns=4, prompt=(64, 256), answer=(16, 64), sampled=(32, 128))
TOOL_MS = 100
# Dense bfloat16 with tensor cores, as the makers state it; elsewhere a large product's speed stands in.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
HALF_A_BILLION = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
# What a machine without a GPU can try the rows with.
TINY = Qwen2Config(
    vocab_size=8192,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    dtype="bfloat16",
)


def gpu_generate(options: Options) -> Json:
    """256 episodes of 4 turns with tools of 100 ms, tokens per second, ours over `generate`."""
    checkpoint, config = make_checkpoint(options.device)
    shape = replace(EPISODES, episodes=8) if options.quick else EPISODES
    one_turn = replace(shape, turns=1)
    slots, sampling = shape.episodes, sampler_options(options.device)
    with ExitStack() as stack:
        ours = stack.enter_context(our_side(checkpoint, options.device))
        theirs = stack.enter_context(transformers_side("generate", checkpoint, options.device))
        common.check_comparable(ours, theirs)
        ours.ask(make_request(shape, 0, config.vocab_size, slots=slots, tool_ms=TOOL_MS, **sampling))
        tried = theirs.ask({**make_request(one_turn, 0, config.vocab_size), "kind": "tune"})
        requests = [
            make_request(shape, seed, config.vocab_size, slots=slots, tool_ms=TOOL_MS, **sampling)
            for seed in range(1, options.runs + 1)
        ]
        answers = common.alternate([ours, theirs], requests)
    rates = common.rates(answers, "tokens")
    return {
        "ratio": rates["etude"] / rates["generate"],
        "tokens_per_second": rates,
        "settings": {
            **asdict(shape),
            "slots": slots,
            "tool_ms": TOOL_MS,
            **sampling,
            "model": config.to_dict(),
        },
        "tuning": tried["tried"],
        "sides": {side.name: side.about for side in (ours, theirs)},
        "runs": answers,
    }


def gpu_bandwidth(options: Options) -> Json:
    """Bytes per second that decoding must read (weights, keys and values) over those that a copy moves."""
    checkpoint, config = make_checkpoint(options.device)
    rows, history, steps = (4, 64, 8) if options.quick else (64, 1024, 128)
    asked = {"kind": "decode", "rows": rows, "history": history, "steps": steps}
    asked["options"] = sampler_options(options.device)
    with our_side(checkpoint, options.device) as ours:
        memory = ours.ask({"kind": "memory", "bytes": (1 << 24) if options.quick else 1 << 32})
        ours.ask({**asked, "seed": 0, "steps": 2})
        answers = common.alternate([ours], [{**asked, "seed": seed} for seed in range(1, options.runs + 1)])
    seconds = median(answer["seconds"] for answer in answers["etude"]) / steps
    seen = rows * (history + (steps + 1) / 2)  # keys that a step looks at, on average
    needed = memory["weight_bytes"] + seen * memory["cache_bytes_per_token"]
    print(f"  decode {needed / seconds / 1e9:.1f} GB/s, copy {memory['bytes_per_second'] / 1e9:.1f} GB/s")
    return {
        "ratio": needed / seconds / memory["bytes_per_second"],
        "seconds_per_step": seconds,
        "bytes_per_step": needed,
        "memory": memory,
        "settings": {**asked, "model": config.to_dict()},
        "sides": {"etude": ours.about},
        "runs": answers,
    }


def gpu_mfu(options: Options) -> Json:
    """Model-FLOP utilisation of an update: floating-point operations per second over the device's peak."""
    checkpoint, config = make_checkpoint(options.device)
    work = {"kind": "update", "episodes": 64, "tokens": 1024, "tokens_per_pass": 32_768}
    if options.quick:
        work |= {"episodes": 4, "tokens": 64, "tokens_per_pass": 128}
    arguments = [
        str(checkpoint),
        f"--device={options.device}",
        *(["--compiled"] if options.device == "cuda" else []),
    ]
    with Side("etude", Path(sys.executable), "benchmarks.etude_gpu_update", *arguments) as ours:
        product = ours.ask({"kind": "multiply", "size": 256 if options.quick else 8192, "times": 20})
        ours.ask({**work, "seed": 0})
        answers = common.alternate([ours], [{**work, "seed": seed} for seed in range(1, options.runs + 1)])
    peak = next(
        (flops for name, flops in PEAK_FLOPS.items() if name in product["device"]),
        product["flops_per_second"],
    )
    reached = median(answer["flops"] / answer["seconds"] for answer in answers["etude"])
    print(f"  update {reached / 1e12:.2f} TFLOP/s, peak {peak / 1e12:.2f} TFLOP/s")
    return {
        "ratio": reached / peak,
        "flops_per_second": reached,
        "peak_flops_per_second": peak,
        "product": product,
        "settings": {**work, "model": config.to_dict()},
        "sides": {"etude": ours.about},
        "runs": answers,
    }


def sampler_options(device: str) -> Json:
    """Of our sampler: what is fastest on that device."""
    return {"cuda_graphs": True, "prefill_tokens": 16_384} if device == "cuda" else {}


@cache
def make_checkpoint(device: str) -> tuple[Path, Qwen2Config]:
    """The model and a tokenizer (of fewer tokens: nothing is read), if there is something to run them on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NotMeasurableError("needs a CUDA device")
    config = TINY if device == "cpu" else HALF_A_BILLION
    folder = common.RESULTS / "models" / f"qwen2-{config.hidden_size}"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder, config


ROWS: dict[str, Row] = {"gpu_generate": gpu_generate, "gpu_bandwidth": gpu_bandwidth, "gpu_mfu": gpu_mfu}

if __name__ == "__main__":
    common.main("python -m benchmarks.gpu", __doc__, ROWS)
