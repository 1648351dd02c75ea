"""The one attention function that sampler and trainer share.

Both lay their sequences end to end in a flat step of shape [1, T], with no padding, and hand the model a
`PackedPlan` that says where each sequence lies. The trainer's plan has no cache: each sequence attends to
itself, causally. The sampler's plan has one: new keys and values are written into the sequence's slot,
and its queries attend to all the slot holds. One function, so that both compute the same numbers.

The plan travels as an extra keyword of the model's forward, which `transformers` passes down to the
attention function. Calls without a plan (`generate`, a plain forward) go to the implementation the
model had before. Families that don't use the attention interface, and layers with features not served
here (soft-capped scores, attention sinks), are refused by `supports_packing`, which also runs a leak
test; they take a slower way elsewhere.
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

PLAN = "packed_plan"  # the keyword under which a plan travels through the model
_PREFIX = "etude_"
_UNSERVED = ("softcap", "s_aux", "position_bias")


class SlotCache:
    """Preallocated keys and values: one slot per sequence, for each layer [slots, heads, length, dim].

    Layers allocate when they are first written, since only then are their shapes known. `reserve` makes
    every slot longer; it copies, so callers grow in large steps.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        if length <= self.length:
            return
        for index, layer in self.layers.items():
            self.layers[index] = tuple(self._grown(tensor, length) for tensor in layer)  # type: ignore[assignment]
        self.length = length

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
        return like.new_zeros(self.slots, like.shape[0], self.length, like.shape[-1])

    def _grown(self, tensor: Tensor, length: int) -> Tensor:
        grown = tensor.new_zeros(tensor.shape[0], tensor.shape[1], length, tensor.shape[3])
        grown[:, :, : self.length] = tensor
        return grown


@dataclass
class PackedPlan:
    """Where each sequence's tokens lie in a flat step.

    Attributes:
        lengths: tokens of each sequence in this step, in order.
        past: tokens of each sequence already in the cache (all 0 without one).
        cache, slots: the cache and each sequence's slot in it; None and empty in training.
        positions_T, slots_T: of each token, its position in its sequence and its slot.
    """

    lengths: Sequence[int]
    past: Sequence[int] = ()
    cache: SlotCache | None = None
    slots: Sequence[int] = ()
    device: torch.device | str = "cpu"
    positions_T: Tensor = field(init=False)
    slots_T: Tensor = field(init=False)  # empty without a cache

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
        tokens = torch.tensor([self.starts[i] for i in rows], device=self.device)
        places = torch.tensor(slots, device=self.device) - first
        return Decoding(set(rows), first, count, width, tokens, places, lengths.to(self.device))


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
    """

    cache: SlotCache
    width: int
    positions_T: Tensor
    slots_T: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.positions_T.device

    @property
    def position_ids(self) -> Tensor:
        """[1, T]"""
        return self.positions_T.unsqueeze(0)

    def mask(self, window: int | None) -> Tensor:
        """[T, 1, 1, width], true where a row's token may look."""
        if window not in self.masks:
            age = self.positions_T[:, None] - torch.arange(self.width, device=self.device)
            visible = age >= 0 if not window else (age >= 0) & (age < window)
            self.masks[window] = visible[:, None, None]
        return self.masks[window]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PackedPlan | StaticPlan,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unserved: Any,
) -> Tensor:
    """Attention of each sequence in a flat step. `query` [1, H, T, d], `key`/`value` [1, H_kv, T, d].

    Without dropout, whatever the model's mode: a policy's update needs the very distribution that sampled.

    Returns [1, T, H, d], the layout that attention functions of `transformers` return.
    """
    for name in _UNSERVED:
        if unserved.get(name) is not None:
            raise ModelError(f"packed attention doesn't serve {name!r} ({type(module).__name__})")
    query, key, value = query[0], key[0], value[0]
    if plan.cache is None:
        output = _attend_to_self(query, key, value, plan, scaling, sliding_window)
    else:
        layer: int = module.layer_idx  # type: ignore[assignment]
        plan.cache.write(layer, key, value, plan.slots_T, plan.positions_T)
        attend = _attend_in_block if isinstance(plan, StaticPlan) else _attend_to_cache
        output = attend(query, *plan.cache.layers[layer], plan, scaling, sliding_window)  # type: ignore[arg-type]
    return output.transpose(0, 1).unsqueeze(0)


def _attend_to_self(
    q: Tensor, k: Tensor, v: Tensor, plan: PackedPlan, scaling: float | None, window: int | None
) -> Tensor:
    """Training: each sequence attends to its own tokens. [H, T, d] in and out."""
    cells = plan.rectangle
    if cells is None or (window and window < cells.width):
        parts = zip(*(tensor.split(list(plan.lengths), dim=1) for tensor in (q, k, v)), strict=True)
        return torch.cat([_attend(q, k, v, scaling, window) for q, k, v in parts], dim=1)
    q_BHLd, k_BHLd, v_BHLd = (
        tensor[:, cells.tokens].unflatten(1, (cells.rows, cells.width)).transpose(0, 1)
        for tensor in (q, k, v)
    )
    out = scaled_dot_product_attention(
        q_BHLd, k_BHLd, v_BHLd, scale=scaling, is_causal=True, enable_gqa=q.shape[0] != k.shape[0]
    )
    return out.transpose(0, 1).flatten(1, 2)[:, cells.cells_T]


def _attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, plan: PackedPlan, scaling: float | None, window: int | None
) -> Tensor:
    """Sampling: each sequence attends to its slot of `keys`/`values` [slots, H_kv, length, d]."""
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    together = plan.decoding
    if together is not None:
        block = slice(together.first, together.first + together.count)
        k, v = keys[block, :, : together.width], values[block, :, : together.width]
        q_block = q.new_zeros(together.count, *q[:, 0].shape)
        q_block[together.places] = q[:, together.tokens].transpose(0, 1)
        grouped = q_block.unflatten(1, (keys.shape[1], -1))  # heads that share keys are stacked as queries
        attended = scaled_dot_product_attention(grouped, k, v, attn_mask=together.mask(window), scale=scaling)
        out[:, together.tokens] = attended.flatten(1, 2)[together.places].transpose(0, 1)
    for i, (start, length, past, slot) in enumerate(
        zip(plan.starts, plan.lengths, plan.past, plan.slots, strict=True)
    ):
        if together is not None and i in together.members:
            continue
        first = max(0, past + 1 - window) if window else 0
        seen = slice(first, past + length)
        part = q[:, start : start + length]
        out[:, start : start + length] = _attend(
            part, keys[slot, :, seen], values[slot, :, seen], scaling, window
        )
    return out


def _attend_in_block(
    q: Tensor, keys: Tensor, values: Tensor, plan: StaticPlan, scaling: float | None, window: int | None
) -> Tensor:
    """Static decoding: row i of `q` [H, T, d] attends to slot i."""
    block = (slice(q.shape[1]), slice(None), slice(plan.width))
    grouped = q.transpose(0, 1).unflatten(1, (keys.shape[1], -1))  # heads that share keys, as queries
    mask = plan.mask(window)
    out = scaled_dot_product_attention(grouped, keys[block], values[block], attn_mask=mask, scale=scaling)
    return out.flatten(1, 2).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One sequence: `q` [H, n, d] are its last n positions, `k`/`v` [H_kv, m, d] all that they may see."""
    heads, n, dim = q.shape
    kv_heads, m = k.shape[0], k.shape[1]
    if n == m and n > 1 and not (window and window < m):
        gqa = heads != kv_heads
        return scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scaling, is_causal=True, enable_gqa=gqa
        )[0]
    # Query heads that share a key head are stacked as more queries of it: no copy of keys is made.
    groups = heads // kv_heads
    mask = None
    if n > 1:
        age = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        mask = age >= 0 if not window else (age >= 0) & (age < window)
        mask = mask.repeat(groups, 1)
    stacked = q.reshape(kv_heads, groups * n, dim)
    out = scaled_dot_product_attention(stacked[None], k[None], v[None], attn_mask=mask, scale=scaling)
    return out.reshape(heads, n, v.shape[-1])


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


@torch.no_grad()
def supports_packing(model: PreTrainedModel) -> bool:
    """Whether a flat step gives this model the numbers that separate forwards give.

    The leak test behind it: two sequences packed together, then one of them changed, must each come out
    as they do alone; and continued from a cache, as they do at once. On True the attention is installed.
    """
    if not getattr(model, "_supports_attention_backend", False) or not model._can_set_attn_implementation():
        return False
    install(model)
    device, vocab = model.device, model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        a, b, c = ([(7 * i + k) % vocab for i in range(n)] for n, k in ((5, 1), (8, 2), (5, 3)))
        alone = [
            model(torch.tensor([ids], device=device), use_cache=False).logits[0].float() for ids in (a, b, c)
        ]
        for first, expected in ((a, alone[0]), (c, alone[2])):
            plan = PackedPlan([len(first), len(b)], device=device)
            packed = model(**packed_inputs(first + b, plan)).logits[0].float()
            if not _close(packed, torch.cat([expected, alone[1]]), model.dtype):
                return False
        cache = SlotCache(slots=2, length=16)
        for start, end in ((0, 3), (3, 7), (7, 8)):
            plan = PackedPlan([end - start], past=[start], cache=cache, slots=[1], device=device)
            packed = model(**packed_inputs(b[start:end], plan)).logits[0].float()
            if not _close(packed, alone[1][start:end], model.dtype):
                return False
    except (ModelError, TypeError):  # a feature not served here; a forward that takes no extra keywords
        return False
    finally:
        model.train(training)
    return True


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Far above rounding, far below a leak."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))
