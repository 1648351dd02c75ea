"""Value head, padding, reloading and LoRA on every kind of decoder of transformers."""

import inspect

import pytest
import torch
from decoder_families import FAMILIES, PADS_RIGHT, VOCAB, make_family
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence

from etude.errors import ModelError
from etude.models.adapters import lora_config
from etude.models.value_head import AutoModelForCausalLMWithValueHead

LENGTHS = (5, 14, 3, 9)


def family_model(family, **settings):
    """With a value head; in float32, in which models are saved and loaded."""
    classes, configuration, _ = FAMILIES[family]
    trunk = make_family(classes, {**configuration, **settings}, torch.float32)
    return with_head(trunk)


def with_head(trunk):
    torch.manual_seed(1)
    return AutoModelForCausalLMWithValueHead(trunk, v_head_init_strategy="normal", summary_dropout_prob=0.0)


def reloaded(directory):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(directory, summary_dropout_prob=0.0)
    model.config._experts_implementation = "eager"
    return model


def random_rows():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]


@torch.no_grad()
def outputs(model, **inputs):
    logits, _, values = model(**inputs)
    return logits, values


def padded_values(model, side):
    rows = random_rows()
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.pretrained_model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    _, values = outputs(model, **inputs)
    return torch.cat([row[kept.bool()] for row, kept in zip(values, mask, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_value_per_token_whatever_the_padding(family):
    model = family_model(family)
    assert model.v_head.summary.in_features == model.pretrained_model.get_output_embeddings().weight.shape[1]
    alone = [outputs(model, input_ids=row[None])[1][0] for row in random_rows()]
    assert [tuple(values.shape) for values in alone] == [(n,) for n in LENGTHS]
    expected = torch.cat(alone)
    assert expected.std() > 0.01
    torch.testing.assert_close(padded_values(model, "right"), expected, rtol=0, atol=2e-5)
    left = padded_values(model, "left")
    if family in PADS_RIGHT:
        assert (left - expected).abs().max() > 0.01, "documented as right padding only"
    else:
        torch.testing.assert_close(left, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_to_the_last_bit(family, tied, tmp_path):
    model = family_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    for trunk in (model.pretrained_model, again.pretrained_model):
        assert (trunk.get_output_embeddings().weight is trunk.get_input_embeddings().weight) == tied
    row = random_rows()[1][None]
    expected = outputs(model, input_ids=row)
    for actual, wanted in zip(outputs(again, input_ids=row), expected, strict=True):
        assert wanted.std() > 0.01
        assert torch.equal(actual, wanted)


@pytest.fixture
def base(request, tmp_path):
    family_model(request.param).pretrained_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_lora_trains_adapters_and_head_and_reloads(base, tmp_path):
    model = adapted(base, lora_config(4, 8.0))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained >= {"v_head.summary.weight", "v_head.summary.bias"}
    assert all(name.startswith("v_head.") or "lora_" in name for name in trained)

    row = random_rows()[1][None]
    before = outputs(model, input_ids=row)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    logits, _, values = model(row, use_cache=False)  # RWKV writes over its state
    (logits.logsumexp(-1).sum() + values.pow(2).sum()).backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name), "they start at 0"
    after = outputs(model, input_ids=row)
    assert all((new - old).abs().max() > 1e-4 for new, old in zip(after, before, strict=True))

    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for actual, expected in zip(outputs(reloaded(tmp_path / "adapter"), input_ids=row), after, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("base", ["llama", "gptj"], indirect=True)
def test_a_family_whose_layers_peft_knows(base):
    model = adapted(base, LoraConfig(task_type="CAUSAL_LM"))
    assert any("q_proj.lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("base", ["olmo2", "mixtral"], indirect=True)
def test_a_family_whose_layers_peft_does_not_know(base):
    with pytest.raises(ModelError, match="target_modules='all-linear'"):
        adapted(base, LoraConfig(task_type="CAUSAL_LM"))


def adapted(base, config):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=config, summary_dropout_prob=0.0, v_head_init_strategy="normal"
    )
    model.config._experts_implementation = "eager"
    return model
