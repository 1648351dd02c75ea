import re

import pytest

from etude.data.messages import marked_messages, task_messages, with_json_arguments
from etude.errors import DataError

CONTROL = re.compile(re.escape("<end>"))


def arguments(value, **call):
    """What becomes of a call's arguments."""
    messages = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": value}, **call}]}
    ]
    [message], _ = marked_messages(messages, CONTROL)
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ('{"a": 1, "b": null}', {"a": 1, "b": None}),
        ({"a": "{}"}, {"a": "{}"}),
        ("[1]", "[1]"),  # no arguments by name
        ("2", "2"),
        ("{oops", "{oops"),
        ("", ""),
    ],
)
def test_arguments_are_a_mapping_where_they_can_be(given, taken):
    assert arguments(given) == taken


def test_a_call_may_be_flat_and_have_no_arguments():
    flat = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}, {"name": "g"}, "h"]}
    [message], _ = marked_messages([flat], CONTROL)
    assert message["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}, "h"]
    as_json = with_json_arguments(message)
    assert as_json["tool_calls"] == flat["tool_calls"]
    assert with_json_arguments({"role": "user"}) == {"role": "user"}


def test_data_is_marked_and_what_authors_write_is_not():
    messages = [
        {"role": "system", "content": "a<end>"},
        {"role": "user", "content": [{"type": "text", "text": "b<end>c\ufdd0"}], "name": None},
        {"role": "tool", "content": "<end>", "tool_call_id": "<end>"},
    ]
    (system, user, tool), (left, right) = marked_messages(messages, CONTROL)
    assert system == messages[0]
    assert user == {"role": "user", "content": [{"type": "text", "text": f"b{left}<end>{right}c\ufdd0"}]}
    assert tool["content"] == tool["tool_call_id"] == f"{left}<end>{right}"
    assert len({left, right, "\ufdd0"}) == 3, "marks occur nowhere else"


@pytest.mark.parametrize("messages", [[], ["hi"], [{"from": "human"}], [{"role": None}], [None]])
def test_what_is_not_a_conversation(messages):
    with pytest.raises(DataError, match=r"no messages|message 0 has no role; its keys are"):
        marked_messages(messages, CONTROL)


def test_a_task_s_conversation():
    said = [{"role": "user", "content": "hi", "name": None}]
    plain = [{"role": "user", "content": "hi"}]
    for task in ({"messages": said}, {"prompt": said}, {"prompt": "hi"}, {"query": "hi"}):
        assert task_messages({"answer": 3, **task}) == plain
    assert task_messages({"prompt": "no", "messages": said}) == plain
    with pytest.raises(DataError, match="this one has answer, prompt"):
        task_messages({"answer": 3, "prompt": []})
    with pytest.raises(DataError, match="message 0 has no role"):
        task_messages({"prompt": ["hi"]})
