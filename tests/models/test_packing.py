"""Which models may be packed: the leak test, and what it is too short to see."""

import pytest
import torch
import transformers as t

from etude.models.packing import crosses_switch, plain_logits, same_logits, supports_packing
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.sampling.solo import SoloBackend
from etude.types import SamplingParams

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LONG = {**SIZES, "head_dim": 8, "max_position_embeddings": 16384}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def build(classes, **settings):
    torch.manual_seed(0)
    config = getattr(t, f"{classes}Config")(**settings)
    config._experts_implementation = "eager"
    return getattr(t, f"{classes.removesuffix('Text')}ForCausalLM")(config).double().eval()


REFUSED = {
    "chunks of 8192": lambda: build(
        "Llama4Text",
        **LONG,
        intermediate_size_mlp=48,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "a choice of 2048 keys": lambda: build(
        "DeepseekV32",
        **{**LONG, **LATENT},
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
    "a convolution": lambda: build("Lfm2", **SIZES, layer_types=["conv", "full_attention"]),
    "no attention interface": lambda: build(
        "GPTJ", vocab_size=53, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=32
    ),
    "attention in both directions": lambda: build("Gemma3Text", **LONG, use_bidirectional_attention=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_is_refused(what):
    assert not supports_packing(REFUSED[what]())


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_leak_is_seen_however_small_the_logits(scale):
    model = build("Qwen3", **LONG)
    model.lm_head.weight.data.mul_(scale)
    tokens = list(range(9))
    expected = plain_logits(model, tokens)
    assert same_logits(expected + 1e-7 * scale, expected)
    leaked = plain_logits(model, [50, *tokens[1:]])
    assert not same_logits(leaked, expected)


def test_windows_longer_than_the_leak_test_are_compared():
    model = build("Mistral", **LONG, sliding_window=4096)
    assert supports_packing(model)
    model.config.layer_types = ["sliding_attention", "full_attention"]  # which its second layer doesn't heed
    assert not supports_packing(model)


def make_longrope():
    """Rotates by short factors up to 32 tokens, and by long ones beyond."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 32,
    }
    limits = {"max_position_embeddings": 64, "original_max_position_embeddings": 32}
    return build("Phi3", **SIZES, **limits, rope_parameters=rope)


def test_embeddings_that_depend_on_the_length_are_packed_up_to_their_switch():
    model = make_longrope()
    assert crosses_switch(model)
    assert LocalSampler(model, Untold()).max_length == 32
    assert not supports_packing(model)
    assert supports_packing(model, max_length=32)


def test_beyond_the_switch_every_token_is_sampled_from_a_whole_forward():
    model = make_longrope()
    sampler = LocalSampler(model, Untold(), slots=1, max_length=64)
    assert isinstance(sampler._backend, SoloBackend)
    assert sampler._backend.way == "whole"
    query = [3, 1, 4, 1, 5, 9, 2, 6]

    async def turn():
        return await sampler.session(seed=0).sample(query, SamplingParams(max_new_tokens=30, temperature=0))

    sampled = run_sync(turn())
    for i, (token, logprob) in enumerate(zip(sampled.token_ids, sampled.logprobs, strict=True)):
        with torch.no_grad():
            expected = plain_logits(model, query + sampled.token_ids[:i])[-1].log_softmax(-1)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected.max()), abs=1e-5)


class Untold:
    """A tokenizer for tests that look at ids only."""

    def decode(self, ids, **_):
        return ""


@torch.no_grad()
def test_the_test_leaves_no_trace(make_gpt2):
    model = make_gpt2().train()
    assert supports_packing(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
