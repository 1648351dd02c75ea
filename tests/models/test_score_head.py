"""Score heads on models that are loaded already."""

import pytest
import torch
from peft import LoraConfig
from scoring_models import make
from transformers import LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.reward_model import add_scoring_adapter
from etude.models.score_head import head_modules, kind_of, score_layer, with_score_head
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.value_model import ValueModel

IDS = torch.tensor([[5, 9, 14, 3]])


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mpt"])
@pytest.mark.parametrize(("kind", "labels"), [("sequence", 1), ("token", 2)])
def test_a_language_model_gets_a_fresh_head_on_its_own_trunk(family, kind, labels):
    model = make(family, "CausalLM")
    torch.manual_seed(7)
    scorer = with_score_head(model, kind)
    assert kind_of(scorer) == kind
    assert (scorer.config.num_labels, scorer.config.architectures) == (labels, [type(scorer).__name__])
    assert scorer.base_model is model.base_model
    _, layer = score_layer(scorer)
    assert layer.out_features == labels
    assert 0.1 < layer.weight.std() < 0.3, "drawn as the family draws its weights"
    states = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    logits = scorer(input_ids=IDS).logits
    torch.testing.assert_close(logits, layer(states)[:, -1] if kind == "sequence" else layer(states))
    torch.manual_seed(7)
    assert torch.equal(score_layer(with_score_head(model, kind))[1].weight, layer.weight)


def test_a_value_head_becomes_the_score_head_without_its_bias():
    model = AutoModelForCausalLMWithValueHead(make("Llama", "CausalLM"))
    scorer = with_score_head(model.eval(), "sequence")
    values = model(input_ids=IDS)[2][0, -1]
    torch.testing.assert_close(scorer(input_ids=IDS).logits[0, 0], values - model.v_head.summary.bias[0])
    value_model = ValueModel(make("GPT2", "CausalLM")).eval()
    scorer = with_score_head(value_model, "sequence")
    values = value_model(input_ids=IDS)[0, -1]
    torch.testing.assert_close(
        scorer(input_ids=IDS).logits[0, 0], values - value_model.v_head.summary.bias[0]
    )


def test_a_model_that_scores_stays_as_it_is():
    model = make("Bert", "SequenceClassification")
    assert with_score_head(model, "sequence") is model
    adapted = add_scoring_adapter(
        make("Llama", "SequenceClassification"), LoraConfig(target_modules=["q_proj"])
    )
    assert with_score_head(adapted, "sequence") is adapted


def test_what_is_trained_beside_the_trunk():
    assert list(head_modules(make("Llama", "SequenceClassification"))) == ["score"]
    assert set(head_modules(make("Bert", "SequenceClassification"))) == {"classifier", "pooler"}
    assert set(head_modules(make("DistilBert", "SequenceClassification"))) == {"pre_classifier", "classifier"}
    assert score_layer(make("DistilBert", "SequenceClassification"))[0] == "classifier"


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (
            lambda: make("Bert", "SequenceClassification", num_labels=3),
            "sequence",
            "has 3 labels; expected one",
        ),
        (
            lambda: make("Bert", "SequenceClassification"),
            "token",
            "scores sequences; expected .* scores tokens",
        ),
        (lambda: make("Bert", "MaskedLM"), "sequence", "lacks pooler, .* give its name or path"),
        (
            lambda: add_adapter(make("Llama", "CausalLM"), lora_config(2, 4)),
            "sequence",
            "merge them first: model = model.merge_and_unload",
        ),
        (lambda: torch.nn.Linear(2, 2), "sequence", "the model is a Linear; expected one of transformers"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)),
            "sequence",
            "no ForSequenceClassification for mamba models",
        ),
    ],
)
def test_models_that_get_no_head(build, kind, message):
    with pytest.raises(ModelError, match=message):
        with_score_head(build(), kind)


def test_a_head_is_as_precise_as_its_trunk():
    scorer = with_score_head(make("Llama", "CausalLM").bfloat16(), "sequence")
    assert isinstance(scorer, LlamaForSequenceClassification)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.bfloat16}
