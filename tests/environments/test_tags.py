"""The tag protocol."""

import pytest

from etude.environments.tags import Call, ParsedTurn, TagProtocol


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
