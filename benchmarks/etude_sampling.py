"""Our side of the sampling benchmarks: `etude`'s sampler in a worker process.

Requests by their "kind": "play" a workload, "decode" some rows from a steady state, or measure the
"memory".
"""

from __future__ import annotations

import argparse
import asyncio
from functools import partial
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import workload
from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import describe
from etude.models.compiled import compile_layers
from etude.models.loading import load_language_model
from etude.models.packing import supports_packing
from etude.sampling.local import LocalSampler
from etude.sampling.session import LocalSession
from etude.types import SamplingParams


def play(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: dict[str, Any]
) -> dict[str, Any]:
    """Every episode is a session; the clock starts before the sampler is built."""
    episodes = workload.load(request["workload"])
    with Stopwatch() as watch:
        sampler = LocalSampler(model, tokenizer, slots=request["slots"], **request.get("options", {}))

        async def one(session: LocalSession, turns: list[workload.Turn]) -> list[list[int]]:
            sampled = []
            for number, turn in enumerate(turns):
                if number:
                    await asyncio.sleep(request["tool_ms"] / 1000)
                given = sampler.decoder_start or turn.given
                result = await session.sample(given, SamplingParams(max_new_tokens=turn.length))
                sampled.append(result.token_ids)
            session.close()
            return sampled

        async def every() -> list[list[list[int]]]:
            sources = [turns[0].given if sampler.decoder_start else () for turns in episodes]
            sessions = (sampler.session(seed=i, source_ids=ids) for i, ids in enumerate(sources))
            return list(await asyncio.gather(*map(one, sessions, episodes)))

        played = asyncio.run(every())
    for turns, sampled in zip(episodes, played, strict=True):
        workload.check_lengths(turns, sampled)
    return {**watch.times, "tokens": workload.count_tokens(episodes)}


def decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: dict[str, Any]
) -> dict[str, Any]:
    """`steps` tokens for each of `rows` sessions of `history` tokens; feeding these isn't timed.

    Nor is the first step of all rows' single tokens, which a captured one has to be captured from.
    """
    rows, steps = request["rows"], request["steps"]
    source = Random(request["seed"])
    vocabulary = model.config.vocab_size
    prompts = [workload.random_tokens(source, request["history"] - 2, vocabulary) for _ in range(rows)]
    sampler = LocalSampler(model, tokenizer, slots=rows, **request.get("options", {}))
    sessions = [sampler.session(seed=i) for i in range(rows)]

    async def steady() -> Stopwatch:
        one, several = SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=steps)
        await asyncio.gather(*(s.sample(p, one) for s, p in zip(sessions, prompts, strict=True)))
        for _ in range(2):
            await asyncio.gather(*(session.sample([], one) for session in sessions))
        with Stopwatch() as watch:
            results = await asyncio.gather(*(session.sample([], several) for session in sessions))
        assert all(len(result.token_ids) == steps for result in results)
        return watch

    return {**asyncio.run(steady()).times, "tokens": rows * steps}


def memory(model: PreTrainedModel, request: dict[str, Any]) -> dict[str, Any]:
    """What the memory gives (read and written by a copy of "bytes"), and what decoding asks of it."""
    source = torch.zeros(request["bytes"], dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        with Stopwatch() as watch:
            target.copy_(source)
            target[-1].item()  # waits for the device
        seconds.append(watch.times["seconds"])
    config = model.config
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    looked_up = 0 if tied else model.get_input_embeddings().weight.nbytes
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return {
        "bytes_per_second": 2 * source.nbytes / min(seconds),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()) - looked_up,
        "cache_bytes_per_token": 2 * config.num_hidden_layers * heads * model.dtype.itemsize,
    }


def start(checkpoint: str, device: str, compiled: bool) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load_language_model(checkpoint, dtype="auto").to(device).eval()
    if compiled:
        assert supports_packing(model)
        compile_layers(model)
    kinds = {
        "play": partial(play, model, tokenizer),
        "decode": partial(decode, model, tokenizer),
        "memory": partial(memory, model),
    }
    return describe(model, "etude"), lambda request: kinds[request["kind"]](request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    serve(partial(start, options.checkpoint, options.device, options.compiled))


if __name__ == "__main__":
    main()
