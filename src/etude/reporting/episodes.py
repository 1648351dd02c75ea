"""An episode in the terminal, each source in its colour.

Model and tool text is hostile data: control and bidirectional characters are shown as escapes, so that it
can neither move the cursor nor change the order in which it is read. Not covered: pages (`report`).
"""

from __future__ import annotations

import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

from rich.style import Style
from rich.text import Text

from etude.types import Episode, NamedReward, Segment

# Each has a contrast of 4.4 or more on white and on black: terminals come in both.
COLORS = {
    "prompt": "#777777",
    "model": "#1177d6",
    "tool": "#b95e0a",
    "environment": "#9658d5",
    "reward": "#078943",
}


class TokenSpeller(Protocol):
    """A tokenizer, as far as this file needs one."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Any: ...


def legend() -> Text:
    """What the colours of `episode_text` and `episode_tokens` mean."""
    names = [Text(source, _style(source)) for source in COLORS]
    names.insert(2, Text("model, not sampled by this run", _style("model", italic=True)))
    return Text(" · ").join(names)


def episode_text(episode: Episode) -> Text:
    """The episode as it reads, each turn's rewards behind it; then its rewards and why it ended."""
    text = Text()
    for segment, rewards in zip(episode.segments, rewards_within(episode), strict=True):
        text.append(visible(segment.text), _segment_style(segment))
        text.append_text(_earned([reward for at_token in rewards.values() for reward in at_token]))
    return text.append_text(_outcome(episode))


def episode_tokens(episode: Episode, tokenizer: TokenSpeller) -> Text:
    """The episode token by token, with a bar between tokens and rewards behind theirs; then the same end."""
    text = Text()
    for segment, rewards in zip(episode.segments, rewards_within(episode), strict=True):
        tokens = spell(segment.token_ids, tokenizer)
        for place, token in enumerate(token_texts(segment.text, tokens) or tokens):
            text.append("│" if text else "", _style("prompt"))
            text.append(visible(token), _segment_style(segment))
            text.append_text(_earned(rewards.get(place, ())))
    return text.append_text(_outcome(episode))


def rewards_within(episode: Episode) -> list[dict[int, list[NamedReward]]]:
    """For each segment the rewards that apply on its tokens, by the token's place in it."""
    placed: list[dict[int, list[NamedReward]]] = []
    for start, end, _ in episode.spans():
        here: dict[int, list[NamedReward]] = {}
        for reward in episode.rewards:
            at = reward.position
            if at is not None and start <= at < end and reward.value is not None:
                here.setdefault(at - start, []).append(reward)
        placed.append(here)
    return placed


# Control, format (bidirectional among them) and surrogate characters, line and paragraph separators …
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
_NOT_HIDDEN = "\n\t\u200c\u200d"  # … but for line ends, tabs and the joiners that scripts and emoji need


def visible(text: str) -> str:
    """`text` with what can't be seen, or would change how the rest is shown, as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _NOT_HIDDEN
        else character
        for character in text
    )


def spell(token_ids: Sequence[int], tokenizer: TokenSpeller) -> list[str]:
    """Each token as its vocabulary spells it; "<id>" for ids beyond the vocabulary."""
    tokens = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [f"<{id}>" if token is None else token for id, token in zip(token_ids, tokens, strict=True)]


def token_texts(text: str, tokens: Sequence[str]) -> list[str] | None:
    """`text` cut where its tokens meet; None if the tokens don't spell it.

    Vocabularies spell in two ways: one printable character per byte (byte-level BPE, as of GPT-2), or as
    text with "▁" for a space and "<0xE2>" for a byte (SentencePiece). A token that ends within a character
    gets "" and the one that completes it gets the character. Tokens that the text leaves out (beginning and
    end of sequence) keep their spelling.
    """
    spellings: tuple[Callable[[str], bytes], ...] = (_byte_level, _sentence_piece)
    for spelling in spellings:
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(spelling(token)) for token in tokens]
        end = 0
        for index, piece in enumerate(pieces):
            if end == 0 and piece.startswith(" ") and not text.startswith(" "):
                piece = pieces[index] = piece[1:]  # SentencePiece puts a space before the first word
            if text.startswith(piece, end):
                end += len(piece)
        if end == len(text):
            return pieces
    return None


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest moves to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(moved)}


def _byte_level(token: str) -> bytes:
    alphabet = _bytes_of_characters()
    if alphabet.keys() >= set(token):
        return bytes(alphabet[character] for character in token)
    return token.encode(errors="replace")  # a special token, as a rule


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode(errors="replace")


def _outcome(episode: Episode) -> Text:
    rewards = ", ".join(_reward(total) for total in episode.reward_totals.values())
    total = f"reward {episode.reward:.3g}" + (f" ({rewards})" if rewards else "")
    ending = ["unfinished" if episode.stop is None else episode.stop.replace("_", " ")]
    ending += [f"{call.name}: {call.error}" for call in episode.tool_calls if call.error]
    ending += [episode.error] if episode.error else []
    style = _style("prompt")
    return Text.assemble(
        "\n", (visible(total), _style("reward")), (" · ", style), (visible(" · ".join(ending)), style)
    )


def _earned(rewards: Sequence[NamedReward]) -> Text:
    totals = Episode(rewards=list(rewards)).reward_totals.values()
    shown = ", ".join(f"{total.name} {total.value:.3g}" for total in totals)
    return Text(visible(f"[{shown}]") if shown else "", _style("reward"))


def _reward(reward: NamedReward) -> str:
    value = "does not apply" if reward.value is None else f"{reward.value:.3g}"
    weight = "" if reward.weight == 1 else f" × {reward.weight:.3g}"
    return f"{reward.name} {value}{weight}"


def _segment_style(segment: Segment) -> Style:
    return _style(segment.source, italic=segment.source == "model" and not segment.sampled)


def _style(source: str, italic: bool = False) -> Style:
    return Style(color=COLORS[source], italic=italic)
