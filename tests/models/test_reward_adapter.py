"""A reward adapter beside the policy's: the scores peft's own classifier gives, and a policy left alone."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from etude.errors import ModelError
from etude.models.adapters import add_adapter, current_peft, lora_config
from etude.models.loading import load_causal_lm
from etude.models.reference import reference_by_disabled_adapters
from etude.models.reward_adapter import RewardAdapter, policy_adapters
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.sampling.weights import WeightWatch

IDS = torch.tensor([[3, 9, 27, 4, 8], [5, 25, 1, 7, 2]])
FAMILIES = ["llama", "gpt2"]


@pytest.fixture
def make(make_llama, make_gpt2, tmp_path):
    """Saves a base model and a reward adapter on it; gives both places and the reward model itself."""

    def of(family, labels=1, **lora):
        base, place = tmp_path / family, tmp_path / f"{family}-reward"
        {"llama": make_llama, "gpt2": make_gpt2}[family]().save_pretrained(base)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, pad_token_id=0)
        settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **lora}
        config = LoraConfig(task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2", **settings)
        torch.manual_seed(1)
        with current_peft():
            reward_model = get_peft_model(model, config).eval()
        nn.init.normal_(reward_model.base_model.model.score.modules_to_save["default"].weight)
        reward_model.save_pretrained(place)
        return base, place, reward_model

    return of


def policy_of(base, place, **options):
    torch.manual_seed(2)
    lora = lora_config(2, 8)
    lora.init_lora_weights = False
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    return load(base, peft_config=lora, reward_adapter=place, **options)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_reward_model_s(family, labels, make):
    base, place, reward_model = make(family, labels)
    model = policy_of(base, place)
    scores = model.compute_reward_score(IDS, torch.ones_like(IDS))
    assert scores.shape == (2, 5, labels)
    assert not scores.requires_grad
    with torch.no_grad():
        for t in range(5):
            expected = reward_model(input_ids=IDS[:, : t + 1]).logits
            torch.testing.assert_close(scores[:, t], expected)
    assert scores.std() > 0.1
    padded = torch.cat([IDS, torch.zeros(2, 2, dtype=torch.long)], 1)
    mask = (torch.arange(7) < 5).long().expand(2, 7)
    torch.testing.assert_close(model.compute_reward_score(padded, mask)[:, :5], scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", [True, False])
def test_the_policy_is_left_alone(family, trainable, make):
    base, place, _ = make(family)
    alone = AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=lora_config(2, 8), is_trainable=trainable
    )
    model = policy_of(base, place, is_trainable=trainable)
    assert trained(model) == trained(alone)
    model.train()
    model.pretrained_model.base_model.model.get_decoder().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch = WeightWatch(model.pretrained_model)
    before = model(IDS)
    model.compute_reward_score(IDS)
    assert not watch.changed(), "a sampler notices nothing"
    assert trained(model) == trained(alone)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.pretrained_model.active_adapters == ["default"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(model(IDS)[0], before[0])
    # It is scored by the reward adapter alone: the policy's moves nothing.
    scores = model.compute_reward_score(IDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(1.0)
    assert torch.equal(model.compute_reward_score(IDS), scores)
    assert not torch.equal(model(IDS)[0], before[0])


def test_the_reference_is_the_base(make):
    base, place, _ = make("llama")
    model = policy_of(base, place)
    model.compute_reward_score(IDS)
    before = trained(model)
    with torch.no_grad(), reference_by_disabled_adapters(model):
        reference = model(IDS)[0]
    torch.testing.assert_close(reference, load_causal_lm(base)(IDS).logits)
    assert trained(model) == before


def test_only_the_policy_is_saved(make, tmp_path):
    base, place, _ = make("llama")
    model = policy_of(base, place)
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").rglob("*")}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "value_head.safetensors",
    }
    assert not any("reward" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "saved", reward_adapter=place)
    for ours, theirs in zip(model(IDS), again(IDS), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.compute_reward_score(IDS), again.compute_reward_score(IDS))


def test_added_afterwards_under_a_name_of_its_own(make):
    base, place, reward_model = make("llama")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora_config(2, 8))
    with pytest.raises(ModelError, match="has no reward adapter; load it with reward_adapter="):
        model.compute_reward_score(IDS)
    model.add_and_load_reward_modeling_adapter(place, adapter_name="judge")
    assert sorted(model.pretrained_model.peft_config) == ["default", "judge"]
    assert policy_adapters(model.pretrained_model) == ["default"]
    with torch.no_grad():
        expected = reward_model(input_ids=IDS).logits
    torch.testing.assert_close(model.compute_reward_score(IDS, ppo_adapter_name="default")[:, -1], expected)


def test_on_a_plain_model_with_adapters(make):
    base, place, reward_model = make("gpt2")
    model = add_adapter(load_causal_lm(base), lora_config(2, 8))
    with torch.no_grad():
        expected = reward_model(input_ids=IDS).logits
    torch.testing.assert_close(RewardAdapter.load(model, place).scores(IDS)[:, -1], expected)


def test_what_users_get_wrong(make, tmp_path, make_llama):
    base, place, _ = make("llama")
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    lora = lora_config(2, 8)
    with pytest.raises(ModelError, match="this model has none; load the model with a peft_config"):
        load(base, reward_adapter=place)
    with pytest.raises(ModelError, match=r"has an adapter 'default' already"):
        load(base, peft_config=lora, reward_adapter=place, reward_adapter_name="default")
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        load(base, peft_config=lora, reward_adapter=base)
    with pytest.raises(ModelError, match="there is no directory"):
        load(base, peft_config=lora, reward_adapter=tmp_path / "nowhere")
    add_adapter(load_causal_lm(base), lora).save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match="has no score layer"):
        load(base, peft_config=lora, reward_adapter=tmp_path / "policy")

    make_llama(hidden_size=16).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ModelError, match="doesn't fit this base model"):
        load(tmp_path / "smaller", peft_config=lora, reward_adapter=place)

    weights = load_file(place / "adapter_model.safetensors")
    lost = next(key for key in weights if "lora_B" in key)
    save_file(
        {key: value for key, value in weights.items() if key != lost}, place / "adapter_model.safetensors"
    )
    model = load(base, peft_config=lora)
    before = trained(model)
    with pytest.raises(ModelError, match="doesn't fit this base model"):
        model.add_and_load_reward_modeling_adapter(place)
    assert list(model.pretrained_model.peft_config) == ["default"], "the model is as it was"
    assert trained(model) == before

    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 2}
    (place / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="PROMPT_TUNING adapter; expected LoRA"):
        model.add_and_load_reward_modeling_adapter(place)
