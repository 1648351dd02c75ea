"""Small encoder–decoders of several families, with weights large enough that what they write varies."""

import torch
import transformers as t

VOCAB = 61
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
FAMILIES = {
    "t5": ("T5ForConditionalGeneration", t.T5Config, _T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        t.T5Config,
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "umt5": ("UMT5ForConditionalGeneration", t.UMT5Config, _T5),
    "bart": ("BartForConditionalGeneration", t.BartConfig, _BART),
    "mbart": ("MBartForConditionalGeneration", t.MBartConfig, _BART),
    "marian": ("MarianMTModel", t.MarianConfig, {**_BART, "decoder_start_token_id": 0}),
    "pegasus": ("PegasusForConditionalGeneration", t.PegasusConfig, _BART),
    "m2m100": ("M2M100ForConditionalGeneration", t.M2M100Config, _BART),
    "led": (
        "LEDForConditionalGeneration",
        t.LEDConfig,
        {
            **{name: value for name, value in _BART.items() if name != "max_position_embeddings"},
            "attention_window": 8,
            "max_encoder_position_embeddings": 96,
            "max_decoder_position_embeddings": 96,
        },
    ),
}


def make(family, dtype=torch.float64, seed=0, **settings):
    """In evaluation mode, without dropout."""
    name, config, values = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(t, name)(config(**{"vocab_size": VOCAB, **values, **settings}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.6)
    with torch.no_grad():
        for embedding in {model.get_output_embeddings(), model.get_input_embeddings()}:
            weight = embedding.weight  # of equal lengths, so that no token is likelier than others everywhere
            weight.mul_(4 / weight.norm(dim=-1, keepdim=True))
            weight[:2].mul_(0.1)  # neither padding nor the end is what it writes at once
    return model.to(dtype).eval()
