"""docs/adapters.md: its code runs. That of OpenEnv and verifiers runs in their own tests."""

import re
import runpy
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import etude
from etude.app.cli import main
from etude.environments.adapters.instance import InstanceEnvironment
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.runtime.run import RunDirectory
from etude.types import StopReason

PAGE = (Path(__file__).parents[1] / "docs/adapters.md").read_text("utf-8")
DUCK, DUCKS, LAKE, LEARNING, OPENENV, VERIFIERS, COMMAND, OWN = re.findall(
    r"```python\n(.*?)```", PAGE, re.DOTALL
)


@pytest.fixture
def names(tokenizer, make_llama, tmp_path, monkeypatch):
    """What a reader brings along."""
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    head = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    return {"model": model, "model_with_value_head": head, "tokenizer": tokenizer}


def test_trls_duck_type(names, capsys):
    exec(DUCK, names)
    assert "('Counter', 0.0), ('overshoot', -0.0)" in capsys.readouterr().out
    assert [episode.prompt for episode in names["episodes"]] == ["count to 3", "count to 5"]
    episodes = RunDirectory("runs/counter").read_episodes(split="train")
    assert {episode.prompt for episode in episodes} <= {f"count to {goal}" for goal in range(8)}
    assert {reward.name for episode in episodes for reward in episode.rewards} == {"Counter", "overshoot"}

    class Other:
        total = goal = 1

        def reset(self, prompt):
            return "!"

    given = {**names, "Other": Other}
    exec(DUCKS, given)
    first, second = given["histories"]
    assert [reward.name for reward in first.episode.rewards] == ["Counter", "overshoot"]
    assert [reward.name for reward in second.episode.rewards] == ["overshoot"]
    assert second.episode.prompt == "go!"


def test_gymnasium(names):
    pytest.importorskip("gymnasium")
    exec(LAKE, names)
    for history in names["histories"]:
        assert history.text.startswith("the lake. you stand on 0, ")
        assert history.episode.rewards[-1].name == "invalid_actions"


def test_the_lake_is_learned(names):
    pytest.importorskip("gymnasium")
    characters = {character: i for i, character in enumerate("0123456789abcdefLDRU")}
    backend = Tokenizer(models.WordLevel({**characters, "[unk]": len(characters)}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("[eos]", normalized=False)])
    small = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]", eos_token="[eos]")
    etude.set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": len(small), "tie_word_embeddings": False, "bos_token_id": None}
    given = {
        **names,
        "small_model": LlamaForCausalLM(LlamaConfig(**sizes, **settings, eos_token_id=small.eos_token_id)),
        "small_tokenizer": small,
    }
    exec(
        "from etude import GRPOConfig, GRPOTrainer, GymnasiumEnvironment, TextEnvironment\n" + LEARNING, given
    )
    metrics = RunDirectory("runs/lake").read_metrics()
    assert metrics[0]["success"] < 0.3
    assert metrics[-1]["success"] > 0.75
    assert all(line["rewards/invalid_actions"] == 0 for line in metrics)
    episode = RunDirectory("runs/lake").read_episodes(split="train")[-1]
    assert episode.stop is StopReason.DONE
    assert set(episode.completion) <= set("LDRU")


@pytest.mark.filterwarnings("ignore:no episode of this batch is better")
def test_the_example(tmp_path, capsys):
    pytest.importorskip("gymnasium")
    [place] = re.findall(r"\(\.\./(examples/\w+\.py)\)", PAGE)
    example = runpy.run_path(str(Path(__file__).parents[1] / place))
    example["main"].__globals__["EPISODES"] = 8
    example["main"](["--output_dir", str(tmp_path), "--iterations", "1"])
    assert re.search(r"reached the goal: \d+\.\d% before, \d+\.\d% after \d+ s", capsys.readouterr().out)
    episodes = RunDirectory(tmp_path).read_episodes(split="train")
    assert {episode.stop for episode in episodes} <= {StopReason.DONE, StopReason.MAX_TURNS}
    assert max(episode.turns for episode in episodes) <= 20


@pytest.mark.filterwarnings("ignore:no episode of this batch is better")
def test_the_command(names, make_llama, tokenizer):
    pytest.importorskip("gymnasium")
    imports = "from etude import GymnasiumEnvironment, TextEnvironment\n\n"
    Path("lake.py").write_text(imports + COMMAND, encoding="utf-8")
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("tasks.jsonl").write_text('{"prompt": "go "}\n' * 4, encoding="utf-8")
    [reference] = re.findall(r"`etude grpo (--environment) (\S+) …`", PAGE)
    options = "--model_name_or_path=model --train_dataset=tasks.jsonl --output_dir=out --disable_progress"
    sizes = "--max_steps=1 --num_generations=2 --generation.max_new_tokens=4"
    assert main(["grpo", "=".join(reference), *options.split(), *sizes.split()]) == 0
    assert all(episode.prompt == "go 0" for episode in RunDirectory("out").read_episodes(split="train"))


def test_one_more_kind(names):
    class PubQuiz:
        def __init__(self, topic):
            self.topic, self.open = topic, True

        def question(self):
            return f"what of {self.topic}?"

        def answer(self, text):
            return None

        def points(self):
            assert self.open
            return 2.0

        def shut(self):
            self.open = False

    given = {**names, "PubQuiz": PubQuiz, "inner": etude.TextEnvironment(names["model"], names["tokenizer"])}
    exec(OWN, given)
    assert [history.episode.prompt for history in given["histories"]] == ["what of lakes?", "what of ducks?"]
    assert [history.episode.reward for history in given["histories"]] == [2.0, 2.0]


def test_the_table_names_every_adapter():
    adapters = {
        name
        for name, module in etude._EXPORTS.items()
        if module.startswith("etude.environments.adapters.") and isinstance(getattr(etude, name), type)
    }
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == adapters
    assert all(issubclass(getattr(etude, name), InstanceEnvironment) for name in adapters)
    extras = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    for extra in re.findall(r"^\| `\w+Environment` \|.*\| `(\w+)` \|$", PAGE, re.MULTILINE):
        assert re.search(rf"^{extra} = \[", extras, re.MULTILINE)
    assert "OpenEnvEnvironment(" in OPENENV
    assert "VerifiersEnvironment(" in VERIFIERS
