"""Templates and columns."""

import pytest

from etude.environments.prompts import PromptTemplate, reference_of, text_of
from etude.errors import ConfigError, DataError


def test_a_template_is_filled_with_texts_and_nothing_else():
    template = PromptTemplate("{to} {{json}}: {text}, {text}", ("text", "to", "from"))
    assert template.used == ("to", "text")
    assert template.fill({"text": "{to} {0}", "to": "de"}) == "de {json}: {to} {0}, {to} {0}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", r"needs \{text\}, and may have \{text\}, \{to\}"),
        ("{to}", r"needs \{text\}"),
        ("{text} {from}", r"needs \{text\}, and may have"),
        ("{text} {}", r"needs \{text\}, and may have"),
        ("{text.__class__}", r"needs \{text\}, and may have"),
        ("{text!r}", r"needs \{text\}, and may have"),
        ("{text:>10}", r"needs \{text\}, and may have"),
        ("{text} {", r"can't be read .*; braces that are no field are doubled"),
    ],
)
def test_templates_that_are_none(template, message):
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(template, ("text", "to"))


def test_the_text_of_a_task():
    task = {"id": 3, "text": "a", "translation": {"en": "b", "fr": "c", "text": "d"}}
    assert text_of(task, ("text",), inside="translation") == "a"
    assert text_of(task, ("en", "text"), inside="translation") == "b"
    assert text_of({"id": 3, "query": "q"}, ("text", "query")) == "q"
    with pytest.raises(DataError, match=r"'en' or 'id'; this one has 'id' \(int\), 'text' \(str\), 'transl"):
        text_of(task, ("en", "id"))
    with pytest.raises(DataError, match=r"in its column 'de', in the task or in its 'translation'; this one"):
        text_of(task, ("de",), inside="translation")
    with pytest.raises(DataError, match="this one has none"):
        text_of({}, ("text",), inside="translation")


def test_the_reference_of_a_task():
    task = {"de": "", "en": ["a", "b"], "translation": {"fr": "c", "en": "d"}}
    assert reference_of(task, "en", inside="translation") == ["a", "b"]
    assert reference_of(task, "fr", inside="translation") == "c"
    assert reference_of(task, "fr") is None
    assert reference_of(task, "de") is None
    assert reference_of({"translation": None}, "de", inside="translation") is None
