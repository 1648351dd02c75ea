"""Who answers a turn of the model that calls no tool: a function, or replies that are written down.

A user is `f(episode) -> str | None`, sync or async. What it says is data, as a tool's answer is; None ends
the episode.

Not covered: a model as user (`model_user`).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from etude.errors import EnvironmentSetupError
from etude.types import Episode

User = Callable[[Episode], str | Awaitable[str | None] | None]


class ScriptedUser:
    """Says what is written down, a reply after each turn that calls no tool, and then no more.

    Args:
        replies: the same for every episode, or the name of the tasks' column that has each one's.
    """

    def __init__(self, replies: Sequence[str] | str) -> None:
        self.replies = replies

    async def __call__(self, episode: Episode) -> str | None:
        replies = episode.task.get(self.replies) if isinstance(self.replies, str) else self.replies
        if replies is None:
            return None
        if isinstance(replies, str) or not all(isinstance(reply, str) for reply in replies):
            raise EnvironmentSetupError(f"a user's replies are {replies!r}; expected a list of texts")
        said = len(episode.replies)
        return replies[said] if said < len(replies) else None


def as_user(user: User | Sequence[str] | str | None) -> User | None:
    """A user as an environment takes it: a function as it is, replies or their column as a `ScriptedUser`.

    Raises:
        EnvironmentSetupError: it is neither.
    """
    if user is None or callable(user):
        return user
    if isinstance(user, str) or (
        isinstance(user, list | tuple) and all(isinstance(reply, str) for reply in user)
    ):
        return ScriptedUser(user)
    raise EnvironmentSetupError(
        f"user is {user!r}; expected a function f(episode) -> text or None, a list of replies, or the name "
        "of the column that has them"
    )


async def ask(user: User, episode: Episode) -> str | None:
    """The user's reply. A plain function runs in a thread: other episodes go on while it thinks.

    Raises:
        EnvironmentSetupError: it is no text.
    """
    is_async = inspect.iscoroutinefunction(user) or inspect.iscoroutinefunction(type(user).__call__)
    try:
        reply: Any = user(episode) if is_async else await asyncio.to_thread(user, episode)
        if inspect.isawaitable(reply):
            reply = await reply
    except Exception as error:  # the user's own error goes on as it is, with its origin
        error.add_note(f"raised by the environment's user {getattr(user, '__name__', type(user).__name__)!r}")
        raise
    if reply is not None and not isinstance(reply, str):
        raise EnvironmentSetupError(f"the user said {reply!r}; expected text, or None to end the episode")
    return reply


def leave(user: User, episode: Episode) -> None:
    """The episode is over: a user that keeps something for it gives it up."""
    close = getattr(user, "close", None)
    if close is not None:
        close(episode)
