"""`transformers`' own sides of the sampling benchmarks, in a worker process on our own interpreter.

Three ways of sampling, one per worker: "generate" in batches, "generate_batch" (continuous batching), and
the "bare" forward over a static cache with argmax, which is what the model alone costs. Requests by their
"kind": "tune" tries the ways' settings on a workload and keeps the fastest, "play" plays one, "decode"
takes rows on from a steady state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from random import Random
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks import workload
from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import describe
from benchmarks.workload import Turn

Settings = dict[str, Any]
Histories = Sequence[list[int]]
Played = list[list[list[int]]]  # the sampled tokens of each turn of each episode


class LengthOfEachRow(StoppingCriteria):
    """Ends each row at a length of its own: one comparison per step."""

    def __init__(self, ends_B: torch.Tensor) -> None:
        self.ends_B = ends_B

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends_B


class Generate:
    """`model.generate`, in batches of neighbours by length of what is known beforehand: the history."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # On a GPU `generate` compiles its forward for every new shape of a static cache: each turn has one.
        gpu = model.device.type != "cpu"
        rows, caches = ((256, 128), ("dynamic",)) if gpu else ((16, 32, 64), ("dynamic", "static"))
        self.candidates = [{"rows": n, "cache": cache} for n, cache in product(rows, caches)]

    def play(self, episodes: Sequence[list[Turn]], settings: Settings, tool_ms: float) -> Played:
        """Turn by turn, all episodes in step; a turn's tools all run at once."""
        histories: list[list[int]] = [[] for _ in episodes]
        sampled: Played = [[] for _ in episodes]
        for number in range(len(episodes[0])):
            if number:
                time.sleep(tool_ms / 1000)
            turns = [episode[number] for episode in episodes]
            for history, turn in zip(histories, turns, strict=True):
                history.extend(turn.given)
            for batch in batches(histories, settings["rows"]):
                lengths = [turns[i].length for i in batch]
                new = self._continue([histories[i] for i in batch], lengths, settings["cache"])
                for i, ids in zip(batch, new, strict=True):
                    histories[i].extend(ids)
                    sampled[i].append(ids)
        return sampled

    def _continue(self, histories: Histories, lengths: Sequence[int], cache: str) -> list[list[int]]:
        width, device = max(map(len, histories)), self.model.device
        padding = [width - len(history) for history in histories]
        ids = [[0] * n + history for n, history in zip(padding, histories, strict=True)]
        mask = [[0] * n + [1] * len(history) for n, history in zip(padding, histories, strict=True)]
        if self.model.config.is_encoder_decoder:
            width = 1  # what comes back begins with the decoder's start
        ends_B = width + torch.tensor(lengths, device=device)
        output = self.model.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=plain_sampling(max_new_tokens=max(lengths)),
            stopping_criteria=StoppingCriteriaList([LengthOfEachRow(ends_B)]),
            **({"cache_implementation": "static"} if cache == "static" else {}),
        )
        return [row[:n] for row, n in zip(output[:, width:].tolist(), lengths, strict=True)]


class GenerateBatch:
    """Continuous batching: every request has its own length; nothing is sorted or padded."""

    candidates: Sequence[Settings] = [
        {"max_requests_per_batch": requests, "max_batch_tokens": tokens}
        for requests, tokens in product((16, 32), (128, 256))
    ]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def play(self, episodes: Sequence[list[Turn]], settings: Settings, tool_ms: float) -> Played:
        turns = workload.single_turns(episodes)
        pages = -(-max(len(turn.given) + turn.length for turn in turns) // PAGE)
        config = ContinuousBatchingConfig(
            **settings,
            page_size=PAGE,
            num_blocks=settings["max_requests_per_batch"] * pages,
            allow_block_sharing=False,  # no two prompts begin alike
        )
        results: dict[str, list[int]] = {}
        with self.model.continuous_batching_context_manager(
            plain_sampling(eos_token_id=-1), continuous_batching_config=config
        ) as manager:
            names = [manager.add_request(turn.given, max_new_tokens=turn.length) for turn in turns]
            while len(results) < len(turns):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RuntimeError("the continuous-batching thread ended before its requests did")
        return [[results[name]] for name in names]


def batches(histories: Histories, rows: int) -> Iterator[list[int]]:
    """Indices of `rows` histories of similar length at a time."""
    order = sorted(range(len(histories)), key=lambda i: len(histories[i]))
    for first in range(0, len(order), rows):
        yield order[first : first + rows]


WAYS: dict[str, type[Generate] | type[GenerateBatch]] = {
    "generate": Generate,
    "generate_batch": GenerateBatch,
}
PAGE = 128  # tokens; smaller pages were no faster


def plain_sampling(**settings: Any) -> GenerationConfig:
    """Temperature 1, nothing cut off, no end-of-sequence token."""
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, **settings)


def play(way: Generate | GenerateBatch, settings: Settings, request: dict[str, Any]) -> dict[str, Any]:
    episodes = workload.load(request["workload"])
    with Stopwatch() as watch:
        sampled = way.play(episodes, settings, request["tool_ms"])
    for turns, ids in zip(episodes, sampled, strict=True):
        workload.check_lengths(turns, ids)
    return {**watch.times, "tokens": workload.count_tokens(episodes), "settings": settings}


def tune(way: Generate | GenerateBatch, request: dict[str, Any]) -> dict[str, Any]:
    """Play the workload with each setting, and once before, uncounted; the fastest is kept for "play"."""
    play(way, way.candidates[0], request)
    return {"tried": [play(way, settings, request) for settings in way.candidates]}


@torch.no_grad()
def decode(model: PreTrainedModel, request: dict[str, Any]) -> dict[str, Any]:
    """`steps` tokens for each of `rows` rows of `history` tokens, by argmax; feeding these isn't timed."""
    rows, history, steps = request["rows"], request["history"], request["steps"]
    source = Random(request["seed"])
    prompts = [workload.random_tokens(source, history, model.config.vocab_size) for _ in range(rows)]
    cache = StaticCache(config=model.config, max_cache_len=history + steps)

    def newest(ids_BT: torch.Tensor) -> torch.Tensor:
        logits_B1V = model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits_B1V.argmax(-1)

    token_B1 = newest(torch.tensor(prompts, device=model.device))
    token_B1.tolist()  # waits for the device
    with Stopwatch() as watch:
        for _ in range(steps):
            token_B1 = newest(token_B1)
            token_B1.tolist()  # as a sampler that decides by the token whether a row goes on
    return {**watch.times, "tokens": rows * steps}


def start(checkpoint: str, way: str, device: str) -> tuple[dict[str, Any], Answer]:
    config = AutoConfig.from_pretrained(checkpoint)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint, dtype="auto").to(device).eval()
    generation: Any = model.generation_config
    generation.eos_token_id = generation.forced_eos_token_id = None  # lengths are the workload's
    about = describe(model)
    if way == "bare":
        return about, lambda request: decode(model, request)
    side = WAYS[way](model)
    best: Settings = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal best
        if request["kind"] == "play":
            return play(side, best, request)
        answered = tune(side, request)
        best = min(answered["tried"], key=lambda run: run["seconds"])["settings"]
        return answered

    return about, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("way", choices=[*WAYS, "bare"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    serve(partial(start, options.checkpoint, options.way, options.device))


if __name__ == "__main__":
    main()
