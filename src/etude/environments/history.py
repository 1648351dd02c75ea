"""`TextHistory`: the view of an episode that TRL 0.7.4's users know."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from rich import print as rich_print
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from etude.reporting.episodes import episode_text, episode_tokens, legend
from etude.types import Episode, Segment, Source, StopReason


class TextHistory:
    """A view of an `Episode` with the attributes of TRL 0.7.4's `TextHistory`.

    Args:
        text, tokens: the first segment's text and its token ids [n].
        system: who wrote it; kept for callers, the first segment is the prompt either way.

    Attributes:
        episode: what is viewed. `append_segment` appends to it.
        reward: what `split_query_response_tokens`' response was given.
    """

    def __init__(self, text: str, tokens: Tensor, system: bool = True) -> None:
        self._view(Episode(), tokens.device)
        self._append("prompt", text, tokens)
        self._first_system = system

    @classmethod
    def of(cls, episode: Episode, device: torch.device | str = "cpu") -> TextHistory:
        """View `episode`, its token tensors on `device`."""
        history = cls.__new__(cls)
        history._view(episode, torch.device(device))
        return history

    def _view(self, episode: Episode, device: torch.device) -> None:
        self.episode = episode
        self.device = device
        self.reward: Tensor | float = episode.reward
        self._first_system = True

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        """Append a segment: the system's (a tool's answer) or, with `system=False`, the model's.

        Tokens appended as the model's count as sampled by the current policy, as in TRL.
        """
        self._append("tool" if system else "model", text, tokens)

    def _append(self, source: Source, text: str, tokens: Tensor) -> None:
        if len(text) == 0 or len(tokens) == 0:
            raise ValueError("a segment needs text and tokens; this one has none of one of them")
        version = 0 if source == "model" else None
        self.episode.append(Segment(source, text, tokens.tolist(), policy_version=version))

    def complete(self, truncated: bool = False) -> None:
        self.episode.stop = StopReason.MAX_TOKENS if truncated else StopReason.DONE

    @property
    def completed(self) -> bool:
        return self.episode.stop is not None

    @property
    def truncated(self) -> bool:
        return self.episode.stop is StopReason.MAX_TOKENS

    @property
    def text(self) -> str:
        return self.episode.text

    @property
    def tokens(self) -> Tensor:
        return torch.tensor(self.episode.token_ids, dtype=torch.long, device=self.device)

    @property
    def token_masks(self) -> Tensor:
        """1 where the policy sampled the token, else 0."""
        return torch.tensor(self.episode.sampled, dtype=torch.long, device=self.device)

    @property
    def _runs(self) -> list[list[Segment]]:
        """The episode's segments as TRL has them: a tool and its frame are one, and so is a model's turn."""
        runs: list[list[Segment]] = []
        for segment in self.episode.segments:
            answers = segment.source in ("tool", "environment")
            answering = answers and runs and runs[-1][0].source in ("tool", "environment")
            if answering or (runs and segment.completes(runs[-1][-1])):
                runs[-1].append(segment)
            else:
                runs.append([segment])
        return runs

    @property
    def text_spans(self) -> list[tuple[int, int]]:
        return _spans([sum(len(segment.text) for segment in run) for run in self._runs])

    @property
    def token_spans(self) -> list[tuple[int, int]]:
        return _spans([sum(len(segment.token_ids) for segment in run) for run in self._runs])

    @property
    def system_spans(self) -> list[bool]:
        sources = [run[0].source != "model" for run in self._runs]
        return [self._first_system, *sources[1:]]

    @property
    def last_text_segment(self) -> str:
        return "".join(segment.text for segment in self._runs[-1])

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """(query [q], response [r], mask of the response [r])"""
        split = self.token_spans[0][1]
        tokens = self.tokens
        return tokens[:split], tokens[split:], self.token_masks[split:]

    def show_text(self, show_legend: bool = False) -> None:
        """Print the text, coloured by source."""
        rich_print(episode_text(self.episode))
        if show_legend:
            self.show_colour_legend()

    def show_tokens(self, tokenizer: PreTrainedTokenizerBase, show_legend: bool = False) -> None:
        """Print the tokens, coloured by source."""
        rich_print(episode_tokens(self.episode, tokenizer))
        if show_legend:
            self.show_colour_legend()

    def show_colour_legend(self) -> None:
        rich_print(legend())


def as_responses(
    episodes: Sequence[Episode], device: torch.device | str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[TextHistory]]:
    """What TRL 0.7.4's `TextEnvironment.run` returns of its episodes, on `device`.

    Returns:
        queries [q], responses [r], masks of the responses [r] (1 where the model sampled), rewards (scalars)
        and histories, each a list with one entry per episode.
    """
    histories = [TextHistory.of(episode, device) for episode in episodes]
    for history in histories:
        history.reward = torch.tensor(history.episode.reward, device=device)
    queries, responses, masks = (
        list(part) for part in zip(*(h.split_query_response_tokens() for h in histories), strict=True)
    )
    return queries, responses, masks, [torch.as_tensor(h.reward) for h in histories], histories


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))
