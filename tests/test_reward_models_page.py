"""docs/reward-models.md: its snippets and commands run, and the settings it names exist."""

import json
import re
import shlex
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import yaml

from etude import ModelReward, PRMConfig, ProcessReward, RewardConfig
from etude.app.arguments import ActorCriticArguments, EnvironmentArguments
from etude.app.cli import main
from etude.app.references import load_object
from etude.runtime.run import RunDirectory

PAGE = (Path(__file__).parents[1] / "docs" / "reward-models.md").read_text(encoding="utf-8")
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "no idea"} for i in range(20)]
STEPS = [
    {"prompt": f"{i}+{i}", "completions": ["hm", f"={2 * i}"], "labels": [False, True]} for i in range(20)
]


@pytest.fixture
def workplace(tmp_path, monkeypatch, make_llama, tokenizer):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("base-model")
    tokenizer.save_pretrained("base-model")
    for name, rows in (("preferences", PAIRS), ("steps", STEPS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_snippets(workplace, capsys, make_llama, tokenizer):
    names = {"held_out": PAIRS[:4], "judged": STEPS[:4], "policy": make_llama(), "tokenizer": tokenizer}
    found = []
    for snippet in blocks("python"):
        exec(snippet, names)
        if "env" in names:
            [*_, [history]] = names["env"].run(["what is 1+1?"])
            found.append({reward.name for reward in history.episode.rewards})
    assert found == [{"reward_model"}, {"reward_model", "process_reward"}]
    said = [float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"[01]\.\d+", line)]
    assert said == [1.0, 1.0]
    [yaml_text] = blocks("yaml")
    settings = yaml.safe_load(yaml_text)
    assert settings["reward_model"] == "runs/rm"
    assert load_object(settings["reward"]).name == "helpful"


def test_the_commands(workplace):
    reward, prm = re.findall(r"```\n(etude .*?)```", PAGE, re.DOTALL)
    for command, directory in ((reward, "runs/rm"), (prm, "runs/prm")):
        assert main([*shlex.split(command)[1:], "--max_steps", "2", "--logging_steps", "1"]) == 0
        losses = [row["loss"] for row in RunDirectory(directory).read_metrics() if "loss" in row]
        assert len(losses) == 2
        assert Path(directory, "report.html").is_file()


def test_settings_exist():
    known = {
        f.name
        for cls in (RewardConfig, PRMConfig, EnvironmentArguments, ActorCriticArguments)
        for f in fields(cls)
    }
    known |= {*signature(ModelReward).parameters, *signature(ProcessReward).parameters}
    metrics = {"mean_reward", "calibration_error", "accuracy_right", "accuracy_wrong"}
    methods = {"peft_config", "merge_and_unload", "score_texts"}
    named = set(re.findall(r"`(?:--)?([a-z0-9]+(?:_[a-z0-9]+)+)(?: [a-z/]+)?`", PAGE))
    assert named - known - metrics - methods == set()
    assert len(named & known) >= 10
