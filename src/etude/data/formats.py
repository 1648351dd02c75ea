"""Dataset rows → episodes to imitate, and prompts.

The formats, told apart by their columns:

    text                            all of it is imitated
    messages [, tools]              the assistant's messages are imitated
    segments                        [{"source": "prompt" | "model" | "tool" | "environment", "text": ...}]:
                                    how run directories keep episodes; what the model wrote is imitated
    prompt                          what a model is to answer
    prompt, completion              the completion is imitated
    [prompt,] chosen, rejected      two answers (`preferences`); without a prompt it is what both begin with
    prompt, completion, label       an answer that is wanted or isn't (`preferences`)
    prompt, completions, labels     an answer in steps, each right or wrong (`steps`)

Prompts and answers are strings or lists of messages. With messages, two more columns count where a dataset
has them: `tools`, a list, and `chat_template_kwargs`, what the template takes besides (`enable_thinking`);
either may be JSON.

Not covered: reading files (`files`), making one format of another (`conversions`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from etude.data.encoding import (
    bos_ids,
    control_tokens,
    decode,
    encode_control,
    encode_plain,
    encode_prompt,
    special_tokens,
)
from etude.data.templates import conversation_rows, prompt_segment, whole_conversation
from etude.errors import DataError, TemplateError
from etude.types import SOURCES, Episode, Segment, Source

Format = Literal[
    "text",
    "messages",
    "segments",
    "prompt",
    "prompt-completion",
    "preference",
    "unpaired-preference",
    "stepwise",
]
COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "segments": ("segments",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
    "preference": ("chosen", "rejected"),
    "unpaired-preference": ("prompt", "completion", "label"),
    "stepwise": ("prompt", "completions", "labels"),
}
DEMONSTRATIONS: tuple[Format, ...] = ("segments", "messages", "prompt-completion", "text")


def detect_format(columns: Collection[str], accepted: Sequence[Format] = DEMONSTRATIONS) -> Format:
    """Which of the accepted formats these columns are in; further columns don't matter.

    Where one format's columns are among another's (prompt; prompt with completion), the larger one counts.

    Raises:
        DataError: none, or more than one.
    """
    fitting = fitting_formats(columns, accepted)
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(map(repr, columns)) or "none"
    if fitting:
        raise DataError(
            f"the columns ({listed}) fit {len(fitting)} formats: {', '.join(fitting)}. Keep the columns of "
            "one of them (dataset.select_columns)"
        )
    known = fitting_formats(columns, tuple(COLUMNS))
    kind = f" ({' or '.join(known)})" if known else ""
    expected = "; ".join(_described(name) for name in accepted)
    raise DataError(
        f"the columns are {listed}{kind}; expected one of these combinations: {expected}. Rename columns "
        "with dataset.rename_column, or build them with dataset.map"
    )


def fitting_formats(columns: Collection[str], among: Sequence[Format]) -> list[Format]:
    """Formats whose columns are all there, without those that another one of them includes."""
    found = {name: set(COLUMNS[name]) for name in among if set(COLUMNS[name]) <= set(columns)}
    if "preference" in found and "prompt" in columns:
        found["preference"].add("prompt")
    return [name for name, own in found.items() if not any(own < other for other in found.values())]


def _described(name: Format) -> str:
    return ("[prompt +] " if name == "preference" else "") + " + ".join(COLUMNS[name])


def to_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Segment:
    """Tokenise what the model is to answer: `prompt`, a string or messages.

    Messages end with the header of the assistant's answer; or in the middle of it, where the last message is
    the assistant's.

    Raises:
        DataError: the prompt is neither, or the template can't render it.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return Segment("prompt", prompt, encode_prompt(tokenizer, prompt))
    if not isinstance(prompt, list):
        raise DataError(f"prompt is a {type(prompt).__name__}; expected a string or a list of messages")
    return prompt_segment(tokenizer, prompt, *_template_options(row))


def to_episode(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = True,
    append_eos: bool = True,
) -> Episode:
    """The one episode of a row; see `to_episodes`.

    Raises:
        DataError: as `to_episodes`.
        TemplateError: the template rewrites turns that are to be imitated, so the row takes several.
    """
    episodes = to_episodes(
        row,
        tokenizer,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        append_eos=append_eos,
    )
    if len(episodes) > 1:
        raise TemplateError(
            "the chat template rewrites earlier turns of the assistant once the conversation goes on, so its "
            f"turns fit in {len(episodes)} texts and not in one. Give one row per turn, or use a template "
            "that leaves earlier turns as they were"
        )
    return episodes[0]


def to_episodes(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = True,
    append_eos: bool = True,
) -> list[Episode]:
    """Tokenise a row once and say which of its tokens are to be imitated (`Segment.target`).

    One episode; of a conversation as many as `conversation_rows` makes: each turn is imitated once, as it
    would be sampled.

    Args:
        row: one row of a dataset, in one of the formats above.
        tokenizer: of the model to train.
        completion_only_loss: imitate the completion only; False imitates the prompt (or, in `segments`, what
            tools and the environment said) too. None: True where the format has a completion. `text` and
            `messages` have none.
        assistant_only_loss: in messages, imitate the assistant only. False takes the conversation as one
            text, as the template renders it.
        append_eos: end the model's last words with the EOS, a segment of its own, which is imitated. Messages
            end as their template ends them, and by the EOS where it ends them by nothing.

    Raises:
        DataError: the row is in no known format, a value has the wrong type, or the options contradict it.
    """
    kind = detect_format(row)
    if completion_only_loss and kind in ("text", "messages"):
        raise DataError(
            f"completion_only_loss=True, but rows of {kind!r} have no completion; leave it out, or give the "
            "columns prompt and completion"
        )
    whole = completion_only_loss is False
    prompt, completion = row.get("prompt"), row.get("completion")
    match kind:
        case "text":
            segments = _text_segments(row, tokenizer)
        case "segments":
            segments = _stored_segments(row, tokenizer, whole)
        case "messages":
            if not isinstance(row["messages"], list):
                found = type(row["messages"]).__name__
                raise DataError(f"messages is a {found}; expected a list of messages")
            return _conversations(row, tokenizer, [], row["messages"], assistant_only_loss, whole, append_eos)
        case "prompt-completion" if isinstance(prompt, list) and isinstance(completion, list):
            return _conversations(row, tokenizer, prompt, completion, assistant_only_loss, whole, append_eos)
        case "prompt-completion" if isinstance(prompt, str) and isinstance(completion, str):
            segments = [
                Segment("prompt", prompt, encode_prompt(tokenizer, prompt), target=whole),
                Segment("model", completion, encode_control(tokenizer, completion), target=True),
            ]
        case _:
            raise DataError(
                f"prompt is a {type(prompt).__name__} and completion a {type(completion).__name__}; "
                "expected two strings or two lists of messages"
            )
    if append_eos:
        _append_eos(segments, tokenizer)
    return [Episode(task=dict(row), segments=segments)]


def _conversations(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Any],
    completion: list[Any],
    assistant_only: bool,
    whole: bool,
    append_eos: bool,
) -> list[Episode]:
    messages, start = [*prompt, *completion], 0 if whole else len(prompt)
    tools, kwargs = _template_options(row)
    if assistant_only:
        rows = conversation_rows(tokenizer, messages, tools, target_from=start, template_kwargs=kwargs)
    else:
        rows = [whole_conversation(tokenizer, messages, tools, target_from=start, template_kwargs=kwargs)]
    for segments in rows if append_eos and messages[-1]["role"] == "assistant" else ():
        if segments[-1].target and not segments[-1].text.rstrip().endswith(
            tuple(control_tokens(tokenizer).values())
        ):
            segments.append(_end(tokenizer))
    return [Episode(task=dict(row), segments=segments) for segments in rows]


def _template_options(row: Mapping[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    """What goes to the template with the messages: tools, and keyword arguments."""
    kwargs = _from_json(row, "chat_template_kwargs", dict) or {}
    given = {name: value for name, value in kwargs.items() if value is not None}  # tables fill up keys
    return _from_json(row, "tools", list) or None, given


def _from_json(row: Mapping[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{name} is not JSON ({error}): {row[name][:60]!r}") from error
    if value and not isinstance(value, kind):
        raise DataError(f"{name} is a {type(value).__name__}; expected a {kind.__name__}, or its JSON")
    return value


def _text_segments(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"text is a {type(text).__name__}; expected a string")
    ids, bos = encode_prompt(tokenizer, text), bos_ids(tokenizer)
    start = [Segment("prompt", "", bos)] if bos else []
    return [*start, Segment("model", text, ids[len(bos) :], target=True)]


def _stored_segments(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, whole: bool
) -> list[Segment]:
    segments: list[Segment] = []
    for position, stored in enumerate(row["segments"] or ()):
        source, text = _source_and_text(stored, position)
        if source == "tool":
            encoded = encode_plain(tokenizer, text)
            text, ids = encoded.text, encoded.ids
        else:
            ids = encode_control(tokenizer, text) if segments else encode_prompt(tokenizer, text)
        if stored.get("token_ids") is not None:
            ids = _stored_ids(stored["token_ids"], ids, tokenizer, position)
        segments.append(Segment(source, text, ids, target=whole or source == "model"))
    return segments


def _source_and_text(stored: Any, position: int) -> tuple[Source, str]:
    if (
        isinstance(stored, Mapping)
        and stored.get("source") in SOURCES
        and isinstance(stored.get("text"), str)
    ):
        return stored["source"], stored["text"]
    raise DataError(
        f"segment {position} is {str(stored)[:80]}; expected 'text' and a 'source' among {', '.join(SOURCES)}"
    )


def _stored_ids(
    stored: list[int], encoded: list[int], tokenizer: PreTrainedTokenizerBase, position: int
) -> list[int]:
    """What a model sampled is trained on as sampled, which need not be how its text would be encoded."""
    if stored == encoded:
        return stored
    # Special tokens aside: a turn's text has none at its end, and data that spells one is not that token.
    expected = _without_special(tokenizer, encoded)
    known = max(stored, default=0) < len(tokenizer)
    said = _without_special(tokenizer, stored) if known else "nothing"
    if said != expected:
        raise DataError(
            f"the token_ids of segment {position} come from another tokenizer: here they mean {said[:60]!r}, "
            f"and the segment's text is {expected[:60]!r}. Leave token_ids out to encode the text again"
        )
    return stored


def _without_special(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = decode(tokenizer, token_ids)
    for token in special_tokens(tokenizer):
        text = text.replace(token, "")
    return text


def _append_eos(segments: list[Segment], tokenizer: PreTrainedTokenizerBase) -> None:
    """End with the EOS, if the model spoke last and didn't end with it."""
    end = _end(tokenizer)
    if segments and segments[-1].source == "model" and segments[-1].token_ids[-1:] != end.token_ids:
        segments.append(end)


def _end(tokenizer: PreTrainedTokenizerBase) -> Segment:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token to append; set `tokenizer.eos_token`, or "
            "append_eos=False"
        )
    return Segment("environment", tokenizer.eos_token, [eos], target=True)
