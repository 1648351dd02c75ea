"""An episode as a trace of `verifiers`: what its rewards, metrics and environments read.

A node per message, in order, and a model call per turn. A turn's content is all that the model wrote in it,
the calls of tools included. Not covered: token ids in the nodes (the episode has them), branches, images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etude.errors import InstanceError
from etude.types import Episode, Segment, StopReason, ToolCall

_STOPS = {StopReason.MAX_TURNS: "max_turns", StopReason.MAX_TOKENS: "max_total_tokens"}
_CUT = (StopReason.MAX_TOKENS, StopReason.TURN_TOKENS)


def as_messages(vf: Any, said: Any) -> list[Any]:
    """A prompt of `verifiers`, text or messages, as its messages."""
    if said is None:
        return []
    return [vf.UserMessage(content=said)] if isinstance(said, str) else list(said)


def as_dicts(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Its messages as chat templates read them.

    Raises:
        InstanceError: one of them isn't text.
    """
    return [{"role": message.role, "content": _text(message.content)} for message in messages]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content or []
    if other := [part.type for part in parts if part.type != "text"]:
        raise InstanceError(f"a message has a part of type {other[0]!r}; only text can be played")
    return "\n".join(part.text for part in parts)


def turn_messages(vf: Any, episode: Episode, turn: int) -> list[Any]:
    """A turn of the model, and what its tools answered."""
    calls = [call for call in episode.tool_calls if call.turn == turn]
    asked = [vf.ToolCall(id=_id(turn, i), name=str(c.name), arguments=_json(c)) for i, c in enumerate(calls)]
    text = "".join(segment.text for segment in episode.model_turns[turn])
    answers = [
        vf.ToolMessage(tool_call_id=_id(turn, i), content=call.response, name=call.name)
        for i, call in enumerate(calls)
    ]
    return [vf.AssistantMessage(content=text, tool_calls=asked or None), *answers]


def fill(vf: Any, trace: Any, prompt: Sequence[Any], episode: Episode) -> None:
    """Write the episode, as far as it has come, into a trace that has nothing else."""
    trace.nodes.clear()
    trace.calls.clear()
    replies = iter(episode.replies)
    for message in prompt:
        _append(vf, trace, message)
    for turn, (seen, segments) in enumerate(_turns(episode)):
        said, *answers = turn_messages(vf, episode, turn)
        node = _append(vf, trace, said, sampled=True)
        last = turn == episode.turns - 1
        reason = "length" if last and episode.stop in _CUT else "tool_calls" if said.tool_calls else "stop"
        sampled = sum(len(segment.token_ids) for segment in segments)
        usage = vf.Usage(prompt_tokens=seen, completion_tokens=sampled)
        trace.calls.append(vf.ModelCall(node=node, finish_reason=reason, usage=usage))
        for answer in answers:
            _append(vf, trace, answer)
        if not answers and (reply := next(replies, None)) is not None:
            _append(vf, trace, vf.UserMessage(content=reply))


def stop_condition(episode: Episode) -> str:
    """What stopped the episode, in the words of `verifiers`."""
    return "agent_completed" if episode.stop is None else _STOPS.get(episode.stop, "agent_completed")


def _append(vf: Any, trace: Any, message: Any, sampled: bool = False) -> int:
    parent = len(trace.nodes) - 1 if trace.nodes else None
    trace.nodes.append(vf.MessageNode(parent=parent, message=message, sampled=sampled))
    return len(trace.nodes) - 1


def _turns(episode: Episode) -> list[tuple[int, list[Segment]]]:
    """(tokens before the turn, its segments) of the model's turns."""
    starts = {id(segment): start for start, _, segment in episode.spans()}
    return [(starts[id(segments[0])], segments) for segments in episode.model_turns]


def _id(turn: int, place: int) -> str:
    return f"call_{turn}_{place}"


def _json(call: ToolCall) -> str:
    return call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
