"""Episodes → padded batches for supervised losses.

Padding on the right, labels -100 where nothing is to be imitated: the form that `transformers` models take.

Not covered: batches for policy-gradient losses, and packing (`batch`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from etude.types import Episode

IGNORED = -100  # the label that cross entropy leaves out


def supervised_labels(episode: Episode) -> list[int]:
    """The episode's tokens where they are targets, else -100. The model's loss does the shift by one."""
    return [
        token if target else IGNORED for token, target in zip(episode.token_ids, episode.target, strict=True)
    ]


def collate_supervised(
    episodes: Sequence[Episode],
    pad_id: int,
    pad_to_multiple_of: int | None = None,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Pad episodes to `input_ids`, `attention_mask` and `labels`, each [B, T] int64.

    Args:
        episodes: B of them.
        pad_id: fills `input_ids` where `attention_mask` is 0; any token will do.
        pad_to_multiple_of: rounds T up.
        max_length: longer episodes lose their end, with a warning.
    """
    rows = [episode.token_ids for episode in episodes]
    labels = [supervised_labels(episode) for episode in episodes]
    if max_length is not None and any(len(row) > max_length for row in rows):
        warnings.warn(f"episodes longer than max_length={max_length} lose their end", stacklevel=2)
        rows, labels = [row[:max_length] for row in rows], [row[:max_length] for row in labels]
    return pad_supervised(rows, labels, pad_id, pad_to_multiple_of)


def pad_supervised(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    pad_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Pad token ids and their labels; see `collate_supervised`."""
    lengths_B = torch.tensor([len(row) for row in rows])
    length = int(lengths_B.max())
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of

    def padded(sequences: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*ids, *(fill,) * (length - len(ids))] for ids in sequences], dtype=torch.long)

    return {
        "input_ids": padded(rows, pad_id),
        "attention_mask": (torch.arange(length) < lengths_B[:, None]).long(),
        "labels": padded(labels, IGNORED),
    }
