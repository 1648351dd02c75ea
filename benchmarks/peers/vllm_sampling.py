"""vLLM's side of the sampling benchmark: its CPU engine in a worker process.

Float32 and eager, as the other sides; one process, so that one thread means one core. Lengths are fixed by
asking for as many tokens at least as at most. Token ids in and out: nothing is tokenized or decoded.
"""

from __future__ import annotations

import argparse
import os

# Read when vLLM is imported or its engine built.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: far more than 256 short sequences of this model take
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks import workload
from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import PROBE

MAX_LENGTH = 512


def play(engine: LLM, request: dict[str, Any]) -> dict[str, Any]:
    turns = workload.single_turns(workload.load(request["workload"]))
    with Stopwatch() as watch:
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=turn.given) for turn in turns],
            [
                SamplingParams(
                    max_tokens=turn.length, min_tokens=turn.length, ignore_eos=True, detokenize=False
                )
                for turn in turns
            ],
            use_tqdm=False,
        )
    workload.check_lengths(turns, [output.outputs[0].token_ids for output in outputs])
    return {**watch.times, "tokens": sum(turn.length for turn in turns)}


def describe(engine: LLM) -> dict[str, Any]:
    """The same as `scripted.describe` says, asked for through the engine."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = engine.generate(TokensPrompt(prompt_token_ids=PROBE), params, use_tqdm=False)[0]
    logprobs = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], PROBE[1:], strict=True)]
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers", "vllm-cpu")}
    return {
        "versions": packages,
        "threads": torch.get_num_threads(),
        "probe_logprobs": logprobs,
        "dtype": str(engine.model_config.dtype),
    }


def start(checkpoint: str, slots: int) -> tuple[dict[str, Any], Answer]:
    engine = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        max_num_seqs=slots,
        generation_config="vllm",
        seed=0,
    )
    return describe(engine), partial(play, engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_args()
    serve(partial(start, options.checkpoint, options.slots))


if __name__ == "__main__":
    main()
