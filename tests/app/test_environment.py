"""Environments by name: what options they are given, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import yaml
from template_families import family_tokenizer

from etude.app.arguments import ENVIRONMENTS, EnvironmentArguments
from etude.app.cli import main
from etude.app.environment import EnvironmentCode, parameters_of
from etude.app.references import load_object
from etude.environments.chat import ChatEnvironment
from etude.environments.generation import GenerationEnvironment
from etude.environments.summarization import SummarizationEnvironment
from etude.environments.text import TextEnvironment
from etude.environments.translation import TranslationEnvironment
from etude.errors import ConfigError
from etude.runtime.run import RunDirectory

CODE = """
from etude import TextEnvironment

class Loud(TextEnvironment):
    def __init__(self, model=None, tokenizer=None, *, times=1, **options):
        super().__init__(model, tokenizer, **options)
        self.times = times

    def build_prompt(self, task):
        return super().build_prompt(task) + "!" * self.times

class Scoring(Loud):
    async def score(self, episodes):
        pass

class Closed(TextEnvironment):
    def __init__(self, model=None, tokenizer=None, rewards=None):
        super().__init__(model, tokenizer, rewards=rewards)

def make(model, tokenizer, **anything):
    return Scoring(model, tokenizer, times=anything["times"])

not_callable = 3

def digits(completions):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CODE, encoding="utf-8")
    return tmp_path


def build(tokenizer: Any, name: str, **settings: Any) -> Any:
    return EnvironmentCode.load(EnvironmentArguments(name, **settings)).environment(None, tokenizer)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_short_names(name: str, tokenizer: Any) -> None:
    tokenizer = family_tokenizer("chatml") if name == "chat" else tokenizer
    environment = build(tokenizer, name, reward="mine.py:digits", generation={"max_new_tokens": 5})
    assert type(environment) is load_object(ENVIRONMENTS[name])
    assert [reward.name for reward in environment.rewards] == ["digits"]
    assert environment.params.max_new_tokens == 5


def test_what_the_options_say(tokenizer: Any) -> None:
    settings = {"tools": ["calculator"], "max_turns": 2, "prompt": "q: ", "max_tool_calls": 3}
    environment = build(tokenizer, "text", reward="chrf", **settings)
    assert type(environment) is TextEnvironment
    assert list(environment.tools) == ["calculator"]
    assert (environment.max_turns, environment.prompt, environment.max_tool_calls) == (2, "q: ", 3)

    environment = build(tokenizer, "generation", reward="chrf", environment_kwargs={"prompt_tokens": [2, 8]})
    assert type(environment) is GenerationEnvironment
    assert environment.prompt_lengths is not None

    kwargs = {"source": "en", "target": "de", "reward_weights": {"chrf": 1.0, "ter": 0.5}}
    environment = build(tokenizer, "translation", environment_kwargs=kwargs)
    assert type(environment) is TranslationEnvironment
    assert [(reward.name, reward.weight) for reward in environment.rewards] == [("chrf", 1.0), ("ter", 0.5)]
    assert environment.build_prompt({"translation": {"en": "yes"}}) == "yes"

    environment = build(tokenizer, "summarization", environment_kwargs={"template": "tldr", "words": [5, 9]})
    assert type(environment) is SummarizationEnvironment
    assert len(environment.rewards) == 5


def test_a_chat_s_options() -> None:
    kwargs = {"system": "Be brief.", "user": ["more"], "template_kwargs": {"enable_thinking": False}}
    settings = {"reward": "chrf", "environment_kwargs": {**kwargs, "rewrites": "keep"}, "max_turns": 3}
    environment = build(family_tokenizer("qwen3"), "chat", tools=["calculator"], **settings)
    assert type(environment) is ChatEnvironment
    prompt = environment.prompt_text({"prompt": "Hi."})
    assert prompt.startswith("<|im_start|>system\nBe brief.")
    assert '"name": "calculator"' in prompt
    assert prompt.endswith("<think>\n\n</think>\n\n")
    with pytest.raises(ConfigError, match="the environment chat takes no rewrite; did you mean rewrites"):
        EnvironmentCode.load(
            EnvironmentArguments("chat", reward="chrf", environment_kwargs={"rewrite": "keep"})
        )


def test_environments_of_ones_own(tokenizer: Any) -> None:
    kwargs = {"times": 2}
    loud = build(tokenizer, "mine.py:Loud", reward="chrf", environment_kwargs=kwargs, max_turns=7)
    assert loud.build_prompt({"prompt": "go"}) == "go!!"
    assert loud.max_turns == 7
    assert build(tokenizer, "mine.py:Scoring").times == 1
    assert build(tokenizer, "mine.py:make", environment_kwargs={"times": 3}).times == 3
    with pytest.raises(ConfigError, match=r"the environment mine.py:Loud has no rewards of its own"):
        build(tokenizer, "mine.py:Loud")
    closed = EnvironmentCode.load(EnvironmentArguments("mine.py:Closed", reward="mine.py:digits"))
    assert closed.environment(None, tokenizer).max_turns == 4
    with pytest.raises(ConfigError, match=r"mine.py:Closed takes no seed, which this command sets; let its"):
        closed.environment(None, tokenizer, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": "translaton"}, "there is no environment 'translaton'; did you mean translation"),
        (
            {"environment": "zzz"},
            "expected one of text, chat, generation, translation, summar",
        ),
        ({"environment": "mine.py:not_callable"}, "is 3; expected a class of environments"),
        ({"environment": "mine.py:Lout"}, "there is no 'Lout' in mine.py; did you mean Loud"),
        (
            {"environment": "translation", "tools": ["calculator"]},
            "environment translation takes no tools",
        ),
        ({"environment": "translation", "max_turns": 2}, "environment translation takes no max_turns"),
        (
            {"environment": "translation", "environment_kwargs": {"sorce": "en"}},
            "the environment translation takes no sorce; did you mean source",
        ),
        (
            {"environment": "mine.py:Closed", "reward": "chrf", "environment_kwargs": {"zzz": 1}},
            "takes no zzz; it takes rewards",
        ),
        (
            {"prompt": "a", "reward": "chrf", "environment_kwargs": {"prompt": "b"}},
            "environment_kwargs has prompt, which is an option, too; give one of them",
        ),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(settings: dict[str, Any], message: str) -> None:
    arguments = EnvironmentArguments(**settings)
    with pytest.raises(ConfigError, match=message):
        EnvironmentCode.load(arguments)


@pytest.mark.parametrize("name", ["text", "chat", "generation"])
def test_some_have_no_rewards_of_their_own(name: str) -> None:
    with pytest.raises(ConfigError, match="an episode needs a score"):
        EnvironmentArguments(name)


def test_what_a_class_takes() -> None:
    takes = parameters_of(GenerationEnvironment)
    assert takes is not None
    assert {"column", "prompt_tokens", "seed"} <= takes
    assert takes.isdisjoint({"tools", "max_turns", "model", "tokenizer", "self"})
    assert parameters_of(lambda model, tokenizer, **anything: None) is None


@pytest.fixture
def translate(model_directory: Path) -> list[str]:
    words = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier"}
    rows = [{"id": i, "translation": {"en": en, "de": de}} for i, (en, de) in enumerate(words.items())]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model_name_or_path": str(model_directory),
        "test_dataset": "rows.jsonl",
        "environment": "translation",
        "environment_kwargs": {
            "source": "en",
            "target": "de",
            "template": "{source} is ",
            "length_sampler": [3, 9],
            "reward_weights": {"chrf": 1.0, "bleu": 0.5},
        },
        "output_dir": "out",
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config=run.yaml"]


def corpus(episodes: list[Any]) -> dict[str, float]:
    said = [episode.completion.strip() for episode in episodes]
    wanted = [[episode.task["translation"]["de"] for episode in episodes]]
    return {
        "chrf": sacrebleu.corpus_chrf(said, wanted, word_order=2).score,
        "bleu": sacrebleu.corpus_bleu(said, wanted).score,
        "ter": sacrebleu.corpus_ter(said, wanted).score,
    }


def test_training_validates_by_the_environment_s_metrics(translate: list[str]) -> None:
    data = ["--train_dataset=rows.jsonl", "--eval_dataset=rows.jsonl", "--eval_steps=1", "--disable_progress"]
    sizes = ["--steps=8", "--batch_size=4", "--mini_batch_size=4", "--ppo_epochs=1", "--success_reward=0.1"]
    assert main(["ppo", *translate, *data, *sizes]) == 0
    run = RunDirectory("out")
    assert run.read_config()["environment_kwargs"]["source"] == "en"
    rows = [row for row in run.read_metrics() if "validation/chrf" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        played = run.read_episodes(split="validation", step=row["step"])
        assert len(played) == 4
        found = {name: row[f"validation/{name}"] for name in ("chrf", "bleu", "ter")}
        assert found == pytest.approx(corpus(played))
        mean = sum(episode.reward_totals["chrf"].value or 0 for episode in played) / 4
        assert row["validation/rewards/chrf"] == pytest.approx(mean)
    trained = run.read_episodes(split="train")
    assert {sum(episode.sampled) for episode in trained} <= {*range(1, 9)}
    assert {episode.prompt for episode in trained} == {f"{n} is " for n in ("one", "two", "three", "four")}


def test_evaluation_has_the_environment_s_metrics(
    translate: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *translate, "--samples=3", "--seed=4"]) == 0
    run = RunDirectory("out")
    measures = run.read_evaluation()["models"]["A"]["conditions"]["clean"]
    expected = corpus(run.read_episodes(split="A/clean"))
    for name, value in expected.items():
        assert measures[name]["value"] == pytest.approx(value)
        assert measures[name]["low"] < value < measures[name]["high"] or value == 0
    assert expected["chrf"] > 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    [row] = [line for line in lines if line[:1] == ["ChrF"]]
    assert float(row[1]) == pytest.approx(expected["chrf"], rel=1e-2)


def test_samples_of_continuations(model_directory: Path) -> None:
    rows = [{"text": f"number {i} was rather long and odd"} for i in range(6)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [
        f"--model_name_or_path={model_directory}",
        "--dataset=texts.jsonl",
        "--environment=generation",
        "--environment_kwargs={prompt_tokens: [2, 8], length_sampler: [2, 5]}",
        "--reward=mine.py:digits",
        "--num_samples=3",
        "--output_dir=out",
    ]
    assert main(["sample", *options]) == 0

    def prompts() -> dict[int, set[str]]:
        groups = RunDirectory("out").read_groups()
        return {task: {episode.prompt for episode in group} for task, group in groups.items()}

    before = prompts()
    assert {len(group) for group in before.values()} == {1}, "all of a group go on from the same beginning"
    assert len({len(prompt) for group in before.values() for prompt in group}) > 2
    assert main(["sample", *options, "--resume", "--num_samples=4"]) == 0
    assert prompts() == before, "and so do those that are played later"
