"""Snippets and commands of docs/merging-and-sampling.md run as they are printed."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from etude.app.cli import main
from etude.data.files import load_rows
from etude.data.selection import SelectionFormat
from etude.math.kl import best_of_n_kl
from etude.models.adapters import lora_config
from etude.models.loading import load_causal_lm
from etude.tools.calculator import calculator

PAGE = (Path(__file__).parents[1] / "docs" / "merging-and-sampling.md").read_text(encoding="utf-8")
REWARD = """
def exact_answer(completions, answers):
    return [float(text[:1].isdigit()) for text in completions]
"""


@pytest.fixture
def names(tokenizer, make_llama, tmp_path, monkeypatch):
    """What a reader brings along."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("tokenizer")
    for seed, name in enumerate(("runs/sft", "checkpoint-1", "checkpoint-2")):
        make_llama(seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    config = make_llama().config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained("reward-model")
    tokenizer.save_pretrained("reward-model")
    tasks = [{"prompt": f"what is {i}+1?", "answers": i + 1} for i in range(4)]
    scope = {
        "model": make_llama(),
        "tokenizer": tokenizer,
        "calculator": calculator,
        "questions": [task["prompt"] for task in tasks[:2]],
        "answers": [1, 2],
        "tasks": tasks,
    }
    exec(REWARD, scope)
    return scope


def save_adapter(name, seed=0):
    model = load_causal_lm("runs/sft", peft_config=lora_config(4, 8.0))
    torch.manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(name)


def test_snippets(names, capsys):
    save_adapter("adapter")
    sampler, episodes, dataset, merging, averaging = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(sampler, names)
    assert names["sampler"].kl_bound == best_of_n_kl(8) == pytest.approx(1.20, abs=5e-3)
    exec(episodes.replace("n=4", "n=2"), names)
    assert "calculator" in names["env"].tools
    exec(dataset, names)
    assert names["summary"].episodes == 16
    assert names["pairs"].rows == len(load_rows("runs/samples/preference.jsonl")) > 0
    exec(merging, names)
    assert names["merged"].change < 1e-5
    exec(averaging, names)
    assert load_causal_lm("average").config.vocab_size == len(names["tokenizer"])


def test_commands(names):
    Path("rewards.py").write_text(REWARD, encoding="utf-8")
    lines = "".join(f'{{"prompt": "what is {i}?", "answers": {i}}}\n' for i in range(6))
    Path("tasks.jsonl").write_text(lines, encoding="utf-8")
    blocks = re.findall(r"```\n(etude .*?)```", PAGE, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert [command[1] for command in commands] == ["sample", "sft", "merge", "merge"]
    sample, sft, merge, both = (command[1:] for command in commands)
    assert main(sample) == 0
    assert load_rows("runs/samples/segments.jsonl")["reward"][0] == 1.0
    assert main(sft) == 0
    assert Path("runs/sft-2/model.safetensors").exists()
    for seed, name in enumerate(("runs/polite", "runs/brief")):
        save_adapter(name, seed)
    assert main([option.replace("runs/sft", "runs/polite", 1) for option in merge]) == 0
    assert load_causal_lm("runs/polite-merged", dtype="auto").dtype == torch.bfloat16
    assert main(both) == 0
    assert Path("runs/both/README.md").exists()


def test_the_page_names_every_format():
    assert re.findall(r"^\| `(\w[\w-]+)` \|", PAGE, re.MULTILINE) == list(get_args(SelectionFormat))
