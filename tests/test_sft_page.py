"""docs/sft.md: its snippet and its command run, and the settings it names exist."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from etude.app.arguments import ModelArguments
from etude.app.cli import main
from etude.runtime.run import RunDirectory
from etude.trainers.sft_config import SFTConfig

PAGE = (Path(__file__).parents[1] / "docs" / "sft.md").read_text(encoding="utf-8")
ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(20)]


@pytest.fixture
def workplace(tmp_path, monkeypatch, make_llama, tokenizer):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("base-model")
    tokenizer.save_pretrained("base-model")
    Path("demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def losses(directory):
    return [row["loss"] for row in RunDirectory(directory).read_metrics() if "loss" in row]


def test_the_snippet(workplace, capsys):
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(snippet, {"held_out": ROWS[:4]})
    assert losses("runs/sft")[-1] < losses("runs/sft")[0]
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0


def test_the_command(workplace):
    [command] = re.findall(r"```\n(etude .*?)```", PAGE, re.DOTALL)
    assert main(shlex.split(command.replace("\\\n", ""))[1:]) == 0
    assert len(losses("runs/sft")) == 2
    assert Path("runs/sft/report.html").is_file()


def test_settings_exist():
    known = {field.name for field in (*fields(SFTConfig), *fields(ModelArguments))}
    others = {"formatting_func", "peft_config", "resume_from_checkpoint"}
    named = re.findall(r"`(?:--)?([a-z0-9]+(?:_[a-z0-9]+)+)(?:: \w+)?`", PAGE)
    columns = {"mean_token_accuracy", "eval_loss", "bfd_split"}
    assert set(named) - known - others - columns == set()
    assert len(set(named) & known) > 10
