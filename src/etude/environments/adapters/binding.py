"""An environment with tools, a user and an ending that are one episode's own.

A copy shares everything else. Where the protocol is a chat template, it shows the model the episode's tools:
a protocol is made for each set of tools that occurs, once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from etude.environments.chat_protocol import ChatProtocol
from etude.environments.tags import ToolProtocol
from etude.environments.text import TextEnvironment
from etude.environments.user import User
from etude.errors import EnvironmentSetupError
from etude.protocols import Tool
from etude.types import Episode, SamplingParams


class Binder:
    """Makes copies of an environment, an episode's own parts in place.

    Args:
        inner: the environment. It is not changed.
        name: of who brings the parts, in messages.
    """

    def __init__(self, inner: TextEnvironment, name: str) -> None:
        self.inner = inner
        self.name = name
        self._known: dict[str, tuple[ToolProtocol, SamplingParams]] = {}

    def bind(
        self, tools: Mapping[str, Tool], user: User | None, is_done: Callable[[Episode], bool]
    ) -> TextEnvironment:
        """The environment with these tools beside its own, this user, and this ending as well as its own.

        Raises:
            EnvironmentSetupError: it has such a tool, or a user, already.
            TemplateError: its chat template can't show what is asked for.
        """
        inner = self.inner
        if taken := tools.keys() & inner.tools.keys():
            raise EnvironmentSetupError(
                f"{self.name} and the inner environment both have a tool {min(taken)!r}; rename one of them"
            )
        if user is not None and inner.user is not None:
            raise EnvironmentSetupError(
                f"{self.name} answers the model's turns, and the inner environment has a user= as well; "
                "leave that out"
            )
        bound = copy.copy(inner)
        bound.tools = {**inner.tools, **tools}
        bound.user = user or inner.user
        bound.protocol, bound.params = self._protocol(bound)
        # An open point, filled in for one object instead of a class.
        vars(bound)["is_done"] = lambda episode: is_done(episode) or inner.is_done(episode)
        return bound

    def _protocol(self, bound: TextEnvironment) -> tuple[ToolProtocol, SamplingParams]:
        protocol, params = bound.protocol, bound.params
        if not isinstance(protocol, ChatProtocol):
            return protocol, params
        shown = [(tool.name, tool.description, dict(tool.schema)) for tool in bound.tools.values()]
        key = json.dumps([shown, bound.user is not None], sort_keys=True, default=str)
        if key not in self._known:
            shows = ChatProtocol(
                bound.tokenizer,
                bound.tools,
                template_kwargs=protocol.template.template_kwargs,
                rewrites=protocol.rewrites,
            )
            shows.check(user=bound.user is not None, turns=bound.max_turns)
            if bound.generation_kwargs.get("eos_token_id") is None:
                ends = dict.fromkeys([*params.eos_token_ids, *shows.end_ids])
                params = replace(params, eos_token_ids=tuple(ends))
            self._known[key] = shows, params
        return self._known[key]
