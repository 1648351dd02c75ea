"""Episodes as tensors for a policy-gradient update.

A `Trajectory` is one episode's tokens and which of them this run's policy sampled. A `PackedBatch` lays
several end to end, without padding, a common beginning only once (`families`), and names the positions
whose outputs are needed: the one before each sampled token (its state), and the last one where the value
bootstraps. Everything per sampled token is then [B, N]: row b holds trajectory b's sampled tokens in order,
the rest is padding.

An encoder–decoder's trajectory is what its decoder read and wrote, and beside it the source, which its
encoder read. A batch holds each distinct source once. What such decoders begin with isn't shared: its states
depend on the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etude.data.families import Layout
from etude.data.sources import Sources, begun
from etude.errors import DataError
from etude.math.placing import place
from etude.types import STOP_POLICIES, Episode, NamedReward, StopPolicy, StopReason


@dataclass(slots=True)
class Trajectory:
    """What an update needs of an episode.

    Attributes:
        token_ids: [T] int64; of an encoder–decoder, its decoder's, start tokens first.
        sampled: positions of the sampled tokens, ascending, [n] int64; none of them 0.
        score: the episode's reward, by its stop reason's policy.
        bootstrap: the value of its last state stands in for what would have followed.
        prompt_length: tokens before the first thing that followed the prompt; a source isn't counted.
        sampler_logprobs: the sampler's log-probabilities of the sampled tokens [n], if known.
        rewards: what the score was made of, where that is known; positions are those of `token_ids`.
        compared: its score takes part in baselines. By default where a token was sampled.
        source_ids: what an encoder–decoder's encoder read, [S] int64; None for a decoder.
        environment: name of the one it was played in, in a mixed run.
    """

    token_ids: Tensor
    sampled: Tensor
    score: float
    bootstrap: bool = False
    prompt_length: int = 0
    sampler_logprobs: Tensor | None = None
    rewards: tuple[NamedReward, ...] = ()
    compared: bool | None = None
    source_ids: Tensor | None = None
    environment: str = ""

    def __post_init__(self) -> None:
        if self.source_ids is not None and not len(self.source_ids):
            raise DataError("an encoder was given no token to read; expected at least one, such as the end")
        if self.compared is None:
            self.compared = len(self.sampled) > 0
        if len(self.sampled) and self.sampled[0] == 0:
            raise DataError("the first token of a sequence can't have been sampled: give the model a prompt")

    @classmethod
    def of_episode(
        cls, episode: Episode, policies: Mapping[StopReason, StopPolicy] = STOP_POLICIES
    ) -> Trajectory:
        """An episode under its stop reason's policy: what isn't trained on has no sampled tokens left."""
        policy = policies[episode.stop] if episode.stop is not None else StopPolicy()
        source, behind = None, 0
        if any(segment.encoder for segment in episode.segments):
            source = torch.tensor(episode.source_ids, dtype=torch.long)
            behind = len(source)
        mask = torch.tensor(episode.sampled[behind:], dtype=torch.bool)
        compared = policy.reward != "drop" and bool(mask.any())
        if not policy.train:
            mask[:] = False
        logprobs = [x for s in episode.segments if s.sampled for x in s.logprobs or ()]
        known = policy.train and len(logprobs) == int(mask.sum())
        prompt = [len(s.token_ids) for s in episode.segments if s.source == "prompt" and not s.encoder]
        rewards = () if policy.reward == "drop" else tuple(_behind(r, behind) for r in episode.rewards)
        return cls(
            token_ids=torch.tensor(episode.token_ids[behind:], dtype=torch.long),
            sampled=mask.nonzero()[:, 0],
            score=_kept(episode.reward, policy),
            bootstrap=policy.bootstrap,
            prompt_length=sum(prompt),
            sampler_logprobs=torch.tensor(logprobs) if known else None,
            rewards=rewards,
            compared=compared,
            source_ids=source,
        )

    @classmethod
    def of_response(
        cls,
        query: Tensor,
        response: Tensor,
        score: float,
        mask: Tensor | None = None,
        starts: Sequence[Sequence[int]] = (),
    ) -> Trajectory:
        """A query [q] and a response [r], every token of it sampled unless `mask` [r] says 0.

        Args:
            starts: for an encoder–decoder, which reads the query and begins its response: with one of these,
                a start token and perhaps one that is forced after it. The start token was never sampled; what
                is forced wasn't unless a mask says so.

        Raises:
            DataError: the mask has another length, or the response doesn't begin with a start token.
        """
        query, response = query.cpu(), response.cpu()
        if mask is not None and mask.shape != response.shape:
            raise DataError(f"a response has {len(response)} tokens and its mask {len(mask)}")
        sampled = torch.ones(len(response), dtype=torch.bool) if mask is None else mask.bool().cpu().clone()
        if not starts:
            positions = len(query) + sampled.nonzero()[:, 0]
            return cls(torch.cat([query, response]), positions, score, prompt_length=len(query))
        given = begun(response.tolist(), starts)
        sampled[: given if mask is None else 1] = False
        return cls(response, sampled.nonzero()[:, 0], score, source_ids=query)

    @property
    def query_length(self) -> int:
        """Tokens of the prompt, whoever reads it."""
        return self.prompt_length + (0 if self.source_ids is None else len(self.source_ids))

    @property
    def response_length(self) -> int:
        """All others: of an encoder–decoder, from the decoder's start token on."""
        return len(self.token_ids) - self.prompt_length

    @property
    def early_rewards(self) -> dict[int, float]:
        """What was earned before the end, by number of the sampled token; the rest of the score comes there.

        A reward at a token that wasn't sampled belongs to the last sampled one before it.
        """
        earned: dict[int, float] = {}
        for reward in self.rewards:
            if reward.position is not None and reward.value is not None and len(self.sampled):
                token = max(int((self.sampled <= reward.position).sum()) - 1, 0)
                earned[token] = earned.get(token, 0.0) + reward.weighted
        return earned


def _behind(reward: NamedReward, source: int) -> NamedReward:
    """A reward whose position counts the tokens of an episode, by those after its source."""
    if reward.position is None or not source:
        return reward
    return replace(reward, position=reward.position - source)


def _kept(reward: float, policy: StopPolicy) -> float:
    if policy.reward == "drop":
        return 0.0
    return min(reward, 0.0) if policy.reward == "clamp" else reward


@dataclass(slots=True)
class PackedBatch:
    """Trajectories end to end.

    Attributes:
        input_ids: [T], all tokens.
        lengths, prefixes: of what lies there, see `families.Layout`.
        states: flat positions whose next-token distributions are needed, [M]: one per sampled token. The
            last one of a common beginning is asked for by each trajectory that samples there.
        targets: the tokens that were sampled there, [M].
        last_states: flat positions of the last tokens of trajectories whose value bootstraps, [K].
        mask: [B, N], true where row b has an n-th sampled token; `mask.sum()` is M.
        bootstrap: [B], true where the value bootstraps; its sum is K.
        sources: what an encoder–decoder's encoder reads; None for a decoder.
    """

    input_ids: Tensor
    lengths: list[int]
    prefixes: list[int | None]
    states: Tensor
    targets: Tensor
    last_states: Tensor
    mask: Tensor
    bootstrap: Tensor
    sources: Sources | None = None

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], device: torch.device | str = "cpu", share: bool = False
    ) -> PackedBatch:
        """With `share`, what several trajectories begin with lies there once, where that saves enough."""
        sources = Sources.of([t.source_ids for t in trajectories], device)
        layout = Layout.of([t.token_ids for t in trajectories], share and sources is None)
        counts = torch.tensor([len(t.sampled) for t in trajectories])
        mask_BN = torch.arange(int(counts.max()) if len(counts) else 0)[None] < counts[:, None]
        states = [layout.flat(i, t.sampled - 1) for i, t in enumerate(trajectories)]
        ends = [
            layout.flat(i, torch.tensor([len(t.token_ids) - 1]))
            for i, t in enumerate(trajectories)
            if t.bootstrap
        ]
        return cls(
            input_ids=place(torch.cat(layout.pieces), device),
            lengths=[len(piece) for piece in layout.pieces],
            prefixes=layout.prefixes,
            states=place(torch.cat(states), device),
            targets=place(torch.cat([t.token_ids[t.sampled] for t in trajectories]), device),
            last_states=place(torch.cat([states[0][:0], *ends]), device),
            mask=place(mask_BN, device),
            bootstrap=place([t.bootstrap for t in trajectories], device),
            sources=sources,
        )

    def unpack(self, values_M: Tensor) -> Tensor:
        """Per-token values [M] as rows [B, N], 0 where there is no token."""
        return values_M.new_zeros(self.mask.shape).masked_scatter(self.mask, values_M)
