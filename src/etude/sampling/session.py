"""What the engine keeps per episode: its session, and the turn that is being sampled in it."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from etude.sampling.draw import Row
from etude.sampling.stop import StopStrings
from etude.types import FinishReason, Sampled, SamplingParams

if TYPE_CHECKING:
    from etude.sampling.local import LocalSampler


@dataclass(eq=False)
class LocalSession:
    """One episode's tokens, and its slot in the cache while it has one."""

    sampler: LocalSampler
    seed: int
    token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    cached: int = 0  # tokens whose keys and values are in the slot
    ends: list[int] = field(default_factory=list)  # where its feeds ended, if the sampler is deterministic
    fed_version: int = 0  # of the weights that the feeds went through
    source: tuple[LocalSession, int] | None = None  # who holds its first tokens, and how many of them
    busy: bool = False
    idle_since: int = 0  # the step at which its last turn ended
    closed: bool = False
    _tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _written: int = 0  # tokens that are in it

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Sampled:
        return await self.sampler._sample(self, token_ids, params)

    def history(self) -> torch.Tensor:
        """The tokens so far, [1, n], written token by token: processors ask for them at every one."""
        count = len(self.token_ids)
        if count > len(self._tensor):
            grown = torch.empty(2 * count, dtype=torch.long, device=self.sampler.model.device)
            grown[: self._written] = self._tensor[: self._written]
            self._tensor = grown
        if count > self._written:
            new = torch.tensor(self.token_ids[self._written :])
            self._tensor[self._written : count] = new
            self._written = count
        return self._tensor[None, :count]

    def next_end(self, chunk: int, version: int) -> int:
        """Where the next feed ends, by the session's own history alone.

        A cache that is rebuilt is fed in the pieces that it was first fed in, since other pieces would
        give other last bits. What is new is fed `chunk` tokens at a time; so is all under new weights.
        """
        if self.fed_version != version:
            self.ends, self.fed_version = [], version
        again = bisect_right(self.ends, self.cached)
        if again == len(self.ends):
            self.ends.append(min(self.cached + chunk, len(self.token_ids)))
        return self.ends[again]

    def close(self) -> None:
        self.closed = True
        self.sampler.release(self)


@dataclass(eq=False)
class Turn:
    """A turn being sampled."""

    session: LocalSession
    params: SamplingParams
    limit: int  # tokens it may still add
    stop: StopStrings | None
    result: asyncio.Future[Sampled]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    version: int = -1  # of the weights at the first token

    def row(self) -> Row:
        session = self.session
        return Row(self.params, session.seed, len(session.token_ids), session.history, len(self.token_ids))

    def extend(self, token: int, logprob: float, sampling_logprob: float) -> FinishReason | None:
        self.session.token_ids.append(token)
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        if token in self.params.eos_token_ids:
            return "eos"
        if self.stop is not None and self.stop.completed_by_last(self.token_ids):
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None
