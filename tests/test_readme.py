"""The snippets of README and docs run as they are printed."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from etude.app.references import load_object
from etude.rewards.function import as_reward
from etude.tools.calculator import calculator

ROOT = Path(__file__).parents[1]


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(tokenizer, make_llama, tmp_path, monkeypatch):
    """What a reader brings along."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("model")
    tokenizer.save_pretrained("model")

    def exact_answer(segments, answers=None):
        return [float("=" in segment) for segment in segments]

    return {
        "model_name_or_path": "model",
        "tokenizer": tokenizer,
        "exact_answer": exact_answer,
        "tasks": [{"prompt": f"what is {i}+1?", "answers": i + 1} for i in range(8)],
        "questions": ["what is 1+1?", "what is 2+2?"],
        "answers": [2, 4],
    }


def test_readme(names, tmp_path):
    quick, own_loop = snippets("README.md")
    # Two iterations instead of an evening.
    exec(quick.replace("steps=20_000", "steps=16, batch_size=8, disable_progress=True"), names)
    assert (tmp_path / "runs" / "calculator" / "report.html").exists()
    exec(own_loop, names)
    assert names["stats"]["objective/kl"] == pytest.approx(0.0, abs=1e-4)


def test_both_loops_over_one_environment(names, tmp_path):
    """The loop is yours, then ours: one model, one environment, few-shot prompt and columns."""
    exec(
        """
from etude import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TextEnvironment

model = AutoModelForCausalLMWithValueHead.from_pretrained(model_name_or_path)
env = TextEnvironment(model, tokenizer, tools=[calculator], reward_fn=exact_answer, prompt="q: 1+1 a: =2 ",
                      max_turns=4, max_tool_response=100, generation_kwargs={"max_new_tokens": 8})
trainer = PPOTrainer(PPOConfig(batch_size=2), model, tokenizer=tokenizer)
queries, responses, masks, rewards, histories = env.run(questions, answers=answers)
stats = trainer.step(queries, responses, rewards, masks)
config = PPOConfig(output_dir="runs/ours", steps=16, batch_size=8, disable_progress=True)
summary = PPOTrainer(config, model, environment=env, train_dataset=tasks).train()
""",
        {**names, "calculator": calculator},
        names,
    )
    assert names["summary"].steps == 2
    assert names["histories"][0].text.startswith("q: 1+1 a: =2 what is 1+1?")


def test_migrating(names):
    [imports] = snippets("docs/migrating.md")
    exec(imports, names)


def test_rewards(names, make_llama):
    """Every environment of the page plays; every reward on it scores."""
    tokenizer = names["tokenizer"]
    config = make_llama().config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained("reward-model")
    tokenizer.save_pretrained("reward-model")
    names |= {"model": make_llama(), "calculator": calculator, "unwanted": set(range(30))}
    scored = set()
    for snippet in snippets("docs/rewards.md"):
        exec(snippet, names)
        [*_, [history]] = names["env"].run(["what is 1+1?"], answer=[2])
        scored |= {given.name for given in history.episode.rewards}
    assert scored == {
        *("exact", "brevity", "classifier", "no_repetition", "dislikes"),
        *("tool_errors", "overlong", "share", "chrf", "length_penalty"),
    }


def test_rewards_on_the_command_line(names):
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/rewards.md").read_text("utf-8"), re.DOTALL)
    Path("rewards.py").write_text("def exact(completions): ...\n", encoding="utf-8")
    found = [
        as_reward(load_object(reference, "etude.rewards")).name
        for reference in yaml.safe_load(text)["reward"]
    ]
    assert found == ["exact", "tool_errors", "overlong", "chrf", "length_penalty"]
