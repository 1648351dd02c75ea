"""One update in a worker process: how much memory it takes, and how long.

A process measures once: what one update made it take, it doesn't give back for the next.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import describe
from benchmarks.wide import WIDE_VOCABULARY, peak_bytes, random_episodes
from etude.data.batch import Trajectory
from etude.models.forward import PolicyForward
from etude.models.head import CHUNK_BYTES
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.trainers.experience import Minibatch
from etude.trainers.learner import Learner


def update(policy: PolicyForward, before: int, request: dict[str, Any]) -> dict[str, Any]:
    """Observe "episodes" of "tokens" tokens, half of them sampled, and learn from all in one pass."""
    accelerator = Accelerator(cpu=True)
    policy, optimizer = accelerator.prepare(policy, torch.optim.Adam(policy.parameters(), lr=1e-5))
    learner = Learner(
        accelerator,
        policy,
        policy,  # a reference that takes no memory of its own
        optimizer,
        mini_batch_size=request["episodes"],
        accumulation=1,
        epochs=1,
        max_grad_norm=1.0,
        temperature=1.0,
        kl_kind="k1",
    )
    generator = torch.Generator().manual_seed(0)
    sampled = torch.arange(request["tokens"] // 2, request["tokens"])
    trajectories = [
        Trajectory(token_ids, sampled, score=1.0)
        for token_ids in random_episodes(request["episodes"], request["tokens"])
    ]
    with Stopwatch() as watch:
        log = learner.update(learner.observe(trajectories), policy_gradient, generator)
    return {**watch.times, "bytes": peak_bytes() - before, "loss": log.mean("loss").item()}


def policy_gradient(minibatch: Minibatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    advantages = torch.linspace(-1, 1, minibatch.logprobs.numel()).view_as(minibatch.logprobs)
    errors = (minibatch.values - 1) ** 2 - advantages * minibatch.logprobs
    loss = (errors * minibatch.observed.mask).sum() / minibatch.denominator
    return loss, {"loss": loss}


def start(whole: bool) -> tuple[dict[str, Any], Answer]:
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead(LlamaForCausalLM(WIDE_VOCABULARY))
    chunk_bytes = 2**62 if whole else CHUNK_BYTES
    policy = PolicyForward(model, chunk_bytes)
    about = {**describe(model.pretrained_model, "etude"), "chunk_bytes": chunk_bytes}
    return about, partial(update, policy, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true", help="all logits of a pass at once")
    serve(partial(start, parser.parse_args().whole))


if __name__ == "__main__":
    main()
