"""Our side of the GRPO benchmarks, in a worker process: a step with tools, or the memory of updates."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LogitsProcessorList

from benchmarks import wide
from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import (
    MAX_NEW_TOKENS,
    MAX_TOOL_RESPONSE,
    Echo,
    ForcedTokens,
    check_played,
    describe,
    load_script,
)
from etude import GRPOConfig, GRPOTrainer, TextEnvironment
from etude.data.batch import Trajectory
from etude.environments.history import TextHistory
from etude.environments.tags import TagProtocol


def step(model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Play the script's episodes, each task as a group, and learn from them in one optimizer step."""
    episodes = load_script(Path(request["script"])).episodes
    environment = TextEnvironment(
        tokenizer=tokenizer,
        tools=[Echo(request["tool_ms"])],
        reward_fn=lambda segments: [float(len(segment)) for segment in segments],
        max_turns=request["turns"],
        max_tool_response=MAX_TOOL_RESPONSE,
        protocol=TagProtocol(call=request["call_end"], submit=request["answer_end"]),
        generation_kwargs={
            "max_new_tokens": MAX_NEW_TOKENS,
            "pad_token_id": tokenizer.pad_token_id,
            "logits_processor": LogitsProcessorList([ForcedTokens(episodes, tokenizer.pad_token_id)]),
        },
    )
    config = GRPOConfig(
        per_device_train_batch_size=request["pass"],
        gradient_accumulation_steps=len(episodes) // request["pass"],
        num_generations=request["samples"],
        beta=request["beta"],
    )
    trainer = GRPOTrainer(model, config, environment=environment)
    with Stopwatch() as watch:
        with Stopwatch() as rollout:
            played = trainer.play([{"prompt": episode.task} for episode in episodes], range(len(episodes)))
        stats = trainer.learn([trainer.trajectory(episode) for episode in played])
        trainer.sampler.weights_changed()
    parts = (TextHistory.of(episode).split_query_response_tokens() for episode in played)
    check_played(episodes, *zip(*parts, strict=True))
    return {
        **watch.times,
        "rollout_seconds": rollout.times["seconds"],
        "loss": stats["loss"],
        "grad_norm": stats["grad_norm"],
    }


def start_steps(checkpoint: str) -> tuple[dict[str, Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return describe(model, "etude"), partial(step, model, tokenizer)


def updates(model: LlamaForCausalLM, before: int, request: dict[str, Any]) -> dict[str, Any]:
    """Learn "updates" times from "episodes" of "tokens" tokens, in passes of "pass" episodes."""
    count = request["episodes"]
    config = GRPOConfig(
        per_device_train_batch_size=request["pass"],
        gradient_accumulation_steps=count // request["pass"],
        num_generations=count,
        gradient_checkpointing=request["checkpointing"],
    )
    trainer = GRPOTrainer(model, config, processing_class=wide.any_tokenizer())
    sampled = torch.arange(request["tokens"] // 2, request["tokens"])
    trajectories = [
        Trajectory(token_ids, sampled, score)
        for token_ids, score in zip(
            wide.random_episodes(count, request["tokens"]), wide.scores(count), strict=True
        )
    ]
    with Stopwatch() as watch:
        norms = [trainer.learn(trajectories)["grad_norm"] for _ in range(request["updates"])]
    return {**watch.times, "bytes": wide.peak_bytes() - before, "grad_norm": norms[0]}


def start_updates() -> tuple[dict[str, Any], Answer]:
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model = LlamaForCausalLM(wide.WIDE_VOCABULARY)
    return describe(model, "etude"), partial(updates, model, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="play and learn with this model; without, only learn")
    checkpoint = parser.parse_args().checkpoint
    serve(partial(start_steps, checkpoint) if checkpoint else start_updates)


if __name__ == "__main__":
    main()
