"""How the engine gets logits out of a model: packed, for almost every family, or row by row.

A backend owns the key–value cache of a number of slots. The engine tells it how many and how long they are,
which tokens follow in which slots, and gets the logits after the last of them. `choose_backend` asks the
model which one is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from etude.models.attention import PackedPlan, SlotCache, packed_inputs, supports_packing
from etude.sampling.memory import CacheCost


@dataclass(slots=True)
class Feed:
    """Tokens that follow `past` tokens already in `slot`."""

    slot: int
    past: int
    token_ids: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens in the slot afterwards."""
        return self.past + len(self.token_ids)


class Backend(Protocol):
    def logits(self, feeds: Sequence[Feed]) -> Tensor:
        """Put each feed's tokens into its slot; the logits after its last token, [feeds, vocabulary]."""
        ...

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copy the first `length` tokens' keys and values between slots; False if that can't be done."""
        ...

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        """Have `slots` slots of `length` tokens; slot i goes on with what slot `kept[i]` held."""
        ...

    def measure(self) -> CacheCost:
        """What the cache takes, found by feeding the model a few tokens."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes the cache holds now."""
        ...


class PackedBackend:
    """One flat step for all rows, prompts and single tokens alike, over a preallocated cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = SlotCache(slots=0, length=0)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, feeds: Sequence[Feed]) -> Tensor:
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

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        self.cache.resize(slots, length, kept)

    def measure(self) -> CacheCost:
        cache = SlotCache(slots=1, length=1)
        plan = PackedPlan([1], past=[0], cache=cache, slots=[0], device=self.model.device)
        self.model(**packed_inputs([0], plan))
        sizes = [tensor.nbytes for layer in cache.layers.values() for tensor in layer]
        return CacheCost(token=sum(sizes), growth=max(sizes))

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

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        """These caches grow as they are fed; what is no longer held goes."""
        self.caches = {new: self.caches[old] for new, old in enumerate(kept) if old in self.caches}

    def measure(self) -> CacheCost:
        """A layer with a sliding window is counted like any other: a bound from above."""
        few, more = self._probe(2), self._probe(4)
        token = (sum(more) - sum(few)) // 2
        growth = max((b - a for a, b in zip(few, more, strict=True)), default=0) // 2
        return CacheCost(token, growth, session=sum(few) - 2 * token)

    def _probe(self, length: int) -> list[int]:
        """Bytes of each tensor in the cache after so many tokens."""
        self._row(Feed(slot=-1, past=0, token_ids=[0] * length))
        return _sizes(self.caches.pop(-1))

    @property
    def nbytes(self) -> int:
        return sum(size for cache in self.caches.values() for size in _sizes(cache))


def _sizes(cache: DynamicCache) -> list[int]:
    return [x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]


def choose_backend(model: PreTrainedModel) -> Backend:
    return PackedBackend(model) if supports_packing(model) else SoloBackend(model)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model lives: on its accelerator, or in the machine's memory."""
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)  # mps shares it
