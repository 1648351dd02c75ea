"""Averages of checkpoints."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from etude.errors import ConfigError, ModelError
from etude.models.averaging import average_models
from etude.models.loading import load_causal_lm


@pytest.fixture
def save(tmp_path, make_llama, tokenizer):
    def save(name, seed, **settings):
        make_llama(seed, **settings).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_is_the_weighted_mean(save, tmp_path, tied):
    """A tied weight counts once."""
    places = [save(name, seed, tie_word_embeddings=tied) for seed, name in enumerate("abc")]
    exported = average_models(places, tmp_path / "average", weights=[0.5, 0.3, 0.2])
    first, second, third = (load_causal_lm(place).state_dict() for place in places)
    average = load_causal_lm(tmp_path / "average").state_dict()
    assert not torch.allclose(first["lm_head.weight"], second["lm_head.weight"], atol=0.1)
    for name, tensor in average.items():
        expected = 0.5 * first[name] + 0.3 * second[name] + 0.2 * third[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert exported.model == "LlamaForCausalLM"
    assert exported.change is None
    assert {"tokenizer.json", "generation_config.json"} <= set(exported.files)


def test_equal_weights_by_default(save, tmp_path):
    places = [save("a", 0), save("b", 1)]
    average_models(places, tmp_path / "average")
    first, second = (load_file(place / "model.safetensors") for place in places)
    for name, tensor in load_file(tmp_path / "average" / "model.safetensors").items():
        assert tensor.equal((first[name] + second[name]) / 2)


def test_half_precision_is_summed_in_float32_and_rounded_once(save, tmp_path):
    places = [save(name, seed, dtype=torch.bfloat16) for seed, name in enumerate("abc")]
    assert average_models(places, tmp_path / "average").dtype == "bfloat16"
    stored = [load_file(place / "model.safetensors") for place in places]
    for name, tensor in load_file(tmp_path / "average" / "model.safetensors").items():
        exact = sum(each[name].double() for each in stored) / 3
        assert tensor.dtype == torch.bfloat16
        # Half a unit in the last place, and a little where float32 has rounded before.
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-7).all()
    assert average_models(places, tmp_path / "wide", dtype="float32").dtype == "float32"


def test_score_heads_and_value_heads_are_averaged(make_llama, tmp_path):
    config = make_llama().config
    config.num_labels = 1
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / name)
        save_file(
            {"summary.weight": torch.full((1, 32), float(seed))}, tmp_path / name / "value_head.safetensors"
        )
    exported = average_models([tmp_path / "a", tmp_path / "b"], tmp_path / "average", weights=[0.25, 0.75])
    assert exported.model == "LlamaForSequenceClassification"
    first, second, average = (
        load_file(tmp_path / name / "model.safetensors")["score.weight"] for name in ("a", "b", "average")
    )
    torch.testing.assert_close(average, 0.25 * first + 0.75 * second)
    head = load_file(tmp_path / "average" / "value_head.safetensors")["summary.weight"]
    assert head.unique().tolist() == [0.75]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 models"),
        ([1.0, 1.0], "add up to 2"),
    ],
)
def test_weights_that_do_not_fit(save, tmp_path, weights, message):
    with pytest.raises(ConfigError, match=message):
        average_models([save("a", 0), save("b", 1)], tmp_path / "average", weights=weights)


def test_models_without_an_average(save, tmp_path, make_llama, make_gpt2, tokenizer):
    first = save("a", 0)
    with pytest.raises(ConfigError, match="1 models to average"):
        average_models([first], tmp_path / "average")
    with pytest.raises(ModelError, match=r"is \[32, 48\] in .* and \[32, 64\]"):
        average_models([first, save("b", 1, intermediate_size=64)], tmp_path / "average")
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"missing in .*; expected models of one architecture"):
        average_models([first, tmp_path / "gpt2"], tmp_path / "average")
    other = AutoTokenizer.from_pretrained(first)
    other.add_tokens(["new"])
    other.save_pretrained(save("c", 2))
    with pytest.raises(ModelError, match="different vocabularies"):
        average_models([first, tmp_path / "c"], tmp_path / "average")
    load_causal_lm(first, peft_config=LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds an adapter; merge it"):
        average_models([first, tmp_path / "adapter"], tmp_path / "average")
    assert not (tmp_path / "average").exists()
