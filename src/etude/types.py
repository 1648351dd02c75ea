"""The words of the library: episodes, and what they are made of.

An `Episode` is the tokens a model saw and sampled, in order, with what produced each of them. It is
built once, by appending, and never re-tokenised: rollouts, demonstrations and replayed logs are all
episodes, so one path leads from any of them to the loss.

Plain dataclasses, no torch. Not covered here: how text becomes tokens (`data`), who samples
(`sampling`), who plays (`environments`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypedDict

Source = Literal["prompt", "model", "tool", "environment"]
SOURCES: tuple[Source, ...] = ("prompt", "model", "tool", "environment")


class Message(TypedDict, total=False):
    """One message of a conversation, in the form chat templates read."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str


class StopReason(StrEnum):
    """Why an episode ended."""

    SUBMITTED = "submitted"  # the model handed in its answer
    END_OF_SEQUENCE = "end_of_sequence"  # the model sampled an end-of-sequence token
    NO_TOOL_CALL = "no_tool_call"  # a turn ended without a tool call and without an answer
    TURN_TOKENS = "turn_tokens"  # a turn used up `max_new_tokens`
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"  # the episode used up `max_length`
    MAX_TOOL_CALLS = "max_tool_calls"
    DONE = "done"  # the environment's own `is_done` said so
    WALL_CLOCK = "wall_clock"
    PREEMPTED = "preempted"
    INFRASTRUCTURE = "infrastructure"  # our side failed: a sampler, a server, a bug


@dataclass(frozen=True, slots=True)
class StopPolicy:
    """What a stop reason means for training.

    Attributes:
        bootstrap: the value of the last state stands in for the rewards that would have followed.
        reward: "keep" the reward, "clamp" it to at most 0, or "drop" it (it counts as 0).
        train: the episode's sampled tokens enter the loss.
    """

    bootstrap: bool = False
    reward: Literal["keep", "clamp", "drop"] = "keep"
    train: bool = True

    def __post_init__(self) -> None:
        if self.reward not in ("keep", "clamp", "drop"):
            raise ValueError(f"reward is {self.reward!r}; expected keep, clamp or drop")
        for name in ("bootstrap", "train"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")


# Limits that hold at evaluation too (turns, tokens, tool calls) are part of the task: terminal, scored
# as they stand. Only interruptions from outside bootstrap. What our side broke is never trained on.
STOP_POLICIES: Mapping[StopReason, StopPolicy] = {
    **{reason: StopPolicy() for reason in StopReason},
    StopReason.WALL_CLOCK: StopPolicy(bootstrap=True),
    StopReason.PREEMPTED: StopPolicy(bootstrap=True),
    StopReason.INFRASTRUCTURE: StopPolicy(reward="drop", train=False),
}


@dataclass(slots=True)
class Segment:
    """One run of tokens from one source.

    Attributes:
        source: who produced it.
        text: its text, as people and parsers read it.
        token_ids: its tokens, as the model saw or sampled them.
        logprobs: for tokens sampled by this run's policy, their log-probabilities at the sampling
            temperature and no other change of the distribution (nats, one per token).
        sampling_logprobs: the same under the distribution really sampled from (top-k, top-p,
            processors); equal to `logprobs` where nothing was cut off.
        policy_version: version of this run's weights that sampled it; None if they didn't.
        target: the data says to imitate it (supervised losses).
        encoder: an encoder reads it: what the model goes on from begins after it.
    """

    source: Source
    text: str
    token_ids: list[int]
    logprobs: list[float] | None = None
    sampling_logprobs: list[float] | None = None
    policy_version: int | None = None
    target: bool = False
    encoder: bool = False

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"segment source is {self.source!r}; expected one of {', '.join(SOURCES)}")
        for name in ("logprobs", "sampling_logprobs"):
            values = getattr(self, name)
            if values is None:
                continue
            if self.source != "model":
                raise ValueError(f"a {self.source!r} segment has {name}; only 'model' segments are sampled")
            if len(values) != len(self.token_ids):
                raise ValueError(f"segment has {len(self.token_ids)} tokens and {len(values)} {name}")
        if self.policy_version is not None and self.source != "model":
            raise ValueError(
                f"a {self.source!r} segment has a policy version; only 'model' segments are sampled"
            )

    @property
    def sampled(self) -> bool:
        """True where this run's policy sampled the tokens, at a recorded version.

        A model's tokens that were forced, replayed or written by a person have no version and are not
        sampled.
        """
        return self.policy_version is not None

    def completes(self, before: Segment) -> bool:
        """True where `before` is the forced beginning of the same turn of the model."""
        return self.sampled and before.source == "model" and not before.sampled


@dataclass(slots=True)
class ToolCall:
    """One call of a tool: what was asked, what came back, what went wrong.

    Attributes:
        name: the tool's name as the model wrote it.
        arguments: what the model passed: a string (tag protocol) or named arguments.
        response: the text the model was shown.
        error: None, or the class of failure: "unknown_tool", "malformed", "invalid_arguments",
            "exception", "timeout", "limit".
        seconds: wall time of the call.
        truncated: the response was cut to the cap.
        turn: index of the model turn that made the call, from 0.
    """

    name: str | None
    arguments: str | dict[str, Any] | None
    response: str
    error: str | None = None
    seconds: float = 0.0
    truncated: bool = False
    turn: int = 0


@dataclass(slots=True)
class NamedReward:
    """A reward and who gave it.

    Attributes:
        name: the reward function's name.
        value: the score; None means the function does not apply to this episode.
        weight: its weight in the episode's reward.
        position: index into the episode's tokens, or None for a terminal reward.
    """

    name: str
    value: float | None
    weight: float = 1.0
    position: int | None = None

    @property
    def weighted(self) -> float:
        return 0.0 if self.value is None else self.weight * self.value


@dataclass(slots=True)
class Episode:
    """What happened in one attempt at one task, to the token.

    Attributes:
        task: the task's row: its prompt and whatever columns the dataset has.
        segments: runs of tokens in order; the first is the prompt. An encoder–decoder's prompt is read by its
            encoder, and what its decoder begins with is a segment of its own after it.
        rewards: each named, terminal or at a token.
        stop: why it ended; None while it is being played.
        tool_calls: in order.
        replies: what a user said to the model's turns, in order.
        seed: of the counter-based stream that its tokens were drawn from.
        timings: seconds by name ("sample", "tools", "total").
        error: what our side broke, for `StopReason.INFRASTRUCTURE`.
    """

    task: Mapping[str, Any] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    rewards: list[NamedReward] = field(default_factory=list)
    stop: StopReason | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    seed: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def append(self, segment: Segment) -> None:
        if self.stop is not None:
            raise ValueError(f"the episode ended ({self.stop}); nothing can be appended to it")
        if segment.encoder and not all(before.encoder for before in self.segments):
            raise ValueError("what an encoder reads comes first; the episode has gone on from it already")
        self.segments.append(segment)

    def __len__(self) -> int:
        """Number of tokens."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def unseen(self) -> list[int]:
        """Tokens after the model's last turn: what its next turn has yet to read. An encoder's are apart."""
        tokens: list[int] = []
        for segment in reversed(self.segments):
            if segment.source == "model" or segment.encoder:
                break
            tokens[:0] = segment.token_ids
        return tokens

    @property
    def source_ids(self) -> list[int]:
        """What an encoder read; empty for a decoder's episode, whose prompt is the beginning of all else."""
        return [token for s in self.segments if s.encoder for token in s.token_ids]

    @property
    def context_length(self) -> int:
        """Tokens that the model goes on from: all but the encoder's."""
        return sum(len(s.token_ids) for s in self.segments if not s.encoder)

    @property
    def sampled(self) -> list[bool]:
        """One flag per token: this run's policy sampled it. For policy-gradient losses."""
        return [s.sampled for s in self.segments for _ in s.token_ids]

    @property
    def target(self) -> list[bool]:
        """One flag per token: the data says to imitate it. For supervised losses."""
        return [s.target for s in self.segments for _ in s.token_ids]

    @property
    def environment(self) -> str:
        """Name of the environment that it was played in, where a run has several; else empty."""
        name = self.task.get("environment")
        return name if isinstance(name, str) else ""

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def prompt(self) -> str:
        return "".join(s.text for s in self.segments if s.source == "prompt")

    @property
    def completion(self) -> str:
        """What the model wrote, and nothing else: tool text can't forge an answer in it."""
        return "".join(s.text for s in self.segments if s.source == "model")

    @property
    def model_turns(self) -> list[list[Segment]]:
        """The model's turns: a segment each, or two where the turn's beginning was forced."""
        turns: list[list[Segment]] = []
        before = None
        for segment in self.segments:
            if before is not None and segment.completes(before):
                turns[-1].append(segment)
            elif segment.source == "model":
                turns.append([segment])
            before = segment
        return turns

    @property
    def last_model_text(self) -> str:
        return "".join(segment.text for turn in self.model_turns[-1:] for segment in turn)

    @property
    def turns(self) -> int:
        return len(self.model_turns)

    @property
    def reward(self) -> float:
        """Weighted sum of all rewards that apply."""
        return math.fsum(reward.weighted for reward in self.rewards)

    @property
    def reward_totals(self) -> dict[str, NamedReward]:
        """By name, the sum of its values over the episode; None where none of them applies."""
        totals: dict[str, NamedReward] = {}
        for reward in self.rewards:
            total = totals.setdefault(reward.name, NamedReward(reward.name, None, reward.weight))
            if reward.value is not None:
                total.value = reward.value + (total.value or 0.0)
        return totals

    def spans(self) -> Iterator[tuple[int, int, Segment]]:
        """(first token, one past the last token, segment) for each segment."""
        start = 0
        for segment in self.segments:
            end = start + len(segment.token_ids)
            yield start, end, segment
            start = end

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_json` reads back; task values must be JSON-ready themselves."""
        return {**asdict(self), "task": dict(self.task)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Episode:
        return cls(
            task=data["task"],
            segments=[Segment(**segment) for segment in data["segments"]],
            rewards=[NamedReward(**reward) for reward in data["rewards"]],
            stop=None if data["stop"] is None else StopReason(data["stop"]),
            tool_calls=[ToolCall(**call) for call in data["tool_calls"]],
            replies=list(data.get("replies", ())),  # runs from before there were users have none
            seed=data["seed"],
            timings=dict(data["timings"]),
            error=data["error"],
        )


@dataclass(slots=True)
class Preference:
    """Two answers to one prompt, one of them preferred. What is compared are the tokens that are targets.

    Attributes:
        chosen, rejected: they begin with the same prompt, token for token.
        margin: by how much the chosen one is better, where that is known.
    """

    chosen: Episode
    rejected: Episode
    margin: float | None = None


@dataclass(slots=True)
class Rating:
    """An answer that is wanted or isn't, without another to compare it with.

    Attributes:
        episode: its targets are the answer.
        desirable: it is wanted.
    """

    episode: Episode
    desirable: bool


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one turn.

    Attributes:
        max_new_tokens: at most this many tokens, those of `forced_prefix` included.
        min_new_tokens: end-of-sequence can't be sampled before this many, counted in the same way.
        temperature: divides the logits; 0 is greedy, without top_k, top_p and min_p.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches p; 1 keeps all.
        min_p: keep tokens at least this many times as probable as the most probable one; 0 keeps all.
        stop: strings that end the turn, kept in its text.
        eos_token_ids: tokens that end the turn, kept in its tokens.
        processors: logits processors in the form of `transformers`: each takes the row's token ids
            [1, n] and scores [1, vocabulary] and returns scores.
        repetition_penalty: scores of tokens that are in the history, prompt included, are divided by it
            where positive and multiplied where negative; 1 changes nothing.
        allowed_token_ids: only these can be sampled; None allows all.
        forced_prefix: tokens that the turn begins with. They are its tokens and text, but not sampled.

    What applies to a token applies in the order of `transformers`: repetition_penalty, min_new_tokens,
    allowed_token_ids, processors, temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    processors: tuple[Callable[[Any, Any], Any], ...] = ()
    repetition_penalty: float = 1.0
    allowed_token_ids: tuple[int, ...] | None = None
    forced_prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; expected a finite number >= 0 (0 is greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected 0 < top_p <= 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; expected 0 <= min_p <= 1 (0 keeps all tokens)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected >= 0 (0 keeps all tokens)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; expected a finite number > 0 "
                "(1 changes nothing)"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty; name at least one token, or None to allow all")
        for name in ("allowed_token_ids", "forced_prefix"):
            least = min(getattr(self, name) or (0,))
            if least < 0:
                raise ValueError(f"{name} has {least}; expected token ids >= 0")
        if len(self.forced_prefix) >= self.max_new_tokens:
            raise ValueError(
                f"forced_prefix has {len(self.forced_prefix)} tokens and max_new_tokens is "
                f"{self.max_new_tokens}, which counts them; raise it, so that at least one can be sampled"
            )


FinishReason = Literal["stop", "eos", "length"]


@dataclass(slots=True)
class Sampled:
    """What a sampler returns for one turn: ids, log-probabilities and version travel together.

    Attributes:
        token_ids: the forced ones, then those sampled, the end-of-sequence token included.
        text: the tokens decoded, without a trailing end-of-sequence token.
        logprobs, sampling_logprobs: see `Segment`; of the sampled tokens only.
        finish: a stop string ("stop"), an end-of-sequence token ("eos") or the token limit ("length").
        policy_version: version of the weights at the first sampled token.
        forced: how many of the tokens were forced: the first ones.
        forced_text: their part of the text, its beginning.
    """

    token_ids: list[int]
    text: str
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish: FinishReason
    policy_version: int
    forced: int = 0
    forced_text: str = ""

    def segments(self) -> list[Segment]:
        """The turn as segments of an episode: what was forced, if anything, and what was sampled."""
        segments = []
        if self.forced:
            segments.append(Segment("model", self.forced_text, self.token_ids[: self.forced]))
        if self.forced < len(self.token_ids):
            segments.append(
                Segment(
                    "model",
                    self.text[len(self.forced_text) :],
                    self.token_ids[self.forced :],
                    logprobs=self.logprobs,
                    sampling_logprobs=self.sampling_logprobs,
                    policy_version=self.policy_version,
                )
            )
        return segments
