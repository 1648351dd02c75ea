"""What passes between an algorithm and the learner: a batch as it was observed, a mini-batch, a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from etude.data.batch import Trajectory
from etude.math.placing import place


@dataclass(slots=True)
class Experience:
    """A batch of trajectories and what was observed of it. Everything per token is [B, N], 0 as padding.

    Attributes:
        mask: where there is a sampled token.
        logprobs, values: under the weights before the update; values are 0 without a value head.
        ref_logprobs, kl: of the reference policy, and the KL estimate per token.
        last_values: [B], the value after the last token where it bootstraps, else 0.
        entropies: of the next-token distributions.
        pending: log-probabilities, values and entropies aren't known yet: an update's first pass over a row
            fills them in.
        order: which the update's first epoch goes through it in, if that was decided when it was observed.
    """

    trajectories: list[Trajectory]
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    last_values: Tensor
    entropies: Tensor
    pending: bool = False
    order: list[int] | None = None

    def rows(self, indices: Sequence[int]) -> Experience:
        """The trajectories at `indices`, as an experience of their own."""
        trajectories = [self.trajectories[i] for i in indices]
        longest = max((len(t.sampled) for t in trajectories), default=0)
        index = place(indices, self.mask.device)
        per_token = ("mask", "logprobs", "values", "ref_logprobs", "kl")
        cut = {name: getattr(self, name)[index, :longest] for name in per_token}
        return Experience(
            trajectories,
            **cut,
            last_values=self.last_values[index],
            entropies=self.entropies[index, :longest],
        )

    def sampler_logprobs(self) -> Tensor:
        """What the sampler recorded [B, N]; the trainer's own where it is unknown."""
        logprobs_BN = self.logprobs.clone()
        for row_N, trajectory in zip(logprobs_BN, self.trajectories, strict=True):
            if trajectory.sampler_logprobs is not None:
                row_N[: len(trajectory.sampled)] = trajectory.sampler_logprobs.to(row_N)
        return logprobs_BN

    def only(self, kept_B: Tensor) -> Experience:
        """The same with tokens to learn from in some rows only."""
        return replace(self, mask=self.mask & kept_B[:, None])

    def sampler_gap(self) -> dict[str, float]:
        """How far the sampler's log-probabilities are from the trainer's, per token; empty where unknown."""
        gaps = [
            (self.logprobs[i, : len(sampler)] - sampler.to(self.logprobs.device)).abs()
            for i, trajectory in enumerate(self.trajectories)
            if self.mask[i].any() and (sampler := trajectory.sampler_logprobs) is not None and len(sampler)
        ]
        if not gaps:
            return {}
        gap = torch.cat(gaps)
        return {"sampler/gap_mean": gap.mean().item(), "sampler/gap_max": gap.max().item()}


@dataclass(slots=True)
class Minibatch:
    """One forward and backward pass: what was observed, and the policy's output now.

    Of a whole mini-batch, or of a part of it where `max_tokens_per_pass` cuts it up.

    Attributes:
        indices: rows of the experience.
        observed: those rows, padded to the longest of them.
        logprobs, entropies, values: [B, N], now; gradients flow through the first and the last, and through
            entropies if the learner was asked for it.
        denominator: sampled tokens of the whole optimizer step, over accumulation steps and processes.
        sequences: the same for trajectories with a sampled token.
    """

    indices: list[int]
    observed: Experience
    logprobs: Tensor
    entropies: Tensor
    values: Tensor
    denominator: Tensor
    sequences: Tensor


# Takes a mini-batch; gives the loss, already divided by the denominator, and numbers to report.
LossFunction = Callable[[Minibatch], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class UpdateLog:
    """What an update reports: for each pass its numbers and its share of all tokens."""

    numbers: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    gradient_norms: list[Tensor] = field(default_factory=list)

    def mean(self, name: str) -> Tensor:
        """Mean over passes, weighted by tokens; a scalar."""
        values = torch.stack([numbers[name].detach().float() for numbers in self.numbers])
        weights = torch.stack(self.weights)
        return (values * weights).sum() / weights.sum()

    def concatenated(self, name: str) -> Tensor:
        """Per-token numbers of all passes, end to end."""
        return torch.cat([numbers[name].detach().flatten() for numbers in self.numbers])
