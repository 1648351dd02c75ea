"""A score head is kept through save, merge and reload: of whole models, LoRA adapters and merged ones."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from scoring_models import make

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.loading import load_causal_lm
from etude.models.reward_model import add_scoring_adapter, kind_in, load_reward_model
from etude.models.score_head import score_layer
from etude.models.score_reader import ScoreReader
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.value_model import ValueModel

IDS = torch.tensor([[5, 9, 14, 22, 3]])
STARTS = {"Llama": "CausalLM", "GPT2": "CausalLM", "Bert": "MaskedLM", "DistilBert": "MaskedLM"}
KINDS = ["sequence", "token"]


@pytest.fixture
def place(tmp_path):
    """Saves a model and says where."""

    def save(model, name):
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def scores(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def require_same(ours, theirs):
    """Bit-equal weights, and scores up to the rounding of tensors that lie elsewhere in memory."""
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name]) or "original_module" in name, name
    torch.testing.assert_close(scores(ours), scores(theirs), atol=2e-6, rtol=1e-5)


def trained_adapter(model):
    """An adapter on every linear layer, of which nothing is at its start."""
    torch.manual_seed(3)
    adapted = add_scoring_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return adapted.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", STARTS)
def test_a_head_is_kept_by_whole_models_adapters_and_merged_ones(family, kind, place):
    start = place(make(family, STARTS[family]), "start")
    whole = load_reward_model(start, kind, fresh=True)
    saved = place(whole, "whole")
    require_same(load_reward_model(saved, kind), whole)

    adapted = trained_adapter(load_reward_model(start, kind, fresh=True))
    saved_adapter = place(adapted, "adapter")
    assert not (saved_adapter / "model.safetensors").exists()
    again = load_reward_model(saved_adapter, kind)
    require_same(again, adapted)
    assert (scores(again) - scores(whole)).abs().max() > 1e-2

    merged = again.merge_and_unload()
    torch.testing.assert_close(scores(merged), scores(adapted), atol=1e-5, rtol=1e-5)
    saved_merged = place(merged, "merged")
    require_same(load_reward_model(saved_merged, kind), merged)
    assert [kind_in(each) for each in (start, saved, saved_adapter, saved_merged)] == [None, kind, kind, kind]


def test_an_adapter_on_a_reward_model_trains_and_saves_its_own_head(place):
    base = load_reward_model(place(make("Llama", "CausalLM"), "start"), fresh=True)
    saved = place(base, "reward")
    adapted = trained_adapter(load_reward_model(saved))
    again = load_reward_model(place(adapted, "adapter"))
    require_same(again, adapted)
    assert not torch.equal(again.base_model.model.score.modules_to_save["default"].weight, base.score.weight)
    assert {name.split(".")[-2] for name, p in again.named_parameters() if p.requires_grad} == {
        "default"  # adapters and the head's copy
    }
    frozen = load_reward_model(place(adapted, "adapter"), is_trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_an_adapter_of_a_language_model_is_merged_under_a_fresh_head(place):
    base = place(make("Llama", "CausalLM"), "start")
    tuned = add_adapter(load_causal_lm(base), lora_config(2, 4))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
    saved = place(tuned, "tuned")
    model = load_reward_model(saved, fresh=True)
    assert not isinstance(model, PeftModel)
    assert all(parameter.requires_grad for parameter in model.parameters())
    states = tuned.eval()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(scores(model), model.score(states)[:, -1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="was trained for CAUSAL_LM; expected SEQ_CLS, with a score head"):
        load_reward_model(saved)


def test_a_value_head_checkpoint_gives_its_head(place):
    model = AutoModelForCausalLMWithValueHead(make("Llama", "CausalLM")).eval()
    scorer = load_reward_model(place(model, "start"), fresh=True)
    torch.testing.assert_close(scorer.score.weight, model.v_head.summary.weight)
    value_model = ValueModel(make("GPT2", "CausalLM"))
    scorer = load_reward_model(place(value_model, "values"), fresh=True)
    torch.testing.assert_close(scorer.score.weight, value_model.v_head.summary.weight)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_critic_starts_from_a_reward_model(adapter, place):
    """PPO's `value_model`: after its last token, a text's value is its score."""
    model = load_reward_model(place(make("Llama", "CausalLM"), "start"), fresh=True)
    if adapter:
        model = trained_adapter(model)
    critic = ValueModel.from_pretrained(place(model, "reward")).eval()
    torch.testing.assert_close(critic(input_ids=IDS)[:, -1:], scores(model), atol=1e-5, rtol=1e-5)


def test_packed_scores_of_a_reloaded_adapter(place):
    adapted = trained_adapter(load_reward_model(place(make("Llama", "CausalLM"), "start"), fresh=True))
    again = load_reward_model(place(adapted, "adapter"))
    batch = {
        "input_ids": torch.cat([IDS[0], IDS[0, :3]]), "lengths": [5, 3], "prefixes": [None, None],
        "places": torch.tensor([4, 7]),
    }  # fmt: skip
    with torch.no_grad():
        found = ScoreReader(again)(again, batch)
        expected = [adapted(input_ids=ids).logits for ids in (IDS, IDS[:, :3])]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_no_head_is_random_in_silence(place, tmp_path):
    start = place(make("Llama", "CausalLM"), "start")
    with pytest.raises(
        ModelError, match="of another kind, LlamaForCausalLM; expected one that scores sequen"
    ):
        load_reward_model(start)
    whole = place(load_reward_model(start, fresh=True), "whole")
    with pytest.raises(ModelError, match="of another kind, LlamaForSequenceClassification"):
        load_reward_model(whole, "token", fresh=True)
    weights = load_file(whole / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"},
        whole / "model.safetensors",
        metadata={"format": "pt"},
    )
    for fresh in (False, True):
        with pytest.raises(ModelError, match=r"lacks 'score.weight', which LlamaForSequenceClassification"):
            load_reward_model(whole, fresh=fresh)
    saved = place(trained_adapter(load_reward_model(start, fresh=True)), "adapter")
    with pytest.raises(ModelError, match="was trained for SEQ_CLS; expected TOKEN_CLS"):
        load_reward_model(saved, "token")
    weights = load_file(saved / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "score" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, saved / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="saved without the score head, 'score'"):
        load_reward_model(saved)
    with pytest.raises(ModelError, match="there is no directory"):
        load_reward_model(tmp_path / "nowhere")
    config = json.loads((start / "config.json").read_text())
    (whole / "config.json").write_text(
        json.dumps(
            {**config, "architectures": ["LlamaForSequenceClassification"], "id2label": {0: "a", 1: "b"}}
        )
    )
    with pytest.raises(ModelError, match="has 2 labels; expected one, a reward"):
        load_reward_model(whole)


def test_the_users_adapter_configuration_stays_as_it_is():
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    adapted = add_scoring_adapter(make("Llama", "SequenceClassification"), config)
    assert (config.task_type, config.modules_to_save) == ("CAUSAL_LM", ["embed_tokens"])
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.rpartition(".modules_to_save")[0].rpartition(".")[2] for name in trained} == {
        "embed_tokens",
        "score",
    }
    assert not any("score" in name for name, _ in adapted.named_parameters() if "lora" in name)
    with pytest.raises(ModelError, match="virtual tokens"):
        add_scoring_adapter(
            make("Llama", "SequenceClassification"),
            PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        )


def test_nothing_is_reported_about_heads(place, caplog):
    for family, head in STARTS.items():
        start = place(make(family, head), family)
        load_reward_model(start, fresh=True)
    assert not caplog.records
    assert score_layer(load_reward_model(start, fresh=True))[0] == "classifier"
