"""Metrics by name: in Python, as attributes of the package, on the command line."""

import inspect
import sys
from importlib import import_module

import pytest

import etude.rewards
from etude.app.references import load_object
from etude.errors import ConfigError, RewardError
from etude.rewards.function import FunctionReward, as_reward
from etude.rewards.metrics import metric_reward
from etude.runtime.loop import run_sync
from etude.types import Episode, Segment


def episode(text, **task):
    turn = Segment("model", text, [1, 2, 3], policy_version=0)
    return Episode(task=task, segments=[Segment("prompt", "?", [0]), turn])


def scores(reward, *episodes):
    return run_sync(as_reward(reward)(episodes))


@pytest.mark.parametrize("name", etude.rewards.METRICS)
def test_every_metric_is_a_reward_by_the_general_contract(name):
    function = getattr(etude.rewards, name)
    assert function is getattr(import_module(etude.rewards.METRICS[name]), name)
    assert function is load_object(name, "etude.rewards") is load_object(f"etude.rewards:{name}")
    row = {"target": "a b c", "summary": "a b c", "document": "d e f"}
    [score] = scores(function, episode("a b c", **row))
    assert score == (0.0 if name.endswith("penalty") else 1.0)
    assert as_reward(function).name == metric_reward(name).name == name


def test_there_are_no_others():
    with pytest.raises(AttributeError, match="no attribute 'crhf'"):
        etude.rewards.crhf  # noqa: B018
    with pytest.raises(ConfigError, match="there is no metric 'chrff'; did you mean 'chrf'"):
        metric_reward("chrff")
    with pytest.raises(ConfigError, match="expected one of chrf, bleu"):
        metric_reward("zzz")
    with pytest.raises(ConfigError, match=r"ships nothing named 'chrff'; did you mean chrf"):
        load_object("chrff", "etude.rewards")


def test_settings():
    reward = load_object("etude:metric_reward('length_penalty', weight=0.5, words=2, name='brief')")
    assert isinstance(reward, FunctionReward)
    assert (reward.name, reward.weight) == ("brief", 0.5)
    assert scores(reward, episode("one two"), episode("one two three")) == [0.0, -0.5]
    with pytest.raises(ConfigError, match="'length_penalty' has no setting 'word'; its settings are: words"):
        metric_reward("length_penalty", word=2)
    with pytest.raises(ConfigError, match="'ter' has no setting 'n'; its settings are: none"):
        metric_reward("ter", n=2)
    with pytest.raises(ConfigError, match="the length is 0"):
        metric_reward("length_penalty", words=0)
    with pytest.raises(ConfigError, match="tokenize is 'cn'"):
        metric_reward("bleu", tokenize="cn")


def test_a_column_is_no_setting():
    """Data sets have columns named tokens and words."""
    row = {"words": ["a"], "tokens": [1], "n": 3, "summary": "one two", "use_stemmer": None}
    assert scores(etude.rewards.length_penalty, episode("one", **row)) == [-0.5]
    assert scores(metric_reward("length_penalty", words=4), episode("one", **row)) == [-0.75]
    assert scores(metric_reward("rouge"), episode("one two", **row)) == [1.0]


def test_references_in_other_columns():
    row = {"de": "ja", "translation": {"de": "nein"}}
    assert scores(metric_reward("ter", columns={"target": "de"}), episode("ja", **row)) == [1.0]
    inside = metric_reward("ter", columns={"target": lambda task: task["translation"]["de"]})
    assert scores(inside, episode("ja", **row)) == [0.0]
    some = metric_reward("ter", columns={"target": "de"})
    assert scores(some, episode("ja", **row), episode("ja")) == [1.0, None], "a row without a reference"
    with pytest.raises(RewardError, match=r"needs 'target', which no column provides; found 'fr'"):
        scores(some, episode("ja", fr="oui"))
    with pytest.raises(ConfigError, match="'copy_penalty' reads no 'text'; it reads: document, summary"):
        metric_reward("copy_penalty", columns={"text": "de"})


@pytest.mark.parametrize(("name", "library"), [("chrf", "sacrebleu"), ("rouge", "rouge_score.rouge_scorer")])
def test_a_library_that_is_missing(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # what import then says is ModuleNotFoundError
    with pytest.raises(ConfigError, match=rf"needs {library} .*pip install 'etude\[metrics\]'"):
        metric_reward(name)
    metric_reward("length_penalty")


def test_signatures_show_columns_only():
    assert list(inspect.signature(etude.rewards.length_penalty).parameters) == [
        "completions",
        "summary",
        "episodes",
    ]


def test_of_a_conversation_the_last_turn_is_read():
    asked = [{"role": "user", "content": "the house?"}]
    said = [Segment("model", text, []) for text in ("let me see", "das Haus ist alt")]
    talk = Episode(task={"prompt": asked, "target": "das Haus ist alt"}, segments=said)
    silent = Episode(task={"prompt": asked, "target": "das Haus ist alt"}, segments=[])
    text = Episode(task={"prompt": "the house?", "target": "das Haus ist alt"}, segments=said[1:])
    found = scores(metric_reward("chrf"), talk, silent, text)
    assert found == [1.0, 0.0, 1.0]
