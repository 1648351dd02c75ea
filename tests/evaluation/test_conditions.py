"""Conditions: where the noise goes, and what stays as it was."""

import pytest

from etude.data.noise import CharacterNoise, Injection
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError
from etude.evaluation.conditions import Condition, make_conditions
from etude.tools.calculator import calculator
from etude.tools.noisy import NoisyTool

ROWS = [{"prompt": f"how much is {i}+{i}, please?", "answer": 2 * i} for i in range(30)]
COLUMNS = ("prompt", "query")


def no_reward(completions):
    return [0.0 for _ in completions]


def test_noise_in_prompts_is_of_the_task():
    condition = Condition("characters", CharacterNoise(0.3))
    noisy = condition.tasks(ROWS, COLUMNS, seed=1)
    assert noisy == condition.tasks(ROWS, COLUMNS, seed=1)
    assert noisy[:7] == condition.tasks(ROWS[:7], COLUMNS, seed=1)
    assert noisy != condition.tasks(ROWS, COLUMNS, seed=2)
    assert [row["answer"] for row in noisy] == [row["answer"] for row in ROWS]
    changed = [f"{i}+{i}," for i in range(30) if noisy[i]["prompt"] != ROWS[i]["prompt"]]
    assert len(changed) > 25
    assert all(f"{i}+{i}," in noisy[i]["prompt"] for i in range(30))
    assert len({row["prompt"].split()[0] for row in noisy}) > 3, "each task has noise of its own"
    assert ROWS[0]["prompt"] == "how much is 0+0, please?", "the caller's rows stay"


def test_the_columns_are_chosen():
    row = {"question": "what now?", "prompt": None, "query": "so?"}
    say = Injection(texts=["{bait}"])
    assert Condition("i", say).tasks([row], COLUMNS, 0) == [{**row, "query": "so? banana"}]
    assert Condition("i", say).tasks([row], ["question"], 0) == [{**row, "question": "what now? banana"}]
    with pytest.raises(DataError, match=r"task 0 has no text in 'prompt' .*noise_columns"):
        Condition("i", say).tasks([row], ["prompt"], 0)
    assert Condition().tasks([row], ["prompt"], 0) == [row], "the clean tasks need none"
    assert Condition("i", say, "tools").tasks([row], ["prompt"], 0) == [row]


def test_of_messages_the_last_of_the_user_s_is_changed():
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "what now?"},
        {"role": "assistant", "content": "well"},
    ]
    [row] = Condition("i", Injection(texts=["{bait}"])).tasks([{"prompt": talk, "answer": 1}], COLUMNS, 0)
    assert row["prompt"] == [*talk[:3], {"role": "user", "content": "what now? banana"}, talk[4]]
    assert talk[3]["content"] == "what now?", "the caller's messages stay"
    with pytest.raises(DataError, match="task 0 has no text"):
        Condition("i", Injection()).tasks([{"prompt": talk[:1]}], COLUMNS, 0)


def test_noise_in_tools_is_in_a_copy(tokenizer):
    environment = TextEnvironment(None, tokenizer, tools=[calculator], rewards=no_reward)
    noisy = Condition("tool_i", Injection(), "tools").environment(environment, 0)
    assert isinstance(noisy.tools["calculator"], NoisyTool)
    assert environment.tools["calculator"] is noisy.tools["calculator"].tool
    assert noisy.rewards is environment.rewards
    assert noisy.params is environment.params
    for other in (Condition(), Condition("i", Injection())):
        assert other.environment(environment, 0) is environment


def test_conditions_have_names():
    found = make_conditions(["characters", Injection("plum")], {"mean": Injection("fig")}, has_tools=True)
    assert [condition.name for condition in found] == ["clean", "characters", "injection", "tool_mean"]
    assert [condition.bait for condition in found] == [None, None, "plum", "fig"]
    assert [condition.where for condition in found][2:] == ["prompts", "tools"]


@pytest.mark.parametrize(
    ("noise", "tool_noise", "message"),
    [
        (["words", "words"], (), "two conditions are named 'words'"),
        ({"clean": "words"}, (), "two conditions are named 'clean'"),
        ((), ["words"], "tool_noise does nothing without tools"),
        ("words", (), "expected a list of noises"),
    ],
)
def test_conditions_that_make_no_sense(noise, tool_noise, message):
    with pytest.raises(ConfigError, match=message):
        make_conditions(noise, tool_noise, has_tools=False)
