"""What the engine keeps per episode: its session, and the turn that is being sampled in it."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from os.path import commonprefix
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import decode
from etude.sampling.cuts import Row
from etude.sampling.stop import StopStrings
from etude.types import FinishReason, Sampled, SamplingParams

if TYPE_CHECKING:
    from etude.sampling.local import LocalSampler


_FAMILIES = count()  # numbers for them


@dataclass(eq=False)
class LocalSession:
    """One episode's tokens, and its slot in the cache while it has one."""

    sampler: LocalSampler
    seed: int
    source_ids: Sequence[int] = ()  # what an encoder–decoder's encoder reads; the tokens are its decoder's
    token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    cached: int = 0  # tokens whose keys and values are in the slot
    ends: list[int] = field(default_factory=list)  # where its feeds ended, if the sampler is deterministic
    fed_version: int = 0  # of the weights that the feeds went through
    source: tuple[LocalSession, int] | None = None  # who holds its first tokens, and how many of them
    family: tuple[int, int] | None = None  # see `feeds.Feed`
    busy: bool = False
    idle_since: int = 0  # the step at which its last turn ended
    closed: bool = False
    _tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _written: int = 0  # tokens that are in it

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Sampled:
        return await self.sampler._sample(self, token_ids, params)

    def history(self) -> torch.Tensor:
        """The tokens so far, [1, n], written token by token: processors ask for them at every one."""
        length = len(self.token_ids)
        if length > len(self._tensor):
            grown = torch.empty(2 * length, dtype=torch.long, device=self.sampler.model.device)
            grown[: self._written] = self._tensor[: self._written]
            self._tensor = grown
        if length > self._written:
            new = torch.tensor(self.token_ids[self._written :])
            self._tensor[self._written : length] = new
            self._written = length
        return self._tensor[None, :length]

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

    def join(self, holder: LocalSession, length: int) -> None:
        """Share the first `length` tokens with `holder` and its family, or found one.

        None shares more than the one that it joined by does: any members share what the least of them does.
        """
        if holder.family is None:
            holder.family = (next(_FAMILIES), length)
        number, shared = holder.family
        self.family = (number, min(length, shared))

    def close(self) -> None:
        """Give up the session's cache; a turn that is being sampled in it fails."""
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
    version: int = -1  # of the weights at the first sampled token
    forced: int = 0  # the tokens that the turn began with
    coming: int | None = None  # the row of the latest draw that its next token is in, not known yet
    in_line: bool = False  # has its place among those that wait
    over: bool = False  # finished, failed or given up: what is still drawn for it is thrown away
    plain: bool = field(init=False)  # drawn from the whole distribution: nothing edits or cuts it
    _row: Row = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        edited = params.min_new_tokens or params.allowed_token_ids is not None or self.needs_history
        self.plain = not (edited or params.top_k > 0 or params.top_p < 1 or params.min_p)
        self._row = Row(self.params, self.session.seed, 0, self.session.history, 0)

    @property
    def ahead(self) -> int:
        """Tokens that were drawn and aren't known yet: 0 or 1."""
        return 0 if self.coming is None else 1

    @property
    def read(self) -> int:
        """Tokens that attention goes over before its first: an encoder's, or the session's own."""
        return len(self.session.source_ids) or len(self.session.token_ids)

    @property
    def ends_by_length(self) -> bool:
        """Whether the token that is coming is the last that it may have."""
        return len(self.token_ids) + self.ahead >= self.limit

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it, and not only on how many they are."""
        return bool(self.params.processors) or self.params.repetition_penalty != 1

    def row(self) -> Row:
        """What the draw of the next token depends on."""
        ahead = self.ahead
        self._row.position = len(self.session.token_ids) + ahead
        self._row.generated = len(self.token_ids) + ahead
        return self._row

    def force(self) -> FinishReason | None:
        """Begin with the forced tokens, up to one that ends the turn."""
        for token in self.params.forced_prefix:
            self.forced += 1
            if finish := self._append(token):
                return finish
        return None

    def extend(self, token: int, logprob: float, sampling_logprob: float) -> FinishReason | None:
        self.logprobs.append(logprob)
        self.sampling_logprobs.append(sampling_logprob)
        return self._append(token)

    def sampled(self, tokenizer: PreTrainedTokenizerBase, finish: FinishReason) -> Sampled:
        """What the turn came to, its text without the end-of-sequence token."""
        ids = self.token_ids[:-1] if finish == "eos" else self.token_ids
        text = decode(tokenizer, ids)
        # A character that forced and sampled tokens share belongs to the sampled part.
        beginning = decode(tokenizer, ids[: self.forced]) if self.forced else ""
        return Sampled(
            self.token_ids,
            text,
            self.logprobs,
            self.sampling_logprobs,
            finish,
            self.version,
            forced=self.forced,
            forced_text=commonprefix([beginning, text]),  # noqa: RUF071 (of characters, as it should be)
        )

    def _append(self, token: int) -> FinishReason | None:
        self.session.token_ids.append(token)
        self.token_ids.append(token)
        if token in self.params.eos_token_ids:
            return "eos"
        if self.stop is not None and self.stop.completed_by_last(self.token_ids):
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None
