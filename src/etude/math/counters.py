"""Random numbers from counters: what is drawn is a function of a few integers, and of nothing drawn before.

A hash of (seed, place) decides; no generator's state is passed around. So the same choices come out whatever
else was drawn, in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """Hash integers to 64 bits by the SplitMix64 finaliser (Steele, Lea & Flood 2014), word by word."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def mix_pairs(words: Sequence[tuple[int, int]]) -> np.ndarray:
    """`mix` of each pair, [N] uint64."""
    columns = np.array([(a & _MASK, b & _MASK) for a, b in words], dtype=np.uint64).reshape(-1, 2).T
    state = np.zeros(len(words), dtype=np.uint64)
    for word in columns:  # arrays wrap around without a warning
        state = state + word + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def fraction(*words: int) -> float:
    """The number in [0, 1) that belongs to these words, in steps of 2^-53."""
    return (mix(*words) >> 11) * 2.0**-53


def word_of(text: str) -> int:
    """A text as a word for `mix`: the same in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
