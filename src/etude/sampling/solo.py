"""One forward per row, each with a state of its own: slow, and right for every decoder that can be sampled.

What a family keeps between two forwards differs: keys and values (BLOOM, Falcon), a convolution's last
inputs and a recurrent state (Mamba, and hybrids such as Jamba or LFM2), or something inside the model that
two sessions would write over each other (RecurrentGemma). So does what it can be fed. So the ways to
continue a sequence are tried on the model itself, the fastest first, until one gives the logits of a
plain forward. An encoder–decoder's encoder reads a slot's source once, when its first tokens are fed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from etude.errors import ModelError
from etude.models.encoder_decoder import is_encoder_decoder, plain_decoder_logits
from etude.models.packing import FOREIGN_ERRORS, crosses_switch, plain_logits, probes, same_logits
from etude.sampling.cuts import Row
from etude.sampling.draw import Draw
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheCost, CacheLimits

Way = Literal["pieces", "tokens", "whole"]  # several tokens after a state, one by one, or all from the start
_STATES = ("past_key_values", "cache_params", "state")  # the keywords under which families take theirs
_NESTS = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)


class SoloBackend:
    """`feeds.Backend` by one forward per row.

    Args:
        way: how a sequence is continued; see `Way`.
        max_source_length: tokens that an encoder–decoder's encoder reads at most.
    """

    closes_up = False
    runs_ahead = False

    def __init__(self, model: PreTrainedModel, way: Way, max_source_length: int = 0) -> None:
        self.model = model
        self.way = way
        self.max_source_length = max_source_length
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keyword = next((name for name in _STATES if name in parameters), _STATES[0])
        self._reads = is_encoder_decoder(model)
        self._states: dict[int, Any] = {}
        self._tokens: dict[int, list[int]] = {}
        self._encoded: dict[int, Any] = {}

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        assert drawn_R is None, "this backend doesn't run ahead"
        row = self._from_the_start if self.way == "whole" else self._continued
        return torch.stack([row(feed) for feed in feeds])

    def draw(
        self, feeds: Sequence[Feed], ready: Sequence[int], rows: Sequence[Row], drawn_R: Tensor | None
    ) -> Draw | None:
        return None

    def weights_changed(self) -> None:
        """Looked up at every step."""

    def copy(self, source: int, target: int, length: int) -> bool:
        return False  # a state may be more than keys and values by position

    def limits(self, limits: CacheLimits) -> CacheLimits:
        return limits

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        """States grow as they are fed; what is no longer held goes."""
        self._states = {new: self._states[old] for new, old in enumerate(kept) if old in self._states}
        self._tokens = {new: self._tokens[old] for new, old in enumerate(kept) if old in self._tokens}
        self._encoded = {new: self._encoded[old] for new, old in enumerate(kept) if old in self._encoded}

    def measure(self) -> CacheCost:
        """A layer with a sliding window is counted like any other: a bound from above.

        So is an encoder's source, by its full length.
        """
        few, more = self._probe(2, 2), self._probe(4, 2)
        token = max(0, sum(more) - sum(few)) // 2
        growth = max((b - a for a, b in zip(few, more, strict=True)), default=0) // 2
        session = sum(few) - 2 * token
        if self._reads:
            session += max(0, sum(self._probe(2, 4)) - sum(few)) // 2 * self.max_source_length
        return CacheCost(token, growth, session)

    def _probe(self, length: int, source: int) -> list[int]:
        """Bytes of each tensor that is kept after so many tokens."""
        self.logits([Feed(slot=-1, past=0, token_ids=[0] * length, source_ids=[0] * source)])
        self._tokens.pop(-1, None)
        kept = self._encoded.pop(-1, None), self._states.pop(-1, None)
        return [tensor.nbytes for tensor in _tensors(kept)]

    @property
    def nbytes(self) -> int:
        states = *self._states.values(), *self._encoded.values()
        return sum(tensor.nbytes for tensor in _tensors(states))

    def _from_the_start(self, feed: Feed) -> Tensor:
        tokens = [*self._tokens.get(feed.slot, [])[: feed.past], *feed.token_ids]
        self._tokens[feed.slot] = tokens
        if not self._reads:
            return plain_logits(self.model, tokens)[-1]
        if feed.past == 0:
            self._encode(feed)
        ids = torch.tensor([tokens], device=self.model.device)
        inputs = {"encoder_outputs": self._encoded[feed.slot], "decoder_input_ids": ids, "use_cache": False}
        logits: Tensor = self.model(**inputs).logits[0, -1]
        return logits

    def _encode(self, feed: Feed) -> None:
        encoder: Any = self.model.get_encoder()
        ids = torch.tensor([feed.source_ids], device=self.model.device)
        self._encoded[feed.slot] = encoder(input_ids=ids)

    def _continued(self, feed: Feed) -> Tensor:
        if feed.past == 0:
            self._states[feed.slot] = self._fresh_state()
            if self._reads:
                self._encode(feed)
        if self.way == "pieces" or feed.past == 0:
            return self._forward(feed.slot, feed.past, feed.token_ids)
        for i, token in enumerate(feed.token_ids):
            logits = self._forward(feed.slot, feed.past + i, [token])
        return logits

    def _forward(self, slot: int, past: int, token_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor([token_ids], device=self.model.device)
        inputs: dict[str, Any] = {"decoder_input_ids" if self._reads else "input_ids": ids, "use_cache": True}
        if self._reads:
            inputs["encoder_outputs"] = self._encoded[slot]
        if self._states[slot] is not None:
            inputs[self._keyword] = self._states[slot]
        if self._takes_positions:  # some families count from 0 in every forward, else
            positions = torch.arange(past, past + len(token_ids), device=self.model.device)
            inputs["position_ids"] = positions.unsqueeze(0)
        output = self.model(**inputs)
        self._states[slot] = output[self._keyword]
        return output.logits[0, -1]

    def _fresh_state(self) -> Any:
        """As `generate` would make it, or None where the model makes its own."""
        family: Any = type(self.model)
        if self._reads:
            return None
        if self._keyword != "past_key_values" or not family._supports_default_dynamic_cache():
            return None
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))


def solo_backend(model: PreTrainedModel, max_length: int, max_source_length: int = 0) -> SoloBackend:
    """The backend with the fastest way that is right for `model`.

    Raises:
        ModelError: there is none: what follows a token changes its logits (an encoder), or the model
            can't be run on a single sequence.
    """
    ways: tuple[Way, ...] = ("whole",) if crosses_switch(model, max_length) else get_args(Way)
    failure: Exception | None = None
    for way in ways:
        try:
            if _continues(SoloBackend(model, way)):
                return SoloBackend(model, way, max_source_length)
        except FOREIGN_ERRORS as error:
            failure = error
    raise ModelError(
        f"{type(model).__name__} can't be sampled from: continuing a sequence gives other logits than one "
        "forward of it"
        + (f" (or fails: {failure!r})" if failure else "")
        + "; expected a causal decoder, or "
        "an encoder–decoder"
    ) from failure


@torch.no_grad()
def _continues(backend: SoloBackend) -> bool:
    """Two sequences fed in turns, in pieces and one by one, come out as one plain forward of each."""
    model, training = backend.model, backend.model.training
    model.eval()
    try:
        sequences: list[list[int]] = probes(model, (21, 20))
        sources: list[list[int]] = [[], []]
        if is_encoder_decoder(model):
            sources = probes(model, (9, 14))
            whole = [plain_decoder_logits(model, *pair) for pair in zip(sources, sequences, strict=True)]
        else:
            whole = [plain_logits(model, ids) for ids in sequences]
        actual, expected = [], []
        for start, end in pairwise((0, 5, *range(6, 12), 15, *range(16, 19), 20)):
            feeds = [
                Feed(slot, start, ids[start:end], source_ids=sources[slot])
                for slot, ids in enumerate(sequences)
            ]
            actual.append(backend.logits(feeds))
            expected.append(torch.stack([logits[end - 1] for logits in whole]))
        return same_logits(torch.cat(actual), torch.cat(expected))
    finally:
        model.train(training)


def _tensors(state: Any) -> Iterator[Tensor]:
    """Tensors in a state, however its family nests them."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)
    elif isinstance(state, _NESTS) or hasattr(state, "rnn_state"):  # the latter: xLSTM's own
        yield from _tensors(vars(state))
