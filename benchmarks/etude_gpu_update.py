"""An update in a worker process on an accelerator, and what the device multiplies at best.

The checkpoint's weights in float32, computed in bfloat16 by autocast, as one trains.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.common import Answer, serve
from benchmarks.etude_update import likelihood
from benchmarks.scripted import describe
from etude.data.batch import Trajectory
from etude.models.forward import PolicyForward
from etude.models.loading import load_causal_lm
from etude.trainers.learner import Learner


def answer(learner: Learner, vocabulary: int, request: dict[str, Any]) -> dict[str, Any]:
    device = learner.accelerator.device
    return (
        multiply(device, request) if request["kind"] == "multiply" else update(learner, vocabulary, request)
    )


def multiply(device: torch.device, request: dict[str, Any]) -> dict[str, Any]:
    """Floating-point operations per second of a large product in bfloat16."""
    size, times = request["size"], request["times"]
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    a @ a
    started = now(device)
    for _ in range(times):
        a @ a
    seconds = now(device) - started
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"flops_per_second": 2 * size**3 * times / seconds, "device": name}


def update(learner: Learner, vocabulary: int, request: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step on "episodes" of "tokens" tokens, half of them sampled; its model FLOPs.

    Forward and backward of each weight that a token meets (6 per weight), of attention over what it sees, and
    of the output layer at sampled tokens: what is computed again in the backward pass doesn't count.
    """
    generator = torch.Generator().manual_seed(request["seed"])
    count, tokens = request["episodes"], request["tokens"]
    trajectories = [
        Trajectory(
            torch.randint(0, vocabulary, (tokens,), generator=generator),
            torch.arange(tokens // 2, tokens),
            score=1.0,
        )
        for _ in range(count)
    ]
    learner.mini_batch_size, learner.max_tokens_per_pass = count, request["tokens_per_pass"]
    experience = learner.observe(trajectories, postpone=True)
    device = learner.accelerator.device
    started = now(device)
    log = learner.update(experience, likelihood, torch.Generator().manual_seed(0))
    seconds = now(device) - started
    config = learner.accelerator.unwrap_model(learner.policy).model.config
    layers = sum(
        weight.numel()
        for name, weight in learner.policy.named_parameters()
        if ".layers." in name and weight.dim() == 2
    )
    heads = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    flops = 6.0 * layers * tokens * count
    flops += 6.0 * config.hidden_size * config.vocab_size * (tokens - tokens // 2) * count
    flops += 6.0 * 2 * config.num_hidden_layers * heads * tokens**2 / 2 * count
    return {"seconds": seconds, "flops": flops, "loss": log.mean("loss").item()}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start(checkpoint: str, device: str, compiled: bool) -> tuple[dict[str, Any], Answer]:
    model = load_causal_lm(checkpoint)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=device != "cpu")
    policy = PolicyForward(model)
    if compiled:
        policy.compile_parts()
    policy, optimizer = accelerator.prepare(policy, optimizer)
    learner = Learner(
        accelerator,
        policy,
        None,
        optimizer,
        mini_batch_size=1,
        accumulation=1,
        epochs=1,
        max_grad_norm=1.0,
        temperature=1.0,
        kl_kind="k1",
        uses_reference=False,
    )
    return describe(model, "etude"), partial(answer, learner, model.config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    serve(partial(start, arguments.checkpoint, arguments.device, arguments.compiled))


if __name__ == "__main__":
    main()
