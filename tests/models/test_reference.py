"""Reference policies: frozen, unmoved by training, and sharing memory where they say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from encoder_decoders import make_seq2seq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.reference import create_reference_model, reference_by_disabled_adapters
from etude.models.value_head import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
)
from etude.models.wrappers import trunk_of

LAYERS, TOKENS = 3, torch.tensor([[3, 9, 27, 4, 8], [5, 25, 1, 7, 2]])
_SIZES = {"vocab_size": 31, "tie_word_embeddings": False}
_DECODER = {
    **_SIZES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}
POLICIES = {
    "gpt2": (
        GPT2Config(**_SIZES, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, initializer_range=0.1),
        "transformer.h.{layer}",
        {"transformer.wte.weight", "transformer.wpe.weight"},
    ),
    "llama": (LlamaConfig(**_DECODER), "model.layers.{layer}", {"model.embed_tokens.weight"}),
    "qwen3": (Qwen3Config(**_DECODER, head_dim=8), "model.layers.{layer}", {"model.embed_tokens.weight"}),
    "opt": (
        OPTConfig(
            **_SIZES,
            hidden_size=16,
            word_embed_proj_dim=8,
            ffn_dim=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
            init_std=0.1,
        ),
        "model.decoder.layers.{layer}",
        {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    ),
}
FAMILIES = sorted(POLICIES)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def policy() -> PreTrainedModel:
    return make_policy("llama")


def make_policy(family: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(POLICIES[family][0]).eval()


def policy_logits(model: nn.Module) -> torch.Tensor:
    return trunk_of(model)(input_ids=TOKENS).logits


def take_a_step(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    policy_logits(model).logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def shared_names(model: nn.Module, reference: nn.Module) -> set[str]:
    """Names of the parameters that lie at the same address in both."""
    others = dict(reference.named_parameters())
    return {name for name, p in model.named_parameters() if p.data_ptr() == others[name].data_ptr()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_copy_is_frozen_and_unmoved_by_training(family: str) -> None:
    policy = make_policy(family).train()
    reference = create_reference_model(policy)
    assert type(reference) is type(policy)
    assert not any(module.training for module in reference.modules())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert policy.training
    assert shared_names(policy, reference) == set()

    policy.eval()
    before = policy_logits(reference)
    assert torch.equal(policy_logits(policy), before)
    take_a_step(policy)
    assert torch.equal(policy_logits(reference), before)
    assert (policy_logits(policy) - before).abs().max() > 0.01


@pytest.mark.parametrize("num_shared", range(LAYERS + 1))
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_layers_are_the_same_memory(family: str, num_shared: int) -> None:
    policy = make_policy(family)
    _, pattern, embeddings = POLICIES[family]
    reference = create_reference_model(policy, num_shared_layers=num_shared)

    prefixes = tuple(pattern.format(layer=i) + "." for i in range(num_shared))
    names = [name for name, _ in policy.named_parameters()]
    expected = embeddings | {name for name in names if prefixes and name.startswith(prefixes)}
    assert shared_names(policy, reference) == expected
    assert {name for name, p in policy.named_parameters() if not p.requires_grad} == expected
    assert not any(parameter.requires_grad for parameter in reference.parameters())

    before = policy_logits(reference)
    take_a_step(policy)
    assert torch.equal(policy_logits(reference), before)
    assert not torch.equal(policy_logits(policy), before)


def test_a_change_to_a_shared_layer_is_seen_by_both(policy: PreTrainedModel) -> None:
    reference = create_reference_model(policy, 1)
    before = policy_logits(reference)
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(policy_logits(reference), before)
    assert torch.equal(policy_logits(reference), policy_logits(policy))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(0, LAYERS))
def test_the_pattern_finds_what_is_found_without_it(family: str, num_shared: int) -> None:
    policy = make_policy(family)
    by_pattern = create_reference_model(policy, num_shared, POLICIES[family][1])
    assert shared_names(policy, by_pattern) == shared_names(
        policy, create_reference_model(policy, num_shared)
    )


def test_tied_embeddings_stay_tied_and_share_the_output_head() -> None:
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**{**_DECODER, "tie_word_embeddings": True}))
    copied, shared = create_reference_model(policy), create_reference_model(policy, 1)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert copied.lm_head.weight is not policy.lm_head.weight
    assert shared.lm_head.weight is policy.lm_head.weight
    assert not policy.lm_head.weight.requires_grad


@pytest.mark.parametrize("num_shared", [None, 2])
def test_value_head_models(num_shared: int | None) -> None:
    model = AutoModelForCausalLMWithValueHead(make_policy("gpt2"))
    reference = create_reference_model(model, num_shared)
    assert isinstance(reference, AutoModelForCausalLMWithValueHead)
    assert reference.v_head.summary.weight.data_ptr() != model.v_head.summary.weight.data_ptr()
    assert model.v_head.summary.weight.requires_grad
    with torch.no_grad():
        logits, _, values = reference(input_ids=TOKENS)
        expected_logits, _, expected_values = model(input_ids=TOKENS)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(values, expected_values)


def test_what_can_not_be_shared(policy: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="num_shared_layers is 4, but the model has 3 layers"):
        create_reference_model(policy, 4)
    with pytest.raises(ModelError, match="num_shared_layers is -1"):
        create_reference_model(policy, -1)
    with pytest.raises(ModelError, match="give num_shared_layers"):
        create_reference_model(policy, pattern="model.layers.{layer}")
    with pytest.raises(ModelError, match=r"expected \{layer\} in it"):
        create_reference_model(policy, 1, "model.layers")
    with pytest.raises(ModelError, match=r"no layer of LlamaForCausalLM is named .*transformer\.h"):
        create_reference_model(policy, 1, "transformer.h.{layer}")
    policy.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"no list of 7 layers.*pattern="):
        create_reference_model(policy, 1)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_weights_partitioned_by_zero3_are_refused(policy: PreTrainedModel) -> None:
    policy.lm_head.weight.ds_id = 0  # DeepSpeed's mark on a parameter that it has partitioned
    with pytest.raises(ModelError, match="ZeRO-3"):
        create_reference_model(policy)


# -- adapters switched off ----------------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "peft": lambda model: model,
    "value head": AutoModelForCausalLMWithValueHead,
}


def make_adapted(policy: PreTrainedModel) -> nn.Module:
    model = add_adapter(policy, lora_config(4, 8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_without_adapters_it_is_the_base_model(wrapper: str, policy: PreTrainedModel) -> None:
    base = create_reference_model(policy)
    model = WRAPPERS[wrapper](make_adapted(policy))
    adapted = policy_logits(model)
    with reference_by_disabled_adapters(model) as reference:
        assert torch.equal(policy_logits(reference), policy_logits(base))
    assert torch.equal(policy_logits(model), adapted)
    assert (adapted - policy_logits(base)).abs().max() > 0.1


@pytest.mark.parametrize("trainable", [True, False])
def test_adapters_are_back_after_an_exception(trainable: bool, policy: PreTrainedModel) -> None:
    model = make_adapted(policy)
    if not trainable:
        model.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    adapted = policy_logits(model)
    with pytest.raises(KeyboardInterrupt), reference_by_disabled_adapters(model):
        raise KeyboardInterrupt
    assert torch.equal(policy_logits(model), adapted)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert any(flags) == trainable


def test_a_graph_built_before_still_reaches_the_adapters(policy: PreTrainedModel) -> None:
    model = make_adapted(policy)
    loss = policy_logits(model).logsumexp(-1).mean()
    with reference_by_disabled_adapters(model), torch.no_grad():
        policy_logits(model)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


def test_it_nests(policy: PreTrainedModel) -> None:
    model = make_adapted(policy)
    adapted = policy_logits(model)
    with reference_by_disabled_adapters(model):
        base = policy_logits(model)
        with reference_by_disabled_adapters(model):
            assert torch.equal(policy_logits(model), base)
        assert torch.equal(policy_logits(model), base)
    assert torch.equal(policy_logits(model), adapted)


def test_a_model_without_adapters_has_none_to_switch_off(policy: PreTrainedModel) -> None:
    for model in (policy, AutoModelForCausalLMWithValueHead(policy)):
        with pytest.raises(ModelError, match="carries no adapters"), reference_by_disabled_adapters(model):
            pass


SEQ2SEQ = {
    "t5": ({"num_layers": 2, "num_decoder_layers": LAYERS}, "decoder.block.{layer}", {"lm_head.weight"}),
    "bart": ({"encoder_layers": 2, "decoder_layers": LAYERS}, "model.decoder.layers.{layer}", set()),
}


@pytest.mark.parametrize("num_shared", range(LAYERS + 1))
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_share_the_encoder_and_the_decoder_s_first_layers(
    family: str, num_shared: int
) -> None:
    depths, pattern, own_head = SEQ2SEQ[family]
    policy = AutoModelForSeq2SeqLMWithValueHead(
        make_seq2seq(family, **depths, tie_word_embeddings=family == "bart")
    )
    reference = create_reference_model(policy, num_shared)
    trunk = policy.pretrained_model
    own = {name for name, _ in trunk.named_parameters()} - own_head
    later = tuple(pattern.format(layer=i) + "." for i in range(num_shared, LAYERS))
    rest = {"decoder.final_layer_norm.weight", "model.decoder.layernorm_embedding.weight"}
    rest |= {"model.decoder.layernorm_embedding.bias"}
    expected = {name for name in own if not (later and name.startswith(later)) and name not in rest}
    shared = {name.removeprefix("pretrained_model.") for name in shared_names(policy, reference)}
    assert shared == expected
    assert any(name.startswith(("encoder.block.1.", "model.encoder.layers.1.")) for name in shared)
    assert shared_names(policy, create_reference_model(policy, num_shared, pattern)) == shared_names(
        policy, reference
    )

    def logits(model: nn.Module) -> torch.Tensor:
        return model(input_ids=TOKENS, decoder_input_ids=TOKENS)[0]

    before = logits(reference)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    logits(policy).logsumexp(-1).mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert torch.equal(logits(reference), before)
    assert not torch.equal(logits(policy), before)
    with pytest.raises(ModelError, match=f"num_shared_layers is 4, but the model has {LAYERS} layers"):
        create_reference_model(policy, 4)
