"""`etude merge`: adapters and full models, from the command line."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.app.cli import main
from etude.app.merge_arguments import MergeArguments
from etude.models.adapters import lora_config
from etude.models.loading import load_causal_lm, load_tokenizer
from etude.models.merging import Combination
from etude.rewards.model import ModelReward


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_llama: Any, tokenizer: Any) -> Path:
    """Two full models, and two adapters on the first one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("model", "other")):
        make_llama(seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for seed, name in enumerate(("first", "second")):
        model = load_causal_lm("model", peft_config=lora_config(4, 8.0))
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(name)
    return tmp_path


def merge(*arguments: str) -> int:
    return main(["merge", *arguments])


def test_an_adapter(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("--sources=first", "--output_dir=merged", "--dtype=bfloat16") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("model: merged (LlamaForCausalLM, ")
    assert out[0].endswith(" weights, bfloat16)")
    assert out[1] == "loaded again: the same weights and logits, to the last bit"
    assert out[2].startswith("against base and adapter: logits differ by ")
    card = Path("merged", "README.md").read_text()
    assert "Merged from `first` with `etude merge` of Étude." in card
    assert "| dtype | `bfloat16` |" in card
    assert str(places) not in card
    assert load_causal_lm("merged", dtype="auto").dtype == torch.bfloat16
    assert load_tokenizer("merged").eos_token == "[eos]"


def test_a_reward_model_that_was_trained_as_an_adapter(places: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": str(n)} for n in range(1, 5)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = "--model_name_or_path=model --train_dataset=pairs.jsonl --output_dir=reward --max_steps=3"
    options = "--use_peft --lora_r=2 --learning_rate=1e-2 --save_strategy=no"
    assert main(["reward", *arguments.split(), *options.split()]) == 0
    assert merge("--sources=reward", "--output_dir=merged") == 0
    texts = ["1+1=2", "3+3=1", "a"]
    adapter, merged = (ModelReward(place).score_texts(texts) for place in ("reward", "merged"))
    assert merged == pytest.approx(adapter, rel=1e-4, abs=1e-5)
    assert len(set(merged)) == 3


def test_several_adapters(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weighted = ["--weights", "0.5", "0.25", "--combination=ties", "--density=0.5"]
    assert merge("--sources", "first", "second", "--output_dir=merged", *weighted) == 0
    card = Path("merged", "README.md").read_text()
    assert "| sources | `first, second` |" in card
    assert "| weights | `[0.5, 0.25]` |" in card
    assert "| combination | `ties` |" in card


def test_full_models(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("--sources", "model", "other", "--output_dir=average") == 0
    out = capsys.readouterr().out
    assert "loaded again" in out
    assert "against base" not in out
    assert "Averaged from `model` with `etude merge`" in Path("average", "README.md").read_text()
    first, second, average = (
        load_causal_lm(name).state_dict()["lm_head.weight"] for name in ("model", "other", "average")
    )
    assert average.equal((first + second) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources=model"], "'model' holds no adapter"),
        (["--sources=nowhere"], "'nowhere' holds no adapter (there is no adapter_config.json, nor "),
        (["--sources", "first", "model"], "'first' holds an adapter and 'model' doesn't"),
        (["--sources", "model", "other", "--combination=ties"], "combination is about adapters"),
        (["--sources", "model", "other", "--weights", "1", "1"], "add up to 2"),
        (["--sources=first", "--combination=mean"], "--combination"),
        ([], "--sources"),
    ],
)
def test_it_says_in_one_line_what_is_wrong(
    places: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert merge(*arguments, "--output_dir=merged") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("merged").exists()


def test_the_combinations_are_those_of_the_function() -> None:
    offered = typing.get_type_hints(MergeArguments)["combination"]
    assert typing.get_args(offered) == typing.get_args(Combination)
