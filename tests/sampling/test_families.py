"""Greedy sampling equals `generate`, token for token, on every kind of decoder that transformers has."""

import pytest
import torch
import transformers as t

from etude.runtime.loop import run_sync
from etude.sampling.backends import PackedBackend
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.types import SamplingParams

VOCAB = 67
COMMON = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
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
GPT = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}

# name -> (model, is it packed?)
FAMILIES = {
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)), True),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)), True),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8)), True),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=6)), True),
    "gemma": (lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED, head_dim=8)), True),
    "gemma2": (lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6)), False),
    "phi": (lambda: t.PhiForCausalLM(t.PhiConfig(**WIDE)), True),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED, pad_token_id=0)), True),
    "granite": (lambda: t.GraniteForCausalLM(t.GraniteConfig(**GROUPED, logits_scaling=2.0)), True),
    "gpt_neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**WIDE)), True),
    "opt": (
        lambda: t.OPTForCausalLM(
            t.OPTConfig(
                **COMMON,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=16,
                max_position_embeddings=128,
                init_std=0.3,
            )
        ),
        True,
    ),
    "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)), True),
    "gptj": (lambda: t.GPTJForCausalLM(t.GPTJConfig(**GPT, rotary_dim=4)), False),
    "bloom": (
        lambda: t.BloomForCausalLM(
            t.BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
        ),
        False,
    ),
    "falcon": (
        lambda: t.FalconForCausalLM(
            t.FalconConfig(
                **COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
            )
        ),
        False,
    ),
    "gpt_neo": (
        lambda: t.GPTNeoForCausalLM(
            t.GPTNeoConfig(
                **COMMON,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=6,
                max_position_embeddings=128,
                initializer_range=0.3,
            )
        ),
        False,
    ),
}


def sequences(n):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 14, (n,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generate(model, ids, new_tokens):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


class NoText:
    """A tokenizer for tests that look at ids only."""

    def decode(self, ids, **_):
        return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_over_two_turns(family):
    make, packed = FAMILIES[family]
    torch.manual_seed(0)
    model = make().double().eval()
    queries = sequences(6)
    expected = [generate(model, query, 9) for query in queries]
    assert len({token for tokens in expected for token in tokens}) > 8, "the model repeats itself"
    sampler = LocalSampler(model, NoText(), slots=4, prefill_tokens=11)
    assert isinstance(sampler._backend, PackedBackend) is packed
    params = SamplingParams(max_new_tokens=9, temperature=0)
    first = continue_all(sampler, queries, params, seeds=range(6))
    assert [turn.token_ids for turn in first] == expected

    async def second_turn(query):
        session = sampler.session(seed=0)
        turn = await session.sample(query, params)
        return turn.token_ids, (await session.sample([5, 6], params)).token_ids

    one, two = run_sync(second_turn(queries[0]))
    assert two == generate(model, [*queries[0], *one, 5, 6], 9)
