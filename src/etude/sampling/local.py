"""The local sampler: continuous batching over any `transformers` decoder, sharing the trainer's weights.

    session.sample(ids)  ─►  waiting ─► running ─► one flat step: feed, draw, extend ─► finished turns return
                                 ▲          │                                               │
                                 └── slots ◄┴───────── sessions keep theirs between turns ◄─┘

A turn that finishes leaves at once and the next one takes its place. A session keeps its keys and values
while its tool runs: on return only the tool's tokens are fed. A beginning that several sessions share (a
group's prompt, a few-shot preamble) is computed once and copied. Steps run on the event loop's own thread,
between them everybody else (tools, other episodes) gets a turn; nothing waits for the slowest.

Not covered: other processes or machines, encoder–decoders.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import decode
from etude.errors import CacheBudgetError, SamplerError
from etude.models.loading import trunk_of
from etude.sampling.backends import Feed, choose_backend
from etude.sampling.draw import draw, draw_each
from etude.sampling.session import LocalSession, Turn
from etude.sampling.slots import Slots
from etude.sampling.stop import StopStrings, token_texts
from etude.types import FinishReason, Sampled, SamplingParams


class LocalSampler:
    """`protocols.Sampler` over a model in this process.

    Args:
        model: a causal language model; value-head, adapter and accelerate wrappers are looked through,
            so that it samples from the very weights that are trained.
        tokenizer: for stop strings and the text of a turn.
        slots: turns that are decoded at once, and sessions that keep their cache.
        max_length: tokens a session can hold; the model's own limit by default.
        prefill_tokens: prompt tokens fed per step at most, which bounds the memory of a step.
        autocast: the trainer's autocast, so that both compute in the same precision.
        deterministic: what a session samples is the same to the last bit, whatever the other sessions,
            their timing and evictions; `etude.sampling.static` says how far that goes. It costs speed: rows
            that stand idle are computed, prompts are fed one by one, and nothing is copied between slots.
        cuda_graphs: replay decode steps from CUDA graphs; by default where the model is on one CUDA device
            and runs packed.

    Memory is bounded by `slots` × `max_length` keys and values; slots grow by doubling up to that.
    CUDA graphs take one slot more; deterministic ones are, besides, rounded up to a multiple of 8.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 32,
        max_length: int | None = None,
        prefill_tokens: int = 4096,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        deterministic: bool = False,
        cuda_graphs: bool | None = None,
    ) -> None:
        if slots < 1 or prefill_tokens < 1:
            raise CacheBudgetError(
                f"slots is {slots} and prefill_tokens {prefill_tokens}; both must be at least 1"
            )
        self.model = trunk_of(model)
        self.tokenizer = tokenizer
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.autocast = autocast
        self.deterministic = deterministic
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.max_length = min(max_length or limit, limit)
        self.policy_version = 0
        self._parameters = list(self.model.parameters())
        self._fingerprint = self._weights()
        self.tokens_fed = self.tokens_copied = self.tokens_sampled = self.steps = 0
        self._backend = choose_backend(
            self.model, slots, self.max_length, deterministic=deterministic, cuda_graphs=cuda_graphs
        )
        self._slots = Slots(slots)
        self._waiting: deque[Turn] = deque()
        self._running: list[Turn] = []
        self._pump: asyncio.Task[None] | None = None
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._token_texts: list[str] | None = None

    def session(self, *, seed: int) -> LocalSession:
        return LocalSession(self, seed)

    def release(self, session: LocalSession) -> None:
        """Take back the session's slot, if it has one; its next turn is fed from the start."""
        self._slots.release(session)

    def weights_changed(self) -> None:
        """Count a new version of the weights; no cache survives it.

        In-place updates, such as an optimizer's, are noticed without this call.
        """
        self._fingerprint = self._weights()
        self.policy_version += 1
        for session in self._slots.holders.values():
            session.cached = 0

    def _weights(self) -> int:
        """Changes whenever a parameter is written in place: torch counts the writes to each tensor."""
        return sum(parameter._version for parameter in self._parameters)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values held now."""
        return self._backend.nbytes

    async def _sample(
        self, session: LocalSession, token_ids: Sequence[int], params: SamplingParams
    ) -> Sampled:
        if session.closed or session.busy:
            state = "closed" if session.closed else "already sampling a turn"
            raise SamplerError(f"this session is {state}; open a new one with sampler.session(seed=…)")
        total = len(session.token_ids) + len(token_ids)
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
        session.token_ids.extend(token_ids)
        stop = self._stop_strings(params.stop) if params.stop else None
        future = asyncio.get_running_loop().create_future()
        limit = min(params.max_new_tokens, room)
        turn = Turn(session, params, limit, stop, future)
        session.busy = True
        self._waiting.append(turn)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        try:
            return await future
        finally:
            session.busy = False
            if not future.done() or future.cancelled():
                self._withdraw(turn)

    async def _run(self) -> None:
        """Step while there is work; yield between steps, so that finished episodes move on."""
        training = self.model.training
        self.model.eval()
        self._parameters = list(self.model.parameters())
        try:
            while self._waiting or self._running:
                self._step()
                await asyncio.sleep(0)
        except BaseException as error:  # every turn that waits for this task must hear of it
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self.model.train(training)

    @torch.no_grad()
    def _step(self) -> None:
        """Feed every running row what it has not seen, draw a token for those that have seen all."""
        if self._weights() != self._fingerprint:
            self.weights_changed()
        self._admit()
        feeds, turns = self._schedule()
        if not feeds:
            return
        with self.autocast():
            logits = self._backend.logits(feeds)
        for feed, turn in zip(feeds, turns, strict=True):
            turn.session.cached += len(feed.token_ids)
        self.steps += 1
        self.tokens_fed += sum(len(feed.token_ids) for feed in feeds)
        ready = [i for i, turn in enumerate(turns) if turn.session.cached == len(turn.session.token_ids)]
        if ready:
            self._draw(logits if len(ready) == len(turns) else logits[ready], [turns[i] for i in ready])

    def _schedule(self) -> tuple[list[Feed], list[Turn]]:
        """Rows that decode always take part; prompts share the step's token budget."""
        feeds, turns = [], []
        budget = self.prefill_tokens
        for turn in self._running:
            session = turn.session
            assert session.slot is not None, "a running turn has a slot"
            if not self.deterministic and session.source is not None and not self._copy_prefix(session):
                continue
            prompt = session.cached + 1 < len(session.token_ids)
            pending = self._pending(session, budget if prompt else 1)
            if prompt:
                budget -= len(pending)
            if pending:
                feeds.append(Feed(session.slot, session.cached, pending))
                turns.append(turn)
        return feeds, turns

    def _pending(self, session: LocalSession, budget: int) -> list[int]:
        """What the session is fed next; deterministic: its own next piece, whole, while there is budget."""
        if budget <= 0:
            return []
        end = session.cached + budget
        if self.deterministic:
            end = session.next_end(self.prefill_tokens, self.policy_version)
        return session.token_ids[session.cached : end]

    def _copy_prefix(self, session: LocalSession) -> bool:
        """Take the shared beginning from its holder's slot; False while the holder is still being fed it."""
        assert session.source is not None
        assert session.slot is not None
        holder, length = session.source
        if holder.slot is not None and holder.cached >= length:
            if self._backend.copy(holder.slot, session.slot, length):
                session.cached = length
                self.tokens_copied += length
        elif holder.slot is not None and holder.busy:
            return False
        session.source = None
        return True

    def _draw(self, logits: torch.Tensor, turns: list[Turn]) -> None:
        drawn = (draw_each if self.deterministic else draw)(logits, [turn.row() for turn in turns])
        self.tokens_sampled += len(turns)
        finished = set()
        rows = zip(turns, drawn.token_ids, drawn.logprobs, drawn.sampling_logprobs, strict=True)
        for turn, token, logprob, sampling_logprob in rows:
            if not turn.token_ids:
                turn.version = self.policy_version
            finish = turn.extend(token, logprob, sampling_logprob)
            if finish is not None:
                finished.add(turn)
                self._finish(turn, finish)
        if finished:
            self._running = [turn for turn in self._running if turn not in finished]

    def _finish(self, turn: Turn, finish: FinishReason) -> None:
        ids = turn.token_ids[:-1] if finish == "eos" else turn.token_ids
        text = decode(self.tokenizer, ids)
        sampled = Sampled(turn.token_ids, text, turn.logprobs, turn.sampling_logprobs, finish, turn.version)
        turn.session.idle_since = self.steps
        if not turn.result.done():
            turn.result.set_result(sampled)

    def _admit(self) -> None:
        """Waiting turns become running ones: those whose session kept its slot, others while slots last."""
        still_waiting: deque[Turn] = deque()
        for turn in self._waiting:
            if turn.session.slot is None and not self._slots.take(
                turn.session, self.steps, idle=not self._running
            ):
                still_waiting.append(turn)
            else:
                self._running.append(turn)
        self._waiting = still_waiting

    def _withdraw(self, turn: Turn) -> None:
        """A turn that nobody waits for any more leaves, and its session with it."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        if turn in self._running:
            self._running.remove(turn)
        turn.session.close()

    def _fail(self, error: BaseException) -> None:
        for turn in [*self._running, *self._waiting]:
            if not turn.result.done():
                failure = SamplerError(f"the sampler stopped: {error!r}")
                failure.__cause__ = error
                turn.result.set_exception(failure)
            turn.session.close()
        self._running.clear()
        self._waiting.clear()

    def _stop_strings(self, strings: tuple[str, ...]) -> StopStrings:
        if strings not in self._stops:
            if self._token_texts is None:
                self._token_texts = token_texts(self.tokenizer)
            self._stops[strings] = StopStrings(self.tokenizer, strings, self._token_texts)
        return self._stops[strings]
