"""A sampler that takes the most probable token at each step, whatever it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etude.protocols import Sampler, Session
from etude.types import Sampled, SamplingParams


class GreedySampler:
    """Another sampler, at temperature 0.

    Args:
        sampler: what it asks.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @property
    def policy_version(self) -> int:
        return self._sampler.policy_version

    @property
    def max_length(self) -> int:
        return self._sampler.max_length

    @property
    def max_source_length(self) -> int:
        return self._sampler.max_source_length

    @property
    def decoder_start(self) -> tuple[int, ...]:
        return self._sampler.decoder_start

    def session(self, *, seed: int, source_ids: Sequence[int] = ()) -> Session:
        return _GreedySession(self._sampler.session(seed=seed, source_ids=source_ids))


class _GreedySession:
    def __init__(self, session: Session) -> None:
        self._session = session

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Sampled:
        return await self._session.sample(token_ids, replace(params, temperature=0.0))

    def close(self) -> None:
        self._session.close()
