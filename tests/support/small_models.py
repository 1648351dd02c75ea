"""Small random models of families whose attention differs, for tests of the sampler's steps."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
WIDE = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "initializer_range": 0.3,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 100,
}
GPT = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 200, "initializer_range": 0.3}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, sliding_window=5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**WIDE, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, pad_token_id=None)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **WIDE,
            head_dim=8,
            sliding_window=5,
            num_local_experts=4,
            num_experts_per_tok=2,
            pad_token_id=None,
        )
    ),
    "dynamic": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, rope_parameters=DYNAMIC)),
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(**WIDE, rope_parameters=LONG, original_max_position_embeddings=100, pad_token_id=None)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**WIDE, num_local_experts=4)),
}


def static_model(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


class Textless:
    def decode(self, ids, **_):
        return ""


def random_prompts(count, longest=40):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
