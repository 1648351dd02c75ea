"""Episodes that were sampled → rows to learn from, in the formats of `formats`.

    segments              the episode as it was played, tools and all, with the sampled token ids
    prompt-completion     prompt and what the model wrote
    preference            the best and the worst episode of a task: chosen, rejected, margin
    unpaired-preference   each episode, and whether its reward reaches `min_reward`: label

Rows keep the number of their task ("task"), their reward and, by name, their rewards. Not covered: playing
(`environments`), and episodes with tools in the three formats of plain text, which have no place for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from etude.errors import ConfigError, DataError
from etude.types import Episode, StopReason

SelectionFormat = Literal["segments", "prompt-completion", "preference", "unpaired-preference"]


@dataclass(frozen=True)
class Selection:
    """Which episodes of a task become rows, and what kind.

    Args:
        format: see above.
        keep: of "segments" and "prompt-completion", the best so many per task, best first; None keeps all. A
            task gives one "preference", and all its episodes are rated in "unpaired-preference".
        min_reward: episodes below it are not kept, or labelled false; a chosen one reaches it.
        min_margin: the chosen reward exceeds the rejected one by more than this.

    Raises:
        ConfigError: they contradict each other.
    """

    format: SelectionFormat = "segments"
    keep: int | None = 1
    min_reward: float | None = None
    min_margin: float = 0.0

    def __post_init__(self) -> None:
        formats = get_args(SelectionFormat)
        if self.format not in formats:
            raise ConfigError(f"format is {self.format!r}; expected one of {', '.join(formats)}")
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; expected at least 1 episode per task, or none for all")
        if self.keep not in {"preference": (1,), "unpaired-preference": (1, None)}.get(
            self.format, (self.keep,)
        ):
            raise ConfigError(f"keep does nothing for {self.format} rows; leave it out")
        if self.format == "unpaired-preference" and self.min_reward is None:
            raise ConfigError("an unpaired-preference says whether an answer is good; set min_reward")
        if self.min_margin < 0:
            raise ConfigError(f"min_margin is {self.min_margin}; expected 0 or more")
        if self.min_margin and self.format != "preference":
            raise ConfigError(f"min_margin does nothing for {self.format} rows; leave it out")

    def rows(self, task: int, episodes: Sequence[Episode]) -> list[dict[str, Any]]:
        """What a task gives; nothing where none of its episodes is good enough.

        Args:
            task: its number.
            episodes: of this task, scored. What failed on our side is left out.

        Raises:
            DataError: an episode has text of tools, and the format no place for it.
        """
        ranked = best_first(episodes)
        good = [e for e in ranked if self.min_reward is None or e.reward >= self.min_reward]
        match self.format:
            case "preference":
                return self._pairs(task, ranked[-1], good[0]) if good else []
            case "unpaired-preference":
                rated = enumerate(ranked)  # the good ones come first
                return [{**_completion(e), "label": i < len(good), **_scores(task, e)} for i, e in rated]
            case "prompt-completion":
                return [{**_completion(e), **_scores(task, e)} for e in good[: self.keep]]
            case "segments":
                return [{**_segments(e), **_scores(task, e)} for e in good[: self.keep]]

    def _pairs(self, task: int, worst: Episode, best: Episode) -> list[dict[str, Any]]:
        margin = best.reward - worst.reward
        if margin <= self.min_margin:
            return []
        chosen, rejected = _completion(best), _completion(worst)
        row = {
            "prompt": chosen["prompt"],
            "chosen": chosen["completion"],
            "rejected": rejected["completion"],
            "margin": margin,
            "task": task,
            "chosen_rewards": _by_name(best),
            "rejected_rewards": _by_name(worst),
        }
        return [row]


def best_first(episodes: Sequence[Episode]) -> list[Episode]:
    """By reward, of equal ones the earlier first; without those that failed on our side."""
    played = [episode for episode in episodes if episode.stop is not StopReason.INFRASTRUCTURE]
    return sorted(played, key=lambda episode: -episode.reward)


def _segments(episode: Episode) -> dict[str, Any]:
    stored = [{"source": s.source, "text": s.text, "token_ids": s.token_ids} for s in episode.segments]
    return {"segments": stored}


def _completion(episode: Episode) -> dict[str, Any]:
    foreign = {s.source for s in episode.segments if s.text} - {"prompt", "model"}
    if foreign:
        raise DataError(
            f"an episode has text of its {' and '.join(sorted(foreign))} (it began "
            f"{episode.prompt[:60]!r}), for which a completion has no place: it would be learnt as the "
            "model's own. Use the format segments"
        )
    return {"prompt": episode.prompt, "completion": episode.completion}


def _scores(task: int, episode: Episode) -> dict[str, Any]:
    return {"task": task, "reward": episode.reward, "rewards": _by_name(episode), "stop": str(episode.stop)}


def _by_name(episode: Episode) -> dict[str, float | None]:
    return {name: total.value for name, total in episode.reward_totals.items()}
