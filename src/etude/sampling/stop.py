"""Stop strings, found as tokens arrive, for the price of a set lookup per token.

A stop string can only be completed by a token whose text holds its last character. Those tokens are
listed once; only when one of them is sampled is the end of the turn decoded and searched. (Some decoders
put spaces between tokens: a stop string that ends in one is looked for after every token.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from etude.data.encoding import decode


class StopStrings:
    """Answers whether the last token of a turn completed one of `strings`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], token_texts: Sequence[str]
    ):
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        last = {string[-1] for string in self.strings}
        # A token that is part of a character decodes to U+FFFD and could complete anything.
        self.completing = {
            i
            for i, text in enumerate(token_texts)
            if "\ufffd" in text or last & set(text) or any(character.isspace() for character in last)
        }
        self.reach = max((len(string.encode()) for string in self.strings), default=0)

    def completed_by_last(self, token_ids: Sequence[int]) -> bool:
        """`token_ids` are the turn's tokens so far, not empty."""
        if token_ids[-1] not in self.completing:
            return False
        # Every token but a few special ones spells at least one byte, so this many reach far enough.
        tail = decode(self.tokenizer, token_ids[-self.reach - 1 :])
        return any(string in tail for string in self.strings)


class KnownStops(dict[tuple[str, ...], StopStrings]):
    """Stop strings by themselves, made when first asked for; the vocabulary is read for them once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def token_texts(self) -> list[str]:
        return token_texts(self.tokenizer)

    def __missing__(self, strings: tuple[str, ...]) -> StopStrings:
        self[strings] = StopStrings(self.tokenizer, strings, self.token_texts)
        return self[strings]


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token of the vocabulary by itself."""
    ids = [[i] for i in range(len(tokenizer))]
    return tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
