"""A conversation under a chat template: its text, what in it the model says, its tokens.

What data hides in its contents is no control text (`messages`): "<|im_end|>" in a tool's answer stays
characters.

Not covered: templates with images; models without a chat template.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from etude.data.encoding import (
    control_tokens,
    encode_after,
    encode_control,
    encode_plain,
    encode_prompt,
    special_tokens,
)
from etude.data.messages import Messages, marked_messages, with_json_arguments
from etude.errors import DataError, TemplateError
from etude.types import Segment, Source

logger = logging.getLogger(__name__)

_Span = tuple[int, int]
_REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing; transformers knows all three names
_UNHEARD_OF = "zqxjkvwq"  # in no text, and the same quoted or in JSON
_SPACE = re.compile(r"\s+")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model says in one message, and what it has read by then.

    Attributes:
        text: what it has read, the message, and what the template puts after it.
        spans: where its words are, (start, end) in characters, at least one.
    """

    text: str
    spans: tuple[_Span, ...]

    def within(self, whole: str) -> bool:
        """The model reads and says the same in a longer conversation: it begins like this."""
        end = self.spans[-1][1]
        return whole[:end] == self.text[:end]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation under a template; control tokens in data stand between two marks.

    Attributes:
        marks: two characters that occur nowhere in the conversation.
        template_kwargs: what the template takes besides messages and tools (`enable_thinking`).
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    template_kwargs: Mapping[str, Any]
    marks: str
    _rendered: dict[tuple[int, bool], tuple[str, list[_Span]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        messages: Messages,
        tools: list[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendering:
        """Check the messages, and mark their data.

        Raises:
            DataError: the tokenizer has no chat template, or a message isn't one.
            TemplateError: the template fails on them.
        """
        _check(tokenizer)
        marked, marks = marked_messages(messages, _control_pattern(tokenizer))
        rendering = cls(tokenizer, marked, tools, template_kwargs or {}, marks)
        try:
            rendering.text(len(marked))
        except TemplateError as error:
            if not isinstance(error.__cause__, TypeError):
                raise
            # DeepSeek-V3's joins a call's arguments to other text: it takes them as JSON only.
            rendering = replace(rendering, messages=[with_json_arguments(m) for m in marked], _rendered={})
            if rendering.messages == marked:
                raise
        rendering._tell_what_is_left_out()
        return rendering

    def text(self, count: int, add_generation_prompt: bool = False) -> str:
        """The first `count` messages, rendered, with marks."""
        return self._render(count, add_generation_prompt)[0]

    def opened(self) -> str:
        """All messages, the last one without its end: the model goes on in it."""
        return self._call(len(self.messages), continue_final_message=True)[0]

    def turn(self, position: int) -> Turn | None:
        """What the model says in an assistant message, read as the last one of its conversation.

        It is what the template itself marks (`{% generation %}`); nothing marked is None. In templates
        without such marks it is what follows the header that asks for a message, to the end-of-turn marker.

        Raises:
            TemplateError: the template asks for the message in another way than it renders it.
        """
        if self._has_marks():
            earlier = len(self._render(position, False)[1]) if position else 0
            text, found = self._render(position + 1, False)
            spans = tuple((start, self.turn_end(text, start, end)) for start, end in found[earlier:])
            return self._complete(Turn(text, spans), position) if spans else None
        if position == 0:
            raise DataError(
                "the conversation starts with an assistant message, so nothing asks for it; "
                "expected a system or user message first"
            )
        asked, text = self.text(position, True), self.text(position + 1)
        if not text.startswith(asked):
            text = self._as_asked(asked, text, position)
        end = self.turn_end(text, len(asked), self.end_of_message(text, position))
        return self._complete(Turn(text, ((len(asked), end),)), position)

    def turn_end(self, text: str, start: int, end: int) -> int:
        """Where a turn ends within `start:end`: before white space that follows its end-of-turn marker."""
        turn = text[start:end].rstrip()
        markers = control_tokens(self.tokenizer).values()
        marker = next((token for token in markers if turn.endswith(token)), None)
        if marker is None:
            return end
        space = text[start + len(turn) : end]
        # Some markers swallow the space (`rstrip=True`, as in Phi-3); cut off, it would become a token.
        swallowed = encode_control(self.tokenizer, marker + space) == encode_control(self.tokenizer, marker)
        return end if swallowed else start + len(turn)

    def end_of_message(self, text: str, position: int) -> int:
        """Where the message ends that ends `text`: before an end-of-text token that nothing follows.

        Phi-3's ends whole conversations so; what is asked for in one that goes on shows the difference.
        """
        stripped = text.rstrip()
        special = special_tokens(self.tokenizer)
        ending = next((token for token in special if stripped.endswith(token)), None)
        if ending is None or not stripped.removesuffix(ending).rstrip().endswith(special):
            return len(text)
        going_on = self.text(position + 1, True)
        last = len(stripped) - len(ending)
        return len(text) if going_on.startswith(stripped) or going_on[:last] != text[:last] else last

    def rewritten(
        self, prefix: str, whole: str, position: int, header: bool = False, advice: str | None = None
    ) -> TemplateError:
        """The error that says what the template does to a message when the conversation goes on.

        Args:
            prefix: up to and with the message; with `header`, to the header that asks for the next one.
            advice: what to do about it; by default, where a conversation is imitated.
        """
        if advice is None:
            advice = (
                "If the template has a mode that asks so, choose it by `chat_template_kwargs` "
                "({'enable_thinking': false}); else mark what the model says in it by {% generation %}"
                if header
                else "Use a template that leaves earlier messages as they were, or one row per assistant turn"
            )
        same = next((i for i, pair in enumerate(zip(prefix, whole, strict=False)) if pair[0] != pair[1]), 0)
        around = slice(max(0, same - 20), same + 40)
        return TemplateError(
            f"{_describe(self.tokenizer)} renders {'the header after ' if header else ''}message {position} "
            f"({self.messages[position]['role']}) differently once the conversation goes on: "
            f"{prefix[around]!r} becomes {whole[around]!r}. {advice}"
        )

    def segment(
        self, source: Source, whole: str, start: int = 0, end: int | None = None, *, target: bool = False
    ) -> Segment:
        """Encode `start:end` of a rendering as the tokenizer would within the whole."""
        ids: list[int] = []
        before, text = whole[:start], whole[start:end]
        shown: list[str] = []
        # Text, data between marks, text, data, ...
        for index, piece in enumerate(
            re.split(f"{self.marks[0]}(.*?){self.marks[1]}", text, flags=re.DOTALL)
        ):
            if any(mark in piece for mark in self.marks):
                raise TemplateError(
                    f"{_describe(self.tokenizer)} takes a message apart next to "
                    f"{piece.strip(self.marks)[:40]!r}, so a control token in the data could pass for the "
                    "template's own; use a template that renders contents whole"
                )
            if index % 2:
                data = encode_plain(self.tokenizer, piece)
                piece, piece_ids = data.text, data.ids
            elif before:
                piece_ids = encode_after(self.tokenizer, before, piece)
            else:
                piece_ids = encode_prompt(self.tokenizer, piece, add_bos=False)
            ids += piece_ids
            shown.append(piece)
            before = piece or before
        return Segment(source, "".join(shown), ids, target=target)

    # ---- rendering ----

    def _render(self, count: int, add_generation_prompt: bool) -> tuple[str, list[_Span]]:
        key = (count, add_generation_prompt)
        if key not in self._rendered:
            self._rendered[key] = self._call(count, add_generation_prompt=add_generation_prompt)
        return self._rendered[key]

    def _call(self, count: int, **options: Any) -> tuple[str, list[_Span]]:
        """The template's text, and what it marks in it."""
        options |= self.template_kwargs
        try:
            if self._has_marks() and "continue_final_message" not in options:
                rendered: Any = render_jinja_template(
                    conversations=[self.messages[:count]],
                    tools=self.tools,
                    chat_template=self._template(),
                    return_assistant_tokens_mask=True,
                    **{**self.tokenizer.special_tokens_map, **options},
                )
                [text], [spans] = rendered
                return text, [(start, end) for start, end in spans if end > start]
            plain = self.tokenizer.apply_chat_template(
                self.messages[:count], tools=self.tools, tokenize=False, **options
            )
            return str(plain), []
        except (jinja2.TemplateError, TypeError) as error:  # or what the template did to a value failed
            raise TemplateError(
                f"{_describe(self.tokenizer)} fails on the conversation up to message {count - 1} "
                f"({self.messages[count - 1]['role']}): {error}"
            ) from error

    def _template(self) -> str:
        return self.tokenizer.get_chat_template(tools=self.tools)

    def _has_marks(self) -> bool:
        return _GENERATION.search(self._template()) is not None

    def _as_asked(self, asked: str, text: str, position: int) -> str:
        """What the model was shown when it was asked, with the message as it is rendered in `text`.

        Once it is answered, a template may show the last message otherwise than when it asked for the
        answer (Hermes' has one more newline after a tool's), or an earlier one (gpt-oss' drops the thoughts
        before a tool call).
        """
        unasked, before = self.text(position), self.text(position - 1) if position > 1 else ""
        header = len(unasked) if asked.startswith(unasked) else len(asked)
        last = len(before) if asked.startswith(before) else 0  # where the last message begins, at least
        first = len(before) if text.startswith(before) else 0  # the same in `text`
        control = _control_pattern(self.tokenizer)
        starts = [match.start() for match in control.finditer(asked, 0, header)]
        if first and control.search(asked, header) and self.messages[position - 1]["role"] != "assistant":
            starts.append(header)  # the last message can't contain it: control tokens in data are marked
        for start in starts:  # the longest ending of what was shown that is still there
            shown = asked[start:]
            found = text.rfind(shown, first)
            if found < 0:
                continue
            if start > last and text.count(shown, first) > 1:
                break  # without all of the last message, it may be the answer's own
            return asked + text[found + len(shown) :]
        raise self.rewritten(asked, text, position - 1, header=True)

    def _tell_what_is_left_out(self) -> None:
        """Warn of messages to the model, and of tools, that the template has no place for."""
        text = self.text(len(self.messages))
        shown = _SPACE.sub("", text)
        for position, message in enumerate(self.messages):
            content = message.get("content")
            if message["role"] == "assistant" or not isinstance(content, str):
                continue
            if _SPACE.sub("", content) not in shown and not self._shows_at_all(position):
                _warn_left_out(_describe(self.tokenizer), f"the messages of the role {message['role']!r}")
        names = [_tool_name(tool) for tool in self.tools or ()]
        if names and not any(name in text for name in names):
            _warn_left_out(_describe(self.tokenizer), "the tools")

    def _shows_at_all(self, position: int) -> bool:
        """Whether a message's content is shown in any form (quoted, say): another is put in its place."""
        messages = [*self.messages]
        messages[position] = {**messages[position], "content": _UNHEARD_OF}
        try:
            return _UNHEARD_OF in replace(self, messages=messages, _rendered={}).text(len(messages))
        except TemplateError:
            return True  # it was read, at least

    def _complete(self, turn: Turn, position: int) -> Turn:
        """The turn, if the template shows all of the message; white space aside, which templates trim."""
        message = self.messages[position]
        calls = [str(call.get("function", call).get("name")) for call in message.get("tool_calls", ())]
        if not all(self._shows(turn, position, name) for name in calls):
            start = turn.spans[0][0]
            raise TemplateError(
                f"{_describe(self.tokenizer)} doesn't show the tool calls of message {position}; it renders "
                f"{turn.text[start : start + 60]!r}. Use a template that does, or write them into contents"
            )
        for name in ("content", *_REASONING):
            value = message.get(name)
            if isinstance(value, str) and not self._shows(turn, position, value):
                _warn_not_shown(_describe(self.tokenizer), name)
        return turn

    def _shows(self, turn: Turn, position: int, text: str) -> bool:
        wanted = _SPACE.sub("", text)
        if wanted in _SPACE.sub("", "".join(turn.text[start:end] for start, end in turn.spans)):
            return True
        before = self.text(position) if position else ""  # the header may have its beginning ("<think>")
        return turn.text.startswith(before) and wanted in _SPACE.sub("", turn.text[len(before) :])


def _tool_name(tool: Any) -> str:
    if callable(tool):
        return str(getattr(tool, "__name__", tool))
    described = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(described.get("name", ""))


@cache
def _warn_left_out(template: str, what: str) -> None:
    logger.warning("%s leaves out %s; no model reads them (said once per template)", template, what)


@cache
def _warn_not_shown(template: str, name: str) -> None:
    logger.warning(
        "%s doesn't show all of %r in an assistant message, so that isn't learned (said once per template)",
        template,
        name,
    )


def _check(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {_name(tokenizer)} has no chat template, so it can't render messages; take a "
            "chat model's tokenizer, give a template (`chat_template_path`, or `tokenizer.chat_template`), "
            "or plain text (`text`, or `prompt` and `completion` as strings)"
        )


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    longest_first = sorted(control_tokens(tokenizer).values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}".removesuffix(" ''")


def _describe(tokenizer: PreTrainedTokenizerBase) -> str:
    start = tokenizer.get_chat_template().strip().splitlines()[0][:60]
    return f"the chat template of {_name(tokenizer)}, which starts {start!r},"
