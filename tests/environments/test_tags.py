"""The tag protocol."""

import pytest

from etude.environments.tags import Call, ParsedTurn, Reply, TagProtocol
from etude.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<request><calc>1+2<call>", ParsedTurn(calls=(Call("calc", "1+2"),))),
        ("hm <request> <calc>a>b<call>", ParsedTurn(calls=(Call("calc", "a>b"),))),
        ("<request><calc>line\nbreak<call>", ParsedTurn(calls=(Call("calc", "line\nbreak"),))),
        ("<request><calc><call>", ParsedTurn(calls=(Call("calc", ""),))),
        ("<request>calc 1+2<call>", ParsedTurn(calls=(Call(None, "<request>calc 1+2<call>"),))),
        ("<call><request>", ParsedTurn(calls=(Call(None, "<call><request>"),))),
        ("<request><calc>1+2", ParsedTurn()),
        ("1+2<call>", ParsedTurn()),
        ("Result=3<submit>", ParsedTurn(submitted=True)),
        ("<request><calc>1<call><submit>", ParsedTurn(submitted=True)),
        ("", ParsedTurn()),
    ],
)
def test_parse(text, expected):
    assert TagProtocol().parse(text) == expected


def test_tags_can_be_other_strings():
    protocol = TagProtocol(request="[[", call="]]", response="|", submit="!")
    assert protocol.parse("[[<f>x]]") == ParsedTurn(calls=(Call("f", "x"),))
    assert protocol.stop == ("]]", "!")


def test_what_comes_back_is_followed_by_the_response_tag(tokenizer):
    framing = TagProtocol().begin(tokenizer, "what is 1+2?")
    assert framing.prompt.text == "what is 1+2?"
    assert framing.prompt.token_ids == tokenizer.encode("what is 1+2?")
    replies = [Reply("3", [3], Call("calc", "1+2")), Reply("so", [40])]
    said = framing.frame(replies, ended_by=None)
    assert [(s.source, s.text) for s in said] == [
        ("tool", "3"),
        ("environment", "<response>"),
        ("environment", "so"),
        ("environment", "<response>"),
    ]
    assert said[1].token_ids == [tokenizer.convert_tokens_to_ids("<response>")]
    assert said[1] is not said[3], "segments of an episode are its own"


def test_tags_take_texts(tokenizer):
    with pytest.raises(DataError, match="messages, which tags can't render; use a ChatEnvironment"):
        TagProtocol().begin(tokenizer, [{"role": "user", "content": "hi"}])
