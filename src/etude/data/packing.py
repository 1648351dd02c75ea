"""Rows into bins of a fixed number of tokens: fewer, fuller training steps.

Sequences of one bin never see each other; a bin says only which of them are computed together. Not covered:
cutting rows up (`trainers.sft` does, where it is asked to).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from etude.errors import DataError


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `capacity`, by best-fit decreasing.

    Longest first, each into the bin that it fills best. At most 11/9 of the fewest possible bins, and one
    (Johnson 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). n lengths
    take n steps, each a search in `capacity` bits.

    Raises:
        DataError: a length is above the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise DataError(f"a row of {max(lengths)} tokens doesn't fit into {capacity}")
    bins: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = defaultdict(list)
    spaces = 0  # bit s is set where a bin has room for s more
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, chosen = lengths[index], []
        if enough := spaces >> length:
            space = length + (enough & -enough).bit_length() - 1  # the smallest that is enough
            chosen = with_space[space].pop()
            spaces ^= 0 if with_space[space] else 1 << space
        else:
            space = capacity
            bins.append(chosen)
        chosen.append(index)
        with_space[space - length].append(chosen)
        spaces |= 1 << (space - length)
    return bins
