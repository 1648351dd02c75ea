"""The local sampler: continuous batching over any language model, sharing the trainer's weights.

    session.sample(ids)  ─►  waiting ─► running ─► one flat step: feed, draw, extend ─► finished turns return
                                 ▲          │                                               │
                                 └── slots ◄┴───────── sessions keep theirs between turns ◄─┘

A turn that finishes leaves at once and the next one takes its place. A session keeps its keys and values
while its tool runs: on return only the tool's tokens are fed. A beginning that several sessions share (a
group's prompt, a few-shot preamble) is computed once and copied. Steps run on the event loop's own thread,
between them everybody else (tools, other episodes) gets a turn; nothing waits for the slowest.

An encoder–decoder's sessions are its decoder's; what its encoder reads belongs to them, and is read once.

Not covered: other processes or machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from etude.errors import CacheBudgetError, ConfigError, SamplerError
from etude.models.encoder_decoder import decoder_start_ids, is_encoder_decoder
from etude.models.packing import rotary_switch
from etude.models.prepacked import PrepackedLinears
from etude.models.wrappers import trunk_of
from etude.sampling.backends import choose_backend, free_memory
from etude.sampling.draw import Draw, begin_draw, begin_draw_each
from etude.sampling.feeds import Feed
from etude.sampling.memory import CacheLimits, format_size, parse_size
from etude.sampling.schedule import Schedule
from etude.sampling.session import LocalSession, Turn
from etude.sampling.slots import Slots
from etude.sampling.stop import KnownStops
from etude.sampling.weights import WeightWatch
from etude.types import FinishReason, Sampled, SamplingParams


@dataclass(slots=True)
class Flight:
    """A step's draws, which the device may still be at work on.

    While it is, the next step is scheduled and launched: turns go on with tokens that only the device knows.
    What it draws for a turn that turns out to have ended is thrown away.
    """

    turns: list[Turn]
    draw: Draw
    version: int  # of the weights


class LocalSampler:
    """`protocols.Sampler` over a model in this process.

    Args:
        model: a causal language model or an encoder–decoder; value-head, adapter and accelerate wrappers are
            looked through, so that it samples from the very weights that are trained.
        tokenizer: for stop strings and the text of a turn.
        slots: turns that are decoded at once, and sessions that keep their cache; at most.
        max_length: tokens a session can hold; the model's own limit by default (with LongRoPE the length
            at which its embeddings switch: beyond it every token costs a forward of the whole session). Of an
            encoder–decoder without a limit (T5), the tokenizer's, 1,024 at most.
        max_source_length: the same for what an encoder reads.
        cache_bytes: what keys and values may take, as a number or a text such as "2GiB". By default half of
            the memory that is free now, and always enough for one session.
        keep_cache: sessions keep keys and values that were computed before the weights changed. Faster, and
            no longer exact: such a turn is sampled from a mixture of old and new weights.
        prefill_tokens: prompt tokens fed per step at most, which bounds the memory of a step.
        autocast: the trainer's autocast, so that both compute in the same precision.
        prepack: keep the linear layers' weights once more, in the layout in which small steps on a CPU run
            up to three times as fast; None does so where that takes at most a quarter of the free memory.
        deterministic: what a session samples is the same to the last bit, whatever the other sessions,
            their timing and evictions; `etude.sampling.static` says how far that goes. It costs speed: rows
            that stand idle are computed, prompts are fed one by one, and nothing is copied between slots.
        cuda_graphs: replay steps of up to 1,024 tokens from CUDA graphs, and launch each before the tokens of
            the last are known (`etude.sampling.tokens`). A capture takes a tenth of a second per size.

    Keys and values never take more than `cache_bytes`, nor more than `slots` sessions of `max_length` need.
    All slots are as long as the longest session so far needs; where the budget is short, there are fewer of
    them the longer they get, and sessions wait, or are rebuilt, instead. `describe` says the sizes.
    With `deterministic` there are from the start no more slots than the budget holds at full length; one
    more is for rows that stand idle, and they fill up to a multiple of 8.

    Raises:
        CacheBudgetError: `cache_bytes` doesn't hold one session of `max_length` tokens.
        ConfigError: `cuda_graphs` for a model that can't have them; `deterministic` with `keep_cache`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 32,
        max_length: int | None = None,
        max_source_length: int | None = None,
        cache_bytes: int | str | None = None,
        keep_cache: bool = False,
        prefill_tokens: int = 4096,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        prepack: bool | None = None,
        deterministic: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        if slots < 1 or prefill_tokens < 1:
            raise CacheBudgetError(
                f"slots is {slots} and prefill_tokens {prefill_tokens}; both must be at least 1"
            )
        if deterministic and keep_cache:
            raise ConfigError(
                "deterministic=True can't hold with keep_cache=True: what a session keeps over a change of "
                "the weights depends on who took its slot meanwhile; leave one of them out"
            )
        self.model = trunk_of(model)
        self.tokenizer = tokenizer
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.autocast = autocast
        self.keep_cache = keep_cache
        self.deterministic = deterministic
        reads = is_encoder_decoder(self.model)
        self.decoder_start = decoder_start_ids(self.model) if reads else ()
        limit, default = _limits_of(self.model, tokenizer)
        self.max_length = min(max_length or default, limit)
        self.max_source_length = min(max_source_length or default, limit) if reads else 0
        self.policy_version = 0
        self.tokens_fed = self.tokens_sampled = self.steps = 0
        self._backend = choose_backend(
            self.model,
            self.max_length,
            max_source_length=self.max_source_length,
            upcoming=lambda count: self._schedule.upcoming(count),
            deterministic=deterministic,
            cuda_graphs=cuda_graphs,
        )
        self._linears = _prepacked(self.model, prepack)
        self.limits = self._limits(cache_bytes)
        self._schedule = Schedule(
            Slots(self.limits), prefill_tokens=prefill_tokens, deterministic=deterministic
        )
        self._backend.resize(self._slots.count, self._slots.length, kept=[])
        self._weights = WeightWatch(self.model)
        self._flight: Flight | None = None
        self._pump: asyncio.Task[None] | None = None
        self._stops = KnownStops(tokenizer)

    def _limits(self, cache_bytes: int | str | None) -> CacheLimits:
        budget = None if cache_bytes is None else parse_size(cache_bytes)
        with torch.no_grad(), self._evaluating(), self.autocast():
            cost = self._backend.measure()
        if budget is None:
            budget = max(free_memory(self.model.device) // 2, cost.of_session(self.max_length))
        return self._backend.limits(CacheLimits(self.slots, self.max_length, cost, budget))

    def describe(self) -> str:
        """The sizes in one line, for the start of a run."""
        line = f"sampler: {self.limits.describe()}"
        if self._linears is not None:
            line += f", and {format_size(self._linears.nbytes)} of prepacked weights"
        return line

    def session(self, *, seed: int, source_ids: Sequence[int] = ()) -> LocalSession:
        if bool(source_ids) != bool(self.decoder_start):
            raise SamplerError(
                "an encoder–decoder's session needs source_ids, what its encoder reads"
                if self.decoder_start
                else "source_ids are for an encoder, and the model is a decoder alone"
            )
        return LocalSession(self, seed, source_ids)

    def release(self, session: LocalSession) -> None:
        """Take back the session's slot, if it has one; a turn that is being sampled in it fails."""
        if session.busy:
            for turn in [turn for turn in self._schedule.turns if turn.session is session]:
                self._schedule.leave(turn)
                if not turn.result.done():
                    turn.result.set_exception(SamplerError("the session was closed while it sampled a turn"))
        self._slots.release(session)

    def weights_changed(self) -> None:
        """Count a new version of the weights. No cache survives it, except by `keep_cache`.

        Most changes are noticed without this call, see `sampling.weights`.
        """
        self._land()
        self._backend.weights_changed()
        self._weights.changed()  # what has changed so far is this version
        self.policy_version += 1
        if self._linears is not None:
            self._linears.forget()
        if self.keep_cache:
            self._slots.forget_prefixes()  # a new session gets nothing of the old weights
            return
        for session in self._slots.holders.values():
            session.cached = 0

    @property
    def tokens_copied(self) -> int:
        """Tokens of shared beginnings that were copied between slots."""
        return self._schedule.tokens_copied

    @property
    def _slots(self) -> Slots:
        return self._schedule.slots

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values held now."""
        return self._backend.nbytes

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    async def _sample(
        self, session: LocalSession, token_ids: Sequence[int], params: SamplingParams
    ) -> Sampled:
        if session.closed or session.busy:
            state = "closed" if session.closed else "already sampling a turn"
            raise SamplerError(f"this session is {state}; open a new one with sampler.session(seed=…)")
        total = len(session.token_ids) + len(token_ids) + len(params.forced_prefix)
        if total == 0:
            raise SamplerError(
                "nothing to continue: a session needs at least one token before its first turn"
            )
        room = self.max_length - total
        if room < 1:
            raise CacheBudgetError(
                f"the session has {total} tokens and the sampler holds {self.max_length} per session; "
                "shorten the prompt, or raise max_length up to the model's own limit"
            )
        if params.forced_prefix:
            self._check_forced(max(params.forced_prefix))
        if len(session.source_ids) > self.max_source_length:
            raise CacheBudgetError(
                f"the encoder is to read {len(session.source_ids)} tokens, at most {self.max_source_length} "
                "are allowed; shorten the prompt, or raise max_source_length up to the model's own limit"
            )
        session.token_ids.extend(token_ids)
        stop = self._stops[params.stop] if params.stop else None
        future = asyncio.get_running_loop().create_future()
        limit = min(params.max_new_tokens, len(params.forced_prefix) + room)
        turn = Turn(session, params, limit, stop, future)
        if finish := turn.force():
            turn.version = self.policy_version
            self._finish(turn, finish)
            return future.result()
        session.busy = True
        self._schedule.waiting.append(turn)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        try:
            return await future
        finally:
            session.busy = False
            if not future.done() or future.cancelled():
                self._withdraw(turn)

    def _check_forced(self, token: int) -> None:
        vocabulary = self.model.config.get_text_config().vocab_size
        if token >= vocabulary:
            raise SamplerError(
                f"forced_prefix has token {token}; the model's vocabulary ends at {vocabulary - 1}"
            )

    async def _run(self) -> None:
        """Step while there is work; yield between steps, so that finished episodes move on."""
        try:
            with self._evaluating(), self._weights:
                while self._schedule.turns or self._flight:
                    self._step()
                    await asyncio.sleep(0)
        except BaseException as error:  # every turn that waits for this task must hear of it
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    @torch.no_grad()
    def _step(self) -> None:
        """Feed every running row what it has not seen, draw a token for those that have seen all."""
        if self._weights.changed(closely=bool(self._schedule.waiting)):
            self.weights_changed()
        self._schedule.admit(self._backend, self.steps)
        running = self._schedule.running
        runs_ahead = self._backend.runs_ahead and not any(turn.needs_history for turn in running)
        if not runs_ahead:
            self._land()
        feeds, turns = self._schedule.feeds(self._backend, self.policy_version)
        while (needed := max((feed.end for feed in feeds), default=0)) > self._slots.length:
            self._land()
            self._schedule.grow(self._backend, needed)
            feeds, turns = self._schedule.feeds(self._backend, self.policy_version)
        flight = self._launch(feeds, turns) if feeds else None
        self._land()
        self._flight = flight
        if flight is not None:
            for turn, place in zip(flight.turns, flight.draw.places, strict=True):
                turn.coming = place
            if not runs_ahead:
                self._land()

    def _launch(self, feeds: list[Feed], turns: list[Turn]) -> Flight | None:
        """Feed, and draw for the turns that have then seen all; nothing of it is known yet."""
        drawn_R = self._flight.draw.tokens_R if self._flight else None
        ready = []
        for i, (feed, turn) in enumerate(zip(feeds, turns, strict=True)):
            session = turn.session
            session.cached += len(feed.token_ids)
            self.tokens_fed += len(feed.token_ids)
            if session.cached == len(session.token_ids) + turn.ahead:
                ready.append(i)
        self.steps += 1
        drawing = [turns[i] for i in ready]
        rows = [turn.row() for turn in drawing]
        draw = None
        with self.autocast(), nullcontext() if self._linears is None else self._linears.active():
            if self._backend.runs_ahead and all(turn.plain for turn in drawing):
                draw = self._backend.draw(feeds, ready, rows, drawn_R)
            if draw is None:
                logits = self._backend.logits(feeds, drawn_R)
        if not ready:
            return None
        if draw is None:
            begin = begin_draw_each if self.deterministic else begin_draw
            draw = begin(logits if len(ready) == len(turns) else logits[ready], rows)
        return Flight(drawing, draw, self.policy_version)

    def _land(self) -> None:
        """Learn what the latest draw gave; turns that end by it leave."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        drawn = flight.draw.known()
        rows = zip(flight.turns, drawn.token_ids, drawn.logprobs, drawn.sampling_logprobs, strict=True)
        for i, (turn, token, logprob, sampling_logprob) in enumerate(rows):
            if turn.over:
                continue
            turn.coming = None
            if i in drawn.failures:
                self._fail_turn(turn, drawn.failures[i])
                continue
            self.tokens_sampled += 1
            if not turn.logprobs:
                turn.version = flight.version
            finish = turn.extend(token, logprob, sampling_logprob)
            if finish is not None:
                self._finish(turn, finish)
        if any(turn.over for turn in flight.turns):
            self._schedule.drop_finished()

    def _finish(self, turn: Turn, finish: FinishReason) -> None:
        sampled = turn.sampled(self.tokenizer, finish)
        turn.over = True
        # A step that ran ahead may have been fed the last token: it is fed again, with what follows.
        turn.session.cached = min(turn.session.cached, len(turn.session.token_ids) - 1)
        turn.session.idle_since = self.steps
        if not turn.result.done():
            turn.result.set_result(sampled)

    def _withdraw(self, turn: Turn) -> None:
        """A turn that nobody waits for any more leaves, and its session with it."""
        self._schedule.leave(turn)
        turn.session.close()

    def _fail(self, error: BaseException) -> None:
        for turn in self._schedule.turns:
            failure = SamplerError(f"the sampler stopped: {error!r}")
            failure.__cause__ = error
            self._fail_turn(turn, failure)
        self._schedule.clear()
        self._flight = None

    def _fail_turn(self, turn: Turn, failure: SamplerError) -> None:
        turn.over = True
        if not turn.result.done():
            turn.result.set_exception(failure)
        turn.session.close()


def _limits_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens that a sequence of the model's can have at most, and where nothing else is asked for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None and is_encoder_decoder(model):
        return 1 << 20, min(tokenizer.model_max_length, 1024)
    limit = limit or 1 << 20
    return limit, rotary_switch(model) or limit


def _prepacked(model: nn.Module, wanted: bool | None) -> PrepackedLinears | None:
    if wanted is False:
        return None
    linears = PrepackedLinears(model)
    too_big = wanted is None and linears.nbytes > free_memory(torch.device("cpu")) // 4
    return None if linears.nbytes == 0 or too_big else linears
