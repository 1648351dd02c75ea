"""Sampling is right on every kind of decoder that transformers has: it equals `generate` and a plain forward.

A selection that stands for some ninety families: each kind of attention, of cache and of state is here
once or twice.
"""

import asyncio

import pytest
import torch
import transformers as t

from etude.errors import ModelError
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.sampling.solo import SoloBackend
from etude.types import SamplingParams

VOCAB = 67
COMMON = {
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WIDE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GROUPED = {**WIDE, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
ALTERNATING = {
    **HEADS,
    "num_hidden_layers": 4,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
SHORT = {"hidden_size": 32, "initializer_range": 0.3}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# family -> (its classes' name, configuration)
PACKED = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", HEADS),
    "qwen3_moe": ("Qwen3Moe", {**HEADS, **EXPERTS, "num_experts": 4}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 6}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "olmoe": ("Olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmo3": ("Olmo3", ALTERNATING),
    "gemma": ("Gemma", HEADS),
    "gemma2": ("Gemma2", {**ALTERNATING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**ALTERNATING, "query_pre_attn_scalar": 8}),
    "gemma3n": (  # the last two layers borrow the keys of the first two
        "Gemma3nText",
        {
            **ALTERNATING,
            "num_kv_shared_layers": 2,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": None,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 8,
        },
    ),
    "gpt_oss": ("GptOss", {**ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere2": ("Cohere2", ALTERNATING),
    "exaone4": ("Exaone4", ALTERNATING),
    "deepseek_v3": (  # keys and values of different widths
        "DeepseekV3",
        {
            **WIDE,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    "glm4": ("Glm4", HEADS),
    "smollm3": ("SmolLM3", GROUPED),
    "starcoder2": ("Starcoder2", GROUPED),
    "phi": ("Phi", WIDE),
    "phi3": ("Phi3", GROUPED),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 2.0}),
    "gpt_neox": ("GPTNeoX", WIDE),
    "gpt2": ("GPT2", GPT),
    "opt": (
        "OPT",
        {
            **COMMON,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 128,
            "init_std": 0.3,
        },
    ),
}
PIECES = {
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**GPT, "rotary_dim": 4}),
    "bloom": ("Bloom", {**COMMON, **SHORT, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {**COMMON, **SHORT, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "mpt": ("Mpt", {**COMMON, "d_model": 32, "n_heads": 4, "n_layers": 2, "initializer_range": 0.3}),
    "gpt_neo": (
        "GPTNeo",
        {
            **COMMON,
            **SHORT,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "max_position_embeddings": 128,
        },
    ),
    "stablelm": ("StableLm", GROUPED),
    "llama4": (
        "Llama4Text",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "attention_chunk_size": 5,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
        },
    ),
    "rwkv": ("Rwkv", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}),
    "mamba2": (
        "Mamba2",
        {
            **COMMON,
            **SHORT,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "state_size": 8,
            "chunk_size": 4,
        },
    ),
    "bamba": ("Bamba", {**GROUPED, **MAMBA2, "mamba_chunk_size": 4, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**HEADS, **MAMBA2, "mamba_d_ssm": 64, "mamba_chunk_size": 4}),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        {
            **GROUPED,
            **MAMBA2,
            "mamba_chunk_size": 4,
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm2": (
        "Lfm2",
        {**GROUPED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **HEADS,
            **EXPERTS,
            **LINEAR,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
TOKENS = {
    "mamba": (
        "Mamba",
        {**COMMON, **SHORT, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    "jamba": (
        "Jamba",
        {
            **GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
}
WHOLE = {
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            **WIDE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 6,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **WIDE,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
            "use_mem_eff_path": False,
        },
    ),
}
FAMILIES = {
    name: (*family, way)
    for way, families in (("packed", PACKED), ("pieces", PIECES), ("tokens", TOKENS), ("whole", WHOLE))
    for name, family in families.items()
}


def make_family(classes, configuration):
    torch.manual_seed(0)
    config = getattr(t, f"{classes}Config")(**configuration)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    names = (f"{classes}ForCausalLM", f"{classes.removesuffix('Text')}ForCausalLM", f"{classes}LMHeadModel")
    model = getattr(t, next(name for name in names if hasattr(t, name)))(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.ndim > 1 and parameter.std() < 0.05) or "sinks" in name:
                parameter.normal_(0, 0.3)  # some families ignore the initial range in some layers
    return model


def random_queries():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 13, 4, 9, 7)]


def generate(model, ids, new_tokens):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


class NoText:
    """A tokenizer for tests that look at ids only."""

    def decode(self, ids, **_):
        return ""


def play(sampler, queries, tool_results, params):
    """Episodes of several turns, all at once; (tokens before the turn, the turn) of each."""

    async def episode(query):
        session, history, turns = sampler.session(seed=0), [], []
        for new in (query, *tool_results):
            turn = await session.sample(new, params)
            history = [*history, *new]
            turns.append((history, turn))
            history = [*history, *turn.token_ids]
        session.close()
        return turns

    async def every():
        return await asyncio.gather(*(episode(query) for query in queries))

    return run_sync(every())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_turns_equal_generate_and_a_plain_forward(family):
    """Fewer slots than sessions and prompts fed in pieces, so that states are dropped and rebuilt, too."""
    classes, configuration, way = FAMILIES[family]
    model = make_family(classes, configuration)
    queries = random_queries()
    expected = [generate(model, query, 9) for query in queries]
    assert len({token for tokens in expected for token in tokens}) > 8, "the model repeats itself"
    sampler = LocalSampler(model, NoText(), slots=2, prefill_tokens=5)
    backend = sampler._backend
    assert (backend.way if isinstance(backend, SoloBackend) else "packed") == way
    episodes = play(sampler, queries, ([5, 6, 7], [8]), SamplingParams(max_new_tokens=9, temperature=0))
    assert [turns[0][1].token_ids for turns in episodes] == expected
    history, last = episodes[1][-1]
    assert last.token_ids == generate(model, history, 9)
    for turns in episodes:
        history, last = turns[-1]
        with torch.no_grad():
            logits = model(torch.tensor([[*history, *last.token_ids]]), use_cache=False).logits[0]
        for history, turn in turns:
            states = logits[len(history) - 1 :][: len(turn.token_ids)]
            assert states.argmax(-1).tolist() == turn.token_ids
            logprobs = states.double().log_softmax(-1).amax(-1)
            # Many families compute norms, softmax or states in float32 whatever the model is in.
            torch.testing.assert_close(torch.tensor(turn.logprobs).double(), logprobs, rtol=0, atol=2e-4)


def test_a_model_that_is_no_causal_decoder_is_refused():
    with pytest.raises(ModelError, match="expected a causal decoder"):
        LocalSampler(make_family("RoFormer", {**WIDE, "embedding_size": 32}), NoText())
