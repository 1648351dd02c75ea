"""A process reward model as a reward: for each step, the probability that it is right.

Not covered: where labels of steps come from; models that score whole episodes (`model`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import (
    decode,
    encode_control,
    encode_plain,
    special_token_ids,
)
from etude.data.formats import to_prompt
from etude.data.scored import scored_ids
from etude.errors import ConfigError, RewardError
from etude.math.reward_model import step_log_odds
from etude.rewards.function import conversation_of
from etude.rewards.levels import Level, Score, check_level, positions
from etude.rewards.reading import EpisodeReader, Reading
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode

Reduce = Literal["product", "min", "mean", "last"]
_REDUCE: dict[Reduce, Callable[[list[float]], float]] = {
    "product": math.prod,
    "min": min,
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "last": lambda scores: scores[-1],
}


class ProcessReward:
    """The probability that a step is right, after its last token, for the steps of an episode.

    The model is what `PRMTrainer` saves, or any other token classifier whose two labels are wrong and right.
    A step ends with `step_separator`, or with its turn.

    Args:
        model_or_path: the model, or its directory or hub id.
        tokenizer: of the model; loaded with it if a path was given.
        level: "token", a score at the last token of each step, for which the policy's tokens must be the
            reward model's; "turn", that of the turn's last step; "episode", what `reduce` makes of all.
        reduce: "product", the probability that every step is right (Lightman et al. 2023, section 2.6; the
            default), "min" (Wang et al. 2024), "mean", or "last". For the level "episode" only.
        step_separator: as in training.
        read, batch_size, max_length, dtype, device: see `ModelReward`.
        name: in metrics.
        weight: of its scores in the episode's reward.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: the model can't be found, doesn't score steps, or has no tokenizer.
    """

    def __init__(
        self,
        model_or_path: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        level: Level = "token",
        reduce: Reduce | None = None,
        step_separator: str = "\n",
        read: Reading | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        name: str = "process_reward",
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.weight = check_weight(weight, name)
        self.level = check_level(level, name)
        if reduce is not None and level != "episode":
            raise ConfigError(f"reduce does nothing at level {level!r}; leave it out, or set level='episode'")
        if reduce is not None and reduce not in _REDUCE:
            raise ConfigError(f"reduce is {reduce!r}; expected one of {', '.join(get_args(Reduce))}")
        if not step_separator:
            raise ConfigError("step_separator is empty; expected what ends a step, such as a line break")
        self.reduce = _REDUCE[reduce or "product"]
        self.step_separator = step_separator
        self.reader = EpisodeReader(
            model_or_path,
            tokenizer,
            "token",
            read=read,
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )

    async def __call__(self, episodes: Sequence[Episode]) -> list[Score]:
        """Score episodes, in a thread; None for what has no step.

        Raises:
            RewardError: the model gave NaN, or doesn't know a token; or the level is "token" and the policy's
                tokens aren't the model's.
        """
        scores = await asyncio.to_thread(self._score, episodes)
        return check_scores(scores, self.name, episodes, self.level)

    def _score(self, episodes: Sequence[Episode]) -> list[Score]:
        with self.reader.lock:
            read = self.reader.reading_of(episodes)
            if read == "tokens":
                self.reader.check_tokens(episodes, self.name)
            elif self.level == "token":
                raise RewardError(
                    f"reward {self.name!r} can't say at which of the policy's tokens a step ends, since its "
                    "model has another tokenizer; use level='turn' or 'episode'"
                )
            make = _steps_in_tokens if read == "tokens" else _steps_in_text
            found = [make(e, self.reader.tokenizer, self.step_separator, read) for e in episodes]
            probabilities = self._probabilities(found)
        return [self._at_level(*each) for each in zip(episodes, found, probabilities, strict=True)]

    def _probabilities(self, found: list[_Steps]) -> list[list[list[float | None]]]:
        """For each episode and each of its turns, one per step; None for one that max_length cut off."""
        reader = self.reader
        texts = [
            scored_ids(steps.ids, reader.tokenizer, append_eos=False, max_length=reader.max_length)
            for steps in found
        ]
        places = [
            [[text.place(end) for end in turn] for turn in steps.ends]
            for steps, text in zip(found, texts, strict=True)
        ]
        ends = [[p for turn in each for p in turn if p is not None] for each in places]
        judged = [i for i, each in enumerate(ends) if each]
        logits = reader.scores_at([texts[i].ids for i in judged], [ends[i] for i in judged])
        right: dict[int, Any] = {
            i: iter(step_log_odds(logits_M2).sigmoid().tolist())
            for i, logits_M2 in zip(judged, logits, strict=True)
        }
        return [
            [[None if p is None else next(right[i]) for p in turn] for turn in each]
            for i, each in enumerate(places)
        ]

    def _at_level(self, episode: Episode, steps: _Steps, scores: list[list[float | None]]) -> Score:
        if self.level == "turn":
            return [turn[-1] if turn else None for turn in scores]
        if self.level == "episode":
            present = [score for turn in scores for score in turn if score is not None]
            return self.reduce(present) if present else None
        at = {
            place: score
            for places, turn in zip(steps.places, scores, strict=True)
            for place, score in zip(places, turn, strict=True)
        }
        return [at.get(place) for place in positions(episode, "token")]


@dataclass
class _Steps:
    """The steps of an episode.

    Attributes:
        ids: what the model reads.
        ends: for each turn, the last token of each of its steps, in `ids`.
        places: the same in the episode's own tokens; empty where these are others.
    """

    ids: list[int]
    ends: list[list[int]]
    places: list[list[int | None]]


def _steps_in_tokens(episode: Episode, tokenizer: Any, separator: str, _: Reading) -> _Steps:
    """Steps of an episode whose tokens are the model's.

    A last step without a separator gets one: after it, steps were judged in training.
    """
    ids, special = episode.token_ids, special_token_ids(tokenizer)
    last_tokens = positions(episode, "turn")
    ends: list[list[int]] = []
    places: list[list[int | None]] = []
    for number, span in enumerate(_turns(episode)):
        found, text, content = [], "", span.start - 1
        for place in span:
            if ids[place] in special:
                continue
            text, content = text + decode(tokenizer, [ids[place]]), place
            step, ended, rest = text.rpartition(separator)
            if ended:
                found += [place] if step.strip() else []
                text = rest
        ends.append(found)
        places.append([*found])
        if text.strip():
            if number == len(last_tokens) - 1 and span.stop == len(ids):
                ids = ids[: content + 1] + encode_control(tokenizer, separator)
                content = len(ids) - 1
            ends[-1].append(content)
            places[-1].append(last_tokens[number])
    return _Steps(ids, ends, places)


def _turns(episode: Episode) -> list[range]:
    """Where the tokens of each of the model's turns are."""
    turns: list[range] = []
    before = None
    for start, end, segment in episode.spans():
        if before is not None and segment.completes(before):
            turns[-1] = range(turns[-1].start, end)
        elif segment.source == "model":
            turns.append(range(start, end))
        before = segment
    return turns


def _steps_in_text(episode: Episode, tokenizer: Any, separator: str, read: Reading) -> _Steps:
    """Steps of an episode in other words, each encoded with its separator, as in training."""
    prompt: Any = episode.prompt
    if read == "messages":
        prompt = conversation_of(episode) or [{"role": "user", "content": prompt}]
    ids = list(to_prompt({"prompt": prompt}, tokenizer).token_ids)
    ends: list[list[int]] = []
    before = None
    for segment in episode.segments:
        if segment.source == "tool":
            ids += encode_plain(tokenizer, segment.text).ids
        elif segment.source == "environment":
            ids += encode_control(tokenizer, segment.text)
        elif segment.source == "model":
            if before is None or not segment.completes(before):
                ends.append([])
            for step in segment.text.split(separator):
                if step.strip():
                    ids += encode_control(tokenizer, step) + encode_control(tokenizer, separator)
                    ends[-1].append(len(ids) - 1)
        before = segment
    return _Steps(ids, ends, [[] for _ in ends])
