"""What encoder–decoders have beside their decoders' tokens: the sources that they read, and a beginning.

Covered: the sources of a batch, each once, and how much of a response a decoder was given. Not covered: texts
(`source_target`), and who is computed together (`families`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etude.errors import DataError
from etude.math.placing import place


class Sources(NamedTuple):
    """What the encoder reads for the sequences of a batch: each distinct source once.

    Attributes:
        ids: [S], all tokens, end to end.
        lengths: of each source.
        rows: [B], for each sequence the number of its source.
    """

    ids: Tensor
    lengths: list[int]
    rows: Tensor

    @classmethod
    def of(cls, sources: Sequence[Tensor | None], device: torch.device | str = "cpu") -> Sources | None:
        """Of sequences by what is read for each, [S]; None where nothing is read for any.

        Raises:
            DataError: something is read for some of them only.
        """
        given = [source for source in sources if source is not None]
        if not given:
            return None
        if len(given) < len(sources):
            raise DataError(
                f"{len(given)} of {len(sources)} trajectories have source_ids; expected it of all (an "
                "encoder-decoder's) or of none (a decoder's)"
            )
        numbers: dict[bytes, int] = {}
        rows = [numbers.setdefault(source.numpy().tobytes(), len(numbers)) for source in given]
        distinct = [given[rows.index(number)] for number in numbers.values()]
        lengths = [len(source) for source in distinct]
        return cls(place(torch.cat(distinct), device), lengths, place(rows, device, torch.long))


def begun(response: Sequence[int], starts: Sequence[Sequence[int]]) -> int:
    """How many tokens of a response are one of `starts`, or the beginning of one.

    Raises:
        DataError: not even the first is.
    """
    common = [
        next((i for i, token in enumerate(start) if i >= len(response) or response[i] != token), len(start))
        for start in starts
    ]
    if not max(common):
        expected = " or ".join(str(start[0]) for start in starts)
        raise DataError(
            f"a response begins with {f'token {response[0]}' if response else 'nothing'}; expected the "
            f"decoder's start token, {expected}: an encoder-decoder's response begins with it, as `generate` "
            "returns it. Leave it there; where generation began with another one, set "
            "model.config.decoder_start_token_id to that"
        )
    return max(common)
