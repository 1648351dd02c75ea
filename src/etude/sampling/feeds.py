"""What the engine asks of a backend: which tokens follow in which slots, and the logits after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from etude.sampling.cuts import Row
from etude.sampling.draw import Draw
from etude.sampling.memory import CacheCost, CacheLimits


@dataclass(slots=True)
class Feed:
    """Tokens that follow `past` tokens already in `slot`.

    `family` is a number, and how many first tokens all slots of that number hold in common. With `drawn`, the
    only token is the one that this row of the step before drew, which Python doesn't know yet. `source_ids`
    are what an encoder reads for the slot, when its first tokens are fed.
    """

    slot: int
    past: int
    token_ids: Sequence[int]
    family: tuple[int, int] | None = None
    drawn: int | None = None
    source_ids: Sequence[int] = ()

    @property
    def end(self) -> int:
        """Tokens in the slot afterwards."""
        return self.past + len(self.token_ids)


class Backend(Protocol):
    closes_up: bool  # a step reads fewer keys where the slots in use lie close together
    runs_ahead: bool  # a step takes tokens that Python doesn't know yet, and doesn't wait for the device

    def logits(self, feeds: Sequence[Feed], drawn_R: Tensor | None = None) -> Tensor:
        """Put each feed's tokens into its slot; the logits after its last token, [feeds, vocabulary].

        `drawn_R` are the tokens that the step before drew.
        """
        ...

    def draw(
        self, feeds: Sequence[Feed], ready: Sequence[int], rows: Sequence[Row], drawn_R: Tensor | None
    ) -> Draw | None:
        """`logits`, and a token for each of the feeds at `ready`, all in one; None where that can't be had.

        Only asked for where nothing edits or cuts the distributions, by a backend that `runs_ahead`.
        """
        ...

    def weights_changed(self) -> None:
        """The model computes with other weights than before, which may lie elsewhere."""
        ...

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copy the first `length` tokens' keys and values between slots; False if that can't be done."""
        ...

    def limits(self, limits: CacheLimits) -> CacheLimits:
        """What of these limits this backend can keep to; CacheBudgetError where it can't."""
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
