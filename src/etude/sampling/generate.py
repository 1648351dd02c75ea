"""Continuing many sequences at once, from plain code."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from etude.protocols import Sampler
from etude.runtime.loop import run_sync
from etude.types import Sampled, SamplingParams


def continue_all(
    sampler: Sampler,
    sequences: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    seeds: Sequence[int],
    start: Sequence[int] | None = None,
) -> list[Sampled]:
    """One turn for each sequence of token ids, in their order.

    Args:
        sequences: what is continued; of an encoder–decoder, what its encoder reads.
        params: of all turns, or one for each.
        seeds: one for each, of its own counter-based stream.
        start: what an encoder–decoder's decoder begins with; by default its own start.
    """
    each = [params] * len(sequences) if isinstance(params, SamplingParams) else list(params)
    start = sampler.decoder_start if start is None else start

    async def one(token_ids: Sequence[int], settings: SamplingParams, seed: int) -> Sampled:
        session = sampler.session(seed=seed, source_ids=token_ids if start else ())
        try:
            return await session.sample(start or token_ids, settings)
        finally:
            session.close()

    async def every() -> list[Sampled]:
        turns = zip(sequences, each, seeds, strict=True)
        return list(await asyncio.gather(*(one(*turn) for turn in turns)))

    return run_sync(every())
