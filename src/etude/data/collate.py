"""Token ids and labels → batches for losses on data: end to end, without padding.

A batch is a mapping of tensors and lists, which `transformers.Trainer` moves to its device. Not covered:
batches of sampled episodes (`batch`), which rows share a step (`packing`), and padding, which the models'
side does for families that can't be packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from etude.data.families import Layout
from etude.types import Episode

IGNORED = -100  # the label of what is not to be learned


def supervised_labels(episode: Episode) -> list[int]:
    """The episode's tokens where they are targets, else -100."""
    return [
        token if target else IGNORED for token, target in zip(episode.token_ids, episode.target, strict=True)
    ]


def pack(
    sequences: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    share: bool = False,
    sources: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """A batch for `models.scorer.TokenScorer`.

    Args:
        sequences: token ids of each row; of an encoder-decoder, what its decoder should say.
        labels: for each of these tokens itself, or -100 where there is nothing to learn. A decoder's first
            token has nothing before it, and no label.
        share: what several rows begin with is computed once, where that saves enough.
        sources: token ids that an encoder reads, one for each row.

    Returns:
        input_ids: [T], all tokens.
        lengths, prefixes: lists; of what lies there, see `families.Layout`.
        states: [M], flat positions of the states that give the targets' distributions.
        targets: [M], row by row.
        counts: list, how many targets each row has.
        source_ids: [S], and source_lengths: list; where there are sources.
    """
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    layout = Layout.of(ids, share and sources is None)
    behind = 1 if sources is None else 0  # an encoder-decoder's input is shifted where it is made
    learned = [(torch.tensor(row[behind:]) != IGNORED).nonzero()[:, 0] for row in labels]
    batch: dict[str, Any] = {
        "input_ids": torch.cat(layout.pieces),
        "lengths": [len(piece) for piece in layout.pieces],
        "prefixes": layout.prefixes,
        "states": torch.cat([layout.flat(i, places) for i, places in enumerate(learned)]),
        "targets": torch.cat([row[places + behind] for row, places in zip(ids, learned, strict=True)]),
        "counts": [len(places) for places in learned],
    }
    if sources is not None:
        batch["source_ids"] = torch.cat([torch.tensor(source, dtype=torch.long) for source in sources])
        batch["source_lengths"] = [len(source) for source in sources]
    return batch
