"""Episodes → token ids to score → batches for `models.score_reader`, end to end.

What a reward model reads is the same in training and as a reward: the text to the end of the model's last
words, ended as the tokenizer ends texts. White space that a chat template puts after an end-of-turn marker is
left out: no model samples it. Not covered: where the scores come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import bos_ids, end_ids, special_token_ids
from etude.data.families import Layout
from etude.types import Episode


class Scored(NamedTuple):
    """What is read of a text: all of it, or its end.

    Attributes:
        ids: tokens to read.
        kept: how many of the text's first tokens are among them, where some of the next are missing.
        dropped: how many of these are missing.
    """

    ids: list[int]
    kept: int
    dropped: int

    def place(self, position: int) -> int | None:
        """Where a token of the text is among those that are read; None if it is missing."""
        if position < self.kept or not self.dropped:
            return position
        return None if position < self.kept + self.dropped else position - self.dropped


def scored_ids(
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    max_length: int | None = None,
) -> Scored:
    """What a reward model reads of a text.

    Args:
        token_ids: of the text, with what the tokenizer puts before it.
        tokenizer: of the reward model.
        append_eos: end it with the end-of-sequence token, if there is one and it doesn't end with a special
            token of its own (that of a turn, say). What an encoder's tokenizer itself puts after a text, as
            BERT's [SEP], is put there in any case.
        max_length: a longer text loses its beginning, but for what the tokenizer put before it: its end holds
            the answer.
    """
    ids, end = list(token_ids), end_ids(tokenizer)
    # An unknown word ends nothing; but GPT-2's token for these is its end-of-sequence token.
    ending = (special_token_ids(tokenizer) - {tokenizer.unk_token_id}) | {tokenizer.eos_token_id}
    ended = bool(ids) and ids[-1] in ending
    if not end and append_eos and not ended and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    if end and ids[-len(end) :] != end:
        ids += end
    if max_length is None or len(ids) <= max_length:
        return Scored(ids, 0, 0)
    start = bos_ids(tokenizer)
    kept = len(start) if ids[: len(start)] == start else 0
    dropped = len(ids) - max_length
    return Scored(ids[:kept] + ids[kept + dropped :], kept, dropped)


def answered_ids(episode: Episode) -> list[int]:
    """The episode's tokens up to the end of the model's last words; all of them, where it said nothing."""
    ends = [end for _, end, segment in episode.spans() if segment.source == "model" or segment.target]
    return episode.token_ids[: ends[-1] if ends else None]


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
