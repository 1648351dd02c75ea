"""Token ids and the places of their scores → batches for `models.score_reader`, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from etude.data.families import Layout


def pack_scored(
    sequences: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], *, share: bool = False
) -> dict[str, Any]:
    """A batch of sequences, of which some tokens are to be scored.

    Args:
        sequences: token ids of each row.
        ends: for each row, the positions of the tokens after which a score is read.
        share: what several rows begin with is computed once, where that saves enough.

    Returns:
        input_ids: [T], all tokens.
        lengths, prefixes: lists; of what lies there, see `families.Layout`.
        places: [M], flat positions of the tokens to score, row by row.
    """
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    layout = Layout.of(ids, share)
    return {
        "input_ids": torch.cat(layout.pieces),
        "lengths": [len(piece) for piece in layout.pieces],
        "prefixes": layout.prefixes,
        "places": torch.cat([layout.flat(i, torch.tensor(e, dtype=torch.long)) for i, e in enumerate(ends)]),
    }
