"""Small random models of the decoder families that tests go through: each kind of attention, cache and state.

A selection that stands for some ninety families of `transformers`: each kind is here once or twice. They are
grouped by how the sampler continues them.
"""

import torch
import transformers as t

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
    "olmo2": ("Olmo2", GROUPED),
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

PADS_RIGHT = {"rwkv", "recurrent_gemma"}  # their state runs through padding on the left, whatever the mask


def make_family(classes, configuration, dtype=torch.float64):
    torch.manual_seed(0)
    config = getattr(t, f"{classes}Config")(**configuration)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    model = model_class(classes)(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.ndim > 1 and parameter.std() < 0.05
            if flat or name.endswith(("sinks", "correct_output_scale")):
                parameter.normal_(0, 0.3)  # some families ignore the initial range in some layers
    return model


def model_class(classes):
    names = (f"{classes}ForCausalLM", f"{classes.removesuffix('Text')}ForCausalLM", f"{classes}LMHeadModel")
    return getattr(t, next(name for name in names if hasattr(t, name)))
