"""docs/chat.md: its snippets run, its tables say what templates do and how calls are read."""

import re
from pathlib import Path

import pytest
from template_families import FAMILIES, family_tokenizer

from etude.environments.call_format import FieldCalls, HeaderCalls, ObjectCalls
from etude.environments.chat import ChatEnvironment
from etude.environments.chat_protocol import ChatProtocol
from etude.errors import TemplateError
from etude.types import StopReason

PAGE = (Path(__file__).parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def table(title):
    after = PAGE[PAGE.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in after]


@pytest.fixture(scope="module")
def names(make_llama):
    """What a reader brings along, and what the first snippet makes."""
    settings = {"eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 1024}

    def model(family, seed):
        return make_llama(seed, vocab_size=len(family_tokenizer(family)), **settings)

    names = {
        "model": model("qwen2.5", 0),
        "tokenizer": family_tokenizer("qwen2.5"),
        "user_model": model("llama-3", 1),
        "user_tokenizer": family_tokenizer("llama-3"),
    }
    exec(SNIPPETS[0], names)
    return names


def test_the_first_conversation(names):
    assert isinstance(names["env"], ChatEnvironment)
    [history] = names["histories"]
    assert history.episode.prompt.startswith("<|im_start|>system\nBe brief.")
    assert '"name": "add"' in history.episode.prompt
    assert names["masks"][0].sum() > 0
    [reward] = history.episode.rewards
    assert reward.name == "brevity"


@pytest.mark.parametrize("snippet", SNIPPETS[1:], ids=range(1, len(SNIPPETS)))
def test_snippets_run_and_print_what_they_say(snippet, names, capsys):
    exec(snippet, dict(names))
    printed = "".join(line.removeprefix("# ") for line in re.findall(r"^# .*\n", snippet, re.MULTILINE))
    if printed:
        assert capsys.readouterr().out == printed


def playable(family, tools, user):
    for rewrites, said in (("refuse", "✓"), ("keep", "keep")):
        try:
            protocol = ChatProtocol(family_tokenizer(family), tools, rewrites=rewrites)
            protocol.check(user=user, turns=4)
        except TemplateError:
            continue
        return said
    return "–"


def test_templates(names):
    rows = table("template")
    assert [row[0] for row in rows] == list(FAMILIES)
    for family, *cells, why in rows:
        tools = [names["add"]]
        found = [playable(family, *kind) for kind in ((None, True), (tools, False), (tools, True))]
        assert cells == found, family
        assert bool(why) == (found != ["✓"] * 3), family


def test_templates_that_show_no_tools(names):
    said = PAGE[PAGE.rindex("chatml, zephyr") :].split(" write a tool's")[0]
    silent = {
        family
        for family in FAMILIES
        if playable(family, [names["add"]], False) != "–"
        and ChatProtocol(family_tokenizer(family), [names["add"]]).template.shows_calls == 0
    }
    assert set(re.split(", | and ", said)) == silent


FORMS = {"an object": ObjectCalls, "a name, then an object": HeaderCalls, "a name, then fields": FieldCalls}


def test_forms_of_calls(names):
    for form, _, templates in table("form"):
        for name in re.sub(r" \(.*?\)", "", templates).split(", "):
            family = name.lower().replace(" ", "-")
            if family == "qwen3-coder":  # in the tests of how calls are read
                continue
            written = ChatProtocol(family_tokenizer(family), [names["add"]]).call_format.written
            assert type(written) is FORMS[form], name


def test_endings():
    for _, reason in table("an episode ends because"):
        assert StopReason(reason.strip("`"))
