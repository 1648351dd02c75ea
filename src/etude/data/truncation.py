"""Episodes that are too long. What is cut off is the caller's to count: lengths before and after differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from etude.types import Episode, Preference

TruncationMode = Literal["keep_start", "keep_end"]


def truncate(episode: Episode, max_length: int | None, mode: TruncationMode = "keep_start") -> Episode:
    """At most `max_length` tokens of an episode: it loses its end, or with "keep_end" its prompt's beginning.

    A prompt keeps its last token, which the answer's first token is predicted from; what is still too long
    then loses its end. Segments that are cut keep their text.
    """
    if max_length is None or len(episode) <= max_length:
        return episode
    drop = min(len(episode) - max_length, _spare(episode)) if mode == "keep_end" else 0
    return _cut(episode, drop, drop + max_length)


def truncate_pair(
    preference: Preference, max_length: int | None, mode: TruncationMode = "keep_start"
) -> Preference:
    """The same for both answers: their prompts lose the same tokens, and stay equal."""
    pair = (preference.chosen, preference.rejected)
    longest = max(map(len, pair))
    if max_length is None or longest <= max_length:
        return preference
    drop = min(longest - max_length, _spare(preference.chosen)) if mode == "keep_end" else 0
    chosen, rejected = (_cut(episode, drop, drop + max_length) for episode in pair)
    return Preference(chosen, rejected, preference.margin)


def _spare(episode: Episode) -> int:
    """Tokens of the prompt that can be missed."""
    target = episode.target
    return max((target.index(True) if True in target else len(target)) - 1, 0)


def _cut(episode: Episode, first: int, end: int) -> Episode:
    segments = [
        replace(segment, token_ids=segment.token_ids[max(first - start, 0) : end - start])
        for start, stop, segment in episode.spans()
        if start < end and stop > first
    ]
    return replace(episode, segments=segments)
