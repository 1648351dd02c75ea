"""Where each sequence lies in a flat step: what a forward is told beside its tokens.

Covered: plans for training (sequences that see themselves), for sampling (sequences that go on in a cache),
and for sampling in shapes that never change. Not covered: the attention that reads them (`attention`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from etude.math.placing import place
from etude.models.slot_cache import SlotCache

if TYPE_CHECKING:
    from etude.models.cross_attention import CrossPlan

PLAN = "packed_plan"  # the keyword under which a plan travels through the model
LONG_PROMPT = 512  # tokens; up to here it costs little on a GPU that each reads all before it

CALL = 32  # keys that could be read in the time of a call of its own for a sequence, in a small model

# Devices where a kernel's start costs less than the padding that would save it, and than gathering rows.
ONE_BY_ONE = frozenset({"cpu"})


@dataclass
class PackedPlan:
    """Where each sequence's tokens lie in a flat step.

    Attributes:
        lengths: tokens of each sequence in this step, in order.
        past: tokens of each sequence that came before: in the cache or, in training, in its prefix.
        cache, slots: the cache and each sequence's slot in it; None and empty in training.
        families: for each sequence, a number and how many first tokens it shares with all others of that
            number at least; None for a sequence of its own. May be left empty.
        prefixes: in training, for each sequence the one of this step that it goes on from, or None. What has
            no prefix comes first, and what goes on from the same one lies together. May be left empty.
        dropout: attention leaves out as many weights as the model's configuration says, while it trains.
        cross: of an encoder–decoder's decoder: what its sequences read besides.
        positions_T, slots_T: of each token, its position in its sequence and its slot.
        windows: the sliding window that each layer asked for, written as the step runs.
    """

    lengths: Sequence[int]
    past: Sequence[int] = ()
    cache: SlotCache | None = None
    slots: Sequence[int] = ()
    families: Sequence[tuple[int, int] | None] = ()
    prefixes: Sequence[int | None] = ()
    device: torch.device | str = "cpu"
    dropout: bool = False
    cross: CrossPlan | None = None
    positions_T: Tensor = field(init=False)
    slots_T: Tensor = field(init=False)  # empty without a cache
    windows: dict[int, int | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.prefixes = self.prefixes or [None] * len(self.lengths)
        self.past = self.past or [0 if before is None else self.lengths[before] for before in self.prefixes]
        positions = [
            p for past, n in zip(self.past, self.lengths, strict=True) for p in range(past, past + n)
        ]
        self.positions_T = place(positions, self.device, torch.long)
        slots = [s for s, n in zip(self.slots, self.lengths, strict=self.cache is not None) for _ in range(n)]
        self.slots_T = place(slots, self.device, torch.long)

    @property
    def position_ids(self) -> Tensor:
        """[1, T]"""
        return self.positions_T.unsqueeze(0)

    @cached_property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)][:-1]

    @cached_property
    def roots(self) -> list[int]:
        """Tokens of each sequence that goes on from no other."""
        return [n for n, before in zip(self.lengths, self.prefixes, strict=True) if before is None]

    @cached_property
    def rectangle(self) -> Rectangle | None:
        """The roots as rows of equal length, unless most of that would be padding, or it wouldn't pay."""
        if torch.device(self.device).type in ONE_BY_ONE:
            return None
        return Rectangle.of(self.roots, self.device)

    @cached_property
    def root_starts(self) -> Tensor:
        """Where the roots start and the last one ends, [roots + 1] int32."""
        return place([0, *accumulate(self.roots)], self.device, torch.int32)

    @cached_property
    def long_prompts(self) -> list[int]:
        """Sequences that add more than `LONG_PROMPT` tokens."""
        return [i for i, n in enumerate(self.lengths) if n > LONG_PROMPT]

    @cached_property
    def short_T(self) -> Tensor:
        """The places in the flat step of the tokens of all others."""
        short = [
            range(start, start + n)
            for start, n in zip(self.starts, self.lengths, strict=True)
            if n <= LONG_PROMPT
        ]
        return place(list(chain.from_iterable(short)), self.device, torch.long)

    @cached_property
    def branches(self) -> list[Branches]:
        """The other ones, by the prefix that they go on from."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for n, before in zip(self.lengths, self.prefixes, strict=True):
            if before is not None:
                lengths[before].append(n)
        return [Branches(before, each, Rectangle.of(each, self.device)) for before, each in lengths.items()]

    @cached_property
    def decoding(self) -> Decoding | None:
        """The sequences that add one token each, as one block of neighbouring slots, where that pays."""
        return self._block(self._singles)

    @cached_property
    def shared(self) -> list[SharedPrefix]:
        """Of those, the ones that begin alike, where reading their beginning once pays."""
        members: dict[int, list[int]] = defaultdict(list)
        for i in self._singles if self.families else ():
            family = self.families[i]
            if family is not None and family[1] <= self.past[i]:  # not while it is still being fed
                members[family[0]].append(i)
        return [group for rows in members.values() if (group := self._shared(rows)) is not None]

    @cached_property
    def unshared(self) -> Decoding | None:
        """`decoding` without the members of `shared`."""
        shared = {i for group in self.shared for i in group.members}
        return self._block([i for i in self._singles if i not in shared])

    @cached_property
    def _singles(self) -> list[int]:
        return [i for i, n in enumerate(self.lengths) if n == 1]

    def _block(self, rows: list[int]) -> Decoding | None:
        if len(rows) < 2:
            return None
        seen = [self.past[i] + 1 for i in rows]
        slots = [self.slots[i] for i in rows]
        first, count, width = min(slots), max(slots) - min(slots) + 1, max(seen)
        if count * width > 2.5 * sum(seen) + CALL * len(rows):
            return None
        lengths = torch.ones(count, dtype=torch.long)  # holes look at one key and are thrown away
        lengths[torch.tensor(slots) - first] = torch.tensor(seen)
        starts = [self.starts[i] for i in rows]
        tokens = torch.tensor(starts, device=self.device)
        places = torch.tensor(slots, device=self.device) - first
        dense = starts == list(range(count)) and slots == list(range(first, first + count))
        return Decoding(set(rows), first, count, width, tokens, places, lengths.to(self.device), dense)

    def _shared(self, rows: list[int]) -> SharedPrefix | None:
        common = min(family[1] for i in rows if (family := self.families[i]) is not None)
        seen = [self.past[i] + 1 for i in rows]
        width = max(seen)
        # What follows the common beginning is copied before it is read: three times the traffic.
        if common + 3 * len(rows) * (width - common) > 0.7 * sum(seen):
            return None
        ages_R1 = torch.tensor(seen)[:, None] - 1 - common
        visible_RS = ages_R1 >= torch.arange(width - common)
        tokens = torch.tensor([self.starts[i] for i in rows], device=self.device)
        slots = torch.tensor([self.slots[i] for i in rows], device=self.device)
        return SharedPrefix(
            set(rows), common, width, tokens, slots, self.slots[rows[0]], visible_RS.to(self.device)
        )


@dataclass
class Rectangle:
    """Sequences as [rows, width], padded on the right, where causal attention never looks."""

    rows: int
    width: int
    tokens: Tensor  # [rows * width], the token in each cell; any token in a padded one
    cells_T: Tensor  # the cell of each token
    full: bool  # nothing is padded: rows and tokens are views of each other

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Rectangle | None:
        """Sequences that lie end to end, unless that is one, or half as much padding as tokens."""
        rows, width = len(lengths), max(lengths)
        if rows < 2 or rows * width > 1.5 * sum(lengths):
            return None
        present = torch.arange(width) < torch.tensor(lengths)[:, None]
        cells_T = present.flatten().nonzero()[:, 0]
        tokens = torch.zeros(rows * width, dtype=torch.long)
        tokens[cells_T] = torch.arange(len(cells_T))
        return cls(rows, width, place(tokens, device), place(cells_T, device), rows * width == len(cells_T))

    def rows_of(self, flat: Tensor) -> Tensor:
        """[H, T, d] as [rows, H, width, d]."""
        cells = flat if self.full else flat[:, self.tokens]
        return cells.unflatten(1, (self.rows, self.width)).transpose(0, 1)

    def flat_of(self, rows: Tensor) -> Tensor:
        """[rows, H, width, d] as [H, T, d]."""
        cells = rows.transpose(0, 1).flatten(1, 2)
        return cells if self.full else cells[:, self.cells_T]


@dataclass
class Branches:
    """Sequences of a training step that go on from the same one and lie end to end."""

    prefix: int
    lengths: list[int]
    rectangle: Rectangle | None


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
class SharedPrefix:
    """Sequences that add one token each and have their first `length` tokens in common."""

    members: set[int]
    length: int
    width: int
    tokens: Tensor  # [R], places in the flat step
    slots: Tensor  # [R]
    holder: int  # the slot that the common beginning is read from
    visible_RS: Tensor  # what each may see of the S = width - length tokens that follow


@dataclass
class TokenPlan:
    """Tokens of any sequences, each by itself: where it lies in the cache is all that a step is told.

    A token sees its slot up to its own position; all of a step are written before any of them looks.
    All that differs between two steps of as many tokens is in the tensors, so that a step can be captured.

    Attributes:
        cache: with the tokens' slots.
        positions_T: of each token.
        slots_T: where each is written and looks; -1 for one that takes no part.
        windows: the sliding window that each layer asked for, written as the step runs.
    """

    cache: SlotCache
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


def packed_inputs(
    input_ids: Sequence[int] | Tensor, plan: PackedPlan | TokenPlan | StaticPlan
) -> dict[str, Any]:
    """Keywords of a model's forward for a flat step of T tokens.

    The 1×1 mask is never read: a four-dimensional mask passes through `transformers` untouched, which
    keeps it from building a T×T one.
    """
    ids = place(input_ids, plan.device).reshape(1, -1)
    return {
        "input_ids": ids,
        "position_ids": plan.position_ids,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=plan.device),
        "use_cache": False,
        PLAN: plan,
    }


def padded_inputs(
    input_ids: Tensor, lengths: Sequence[int], prefixes: Sequence[int | None] = ()
) -> tuple[dict[str, Any], Tensor]:
    """Keywords of a model's forward for sequences that lie end to end, and where their tokens went [B, T].

    For models that can't be packed. A sequence that goes on from another has that one in front, computed
    again.
    """
    pieces = input_ids.split(list(lengths))
    before = [pieces[0][:0] if p is None else pieces[p] for p in prefixes or [None] * len(pieces)]
    rows = [torch.cat(pair) for pair in zip(before, pieces, strict=True)]
    padded = pad_sequence(rows, batch_first=True)
    first, end = (torch.tensor([len(x) for x in each], device=padded.device) for each in (before, rows))
    columns = torch.arange(padded.shape[1], device=padded.device)[None]
    mask = columns < end[:, None]
    own = mask & (columns >= first[:, None])
    return {"input_ids": padded, "attention_mask": mask.long(), "use_cache": False}, own
