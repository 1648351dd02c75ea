import logging

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from transformers.integrations import integration_utils

from etude.errors import ConfigError, ModelError
from etude.trainers.sft import SFTTrainer
from etude.trainers.sft_config import SFTConfig

ROWS = [{"text": "2+2=4"}, {"text": "one and one is two, and so on for a while"}]


def settings(directory, **options):
    defaults = {"output_dir": str(directory), "max_steps": 1, "save_strategy": "no", "use_cpu": True}
    return SFTConfig(**defaults | {"disable_tqdm": True} | options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"report_to": "nonsense"}, "report_to names 'nonsense'; expected none, all, or some of .*wandb"),
        ({"report_to": ["wandb"]}, "report_to names 'wandb', which isn't installed; install it"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected at least 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected at least 1"),
        ({"fp16": True}, "fp16 does nothing without a GPU; set bf16"),
        ({"seed": -3}, "seed is -3; expected at least 0"),
        ({"packing_strategy": "bfd_split"}, "packing_strategy does nothing without packing"),
        (
            {"early_stopping_patience": 2, "eval_strategy": "steps"},
            "goes back to the best checkpoint, and save_strategy no keeps none",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, monkeypatch, options, match):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match=match):
        settings(tmp_path, **options)


def test_an_evaluation_of_nothing(tmp_path, tokenizer, make_llama):
    config = settings(tmp_path, eval_strategy="epoch")
    with pytest.raises(ConfigError, match="eval_strategy is epoch, and there is nothing to evaluate on"):
        SFTTrainer(make_llama(), config, train_dataset=ROWS, processing_class=tokenizer)


def test_what_transformers_says_of_settings_is_our_error(tmp_path, tokenizer, make_llama, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments = {"train_dataset": ROWS, "processing_class": tokenizer}
    with pytest.raises(ConfigError, match=r"push_to_hub can't make the model's repository .*offline"):
        SFTTrainer(make_llama(), settings(tmp_path, push_to_hub=True, hub_token="hf_no"), **arguments)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir can't be made: .*exists"):
        SFTTrainer(make_llama(), settings(tmp_path / "file"), **arguments)
    trainer = SFTTrainer(make_llama(), settings(tmp_path, adam_beta1=3.0), **arguments)
    with pytest.raises(ConfigError, match="Invalid beta parameter"):
        trainer.train()


@pytest.mark.parametrize("max_length", [1024, None])
def test_rows_are_cut_to_the_positions_that_a_model_has(tmp_path, tokenizer, make_gpt2, caplog, max_length):
    config = settings(tmp_path, max_length=max_length)
    with caplog.at_level(logging.WARNING):
        trainer = SFTTrainer(
            make_gpt2(n_positions=16), config, train_dataset=ROWS, processing_class=tokenizer
        )
    assert f"the model has 16 positions: max_length is that, not {max_length}" in caplog.messages
    assert "1 of 2 rows are longer than max_length=16 and are cut" in caplog.messages
    assert config.max_length == max_length, "what was passed is left as it was"
    trainer.train()


def test_weights_in_which_small_steps_are_lost(tmp_path, tokenizer, make_llama):
    arguments = {"args": settings(tmp_path), "train_dataset": ROWS, "processing_class": tokenizer}
    with pytest.raises(ModelError, match=r"weights to train are float16.* by bf16=True; or train an adapter"):
        SFTTrainer(make_llama(dtype=torch.float16), **arguments)
    with pytest.warns(UserWarning, match="less than 1/256 of a weight is lost.* by bf16=True"):
        SFTTrainer(make_llama(dtype=torch.bfloat16), **arguments)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    SFTTrainer(make_llama(dtype=torch.bfloat16), peft_config=adapter, **arguments)
