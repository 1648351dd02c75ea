"""Prompts and lengths for sampling: which tokens a turn is given, and how many it adds.

Nothing is forced here. Tokens are sampled at temperature 1 and no token ends a turn, so both sides produce
the same number of tokens from the same prompts, each by its own plainest way. All workloads of one shape
have the same lengths, whatever their seed, and other tokens. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

FIRST_TOKEN = 2  # below are the tokenizer's special ones


class WrongLengthError(RuntimeError):
    """A side sampled another number of tokens than asked for: its time means nothing."""


@dataclass(frozen=True)
class Turn:
    """What a model reads before a turn (a prompt, a tool's answer), and the tokens it then samples."""

    given: list[int]
    length: int


@dataclass(frozen=True)
class Shape:
    """How much there is to do; ranges in tokens, both ends included."""

    episodes: int = 256
    turns: int = 1
    prompt: tuple[int, int] = (16, 128)
    answer: tuple[int, int] = (8, 32)
    sampled: tuple[int, int] = (8, 64)


def write(path: Path, shape: Shape, vocabulary: int, seed: int) -> Path:
    """Write the episodes of `shape`, their tokens drawn from `seed`."""
    lengths, tokens = Random(0), Random(seed)

    def one_turn(number: int) -> Turn:
        given = lengths.randint(*(shape.answer if number else shape.prompt))
        return Turn(random_tokens(tokens, given, vocabulary), lengths.randint(*shape.sampled))

    episodes = [[one_turn(number) for number in range(shape.turns)] for _ in range(shape.episodes)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([[asdict(turn) for turn in episode] for episode in episodes]))
    return path


def load(path: Path | str) -> list[list[Turn]]:
    return [[Turn(**turn) for turn in episode] for episode in json.loads(Path(path).read_text())]


def random_tokens(source: Random, count: int, vocabulary: int) -> list[int]:
    return [source.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)]


def count_tokens(episodes: Sequence[Sequence[Turn]]) -> int:
    """Tokens to sample."""
    return sum(turn.length for episode in episodes for turn in episode)


def single_turns(episodes: Sequence[Sequence[Turn]]) -> list[Turn]:
    """The only turn of each episode, for sides that have no sessions."""
    assert all(len(episode) == 1 for episode in episodes), "this side serves one turn per episode"
    return [episode[0] for episode in episodes]


def check_lengths(turns: Sequence[Turn], sampled: Sequence[Sequence[int]]) -> None:
    """Raises `WrongLengthError` unless each turn has the tokens it asked for."""
    wanted, got = [turn.length for turn in turns], [len(ids) for ids in sampled]
    if wanted != got:
        place = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), len(got))
        raise WrongLengthError(
            f"{len(got)} turns came back for {len(wanted)}; at {place}: {got[place : place + 4]} tokens "
            f"instead of {wanted[place : place + 4]}"
        )
