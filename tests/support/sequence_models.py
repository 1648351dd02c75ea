"""Small random encoder–decoders, and a way to make any model say something."""

import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration


def make_t5(tokenizer, seed=0, **settings):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **settings,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight.data *= 0.3  # else it hardly hesitates
    return model


def make_bart(tokenizer, seed=0, **settings):
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        init_std=0.3,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        **settings,
    )
    return BartForConditionalGeneration(config).eval()


def saying(tokenizer, text):
    """Generation keywords that make any model answer with a text, and end."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return {
        "forced_prefix": ids,
        "allowed_token_ids": [tokenizer.eos_token_id],
        "max_new_tokens": len(ids) + 1,
    }
