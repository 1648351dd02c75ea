"""The value model against the models it is made of, saved and read again, and what can't be one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from etude.errors import ModelError
from etude.models.adapters import add_adapter, current_peft, lora_config
from etude.models.loading import load_causal_lm
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.value_model import ValueModel

IDS = torch.tensor([[3, 9, 27, 4, 8], [5, 25, 1, 7, 2]])
FAMILIES = ["llama", "gpt2"]


@pytest.fixture
def make(make_llama, make_gpt2):
    return {"llama": make_llama, "gpt2": make_gpt2}


@pytest.fixture
def make_reward_model(make, tmp_path):
    """A sequence classifier with the trunk of the language model of that seed."""

    def of(family, seed=0, labels=1):
        base = make[family](seed)
        base.save_pretrained(tmp_path / f"{family}-{seed}")
        options = {"num_labels": labels, "pad_token_id": 0}
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{family}-{seed}", **options)
        nn.init.normal_(model.score.weight)
        return model.eval()

    return of


def values(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids)


def scores_of_all_prefixes(reward_model):
    with torch.no_grad():
        return torch.cat([reward_model(input_ids=IDS[:, : t + 1]).logits for t in range(IDS.shape[1])], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_language_model_or_its_place(family, make, tmp_path, caplog):
    model = make[family]()
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    model.save_pretrained(tmp_path / "model")
    for source in (model, tmp_path / "model", str(tmp_path / "model")):
        value_model = ValueModel.from_pretrained(source)
        torch.testing.assert_close(values(value_model), value_model.v_head(states)[..., 0])
        assert values(value_model).std() > 0.01
        assert not any("lm_head" in name for name, _ in value_model.named_parameters())
        assert all(parameter.requires_grad for parameter in value_model.parameters())
    assert "LOAD REPORT" not in caplog.text, "the head that is left out is no surprise"


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_value_head_model_or_its_place(family, make, tmp_path):
    model = AutoModelForCausalLMWithValueHead(make[family](), v_head_init_strategy="normal").eval()
    with torch.no_grad():
        expected = model(IDS)[2]
    model.save_pretrained(tmp_path / "model")
    for source in (tmp_path / "model", model):
        torch.testing.assert_close(values(ValueModel.from_pretrained(source)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_reward_model_or_its_place(family, make_reward_model, tmp_path):
    """The value of a state is what the reward model says of the text so far."""
    reward_model = make_reward_model(family)
    expected = scores_of_all_prefixes(reward_model)
    reward_model.save_pretrained(tmp_path / "reward")
    for source in (tmp_path / "reward", reward_model):
        torch.testing.assert_close(values(ValueModel.from_pretrained(source)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_reward_model_s_adapter(family, make_reward_model, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    config.fan_in_fan_out = family == "gpt2"
    with current_peft():
        adapted = get_peft_model(make_reward_model(family), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    value_model = ValueModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(values(value_model), scores_of_all_prefixes(adapted))
    assert all(parameter.requires_grad for parameter in value_model.parameters()), "merged: all of it trains"
    with pytest.raises(ModelError, match="merge_and_unload"):
        ValueModel.from_pretrained(adapted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_saved_and_read_again(family, adapted, make, tmp_path):
    make[family]().save_pretrained(tmp_path / "base")
    model = load_causal_lm(tmp_path / "base")
    if adapted:
        model = add_adapter(model, lora_config(4, 8))
    value_model = ValueModel(model.eval())
    with torch.no_grad():
        for name, parameter in value_model.named_parameters():
            if "lora_B" in name or "v_head" in name or not adapted:
                parameter.add_(torch.randn_like(parameter) / 10)
    expected = values(value_model)
    value_model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_config.json").exists() == adapted
    again = ValueModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(values(again), expected, atol=0, rtol=0)

    tensors = [parameter.data_ptr() for parameter in value_model.parameters()]
    with torch.no_grad():
        for parameter in value_model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert values(value_model).abs().max() < 1e-6
    value_model.load_weights(tmp_path / "saved")
    torch.testing.assert_close(values(value_model), expected, atol=0, rtol=0)
    assert [parameter.data_ptr() for parameter in value_model.parameters()] == tensors, "in place"


def test_a_trunk_whose_states_are_narrower_than_its_layers():
    """OPT-350m projects them down; embeddings have their width, too."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    value_model = ValueModel(OPTForCausalLM(OPTConfig(**sizes, **depth, init_std=0.2)).eval())
    assert value_model.v_head.summary.in_features == 16
    assert values(value_model).shape == (2, 5)


def test_precision(make, make_reward_model):
    reward_model = make_reward_model("llama")
    assert ValueModel(make["llama"](dtype=torch.float64)).v_head.summary.weight.dtype == torch.float64
    half = ValueModel(reward_model.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.v_head.summary.weight.dtype == torch.float32
    assert values(half).dtype == torch.float32


def test_what_can_t_give_values(make, make_reward_model, tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=1, num_labels=1))
    both = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for wrong, message in [
        (make_reward_model("llama", labels=2), "scores 2 labels; a value is one number"),
        (encoder, "sees the tokens to come"),
        (both, "encoder-decoder"),
        (nn.Linear(2, 2), "is a Linear; expected a language model or a reward model"),
        (tmp_path / "nowhere", "there is no directory"),
    ]:
        with pytest.raises(ModelError, match=message):
            ValueModel.from_pretrained(wrong)
