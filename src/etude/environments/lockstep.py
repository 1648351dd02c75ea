"""TRL 0.7.4's lock-step methods, for callers that drive histories by hand.

The orchestrator doesn't use them: they advance all histories together, turn by turn, and re-read each
history from its first token.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from etude.environments.history import TextHistory
from etude.environments.tags import ParsedTurn, Reply, ToolProtocol
from etude.environments.user import User
from etude.errors import EnvironmentSetupError
from etude.protocols import Reward, Sampler
from etude.rewards.mixture import score_episodes
from etude.runtime.loop import run_sync
from etude.sampling.params import decoder_start
from etude.types import Episode, SamplingParams, Segment


class Lockstep(ABC):
    """The methods of TRL 0.7.4's `TextEnvironment` beside `run`."""

    tokenizer: PreTrainedTokenizerBase
    protocol: ToolProtocol
    params: SamplingParams
    generation_kwargs: Mapping[str, Any]
    rewards: list[Reward]
    user: User | None
    max_length: int | None
    next_seed: Callable[[], int]

    @property
    @abstractmethod
    def sampler(self) -> Sampler: ...

    @abstractmethod
    def _turn_tokens(self, seed: int) -> int: ...

    @abstractmethod
    async def _answer(self, episode: Episode, parsed: ParsedTurn) -> list[Reply]: ...

    @abstractmethod
    def _append(
        self, episode: Episode, answer: Sequence[Segment], limit: int, heard: Sequence[str] = ()
    ) -> None: ...

    def generate(self, histories: list[TextHistory]) -> list[TextHistory]:
        """Sample one turn for each history that isn't completed.

        An encoder–decoder's encoder reads what a history holds before its first turn.

        Raises:
            EnvironmentSetupError: there is a user, whom TRL's loop wouldn't ask, or a chat template.
        """
        if self.user is not None or self.protocol.end_ids:
            raise EnvironmentSetupError(
                "the lock-step methods ask no user and know no chat templates; call run(tasks)"
            )
        start = decoder_start(self.generation_kwargs, self.sampler.decoder_start)

        async def turn(history: TextHistory, seed: int) -> None:
            if start and not history.episode.source_ids:
                for segment in history.episode.segments:
                    segment.encoder = True
                history.episode.append(Segment("environment", "", list(start)))
            source_ids = history.episode.source_ids
            session = self.sampler.session(seed=seed, source_ids=source_ids)
            params = replace(self.params, max_new_tokens=self._turn_tokens(seed))
            sampled = await session.sample(history.episode.token_ids[len(source_ids) :], params)
            session.close()
            for segment in sampled.segments():
                history.episode.append(segment)

        async def turns() -> None:
            active = [history for history in histories if not history.completed]
            await asyncio.gather(*(turn(history, self.next_seed()) for history in active))

        run_sync(turns())
        return histories

    def step(self, history: TextHistory) -> TextHistory:
        """End the history if it is over, else run the tool its last turn calls."""
        truncated, ended = self.task_end_check(history)
        if ended:
            history.complete(truncated)
        if not history.completed:
            parsed = self.protocol.parse(history.last_text_segment)
            framing = self.protocol.begin(self.tokenizer, history.episode.prompt)
            replies = run_sync(self._answer(history.episode, parsed))
            limit = min(self.max_length or self.sampler.max_length, self.sampler.max_length)
            self._append(history.episode, framing.frame(replies, None), limit)
        return history

    def parse_tool_call(self, text: str) -> tuple[str | None, str | None]:
        """(tool, query) of a turn's text; (None, None) where there is no well-formed call."""
        for call in self.protocol.parse(text).calls:
            if call.tool is not None:
                return call.tool, str(call.arguments)
        return None, None

    def task_end_check(self, history: TextHistory, model_turn: bool = True) -> tuple[bool, bool]:
        """(truncated, ended)"""
        if history.completed:
            return False, False
        if self.max_length is not None and history.episode.context_length > self.max_length:
            return True, True
        last = history.episode.segments[-1]
        if last.source != "model":
            return False, False
        parsed = self.protocol.parse(history.last_text_segment)
        ended = parsed.submitted or self.tokenizer.eos_token_id in last.token_ids
        return False, ended or (model_turn and not parsed.calls)

    def tasks_end_check(self, histories: list[TextHistory], model_turn: bool = True) -> list[TextHistory]:
        """Complete each history that is over."""
        for history in histories:
            truncated, ended = self.task_end_check(history, model_turn)
            if ended:
                history.complete(truncated)
        return histories

    def compute_reward(self, histories: Sequence[TextHistory], **columns: Any) -> Sequence[TextHistory]:
        """Score the histories; their `reward` is set."""
        episodes: list[Episode] = []
        for i, history in enumerate(histories):
            history.episode.task = {name: values[i] for name, values in columns.items()}
            history.episode.rewards.clear()
            episodes.append(history.episode)
        run_sync(score_episodes(self.rewards, episodes))
        for history in histories:
            history.reward = torch.tensor(history.episode.reward, device=history.device)
        return histories
