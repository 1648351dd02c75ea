"""What the argument classes refuse, and what they hand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from etude.app.arguments import DataArguments, EnvironmentArguments, ModelArguments, TaskArguments
from etude.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_r": 8}, "lora_r does nothing without use_peft"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules does nothing without use_peft"),
        ({"use_peft": True, "lora_r": 0}, "lora_r is 0; expected at least 1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "expected 0 <= lora_dropout < 1"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "two ways to keep weights; give one of them"),
    ],
)
def test_adapters_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelArguments("m", **given)


@pytest.mark.parametrize("installed", [True, False])
def test_weights_of_few_bits(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etude.app.arguments.find_spec", lambda name: name if installed else None)
    if not installed:
        with pytest.raises(ConfigError, match=r"load_in_4bit needs bitsandbytes.*etude\[quantization\]"):
            ModelArguments("m", load_in_4bit=True, use_peft=True)
        return
    with pytest.raises(ConfigError, match="with load_in_8bit set use_peft, too"):
        ModelArguments("m", load_in_8bit=True)
    config = ModelArguments("m", load_in_4bit=True, use_peft=True).loading["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert "quantization_config" not in ModelArguments("m").loading


def test_an_adapter_is_made_as_asked() -> None:
    assert ModelArguments("m").peft_config() is None
    config = ModelArguments(
        "m", use_peft=True, lora_r=4, lora_alpha=6.0, lora_target_modules=["q_proj"]
    ).peft_config()
    assert config is not None
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (
        4,
        6.0,
        0.0,
        {"q_proj"},
    )


def test_the_revision_is_the_models() -> None:
    own = ModelArguments("m", model_revision="v2")
    assert (own.tokenizer_place["name_or_path"], own.tokenizer_place["revision"]) == ("m", "v2")
    other = ModelArguments("m", model_revision="v2", tokenizer_name="t")
    assert (other.tokenizer_place["name_or_path"], other.tokenizer_place["revision"]) == ("t", None)
    assert other.loading["revision"] == "v2"


def test_a_split_needs_its_dataset() -> None:
    with pytest.raises(ConfigError, match="eval_split does nothing without eval_dataset"):
        DataArguments("t", eval_split="validation")
    with pytest.raises(ConfigError, match="test_split does nothing without test_dataset"):
        TaskArguments("t", test_split="test")


def test_rows_come_from_where_they_are_said_to_be(tmp_path: Path) -> None:
    for split, numbers in {"train": [1, 2], "test": [3]}.items():
        lines = [json.dumps({"prompt": str(number)}) + "\n" for number in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    tasks = TaskArguments(str(tmp_path), test_dataset=str(tmp_path), test_split="test")
    train, held_out = tasks.rows("train"), tasks.rows("test")
    assert train is not None
    assert held_out is not None
    assert (train["prompt"][:], held_out["prompt"][:]) == (["1", "2"], ["3"])
    assert tasks.rows("eval") is None
    with pytest.raises(DataError):
        TaskArguments(str(tmp_path / "nowhere.jsonl")).rows("train")


def test_an_episode_needs_a_score() -> None:
    with pytest.raises(ConfigError, match="reward or reward_fn"):
        EnvironmentArguments()
    assert EnvironmentArguments(reward="a.py:f").rewards == ["a.py:f"]
    assert EnvironmentArguments(reward=["a.py:f", "a.py:g"]).rewards == ["a.py:f", "a.py:g"]
    assert EnvironmentArguments(reward_fn="a.py:f").rewards == []


def test_a_prompt_is_kept_to_the_character(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"# Question\n\nWhat is\n")
    assert EnvironmentArguments(reward="r", prompt_file=str(file)).prompt_text() == "# Question\n\nWhat is\n"
    assert EnvironmentArguments(reward="r", prompt=" x\n").prompt_text() == " x\n"
    assert EnvironmentArguments(reward="r").prompt_text() is None
    with pytest.raises(ConfigError, match="give one of them"):
        EnvironmentArguments(reward="r", prompt="x", prompt_file=str(file))
    with pytest.raises(ConfigError, match="nowhere"):
        EnvironmentArguments(reward="r", prompt_file=str(tmp_path / "nowhere.txt")).prompt_text()
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        EnvironmentArguments(reward="r", prompt_file=str(file)).prompt_text()
