"""How the engine gets logits out of a model: packed, for almost every family, in fixed shapes, or row by row.

A backend owns the key–value cache of a number of slots. The engine tells it which tokens follow in which
slots and gets the logits after the last of them. `choose_backend` asks the model which one is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from etude.errors import ConfigError
from etude.models.attention import PackedPlan, SlotCache, packed_inputs, supports_packing
from etude.sampling.static import (
    KEYS,
    ROWS,
    CudaCapture,
    StaticBackend,
    capturable,
    check_determinism,
    round_up,
)


@dataclass(slots=True)
class Feed:
    """Tokens that follow `past` tokens already in `slot`."""

    slot: int
    past: int
    token_ids: Sequence[int]


class Backend(Protocol):
    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        """Put each feed's tokens into its slot; the logits after its last token, [feeds, vocabulary]."""
        ...

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copy the first `length` tokens' keys and values between slots; False if that can't be done."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds now."""
        ...


class PackedBackend:
    """One flat step for all rows, prompts and single tokens alike, over a preallocated cache."""

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int, first_length: int = 256) -> None:
        self.model = model
        self.max_length = max_length
        self.cache = SlotCache(slots, min(first_length, max_length))
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        longest = max(feed.past + len(feed.token_ids) for feed in feeds)
        if longest > self.cache.length:
            self.cache.reserve(min(self.max_length, max(longest, 2 * self.cache.length)))
        plan = PackedPlan(
            lengths=[len(feed.token_ids) for feed in feeds],
            past=[feed.past for feed in feeds],
            cache=self.cache,
            slots=[feed.slot for feed in feeds],
            device=self.model.device,
        )
        inputs = packed_inputs([token for feed in feeds for token in feed.token_ids], plan)
        ends = torch.tensor(plan.lengths, device=self.model.device).cumsum(0) - 1
        if self.keeps_logits:
            return self.model(**inputs, logits_to_keep=ends).logits[0]
        return self.model(**inputs).logits[0, ends]

    def copy(self, source: int, target: int, length: int) -> bool:
        self.cache.copy(source, target, length)
        return True

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes


class SoloBackend:
    """One forward per row, each with a cache of its own: slow, and right for every decoder with a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.caches: dict[int, DynamicCache] = {}

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        return torch.stack([self._row(feed) for feed in feeds])

    def _row(self, feed: Feed) -> Tensor:
        if feed.past == 0:
            self.caches[feed.slot] = DynamicCache(config=self.model.config)
        ids = torch.tensor([feed.token_ids], device=self.model.device)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "past_key_values": self.caches[feed.slot],
            "use_cache": True,
        }
        return self.model(**inputs, attention_mask=ids.new_ones(1, feed.past + ids.shape[1])).logits[0, -1]

    def copy(self, source: int, target: int, length: int) -> bool:
        return False  # the caches of these models may hold more than keys and values by position

    @property
    def nbytes(self) -> int:
        layers = (layer for cache in self.caches.values() for layer in cache.layers)
        return sum(x.nbytes for layer in layers for x in vars(layer).values() if isinstance(x, Tensor))


def choose_backend(
    model: PreTrainedModel,
    slots: int,
    max_length: int,
    *,
    deterministic: bool = False,
    cuda_graphs: bool | None = None,
) -> Backend:
    """The fastest backend that this model can run on.

    Raises:
        ConfigError: `cuda_graphs` was asked for and can't be had.
        ModelError: `deterministic`, for a model that never can be.
    """
    if deterministic:
        check_determinism(model)
    packs = supports_packing(model)
    graphs = packs and cuda_graphs is not False and capturable(model)
    if cuda_graphs and not graphs:
        raise ConfigError(
            "cuda_graphs=True needs a model that runs packed, is on one CUDA device and has rotary "
            "frequencies that don't follow the batch; leave cuda_graphs out"
        )
    if not packs:
        return SoloBackend(model)
    if not deterministic and not graphs:
        return PackedBackend(model, slots, max_length)
    rows = round_up(slots, ROWS) if deterministic else slots
    packed = PackedBackend(model, rows + 1, round_up(max_length, KEYS))
    capture = partial(CudaCapture, model.device) if graphs else None
    return StaticBackend(packed, deterministic=deterministic, capture=capture)
