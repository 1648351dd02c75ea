"""One update in a worker process: how much memory it takes, and how long.

A process measures once: what one update made it take, it doesn't give back for the next.
"""

from __future__ import annotations

import argparse
import resource
import sys
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import describe
from etude.data.batch import Trajectory
from etude.models.forward import PolicyForward
from etude.models.head import CHUNK_BYTES
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.trainers.experience import Minibatch
from etude.trainers.learner import Learner

# As small as a model with such a vocabulary may be: it is the logits that are measured.
WIDE_VOCABULARY = LlamaConfig(
    vocab_size=150_000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


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
    tokens, vocabulary = request["tokens"], WIDE_VOCABULARY.vocab_size
    trajectories = [
        Trajectory(
            torch.randint(0, vocabulary, (tokens,), generator=generator),
            torch.arange(tokens // 2, tokens),
            score=1.0,
        )
        for _ in range(request["episodes"])
    ]
    with Stopwatch() as watch:
        log = learner.update(learner.observe(trajectories), policy_gradient, generator)
    return {**watch.times, "bytes": peak_bytes() - before, "loss": log.mean("loss").item()}


def policy_gradient(minibatch: Minibatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    advantages = torch.linspace(-1, 1, minibatch.logprobs.numel()).view_as(minibatch.logprobs)
    errors = (minibatch.values - 1) ** 2 - advantages * minibatch.logprobs
    loss = (errors * minibatch.observed.mask).sum() / minibatch.denominator
    return loss, {"loss": loss}


def peak_bytes() -> int:
    """The most that this process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
