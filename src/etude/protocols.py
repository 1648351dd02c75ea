"""The page to read first: the five interfaces everything else meets through.

    tasks ─► Environment ◄──► Sampler          text on one side, token ids on the other
                │   ▲
                ▼   │
              Tools
                │
                ▼
             Episode ──► Reward

Environments, tools and samplers are async inside; people call plain functions (`runtime.loop`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etude.types import Episode, Sampled, SamplingParams


class Session(Protocol):
    """One episode's place in a sampler: the tokens so far and, where there is one, their KV cache."""

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Sampled:
        """Append `token_ids` to the session, sample a turn, append that too, and return it.

        Only tokens that the session has not seen are passed: the cache is kept between turns.
        """
        ...

    def close(self) -> None:
        """Give up the session's cache. Closing twice is fine."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """A policy that continues token ids."""

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; grows by one with each update."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens that one session can hold, an encoder's source not counted."""
        ...

    @property
    def max_source_length(self) -> int:
        """Tokens that an encoder–decoder's encoder reads at most; 0 for a decoder alone."""
        ...

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """What an encoder–decoder's decoder begins with, at least a token; empty for a decoder alone."""
        ...

    def session(self, *, seed: int, source_ids: Sequence[int] = ()) -> Session:
        """Open a session whose tokens are drawn from the counter-based stream of `seed`.

        Args:
            source_ids: what an encoder–decoder's encoder reads. The session's own tokens are its decoder's:
                the first that it is given are `decoder_start`.
        """
        ...


@runtime_checkable
class Tool(Protocol):
    """Something a model can call.

    The contract (time-out, output cap, errors as text) is enforced by the caller and not left to the tool.
    """

    name: str
    description: str
    schema: Mapping[str, Any]  # JSON schema of the arguments

    async def __call__(self, arguments: str | Mapping[str, Any]) -> Any:
        """Run the tool. A string is the tag protocol's single query. Raises whatever the tool raises."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Something that scores episodes.

    An attribute `level` says what it scores: each "episode" as a whole, which is also meant where there is no
    such attribute, each "turn" of the model, or each "token" that was sampled.
    """

    name: str
    weight: float

    async def __call__(self, episodes: Sequence[Episode]) -> Sequence[float | Sequence[float | None] | None]:
        """One score per episode, in order; None where the reward does not apply.

        At the levels "turn" and "token" a score is a sequence: a number or None for each of the episode's.

        Raises:
            RewardError: a score is NaN or infinite, or there are too few or too many.
        """
        ...


@runtime_checkable
class Environment(Protocol):
    """A world in which a model attempts a task.

    These two methods are all that playing and training need. `environments.traits` says what else is made use
    of where an environment has it (`tokenizer`, `max_length`, …), and what takes its place where it doesn't.
    """

    async def play(self, task: Mapping[str, Any], sampler: Sampler, *, seed: int) -> Episode:
        """Play one episode to its end. The model's mistakes are data, never exceptions.

        Args:
            task: a row of the dataset. It becomes the episode's `task`.
            seed: of the session's random stream, and of whatever else the environment draws.
        """
        ...

    async def score(self, episodes: Sequence[Episode]) -> None:
        """Append each reward to each episode. Those that failed on our side aren't among them."""
        ...
