"""Episodes in the terminal: coloured by source, harmless, and cut where their tokens meet."""

from __future__ import annotations

import io
import unicodedata
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.color import Color
from rich.console import Console
from rich.text import Text

from etude.reporting.episodes import (
    COLORS,
    _bytes_of_characters,
    episode_text,
    episode_tokens,
    legend,
    token_texts,
    visible,
)
from etude.types import SOURCES, Episode, NamedReward, Segment, StopReason, ToolCall


def shown_episode(tool_text: str = "12<response>") -> Episode:
    return Episode(
        segments=[
            Segment("prompt", "3*4? ", [1, 2]),
            Segment("model", "<calculator>3*4<call>", [3, 4], [-0.5, -0.25], [-0.5, -0.25], 7),
            Segment("tool", tool_text, [5]),
            Segment("model", "forced", [6]),
        ],
        rewards=[
            NamedReward("exact", 1.0),
            NamedReward("short", -0.5, weight=0.2),
            NamedReward("rated", None),
        ],
        tool_calls=[ToolCall("calculator", "3*4", "12"), ToolCall("clock", "", "late", error="timeout")],
        stop=StopReason.MAX_TURNS,
    )


def styled(text: Text) -> dict[str, tuple[str, bool]]:
    """Colour and italics of each styled run."""
    runs = {}
    for span in text.spans:
        style = span.style
        assert not isinstance(style, str)
        runs[text.plain[span.start : span.end]] = (
            style.color.name if style.color else "",
            bool(style.italic),
        )
    return runs


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    channels = [channel / 255 for channel in Color.parse(color).get_truecolor()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("source", COLORS)
def test_colours_are_readable_on_black_and_on_white(source: str) -> None:
    assert (luminance(COLORS[source]) + 0.05) / 0.05 > 4.4
    assert 1.05 / (luminance(COLORS[source]) + 0.05) > 4.4


def test_every_source_has_a_colour_of_its_own() -> None:
    assert set(COLORS) == {*SOURCES, "reward"}
    assert len(set(COLORS.values())) == len(COLORS)


def test_legend_names_each_colour_in_itself() -> None:
    shown = styled(legend())
    for name, color in COLORS.items():
        assert shown[name] == (color, False)
    assert shown["model, not sampled by this run"] == (COLORS["model"], True)


def test_text_is_coloured_by_source() -> None:
    text = episode_text(shown_episode())
    assert text.plain == (
        "3*4? <calculator>3*4<call>12<response>forced\n"
        "reward 0.9 (exact 1, short -0.5 × 0.2, rated does not apply) · max turns · clock: timeout"
    )
    shown = styled(text)
    assert shown["3*4? "] == (COLORS["prompt"], False)
    assert shown["<calculator>3*4<call>"] == (COLORS["model"], False)
    assert shown["12<response>"] == (COLORS["tool"], False)
    assert shown["forced"] == (COLORS["model"], True)


def test_an_unfinished_episode_and_a_broken_one() -> None:
    assert episode_text(Episode()).plain == "\nreward 0 · unfinished"
    broken = Episode(stop=StopReason.INFRASTRUCTURE, error="server\x1b[2J gone")
    assert episode_text(broken).plain == "\nreward 0 · infrastructure · server\\x1b[2J gone"


def test_tool_text_cannot_reach_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\r[red]\x9b31m\u202egnp\u2066\u200b\ud800\u2028 é\t中\u200d\n"
    output = io.StringIO()
    Console(file=output, force_terminal=True, color_system="truecolor", width=500).print(
        episode_text(shown_episode(hostile))
    )
    rich_itself, *_ = output.getvalue().partition("3*4?")
    assert rich_itself == "\x1b[38;2;119;119;119m"
    for character in "\x07\r\x9b\u202e\u2066\u200b\ud800\u2028":
        assert character not in output.getvalue()
    assert (
        "]0;owned\\x07\\x1b[2J\\r[red]\\x9b31m\\u202egnp\\u2066\\u200b\\ud800\\u2028 é" in output.getvalue()
    )


@given(st.text(st.characters(exclude_categories=[])))
def test_visible_leaves_nothing_hidden(text: str) -> None:
    left = set(visible(text)) - set("\n\t\u200c\u200d")
    assert not {
        character for character in left if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"])))
def test_visible_leaves_ordinary_text_alone(text: str) -> None:
    assert visible(text) == text


def test_tokens_are_told_apart() -> None:
    words = {1: "3*4", 2: "?▁", 3: "<calculator>", 4: "3*4<call>", 5: "12<response>", 6: None}
    speller = SimpleNamespace(convert_ids_to_tokens=lambda ids: [words[id] for id in ids])
    text = episode_tokens(shown_episode(), speller)
    first, _ = text.plain.split("\n")
    assert first == "3*4│? │<calculator>│3*4<call>│12<response>│<6>"
    assert styled(text)["3*4<call>"] == (COLORS["model"], False)


def byte_level(piece: bytes) -> str:
    alphabet = {byte: character for character, byte in _bytes_of_characters().items()}
    return "".join(alphabet[byte] for byte in piece)


def test_byte_level_alphabet_matches_the_published_one() -> None:
    assert byte_level(" é\n".encode()) == "ĠÃ©Ċ"
    assert sorted(_bytes_of_characters().values()) == list(range(256))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sets(st.integers(1, 40)))
def test_byte_level_tokens_spell_any_text_wherever_they_cut_it(text: str, cuts: set[int]) -> None:
    data = text.encode()
    ends = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    tokens = [byte_level(data[start:end]) for start, end in pairwise(ends)]
    pieces = token_texts(text, [*tokens, "<|endoftext|>"])
    assert pieces is not None
    assert pieces[-1] == "<|endoftext|>"
    assert "".join(pieces[:-1]) == text
    for count, end in enumerate(ends):
        assert "".join(pieces[:count]) == data[:end].decode(errors="ignore")


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("Hello wörld", ["▁Hello", "▁w", "<0xC3>", "<0xB6>", "rld"], ["Hello", " w", "", "ö", "rld"]),
        (" Hello", ["▁Hello"], [" Hello"]),
        ("Hello", ["<s>", "Hello", "</s>"], ["<s>", "Hello", "</s>"]),
        ("What is 3?", ["What is ", "3", "?"], ["What is ", "3", "?"]),
        ("", ["</s>"], ["</s>"]),
        ("", [], []),
        ("playing", ["play", "##ing"], None),
        ("Hello", ["Bye"], None),
    ],
)
def test_token_texts(text: str, tokens: list[str], pieces: list[str] | None) -> None:
    assert token_texts(text, tokens) == pieces


def test_rewards_of_turns_and_tokens_stand_behind_them() -> None:
    episode = shown_episode()
    episode.rewards = [
        NamedReward("exact", 1.0),
        NamedReward("steps", -1.0, 0.5, position=3),
        NamedReward("steps", 0.25, 0.5, position=2),
        NamedReward("rated", 2.0, position=5),
        NamedReward("rated", None, position=0),
        NamedReward("odd\x1b", 3.0, position=99),
    ]
    text = episode_text(episode)
    ending = "reward 5.62 (exact 1, steps -0.75 × 0.5, rated 2, odd\\x1b 3) · max turns · clock: timeout"
    assert text.plain == (f"3*4? <calculator>3*4<call>[steps -0.75]12<response>forced[rated 2]\n{ending}")
    assert styled(text)["[steps -0.75]"] == (COLORS["reward"], False)
    words = {1: "3*4", 2: "?▁", 3: "<calculator>", 4: "3*4<call>", 5: "12<response>", 6: None}
    speller = SimpleNamespace(convert_ids_to_tokens=lambda ids: [words[id] for id in ids])
    assert episode_tokens(episode, speller).plain.split("\n")[0] == (
        "3*4│? │<calculator>[steps 0.25]│3*4<call>[steps -1]│12<response>│<6>[rated 2]"
    )
