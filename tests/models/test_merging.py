"""Merged models: they are what base and adapter were, load without peft, and keep what was beside them."""

import json

import pytest
import torch
import transformers
from decoder_families import FAMILIES, make_family
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from etude.errors import ConfigError, ModelError
from etude.models.adapters import add_adapter, current_peft, lora_config
from etude.models.export import probe_logits
from etude.models.loading import load_causal_lm
from etude.models.merging import merge_adapters
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.rewards.classifier import ClassifierReward

IDS = torch.arange(1, 13)[None]


def train(model, seed=0):
    """Stand-in for training: weights of the adapter that do something."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def save_base(tmp_path, make_llama, tokenizer):
    def save(model=None, name="base"):
        model = make_llama() if model is None else model
        model.generation_config.temperature = 0.7
        model.generation_config.do_sample = True
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def save_adapter(tmp_path):
    def save(base, name="adapter", seed=1, **settings):
        model = load_causal_lm(base, peft_config=LoraConfig(**{**lora_config(4, 8.0).to_dict(), **settings}))
        train(model, seed).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gptj"])
def test_a_merged_model_is_base_and_adapter(family, tmp_path, save_base, save_adapter):
    base = save_base(make_family(*FAMILIES[family][:2]).float())
    adapter = save_adapter(base)
    exported = merge_adapters(adapter, tmp_path / "merged")
    assert exported.directory == tmp_path / "merged"
    assert 0 <= exported.change < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert exported.model == type(merged).__name__
    assert not hasattr(merged, "peft_config")
    expected = logits(load_causal_lm(adapter))
    assert not torch.allclose(logits(load_causal_lm(base)), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_what_is_beside_the_weights_is_kept(tmp_path, save_base, save_adapter, tokenizer):
    base = save_base()
    adapter = save_adapter(base)
    exported = merge_adapters(adapter, tmp_path / "merged")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        exported.files
    )
    assert not any("adapter" in name for name in exported.files)
    assert [path.name for path in tmp_path.glob(".*")] == []
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["do_sample"]) == (0.7, True)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer.get_vocab()


def test_the_tokenizer_beside_the_adapter_wins(tmp_path, save_base, save_adapter):
    base = save_base()
    adapter = save_adapter(base)
    own = AutoTokenizer.from_pretrained(base)
    own.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    own.save_pretrained(adapter)
    merge_adapters(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == own.chat_template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_are_written_in_the_dtype_asked_for(dtype, tmp_path, save_base, save_adapter):
    adapter = save_adapter(save_base())
    exported = merge_adapters(adapter, tmp_path / "merged", dtype=dtype)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    assert exported.dtype == dtype
    # Merged in float32 at least, then rounded once.
    wide = load_causal_lm(adapter, dtype="float64" if dtype == "float64" else "float32")
    with current_peft():
        expected = wide.merge_and_unload().state_dict()
    for name, tensor in stored.items():
        assert tensor.equal(expected[name].to(tensor.dtype))


def test_a_half_precision_base_stays_one(tmp_path, save_base, save_adapter, make_llama):
    base = save_base(make_llama(dtype=torch.bfloat16))
    exported = merge_adapters(save_adapter(base), tmp_path / "merged")
    assert exported.dtype == "bfloat16"
    assert 0 < exported.change < 0.05


def test_large_models_come_in_shards(tmp_path, save_base, save_adapter):
    exported = merge_adapters(save_adapter(save_base()), tmp_path / "merged", max_shard_size="30KB")
    assert "model.safetensors.index.json" in exported.files
    assert len([name for name in exported.files if name.startswith("model-0")]) > 1


def test_a_value_head_stays_beside_the_model(tmp_path, save_base):
    base = save_base()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(4, 8.0))
    train(model).save_pretrained(tmp_path / "adapter")
    exported = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    assert "value_head.safetensors" in exported.files
    merged = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "merged").eval()
    assert merged.v_head.summary.weight.equal(model.v_head.summary.weight)
    with torch.no_grad():
        for actual, expected in zip(merged(input_ids=IDS)[::2], model(input_ids=IDS)[::2], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "auto", "labels"),
    [
        ("SEQ_CLS", AutoModelForSequenceClassification, 1),
        ("SEQ_CLS", AutoModelForSequenceClassification, 3),
        ("TOKEN_CLS", AutoModelForTokenClassification, 2),
    ],
)
def test_a_score_head_is_kept(task, auto, labels, tmp_path, save_base, tokenizer):
    base = save_base()
    model = auto.from_pretrained(base, num_labels=labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    model = train(add_adapter(model, config))
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    exported = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    assert exported.change < 1e-5
    merged = auto.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == labels
    assert merged.score.weight.equal(model.base_model.model.score.modules_to_save["default"].weight)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    if labels == 1:  # a reward at once: the padding token is known
        scores = ClassifierReward(str(tmp_path / "merged")).score_texts(["1+1=2", "a"])
        assert scores[0] != scores[1]


def test_encoder_decoders(tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "initializer_factor": 2.0}
    ids = {"decoder_start_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(
        tmp_path / "base"
    )
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    model = train(add_adapter(base, config))
    model.save_pretrained(tmp_path / "adapter")
    exported = merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    assert exported.change < 1e-4
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(merged), probe_logits(model), rtol=1e-4, atol=1e-4)
    assert not any(name.startswith("tokenizer") for name in exported.files)


@pytest.mark.parametrize(
    ("model", "heads", "classes"),
    [
        ("Bart", ["classification_head"], {"SEQ_CLS": AutoModelForSequenceClassification}),
        ("Bert", ["classifier", "pooler"], {"SEQ_CLS": AutoModelForSequenceClassification}),
        ("Bert", ["classifier"], {"TOKEN_CLS": AutoModelForTokenClassification}),
    ],
)
def test_heads_of_several_layers(model, heads, classes, tmp_path):
    """Whatever the alignment of weights that are mapped from their file."""
    [(task, auto)] = classes.items()
    torch.manual_seed(0)
    sizes = (
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        if model == "Bert"
        else {
            **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
            "d_model": 16,
        }
    )
    config = getattr(transformers, f"{model}Config")(vocab_size=50, max_position_embeddings=64, **sizes)
    getattr(transformers, f"{model}Model")(config).save_pretrained(tmp_path / "base")
    base = auto.from_pretrained(tmp_path / "base", num_labels=1 if task == "SEQ_CLS" else 2)
    targets = ["query"] if model == "Bert" else ["q_proj"]
    adapted = add_adapter(base, LoraConfig(task_type=task, target_modules=targets, modules_to_save=heads))
    train(adapted).save_pretrained(tmp_path / "adapter")
    assert merge_adapters(tmp_path / "adapter", tmp_path / "merged").change < 1e-5
    merged = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(merged), probe_logits(adapted), rtol=1e-4, atol=1e-5)


# ---- several adapters ----


def updates(adapter):
    """What an adapter adds to each weight."""
    with current_peft():
        merged = load_causal_lm(adapter).merge_and_unload().state_dict()
    base = load_causal_lm(adapter.parent / "base").state_dict()
    return {name: merged[name] - base[name] for name in base}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_the_weighted_sum_of_several(settings, tmp_path, save_base, save_adapter):
    base = save_base()
    first = save_adapter(base, "first", 1, **settings)
    second = save_adapter(base, "second", 2, r=2, lora_alpha=3, **settings)
    merge_adapters([first, second], tmp_path / "merged", weights=[0.3, -0.5])
    merged = load_causal_lm(tmp_path / "merged").state_dict()
    before, one, two = load_causal_lm(base).state_dict(), updates(first), updates(second)
    assert max(change.abs().max() for change in one.values()) > 0.1
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, before[name] + 0.3 * one[name] - 0.5 * two[name], rtol=0, atol=1e-6
        )


def test_one_adapter_weighted(tmp_path, save_base, save_adapter):
    base = save_base()
    adapter = save_adapter(base)
    merge_adapters(adapter, tmp_path / "merged", weights=[0.5])
    merged, before, one = (
        load_causal_lm(tmp_path / "merged").state_dict(),
        load_causal_lm(base).state_dict(),
        updates(adapter),
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, before[name] + 0.5 * one[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("combination", "density"), [("linear", None), ("svd", None), ("ties", 0.5), ("dare_ties_svd", 0.5)]
)
def test_other_combinations(combination, density, tmp_path, save_base, save_adapter):
    base = save_base()
    adapters = [save_adapter(base, "first", 1), save_adapter(base, "second", 2)]
    merge_adapters(adapters, tmp_path / "sum")
    exported = merge_adapters(adapters, tmp_path / "merged", combination=combination, density=density)
    assert exported.change < 1e-5
    merged, summed, before = (
        load_causal_lm(place).state_dict()["model.layers.0.mlp.up_proj.weight"]
        for place in (tmp_path / "merged", tmp_path / "sum", base)
    )
    assert not torch.allclose(merged, before, atol=1e-3)
    assert not torch.allclose(merged, summed, atol=1e-3)


# ---- what can't be ----


def test_no_adapter(tmp_path, save_base):
    base = save_base()
    with pytest.raises(ModelError, match=r"holds no adapter .* can be averaged"):
        merge_adapters(base, tmp_path / "merged")
    with pytest.raises(ModelError, match="there is no directory"):
        merge_adapters(tmp_path / "nowhere", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, save_base, save_adapter):
    adapter = save_adapter(save_base())
    before = sorted(adapter.iterdir())
    with pytest.raises(ModelError, match="holds something already"):
        merge_adapters(adapter, adapter)
    assert sorted(adapter.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        merge_adapters(adapter, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert merge_adapters(adapter, tmp_path / "empty").files


def test_adapters_of_different_models(tmp_path, save_base, save_adapter, make_llama):
    first = save_adapter(save_base(), "first")
    second = save_adapter(save_base(make_llama(), "elsewhere"), "second")
    with pytest.raises(ModelError, match="has base_model_name_or_path"):
        merge_adapters([first, second], tmp_path / "merged")
    merge_adapters([first, second], tmp_path / "merged", base_model=tmp_path / "elsewhere")


def test_a_base_that_has_moved(tmp_path, save_base, save_adapter):
    base = save_base()
    adapter = save_adapter(base)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="the base model of the adapter"):
        merge_adapters(adapter, tmp_path / "merged")
    assert merge_adapters(adapter, tmp_path / "merged", base_model=tmp_path / "moved").change < 1e-5


def test_adapters_that_no_weights_take_in(tmp_path, save_base):
    base = save_base()
    with current_peft():
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(load_causal_lm(base), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="PROMPT_TUNING adapter"):
        merge_adapters(tmp_path / "prompt", tmp_path / "merged")


def test_what_cannot_be_weighted(tmp_path, save_base, save_adapter):
    base = save_base()
    adapters = [save_adapter(base, name, modules_to_save=["lm_head"]) for name in ("first", "second")]
    with pytest.raises(ModelError, match=r"modules_to_save.*merge it alone"):
        merge_adapters(adapters, tmp_path / "merged")
    with pytest.raises(ModelError, match="use_dora"):
        merge_adapters(save_adapter(base, "dora", use_dora=True), tmp_path / "merged", weights=[0.5])
    assert merge_adapters(tmp_path / "dora", tmp_path / "merged").change < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's: of this very thing
def test_a_tied_embedding_that_was_trained(tmp_path, save_base, save_adapter, make_llama):
    """Merging would change the other one with it."""
    base = save_base(make_llama(tie_word_embeddings=True))
    adapter = save_adapter(base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match="one of two tied embeddings"):
        merge_adapters(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_classifier_without_its_head(tmp_path, save_base, save_adapter):
    adapter = save_adapter(save_base())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(ModelError, match="saved without its head"):
        merge_adapters(adapter, tmp_path / "merged")


def test_value_heads_of_some(tmp_path, save_base, save_adapter):
    base = save_base()
    adapters = [save_adapter(base, "first", 1), save_adapter(base, "second", 2)]
    head = {"summary.weight": torch.ones(1, 32), "summary.bias": torch.zeros(1)}
    save_file(head, adapters[0] / "value_head.safetensors")
    with pytest.raises(ModelError, match="second' has no value head and others have"):
        merge_adapters(adapters, tmp_path / "merged")
    save_file({key: 3 * tensor for key, tensor in head.items()}, adapters[1] / "value_head.safetensors")
    merge_adapters(adapters, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "value_head.safetensors")["summary.weight"].unique().tolist() == [
        2.0
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 weights for 1 adapters"),
        ({"combination": "sum"}, "combination is 'sum'"),
        ({"combination": "svd"}, "about several adapters"),
        ({"density": 0.5}, "density does nothing"),
    ],
)
def test_settings_that_contradict_each_other(settings, message, tmp_path, save_base, save_adapter):
    with pytest.raises(ConfigError, match=message):
        merge_adapters(save_adapter(save_base()), tmp_path / "merged", **settings)


def test_settings_of_several(tmp_path, save_base, save_adapter):
    base = save_base()
    adapters = [save_adapter(base, "first", 1), save_adapter(base, "second", 2)]
    with pytest.raises(ConfigError, match="set density"):
        merge_adapters(adapters, tmp_path / "merged", combination="ties")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapters([], tmp_path / "merged")
    adapters[1] = save_adapter(base, "third", 3, r=2)
    with pytest.raises(ModelError, match=r"peft can't combine .* same r value"):
        merge_adapters(adapters, tmp_path / "merged", combination="linear")
