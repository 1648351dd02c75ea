"""The one attention function that sampler and trainer share.

Both lay their sequences end to end in a flat step of shape [1, T], with no padding, and hand the model a
`PackedPlan` that says where each sequence lies. The trainer's plan has no cache: each sequence attends to
itself, causally. The sampler's plan has one: new keys and values are written into the sequence's slot,
and its queries attend to all the slot holds. One function, so that both compute the same numbers.

The plan travels as an extra keyword of the model's forward, which `transformers` passes down to the
attention function. Calls without a plan (`generate`, a plain forward) go to the implementation the
model had before. Soft-capped scores and attention sinks, which the fused kernels don't know, are computed
explicitly, one sequence at a time. Not covered: families that don't use the attention interface, and
whatever mixes tokens outside attention (convolutions, recurrent states). `models.packing` refuses those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from etude.errors import ModelError
from etude.models import hugepages

PLAN = "packed_plan"  # the keyword under which a plan travels through the model
_PREFIX = "etude_"
_KNOWN_TENSORS = ("position_ids", "cache_position")  # that families hand on, and attention needn't know


class SlotCache:
    """Preallocated keys and values: one slot per sequence, for each layer [slots, heads, length, dim].

    Layers allocate when they are first written, since only then are their shapes known. `resize` copies,
    so callers grow in large steps.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def resize(self, slots: int, length: int, kept: Sequence[int]) -> None:
        """Have `slots` slots of `length` tokens; slot i goes on with what slot `kept[i]` held.

        Tensor by tensor, each given up before the next is copied: beside the cache itself, as it was or as
        it becomes, there is never more than one of its tensors.
        """
        if not kept:
            self.layers.clear()
        for index in self.layers:
            for part in (0, 1):
                keys_values = list(self.layers[index])
                keys_values[part] = self._resized(keys_values[part], slots, length, kept)
                self.layers[index] = (keys_values[0], keys_values[1])
        self.slots, self.length = slots, length

    def write(self, layer: int, key: Tensor, value: Tensor, slots_T: Tensor, positions_T: Tensor) -> None:
        """Write `key` and `value` [heads, T, dim] at (slot, position) of each of the T tokens."""
        if layer not in self.layers:
            self.layers[layer] = (self._empty(key), self._empty(value))
        keys, values = self.layers[layer]
        keys[slots_T, :, positions_T] = key.transpose(0, 1)
        values[slots_T, :, positions_T] = value.transpose(0, 1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for layer in self.layers.values():
            for tensor in layer:
                tensor[target, :, :length] = tensor[source, :, :length]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer)

    def _empty(self, like: Tensor) -> Tensor:
        return hugepages.zeros(like, self.slots, like.shape[0], self.length, like.shape[-1])

    def _resized(self, tensor: Tensor, slots: int, length: int, kept: Sequence[int]) -> Tensor:
        resized = hugepages.zeros(tensor, slots, tensor.shape[1], length, tensor.shape[3])
        both = min(length, self.length)
        for new, old in enumerate(kept):
            resized[new, :, :both] = tensor[old, :, :both]
        return resized


@dataclass
class PackedPlan:
    """Where each sequence's tokens lie in a flat step.

    Attributes:
        lengths: tokens of each sequence in this step, in order.
        past: tokens of each sequence already in the cache (all 0 without one).
        cache, slots: the cache and each sequence's slot in it; None and empty in training.
        positions_T, slots_T: of each token, its position in its sequence and its slot.
        windows: the sliding window that each layer asked for, written as the step runs.
    """

    lengths: Sequence[int]
    past: Sequence[int] = ()
    cache: SlotCache | None = None
    slots: Sequence[int] = ()
    device: torch.device | str = "cpu"
    positions_T: Tensor = field(init=False)
    slots_T: Tensor = field(init=False)  # empty without a cache
    windows: dict[int, int | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.past = self.past or [0] * len(self.lengths)
        positions = [
            p for past, n in zip(self.past, self.lengths, strict=True) for p in range(past, past + n)
        ]
        self.positions_T = torch.tensor(positions, device=self.device)
        slots = [s for s, n in zip(self.slots, self.lengths, strict=self.cache is not None) for _ in range(n)]
        self.slots_T = torch.tensor(slots, device=self.device)

    @property
    def position_ids(self) -> Tensor:
        """[1, T]"""
        return self.positions_T.unsqueeze(0)

    @cached_property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)][:-1]

    @cached_property
    def rectangle(self) -> Rectangle | None:
        """The training step as rows of equal length, unless most of that would be padding."""
        rows, width = len(self.lengths), max(self.lengths)
        if rows < 2 or rows * width > 1.5 * sum(self.lengths):
            return None
        row_T = torch.repeat_interleave(torch.tensor(self.lengths))
        cells_T = row_T * width + self.positions_T.cpu()
        tokens = torch.zeros(rows * width, dtype=torch.long)
        tokens[cells_T] = torch.arange(len(cells_T))
        return Rectangle(rows, width, tokens.to(self.device), cells_T.to(self.device))

    @cached_property
    def decoding(self) -> Decoding | None:
        """The sequences that add one token each, as one block of neighbouring slots, where that pays."""
        rows = [i for i, n in enumerate(self.lengths) if n == 1]
        if len(rows) < 2:
            return None
        seen = [self.past[i] + 1 for i in rows]
        slots = [self.slots[i] for i in rows]
        first, count, width = min(slots), max(slots) - min(slots) + 1, max(seen)
        if count * width > 2.5 * sum(seen):
            return None
        lengths = torch.ones(count, dtype=torch.long)  # holes look at one key and are thrown away
        lengths[torch.tensor(slots) - first] = torch.tensor(seen)
        starts = [self.starts[i] for i in rows]
        tokens = torch.tensor(starts, device=self.device)
        places = torch.tensor(slots, device=self.device) - first
        dense = starts == list(range(count)) and slots == list(range(first, first + count))
        return Decoding(set(rows), first, count, width, tokens, places, lengths.to(self.device), dense)


@dataclass
class Rectangle:
    """Sequences as [rows, width], padded on the right, where causal attention never looks."""

    rows: int
    width: int
    tokens: Tensor  # [rows * width], the token in each cell; any token in a padded one
    cells_T: Tensor  # the cell of each token


@dataclass
class Decoding:
    """Sequences that add one token each, and the block of slots that holds them."""

    members: set[int]
    first: int
    count: int
    width: int
    tokens: Tensor  # [R], places in the flat step
    places: Tensor  # [R], places in the block
    lengths: Tensor  # [count]
    dense: bool  # the step's first `count` tokens, in the order of the block and without holes
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[count, 1, 1, width], true where a slot's newest token may look."""
        if window not in self.masks:
            age = self.lengths[:, None] - 1 - torch.arange(self.width, device=self.lengths.device)
            visible = age >= 0 if not window else (age >= 0) & (age < window)
            self.masks[window] = visible[:, None, None]
        return self.masks[window]


@dataclass
class StaticPlan:
    """One token for each row of a fixed block, row i in slot i, in shapes that never change.

    All that differs between two steps is in the tensors, so that a step can be captured once and replayed,
    and so that what is computed for a row is computed in the same way whatever the others hold.

    Attributes:
        cache: with at least as many slots as there are rows.
        width: keys that every row is given, the ones after its own position masked.
        positions_T: of each row's token.
        slots_T: where each row writes: its own slot, or, if it takes no part, one that nobody reads.
        windows: the sliding window that each layer asked for, written as the step runs.
    """

    cache: SlotCache
    width: int
    positions_T: Tensor
    slots_T: Tensor
    windows: dict[int, int | None] = field(init=False, default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.positions_T.device

    @property
    def position_ids(self) -> Tensor:
        """[1, T]"""
        return self.positions_T.unsqueeze(0)

    @cached_property
    def decoding(self) -> Decoding:
        """All rows, in order and without holes."""
        count = len(self.positions_T)
        rows = torch.arange(count, device=self.device)
        return Decoding(set(range(count)), 0, count, self.width, rows, rows, self.positions_T + 1, dense=True)


@dataclass(frozen=True)
class Scores:
    """What is done to q·k before the softmax, and beside it.

    Attributes:
        scaling: the factor of q·k; 1/√d if None.
        softcap: scores are squashed into ±softcap, softcap · tanh(score / softcap) (Gemma 2).
        sinks_H: per head, the score of a key that every query sees and that has no value (GPT-OSS).
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_H is None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackedPlan | StaticPlan,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Attention of each sequence in a flat step. `query` [1, H, T, d], `key`/`value` [1, H_kv, T, d].

    Without dropout, whatever the model's mode: a policy's update needs the very distribution that sampled.

    Returns [1, T, H, d], the layout that attention functions of `transformers` return.

    Raises:
        ModelError: the layer hands over a tensor that is not known here (a position bias, say).
    """
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and name not in _KNOWN_TENSORS:
            raise ModelError(f"packed attention doesn't serve {name!r} ({type(module).__name__})")
    query, key, value = query[0], key[0], value[0]
    scores = Scores(scaling, softcap, s_aux)
    layer: int | None = getattr(module, "layer_idx", None)
    if layer is not None:
        plan.windows[layer] = sliding_window
    if plan.cache is None:
        assert isinstance(plan, PackedPlan)
        output = _attend_to_self(query, key, value, plan, scores, sliding_window)
    elif layer is None:
        raise ModelError(f"{type(module).__name__} has no layer_idx, by which the cache keeps its keys")
    else:
        plan.cache.write(layer, key, value, plan.slots_T, plan.positions_T)
        keys, values = plan.cache.layers[layer]
        if isinstance(plan, StaticPlan):
            output = _attend_block(query, keys, values, plan.decoding, scores, sliding_window)
        else:
            output = _attend_to_cache(query, keys, values, plan, scores, sliding_window)
    return output.transpose(0, 1).contiguous().unsqueeze(0)  # some families take a view of it


def _attend_to_self(
    q: Tensor, k: Tensor, v: Tensor, plan: PackedPlan, scores: Scores, window: int | None
) -> Tensor:
    """Training: each sequence attends to its own tokens. [H, T, d] in and out."""
    cells = plan.rectangle
    if cells is None or not scores.plain or (window and window < cells.width):
        parts = zip(*(tensor.split(list(plan.lengths), dim=1) for tensor in (q, k, v)), strict=True)
        return torch.cat([_attend(q, k, v, scores, window) for q, k, v in parts], dim=1)
    q_BHLd, k_BHLd, v_BHLd = (
        tensor[:, cells.tokens].unflatten(1, (cells.rows, cells.width)).transpose(0, 1)
        for tensor in (q, k, v)
    )
    out = scaled_dot_product_attention(
        q_BHLd, k_BHLd, v_BHLd, scale=scores.scaling, is_causal=True, enable_gqa=q.shape[0] != k.shape[0]
    )
    return out.transpose(0, 1).flatten(1, 2)[:, cells.cells_T]


def _attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, plan: PackedPlan, scores: Scores, window: int | None
) -> Tensor:
    """Sampling: each sequence attends to its slot of `keys`/`values` [slots, H_kv, length, d]."""
    together = plan.decoding
    if together is not None:
        decoded = _attend_block(q, keys, values, together, scores, window)
        if len(together.members) == len(plan.lengths) and together.dense:
            return decoded
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    if together is not None:
        out[:, together.tokens] = decoded
    for i, (start, length, past, slot) in enumerate(
        zip(plan.starts, plan.lengths, plan.past, plan.slots, strict=True)
    ):
        if together is not None and i in together.members:
            continue
        first = max(0, past + 1 - window) if window else 0
        seen = slice(first, past + length)
        part = q[:, start : start + length]
        out[:, start : start + length] = _attend(
            part, keys[slot, :, seen], values[slot, :, seen], scores, window
        )
    return out


def _attend_block(
    q: Tensor, keys: Tensor, values: Tensor, block: Decoding, scores: Scores, window: int | None
) -> Tensor:
    """The rows that add one token each, in one call over their neighbouring slots. [H, R, d]"""
    slots = slice(block.first, block.first + block.count)
    k, v = keys[slots, :, : block.width], values[slots, :, : block.width]
    if block.dense:
        q_block = q[:, : block.count].transpose(0, 1)
    else:
        q_block = q.new_zeros(block.count, *q[:, 0].shape)
        q_block[block.places] = q[:, block.tokens].transpose(0, 1)
    grouped = q_block.unflatten(1, (keys.shape[1], -1))  # heads that share keys are stacked as queries
    out = _grouped(grouped, k, v, block.mask(window), scores).flatten(1, 2)
    return (out if block.dense else out[block.places]).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores, window: int | None) -> Tensor:
    """One sequence: `q` [H, n, d] are its last n positions, `k`/`v` [H_kv, m, d] all that they may see."""
    heads, n, dim = q.shape
    kv_heads, m = k.shape[0], k.shape[1]
    if scores.plain and n == m and n > 1 and not (window and window < m):
        gqa = heads != kv_heads
        return scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scores.scaling, is_causal=True, enable_gqa=gqa
        )[0]
    # Query heads that share a key head are stacked as more queries of it: no copy of keys is made.
    groups = heads // kv_heads
    mask = None
    if n > 1:
        age = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        mask = age >= 0 if not window else (age >= 0) & (age < window)
        mask = mask.repeat(groups, 1)
    stacked = q.reshape(kv_heads, groups * n, dim)
    out = _grouped(stacked[None], k[None], v[None], mask, scores)
    return out.reshape(heads, n, v.shape[-1])


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """`q` [B, H_kv, G·n, d], where G query heads of n positions each lie under the key head they share."""
    if scores.plain:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scaling)
    scaling = q.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    logits = q @ k.transpose(-1, -2) * scaling
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    if scores.sinks_H is not None:
        sinks = scores.sinks_H.to(logits.dtype).unflatten(0, (q.shape[1], -1))
        repeats = q.shape[-2] // sinks.shape[1]
        total = torch.logaddexp(total, sinks.repeat_interleave(repeats, dim=1).unsqueeze(-1))
    return (logits - total).exp().to(v.dtype) @ v


def install(model: PreTrainedModel) -> None:
    """Make `model` compute a call that carries a plan by `packed_attention`, and any other call as before."""
    current = model.config._attn_implementation or "eager"
    if current.startswith(_PREFIX):
        return
    name = _PREFIX + current
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _dispatch(current))
        if current in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[current])
    model.set_attn_implementation(name)


def _dispatch(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        plan = kwargs.pop(PLAN, None)
        if plan is not None:
            return packed_attention(module, query, key, value, plan, **kwargs), None
        if original == "eager":  # each modelling file has its own
            forward = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        else:
            forward = ALL_ATTENTION_FUNCTIONS[original]
        return forward(module, query, key, value, attention_mask, **kwargs)

    return attention


def packed_inputs(input_ids: Sequence[int] | Tensor, plan: PackedPlan | StaticPlan) -> dict[str, Any]:
    """Keywords of a model's forward for a flat step of T tokens.

    The 1×1 mask is never read: a four-dimensional mask passes through `transformers` untouched, which
    keeps it from building a T×T one.
    """
    ids = torch.as_tensor(input_ids, device=plan.device).reshape(1, -1)
    return {
        "input_ids": ids,
        "position_ids": plan.position_ids,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=plan.device),
        "use_cache": False,
        PLAN: plan,
    }
