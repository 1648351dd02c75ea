"""An optimizer step in a worker process: the learner's, or a bare forward and backward of the same tokens.

The model is a random Llama of 10.1 M parameters in float32, without a value head.
"""

from __future__ import annotations

import argparse
from functools import partial
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Answer, Stopwatch, serve
from benchmarks.scripted import describe
from etude.data.batch import Trajectory
from etude.models.forward import PolicyForward
from etude.trainers.learner import Learner, Minibatch

MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.1,
    tie_word_embeddings=False,
)


def trajectories_of(request: dict[str, Any]) -> list[Trajectory]:
    """For each of "groups" a prompt of "prompt" tokens and sampled answers of "answers" tokens, shuffled."""
    generator = torch.Generator().manual_seed(request["seed"])

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(2, MODEL.vocab_size, (count,), generator=generator)

    made = []
    for group in request["groups"]:
        prompt = tokens(group["prompt"])
        made += [Trajectory.of_response(prompt, tokens(n), score=1.0) for n in group["answers"]]
    Random(request["seed"]).shuffle(made)
    return made


def learn(learner: Learner, request: dict[str, Any]) -> dict[str, Any]:
    """What the learner does with a batch: observe it, if the request says so, and one optimizer step."""
    trajectories = trajectories_of(request)
    learner.mini_batch_size = len(trajectories)
    observed = learner.observe(trajectories)
    with Stopwatch() as watch:
        experience = learner.observe(trajectories) if request["observe"] else observed
        log = learner.update(experience, likelihood, torch.Generator().manual_seed(0))
    return {**watch.times, "loss": log.mean("loss").item()}


def likelihood(minibatch: Minibatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = -(minibatch.logprobs * minibatch.observed.mask).sum() / minibatch.denominator
    return loss, {"loss": loss}


def bare(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, request: dict[str, Any]
) -> dict[str, Any]:
    """The same step without a library: each sequence by itself, nothing padded, only answers projected."""
    trajectories = trajectories_of(request)
    model.train()
    total = sum(len(t.sampled) for t in trajectories)
    loss = 0.0
    with Stopwatch() as watch:
        for t in trajectories:
            logits = model(t.token_ids[None], logits_to_keep=t.sampled - 1, use_cache=False).logits[0]
            logprobs = logits.log_softmax(-1).gather(-1, t.token_ids[t.sampled, None])
            part = -logprobs.sum() / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {**watch.times, "loss": loss}


def start(way: str) -> tuple[dict[str, Any], Answer]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODEL)
    about = {**describe(model, "etude"), "way": way}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    if way == "bare":
        return about, partial(bare, model, optimizer)
    accelerator = Accelerator(cpu=True)
    policy, optimizer = accelerator.prepare(PolicyForward(model), optimizer)
    learner = Learner(
        accelerator,
        policy,
        None,
        optimizer,
        mini_batch_size=1,  # set by the request
        accumulation=1,
        epochs=1,
        max_grad_norm=1.0,
        temperature=1.0,
        kl_kind="k1",
        uses_reference=False,
        share_prefixes=way == "shared",
    )
    return about, partial(learn, learner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("shared", "apart", "bare"), help="prefixes shared or not; no library")
    serve(partial(start, parser.parse_args().way))


if __name__ == "__main__":
    main()
