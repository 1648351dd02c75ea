"""Several environments on the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from etude.app.cli import build_arguments, main
from etude.app.mixed_arguments import PlayArguments
from etude.app.options import read_options
from etude.app.parsing import parse_options
from etude.errors import ConfigError
from etude.runtime.run import RunDirectory

REWARDS = """
def digits(completions, answer, **_):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

def vowels(completions, **_):
    return [10.0 * sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_llama: Any, tokenizer: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("rewards.py").write_text(REWARDS, encoding="utf-8")
    Path("sums.jsonl").write_text("".join(f'{{"prompt": "{n}+{n}=", "answer": {n}}}\n' for n in range(5)))
    pairs = [{"source": word, "target": digit} for word, digit in (("one", "1"), ("two", "2"))]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def settings(**changes: Any) -> dict[str, Any]:
    own = dict.fromkeys(("train_dataset", "test_dataset"), "sums.jsonl")
    pairs = dict.fromkeys(("train_dataset", "test_dataset"), "pairs.jsonl")
    return {
        "model_name_or_path": "model",
        "output_dir": "run",
        "generation": {"max_new_tokens": 6},
        "environments": {
            "sums": {**own, "tools": ["calculator"], "reward": "rewards.py:digits", "weight": 3},
            "words": {
                **pairs,
                "environment": "translation",
                "environment_kwargs": {"template": "say {source}:"},
                "generation": {"max_new_tokens": 3},
                "weight": 1,
            },
        },
        "success_reward": {"sums": 0.2, "words": 0.1},
        "disable_progress": True,
        **changes,
    }


def write(**changes: Any) -> str:
    Path("mixed.yaml").write_text(yaml.safe_dump(settings(**changes)), encoding="utf-8")
    return "--config=mixed.yaml"


def arguments(**changes: Any) -> PlayArguments:
    given = [write(**changes)]
    built = build_arguments("ppo", parse_options(read_options("ppo"), given))
    return next(each for each in built if isinstance(each, PlayArguments))


def test_a_mixed_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"steps": 16, "batch_size": 8, "mini_batch_size": 4, "eval_steps": 0, "episodes_to_log": -1}
    assert main(["ppo", write(**short)]) == 0
    run = RunDirectory("run")
    played = run.read_episodes(split="train")
    assert Counter(e.environment for e in played) == {"sums": 12, "words": 4}
    for episode in played:
        assert episode.prompt.startswith("say " if episode.environment == "words" else episode.task["prompt"])
        assert sum(episode.sampled) <= (3 if episode.environment == "words" else 24)
        names = {reward.name for reward in episode.rewards}
        assert names == ({"chrf"} if episode.environment == "words" else {"digits"})
    assert {"sums/rewards/digits", "words/rewards/chrf"} <= run.read_metrics()[0].keys()
    out = capsys.readouterr().out
    after = run.read_summary()["environments"]["words"]["after"]
    assert f"→ {after['success']:.3g}" in out.partition("  words: ")[2].splitlines()[0]
    assert "bleu" in after, "what translation says of all episodes"
    # The settings that are stored can be given back as they are.
    again = {**yaml.safe_load(Path("run/run.yaml").read_text()), "output_dir": "again", "steps": 8}
    Path("again.yaml").write_text(yaml.safe_dump(again))
    assert main(["ppo", "--config=again.yaml", "--environments.words.weight=7"]) == 0
    counts = Counter(e.environment for e in RunDirectory("again").read_episodes(split="train"))
    assert counts["words"] > counts["sums"]


def test_groups_of_several_environments_with_one_file_of_tasks(workplace: Path) -> None:
    rows = [{"environment": "sums", "prompt": "1+1=", "answer": 2}, {"environment": "words", "source": "two"}]
    Path("tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words: dict[str, Any] = {"environment": "generation", "environment_kwargs": {"column": "source"}}
    environments = {
        "sums": {"reward": "rewards.py:digits"},
        "words": {**words, "reward": "rewards.py:vowels"},
    }
    group = {"num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 1, "eval_steps": 0}
    config = write(environments=environments, train_dataset="tasks.jsonl", **group)
    assert main(["grpo", config, "--episodes_to_log=-1"]) == 0
    played = RunDirectory("run").read_episodes(split="train")
    assert [e.environment for e in played] == [played[0].environment] * 4 + [played[4].environment] * 4


def test_what_stands_beside_is_everyones_unless_it_says_otherwise(workplace: Path) -> None:
    found = arguments(max_turns=2, tool_timeout=3.0)
    sums, words = found.parts["sums"].episodes, found.parts["words"].episodes
    assert (sums.max_turns, sums.tool_timeout, sums.generation) == (2, 3.0, {"max_new_tokens": 6})
    assert words.generation == {"max_new_tokens": 3}
    assert words.environment == "translation"
    assert found.weights == {"sums": 3.0, "words": 1.0}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sums", "calculator", r"environments\.sums is 'calculator'; expected a mapping of its options"),
        ("sums.max_turn", 2, r"environments\.sums: unknown option max_turn; did you mean max_turns\?"),
        ("sums.max_turns", "two", r"environments\.sums: max_turns is 'two'; expected a whole number"),
        ("sums.reward", [], r"environments\.sums: an episode needs a score"),
        ("sums.environments", {}, r"environments\.sums: unknown option environments"),
        ("sums.train_split", "x", None),
        ("sums.eval_split", "x", r"environments\.sums: eval_split does nothing without eval_dataset"),
    ],
)
def test_mistakes_name_the_environment(workplace: Path, path: str, value: Any, message: str | None) -> None:
    environments = settings()["environments"]
    name, _, option = path.partition(".")
    if option:
        environments[name][option] = value
    else:
        environments[name] = value
    if message is None:
        assert arguments(environments=environments).parts["sums"].tasks.train_split == "x"
        return
    with pytest.raises(ConfigError, match=message):
        arguments(environments=environments)


def test_tasks_are_named_once(workplace: Path) -> None:
    with pytest.raises(ConfigError, match="train_dataset is given for all environments, and for sums"):
        arguments(train_dataset="sums.jsonl")
    environments = {name: {"reward": "rewards.py:vowels"} for name in ("a", "b")}
    missing = r"--train_dataset \(.*\) must be given; or environments\.a\.train_dataset and environments\.b\."
    with pytest.raises(ConfigError, match=missing):
        arguments(environments=environments, success_reward=1.0)
    with pytest.raises(ConfigError, match=r"--train_dataset \(.*training rows\) must be given$"):
        arguments(environments={}, reward="rewards.py:vowels")


def test_weights_are_of_all_or_of_none(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environments = settings()["environments"]
    del environments["words"]["weight"]
    assert main(["ppo", write(environments=environments)]) == 2
    assert "weights are of sums; expected one for each of sums, words" in capsys.readouterr().err
