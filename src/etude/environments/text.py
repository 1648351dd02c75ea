"""The text environment: a model and its tools, over several turns, on one task.

    prompt ─► model turn ─► calls a tool? ─► tool's answer ─► model turn ─► … ─► submitted, or a limit
                                 └► no, but there is a user ─► its reply ─► model turn ─► …

`TextEnvironment` is concrete. It is subclassed through `build_prompt`, `is_done`, `score` and `metrics`;
everything else is composed: tools, rewards, protocol, user and sampler are arguments.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import decode, encode_plain
from etude.data.messages import Messages
from etude.data.source_target import encode_source
from etude.environments.lockstep import Lockstep
from etude.environments.running import Runs, Seeds
from etude.environments.tags import Framing, ParsedTurn, Reply, TagProtocol, ToolProtocol
from etude.environments.user import User, as_user, ask, leave
from etude.errors import DataError, EnvironmentSetupError, SamplerError
from etude.math.counters import word_of
from etude.protocols import Reward, Sampler, Session, Tool
from etude.rewards.function import SegmentReward, as_reward
from etude.rewards.mixture import score_episodes
from etude.sampling.lengths import LengthRange, Lengths
from etude.sampling.local import LocalSampler
from etude.sampling.params import decoder_start, sampling_params
from etude.tools.contract import ToolLimits, call_tool
from etude.tools.function import tools_by_name
from etude.types import Episode, Sampled, Segment, StopReason

_LENGTHS = word_of("length_sampler")  # name of a random stream

_OPEN = {"build_prompt", "is_done", "score", "metrics"}
_INSTEAD = {
    "step": "is_done(episode), or a tool",
    "task_end_check": "is_done(episode)",
    "tasks_end_check": "is_done(episode)",
    "compute_reward": "score(episodes)",
    "parse_tool_call": "the protocol= argument",
    "generate": "the sampler= argument",
    "play": "build_prompt(task), is_done(episode) and score(episodes)",
}


class TextEnvironment(Runs, Lockstep):
    """Lets a language model call tools over several turns to solve a task, and scores what it did.

    The first nine arguments are those of TRL 0.7.4.

    Args:
        model: what plays; a value-head model or any causal language model. May be None where a sampler
            is given, or where a trainer brings its own.
        tokenizer: of the model. It is not changed.
        tools: functions, callables or `Tool`s, as a list (functions known by `__name__`, instances by
            class name) or a dict by name; None for none.
        reward_fn: `f(last_segments, **columns) -> scores`, TRL 0.7.4's call. It sees the model's last
            segment.
        prompt: put before each task.
        max_turns: model turns per episode at most.
        max_tool_response: characters of a tool's answer that the model is shown, at most (also accepted as
            `max_tool_reponse`); None for no limit.
        max_length: tokens of an episode at most, an encoder's prompt not counted; the model's own limit by
            default.
        generation_kwargs: `max_new_tokens` (per turn), `temperature`, `top_k`, …; sampling, unless
            `do_sample=False`. Every turn begins with `forced_prefix`, whose tokens are not sampled: their
            mask is 0. For an encoder–decoder, `decoder_start_token_id` and `forced_bos_token_id` choose what
            its decoder begins with. The mapping is not changed.
        rewards: general rewards, `f(prompts, completions, **columns)` or `Reward`s, alone or in a list; of an
            episode, of its turns or of its tokens, as their `level` says.
        max_tool_response_tokens: the same limit in tokens.
        max_tool_calls: per episode at most; a further call ends it.
        tool_timeout: seconds a tool may take.
        max_seconds: wall time of an episode, after which it is interrupted; None for no limit.
        protocol: how calls are written; TRL's tags by default.
        user: who answers a turn that calls no tool: `f(episode) -> text`, sync or async, or None to end the
            episode; a list of replies, or the name of the tasks' column that has them. By default nobody
            does, and such a turn ends the episode. If it has a method `close(episode)`, that is called when
            the episode is over.
        sampler: a sampler to use instead of a local one over `model`.
        length_sampler: a `LengthSampler` or a pair (low, high): each episode draws its `max_new_tokens` from
            that range, `high` excluded, by its own random stream; in place of a fixed one in
            `generation_kwargs`.
        slots: episodes that the local sampler decodes at once, at most.
        cache_bytes: what its keys and values may take, such as "2GiB"; half of the free memory by default.
        seed: of the episodes' random streams; `set_seed` decides it by default.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tools: Mapping[str, Any] | Sequence[Any] | None = None,
        reward_fn: Any = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int | None = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        rewards: Any = None,
        max_tool_response: int | None = None,
        max_tool_response_tokens: int | None = None,
        max_tool_calls: int | None = None,
        tool_timeout: float = 10.0,
        max_seconds: float | None = None,
        protocol: ToolProtocol | None = None,
        user: User | Sequence[str] | str | None = None,
        sampler: Sampler | None = None,
        length_sampler: Lengths | None = None,
        slots: int = 32,
        cache_bytes: int | str | None = None,
        seed: int | None = None,
    ) -> None:
        if tokenizer is None:
            raise EnvironmentSetupError(
                "TextEnvironment needs the model's tokenizer: TextEnvironment(model, tokenizer, …)"
            )
        if max_turns < 1:
            raise EnvironmentSetupError(f"max_turns is {max_turns}; an episode has at least 1 model turn")
        self._model = model
        self.tokenizer = tokenizer
        self.tools: dict[str, Tool] = tools_by_name(tools)
        self.reward_fn = reward_fn
        several = rewards if isinstance(rewards, list | tuple) else [] if rewards is None else [rewards]
        self.rewards: list[Reward] = [as_reward(reward) for reward in several]
        if reward_fn is not None:
            self.rewards.append(SegmentReward(reward_fn))
        self.prompt = prompt or ""
        self.max_turns = max_turns
        self.max_tool_response = max_tool_response if max_tool_response is not None else max_tool_reponse
        self.max_tool_response_tokens = max_tool_response_tokens
        self.max_tool_calls = max_tool_calls
        self.max_length = max_length
        self.max_seconds = max_seconds
        self.protocol = protocol or TagProtocol()
        self.user = as_user(user)
        self.tool_limits = ToolLimits(timeout=tool_timeout, max_characters=self.max_tool_response)
        self.generation_kwargs = dict(generation_kwargs or {})
        self.params = sampling_params(
            {"eos_token_id": _ends(tokenizer, self.protocol), **self.generation_kwargs},
            tokenizer,
            stop=self.protocol.stop,
        )
        self.lengths = self._checked(length_sampler)
        self.slots = slots
        self.cache_bytes = cache_bytes
        self.next_seed = Seeds(seed)
        self.seed = self.next_seed.seed
        self._sampler = sampler

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name in _OPEN or name.startswith("__") or not hasattr(TextEnvironment, name):
                continue
            instead = _INSTEAD.get(name, "build_prompt, is_done, score or metrics")
            raise EnvironmentSetupError(
                f"{cls.__name__} overrides TextEnvironment.{name}; use {instead} instead"
            )

    # The four open points.

    def build_prompt(self, task: Mapping[str, Any]) -> str | Messages:
        """The text an episode starts with; or messages, where the protocol is a chat template."""
        for column in ("prompt", "query"):
            if isinstance(task.get(column), str):
                return self.prompt + task[column]
        raise DataError(
            f"a task needs a text column 'prompt' (or 'query'); this one has {', '.join(task) or 'none'}. "
            "Messages are for a ChatEnvironment"
        )

    def is_done(self, episode: Episode) -> bool:
        """Asked after each turn and each tool's answer: is the episode over?"""
        return False

    async def score(self, episodes: Sequence[Episode]) -> None:
        """Append rewards to each episode, those of turns and tokens where they belong."""
        await score_episodes(self.rewards, episodes)

    def metrics(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """What an evaluation says about all its episodes together, beside the means of their rewards."""
        return {}

    def prompt_text(self, task: Mapping[str, Any]) -> str:
        """What the episodes of a task begin with, as text."""
        return self.protocol.begin(self.tokenizer, self.build_prompt(task)).prompt.text

    # Playing.

    async def play(self, task: Mapping[str, Any], sampler: Sampler, *, seed: int) -> Episode:
        """Play one episode. What the model gets wrong is data; so is a failure on our side."""
        episode = Episode(task=task, seed=seed)
        started = time.monotonic()
        framing = self.protocol.begin(self.tokenizer, self.build_prompt(task))
        session = self._begin(episode, sampler, framing.prompt)
        limit = min(self.max_length or sampler.max_length, sampler.max_length)
        try:
            async with asyncio.timeout(self.max_seconds):
                while episode.stop is None:
                    await self._turn(episode, session, framing, limit)
        except TimeoutError:
            episode.stop = StopReason.WALL_CLOCK
        except SamplerError as error:
            episode.stop, episode.error = StopReason.INFRASTRUCTURE, str(error)
        finally:
            session.close()
            if self.user is not None:
                leave(self.user, episode)
            episode.timings["total"] = time.monotonic() - started
        return episode

    def _begin(self, episode: Episode, sampler: Sampler, prompt: Segment) -> Session:
        """Append the prompt; an encoder reads it, or it is the beginning of what the model goes on from."""
        start = decoder_start(self.generation_kwargs, sampler.decoder_start)
        if not start:
            episode.append(prompt)
            return sampler.session(seed=episode.seed)
        if self.protocol.end_ids:
            raise EnvironmentSetupError(
                "the model is an encoder–decoder, whose decoder doesn't go on from its prompt; a chat "
                "template needs a decoder that does"
            )
        source_ids = encode_source(self.tokenizer, prompt.text)
        episode.append(Segment("prompt", prompt.text, source_ids, encoder=True))
        episode.append(Segment("environment", "", list(start)))
        if len(source_ids) > sampler.max_source_length:  # as where nothing could follow a decoder's prompt
            episode.stop = StopReason.MAX_TOKENS
        return sampler.session(seed=episode.seed, source_ids=source_ids)

    async def _turn(self, episode: Episode, session: Session, framing: Framing, limit: int) -> None:
        """One model turn, and what a tool or the user answers."""
        room = limit - episode.context_length
        if room <= len(self.params.forced_prefix):  # nothing could be sampled
            episode.stop = StopReason.MAX_TOKENS
            return
        started = time.monotonic()
        params = replace(self.params, max_new_tokens=min(self._turn_tokens(episode.seed), room))
        sampled = await session.sample(episode.unseen, params)
        _count(episode, "sample", started)
        for segment in sampled.segments():
            episode.append(segment)
        parsed = self.protocol.parse(sampled.text)
        episode.stop = self._stop_after_model(episode, sampled, parsed, limit)
        if episode.stop is not None:
            return
        started = time.monotonic()
        if parsed.calls:
            replies = await self._answer(episode, parsed)
            _count(episode, "tools", started)
        else:
            replies = await self._listen(episode)
            _count(episode, "user", started)
        if replies:
            ended_by = sampled.token_ids[-1] if sampled.finish == "eos" else None
            heard = [reply.text for reply in replies if reply.call is None]
            self._append(episode, framing.frame(replies, ended_by), limit, heard)
        else:  # the user has nothing to add
            episode.stop = _last_word(sampled)

    def _turn_tokens(self, seed: int) -> int:
        """`max_new_tokens` of an episode's turns."""
        return self.params.max_new_tokens if self.lengths is None else self.lengths.draw(seed, _LENGTHS)

    def _checked(self, lengths: Lengths | None) -> LengthRange | None:
        if lengths is None:
            return None
        if "max_new_tokens" in self.generation_kwargs:
            raise EnvironmentSetupError(
                "length_sampler and generation_kwargs' max_new_tokens both limit a turn; give one of them"
            )
        found, forced = LengthRange.of(lengths, "length_sampler"), len(self.params.forced_prefix)
        if found.low <= forced:
            raise EnvironmentSetupError(
                f"length_sampler begins with {found.low}, and forced_prefix has {forced} tokens, which "
                "count; raise it, so that at least one can be sampled"
            )
        return found

    def _stop_after_model(
        self, episode: Episode, sampled: Sampled, parsed: ParsedTurn, limit: int
    ) -> StopReason | None:
        if parsed.submitted:
            return StopReason.SUBMITTED
        ended = sampled.finish == "eos" or self.tokenizer.eos_token_id in sampled.token_ids
        # In a chat, an end of sequence ends the turn that calls a tool; tags end such a turn themselves.
        if ended and (self.user is None if not parsed.calls else sampled.finish != "eos"):
            return StopReason.END_OF_SEQUENCE
        if sampled.finish == "length":
            return StopReason.MAX_TOKENS if episode.context_length >= limit else StopReason.TURN_TOKENS
        if self.is_done(episode):
            return StopReason.DONE
        if not parsed.calls and self.user is None:
            return StopReason.NO_TOOL_CALL
        if episode.turns >= self.max_turns:
            return StopReason.MAX_TURNS
        calls, most = len(episode.tool_calls) + len(parsed.calls), self.max_tool_calls
        if parsed.calls and most is not None and calls > most:
            return StopReason.MAX_TOOL_CALLS
        return None

    async def _answer(self, episode: Episode, parsed: ParsedTurn) -> list[Reply]:
        """Run the tools that a turn calls, one after the other: they may share what they work on."""
        replies, turn = [], episode.turns - 1
        for asked in parsed.calls:
            call = await call_tool(self.tools, asked.tool, asked.arguments, self.tool_limits, turn)
            episode.tool_calls.append(call)
            encoded = encode_plain(self.tokenizer, call.response)
            response_ids, response = encoded.ids, encoded.text
            cap = self.max_tool_response_tokens
            if cap is not None and len(response_ids) > cap:
                response_ids = response_ids[:cap]
                response = decode(self.tokenizer, response_ids)
                call.truncated = True
            replies.append(Reply(response, response_ids, asked))
        return replies

    async def _listen(self, episode: Episode) -> list[Reply]:
        """Ask the user; nothing comes back if it says no more."""
        assert self.user is not None, "without a user, a turn that calls no tool ends the episode"
        reply = await ask(self.user, episode)
        if reply is None:
            return []
        encoded = encode_plain(self.tokenizer, reply)
        return [Reply(encoded.text, encoded.ids)]

    def _append(
        self, episode: Episode, answer: Sequence[Segment], limit: int, heard: Sequence[str] = ()
    ) -> None:
        """Append what came back, if it fits; `heard` is what a user said in it."""
        if episode.context_length + sum(len(segment.token_ids) for segment in answer) >= limit:
            episode.stop = StopReason.MAX_TOKENS
            return
        for segment in answer:
            if segment.token_ids:
                episode.append(segment)
        episode.replies += heard
        if self.is_done(episode):
            episode.stop = StopReason.DONE

    @property
    def model(self) -> nn.Module | None:
        return self._model

    @property
    def sampler(self) -> Sampler:
        """The sampler in use; a local one over `model` is made when it is first needed."""
        if self._sampler is None:
            if self.model is None:
                raise EnvironmentSetupError("this environment has no model and no sampler; pass one of them")
            self._sampler = LocalSampler(
                self.model,
                self.tokenizer,
                slots=self.slots,
                max_length=self.max_length,
                cache_bytes=self.cache_bytes,
            )
        return self._sampler


def _ends(tokenizer: PreTrainedTokenizerBase, protocol: ToolProtocol) -> list[int]:
    """The tokens that end a turn where the caller doesn't say."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*eos, *protocol.end_ids]))


def _last_word(sampled: Sampled) -> StopReason:
    return StopReason.END_OF_SEQUENCE if sampled.finish == "eos" else StopReason.NO_TOOL_CALL


def _count(episode: Episode, name: str, started: float) -> None:
    episode.timings[name] = episode.timings.get(name, 0.0) + time.monotonic() - started
