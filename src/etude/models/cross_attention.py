"""What a decoder's flat step attends to beside its own tokens: what each sequence's encoder has read.

Keys and values of a source are computed once, in the step that brings its states, and lie in a slot from then
on, like those of the sequence's own tokens. The modelling code sees a cache of its own kind (`StepCache`): it
hands on new keys and values, and holds a mark in place of those that lie in slots, by which the attention
knows what it is asked for. Position biases by distance (T5) come here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import Cache

from etude.errors import ModelError
from etude.models.cached_attention import attend_block, attend_cached
from etude.models.plans import PackedPlan
from etude.models.single_attention import Scores, computing, grouped
from etude.models.slot_cache import SlotCache


@dataclass
class CrossPlan:
    """Where the keys and values lie of what each sequence's encoder has read.

    Attributes:
        cache: with slots for sources.
        slots, lengths, source_lengths: of each sequence in this step: its slot, its own tokens in the step,
            and how many its encoder read.
        new: states [S, D] of sources that come with this step.
        places: (slot, index into `new`): a source may go to several slots.
        bias: of the attention to a sequence's own tokens (T5), as the step runs.
    """

    cache: SlotCache
    slots: Sequence[int]
    lengths: Sequence[int]
    source_lengths: Sequence[int]
    new: Sequence[Tensor] = ()
    places: Sequence[tuple[int, int]] = ()
    device: torch.device | str = "cpu"
    bias: DistanceBias | None = field(init=False, default=None)

    def new_states(self, device: torch.device) -> Tensor:
        """[1, S, D], the new sources end to end; a single empty state where there is none."""
        if not self.new:
            return torch.zeros(1, 1, 1, device=device)  # never looked at
        return torch.cat(list(self.new)).unsqueeze(0)

    @cached_property
    def plan(self) -> PackedPlan:
        """The step's sequences as ones that see all of their slot."""
        return PackedPlan(
            self.lengths,
            past=[n - 1 for n in self.source_lengths],
            cache=self.cache,
            slots=self.slots,
            device=self.device,
        )

    @cached_property
    def _written(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each token that is written: its place among the new ones, its slot, its position there."""
        starts = [0, *accumulate(map(len, self.new))]
        positions = [torch.arange(len(self.new[k])) for _, k in self.places]
        source = [starts[k] + own for (_, k), own in zip(self.places, positions, strict=True)]
        slots = [torch.full_like(own, slot) for (slot, _), own in zip(self.places, positions, strict=True)]
        written = torch.stack([torch.cat(part) for part in (source, slots, positions)]).to(self.device)
        return written[0], written[1], written[2]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put `key` and `value` [H, S, d] of the new sources into their slots."""
        source, slots, positions = self._written
        if [k for _, k in self.places] != list(range(len(self.new))):  # else each goes to one slot, in order
            key, value = key[:, source], value[:, source]
        self.cache.write(layer, key, value, slots, positions)


class StepCache(EncoderDecoderCache):
    """What modelling code takes for its cache in a flat step."""

    def __init__(self, cross: CrossPlan) -> None:
        super().__init__(_OwnTokens(), _Sources(cross))
        if not cross.new:
            self.is_updated = _Always()


class _Always(dict[int, bool]):
    def get(self, key: int, default: Any = None) -> bool:
        return True


class _OwnTokens(Cache):
    """Hands new keys and values on: the attention puts them where the plan says."""

    def __init__(self) -> None:
        self.layers = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _Sources(Cache):
    """Writes keys and values of new sources into their slots, and gives a mark for all."""

    def __init__(self, cross: CrossPlan) -> None:
        self.layers = _MarkedLayers()  # type: ignore[assignment]
        self._cross = cross

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self._cross.write(layer_idx, computing(key_states[0]), computing(value_states[0]))
        return IN_SLOTS, IN_SLOTS

    def __len__(self) -> int:
        return 0


@dataclass
class _MarkedLayer:
    keys: Tensor
    values: Tensor


class _MarkedLayers:
    """As many layers as anyone asks for."""

    def __getitem__(self, index: int) -> _MarkedLayer:
        return _MARKED


IN_SLOTS = torch.zeros(1, 1, 1, 1)  # stands for keys and values that lie in slots
_MARKED = _MarkedLayer(IN_SLOTS, IN_SLOTS)


def attend_decoder(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackedPlan,
    layer: int,
    scores: Scores,
    position_bias: Tensor | None,
) -> Tensor:
    """A decoder's attention in a flat step: to what its sequences' encoder read, or to their own tokens.

    Args:
        query: [H, T, d].
        key, value: [1, H_kv, T, d] of the sequences' own tokens, or the mark for what was read.
        position_bias: what the layer would add to its scores, if its sequence were the only one.

    Returns:
        [H, T, d]
    """
    assert plan.cross is not None
    if key is IN_SLOTS:
        return attend_sources(query, plan.cross, layer, scores)
    own = computing(key[0]), computing(value[0])
    if position_bias is None:
        return attend_cached(query, *own, plan, layer, scores, None)
    assert plan.cache is not None
    plan.cache.layer(layer, *own)
    plan.cache.write(layer, *own, plan.slots_T, plan.positions_T)
    width = max(past + n for past, n in zip(plan.past, plan.lengths, strict=True))
    if getattr(module, "has_relative_attention_bias", False):
        plan.cross.bias = DistanceBias.of(module, width, query.dtype)
    if plan.cross.bias is None:
        raise ModelError(f"{type(module).__name__} adds a position bias that is not one by distance")
    return attend_with_bias(query, *plan.cache.layers[layer], plan, scores, plan.cross.bias)


def attend_sources(q: Tensor, cross: CrossPlan, layer: int, scores: Scores) -> Tensor:
    """Each token over all that its sequence's encoder read. [H, T, d] in and out."""
    keys, values = cross.cache.layers[layer]
    plan, block = cross.plan, cross.plan.decoding
    if block is not None:
        attended = attend_block(q, keys, values, block, scores, block.mask(None))
        if block.dense and len(block.members) == len(plan.lengths):
            return attended
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    if block is not None:
        out[:, block.tokens] = attended
    for i, (start, n) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        if block is not None and i in block.members:
            continue
        own, slot, seen = slice(start, start + n), plan.slots[i], slice(plan.past[i] + 1)
        stacked = q[:, own].reshape(keys.shape[1], -1, q.shape[-1])  # heads that share keys, as queries
        each = grouped(stacked[None], keys[slot, :, seen][None], values[slot, :, seen][None], None, scores)
        out[:, own] = each.reshape(q.shape[0], n, -1)
    return out


@dataclass
class DistanceBias:
    """What is added to the score of a key that lies so many tokens back: [H, N] for distances 0 … N − 1.

    Raffel et al. 2020 (arXiv:1910.10683), section 2.1. Layers may share one.
    """

    by_distance_HN: Tensor
    _block_mask: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, width: int, dtype: torch.dtype) -> DistanceBias:
        """Of the layer that has it; its last query's biases are those of all distances."""
        compute: Any = module.compute_bias
        return cls(compute(1, width, past_seen_tokens=width - 1)[0, :, 0].flip(-1).to(dtype))

    def masked(self, age: Tensor) -> Tensor:
        """What to add at these distances [...], −inf at negative ones. [H, ...]"""
        return self.by_distance_HN[:, age.clamp(min=0)].masked_fill(age < 0, -torch.inf)

    def block_mask(self, lengths: Tensor, width: int) -> Tensor:
        """Of rows whose last of so many tokens looks back. [rows, H, 1, width]"""
        if self._block_mask is None:
            age = lengths[:, None] - 1 - torch.arange(width, device=lengths.device)
            self._block_mask = self.masked(age).transpose(0, 1).unsqueeze(2)
        return self._block_mask


def attend_with_bias(
    q: Tensor, keys: Tensor, values: Tensor, plan: PackedPlan, scores: Scores, bias: DistanceBias
) -> Tensor:
    """Each sequence over its own tokens in its slot of `keys`/`values`. [H, T, d] in and out."""
    block = plan.decoding
    if block is not None:
        mask = bias.block_mask(block.lengths, block.width)
        attended = attend_block(q, keys, values, block, scores, mask)
        if block.dense and len(block.members) == len(plan.lengths):
            return attended
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    if block is not None:
        out[:, block.tokens] = attended
    for i, (start, n) in enumerate(zip(plan.starts, plan.lengths, strict=True)):
        if block is not None and i in block.members:
            continue
        own, slot, seen = slice(start, start + n), plan.slots[i], slice(plan.past[i] + n)
        end = plan.past[i] + n
        positions = torch.arange(end, device=q.device)
        mask = bias.masked(positions[-n:, None] - positions)
        k, v = keys[slot, :, seen], values[slot, :, seen]
        out[:, own] = grouped(q[:, own][None], k[None], v[None], mask[None], scores)[0]
    return out
