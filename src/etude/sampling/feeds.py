"""What the engine asks of a backend: which tokens follow in which slots, and the logits after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
