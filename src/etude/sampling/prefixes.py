"""Shared prefixes: who already holds the beginning of a sequence in the cache.

Groups of samples of one prompt share all of it, tasks behind a few-shot preamble share the preamble.
Sequences are hashed block by block, each hash including the one before it, so the longest common beginning
is found by looking up block ends from the last to the first. What is found is compared token by token
before it is used.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

Holder = TypeVar("Holder", bound=Hashable)

BLOCK = 16


class Prefixes(Generic[Holder]):
    """Holders of sequences, by what these begin with."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[Holder, None]] = {}
        self._registered: dict[Holder, tuple[list[int], list[int]]] = {}

    def add(self, holder: Holder, token_ids: Sequence[int]) -> None:
        """Say that `holder` holds, or is about to hold, a sequence that begins with `token_ids`."""
        tokens = list(token_ids)
        hashes = list(_block_hashes(tokens))
        self._registered[holder] = (tokens, hashes)
        for key in hashes:
            self._holders.setdefault(key, {})[holder] = None

    def remove(self, holder: Holder) -> None:
        _, hashes = self._registered.pop(holder, ([], []))
        for key in hashes:
            holders = self._holders[key]
            del holders[holder]
            if not holders:
                del self._holders[key]

    def longest(self, token_ids: Sequence[int]) -> tuple[Holder, int] | None:
        """A holder of the longest common beginning of at least a block, and its length in tokens.

        At least the last token is left out: it has to be fed for there to be logits.
        """
        tokens = list(token_ids)
        for key in reversed(list(_block_hashes(tokens[:-1]))):
            for holder in self._holders.get(key, ()):
                length = _common(self._registered[holder][0], tokens[:-1])
                if length >= BLOCK:
                    return holder, length
        return None


def _block_hashes(tokens: list[int]) -> Iterator[int]:
    key = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, *tokens[end - BLOCK : end]))
        yield key


def _common(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
