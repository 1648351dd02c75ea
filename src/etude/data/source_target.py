"""Dataset rows → what an encoder reads and what its decoder is to write.

The tokenizer's own calls make both: for the source with what it adds at both ends, for the target by its
`text_target`, which Marian encodes with another vocabulary and mBART marks with another language.

Not covered: the decoder's input, which models make from the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from etude.data.conversions import split_prompt
from etude.errors import DataError


class SourceTarget(NamedTuple):
    """Attributes: input_ids: of the encoder; labels: of the decoder, with EOS."""

    input_ids: list[int]
    labels: list[int]


def to_source_target(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> SourceTarget:
    """Tokenise a row of `prompt, completion`, two strings.

    Raises:
        DataError: they aren't strings, or the tokenizer has no end-of-sequence token.
    """
    return SourceTarget(_source(row, tokenizer), _target(row["completion"], tokenizer))


def to_source_targets(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[SourceTarget, SourceTarget]:
    """Tokenise a row of `[prompt,] chosen, rejected`: the same source with either target."""
    row = split_prompt(row)
    source = _source(row, tokenizer)
    return (
        SourceTarget(source, _target(row["chosen"], tokenizer)),
        SourceTarget(source, _target(row["rejected"], tokenizer)),
    )


def encode_source(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What an encoder reads of a text, with what the tokenizer adds at both ends."""
    return list(tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"])


def _source(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode_source(tokenizer, _text(row["prompt"], "prompt"))


def _target(value: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = _text(value, "the answer")
    labels = list(tokenizer(text_target=text, padding=False, truncation=False, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token to end answers with; set `tokenizer.eos_token`"
        )
    return labels if eos in labels[-2:] else [*labels, eos]  # mBART's last token is the language


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{name} is a {type(value).__name__}; expected a string: encoder-decoder models read texts"
        )
    return value
