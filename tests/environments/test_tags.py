"""The tag protocol."""

import pytest

from etude.environments.tags import ParsedTurn, TagProtocol


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<request><calc>1+2<call>", ParsedTurn(calls=True, tool="calc", query="1+2")),
        ("hm <request> <calc>a>b<call>", ParsedTurn(calls=True, tool="calc", query="a>b")),
        ("<request><calc>line\nbreak<call>", ParsedTurn(calls=True, tool="calc", query="line\nbreak")),
        ("<request><calc><call>", ParsedTurn(calls=True, tool="calc", query="")),
        ("<request>calc 1+2<call>", ParsedTurn(calls=True)),
        ("<call><request>", ParsedTurn(calls=True)),
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
    assert protocol.parse("[[<f>x]]") == ParsedTurn(calls=True, tool="f", query="x")
    assert protocol.stop == ("]]", "!")
    assert protocol.frame() == ("", "|")
