"""One forward per row, each with a state of its own: slow, and right for every decoder that can be sampled.

What a family keeps between two forwards differs: keys and values (BLOOM, Falcon), a convolution's last
inputs and a recurrent state (Mamba, and hybrids such as Jamba or LFM2), or something inside the model that
two sessions would write over each other (RecurrentGemma). So does what it can be fed. So the ways to
continue a sequence are tried on the model itself, the fastest first, until one gives the logits of a
plain forward. Not covered: encoder–decoders.
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
    """

    closes_up = False
    runs_ahead = False

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        self.model = model
        self.way = way
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keyword = next((name for name in _STATES if name in parameters), _STATES[0])
        self._states: dict[int, Any] = {}
        self._tokens: dict[int, list[int]] = {}

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

    def measure(self) -> CacheCost:
        """A layer with a sliding window is counted like any other: a bound from above."""
        few, more = self._probe(2), self._probe(4)
        token = max(0, sum(more) - sum(few)) // 2
        growth = max((b - a for a, b in zip(few, more, strict=True)), default=0) // 2
        return CacheCost(token, growth, session=sum(few) - 2 * token)

    def _probe(self, length: int) -> list[int]:
        """Bytes of each tensor in the state after so many tokens."""
        self.logits([Feed(slot=-1, past=0, token_ids=[0] * length)])
        self._tokens.pop(-1, None)
        return [tensor.nbytes for tensor in _tensors(self._states.pop(-1, None))]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for state in self._states.values() for tensor in _tensors(state))

    def _from_the_start(self, feed: Feed) -> Tensor:
        tokens = [*self._tokens.get(feed.slot, [])[: feed.past], *feed.token_ids]
        self._tokens[feed.slot] = tokens
        return plain_logits(self.model, tokens)[-1]

    def _continued(self, feed: Feed) -> Tensor:
        if feed.past == 0:
            self._states[feed.slot] = self._fresh_state()
        if self.way == "pieces" or feed.past == 0:
            return self._forward(feed.slot, feed.past, feed.token_ids)
        for i, token in enumerate(feed.token_ids):
            logits = self._forward(feed.slot, feed.past + i, [token])
        return logits

    def _forward(self, slot: int, past: int, token_ids: Sequence[int]) -> Tensor:
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([token_ids], device=self.model.device),
            "use_cache": True,
        }
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
        if self._keyword != "past_key_values" or not family._supports_default_dynamic_cache():
            return None
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))


def solo_backend(model: PreTrainedModel, max_length: int) -> SoloBackend:
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
                return SoloBackend(model, way)
        except FOREIGN_ERRORS as error:
            failure = error
    raise ModelError(
        f"{type(model).__name__} can't be sampled from: continuing a sequence gives other logits than one "
        "forward of it" + (f" (or fails: {failure!r})" if failure else "") + "; expected a causal decoder"
    ) from failure


@torch.no_grad()
def _continues(backend: SoloBackend) -> bool:
    """Two sequences fed in turns, in pieces and one by one, come out as one plain forward of each."""
    model, training = backend.model, backend.model.training
    model.eval()
    try:
        sequences = probes(model, (21, 20))
        whole = [plain_logits(model, ids) for ids in sequences]
        actual, expected = [], []
        for start, end in pairwise((0, 5, *range(6, 12), 15, *range(16, 19), 20)):
            feeds = [Feed(slot, start, ids[start:end]) for slot, ids in enumerate(sequences)]
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
