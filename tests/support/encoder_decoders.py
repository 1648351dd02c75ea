"""Small random encoder–decoders of the families that training is tested on, and a tokenizer of theirs."""

import string

import torch
import transformers as t
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PAD, EOS, START, BOS = 0, 1, 2, 3
_SPECIAL = ("[pad]", "[eos]", "[start]", "[bos]", "[unk]")
CHARACTERS = string.ascii_lowercase + string.digits + " .,:"
VOCAB = len(_SPECIAL) + len(CHARACTERS)
FIRST = len(_SPECIAL)  # the first token that isn't special

_COMMON = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "decoder_start_token_id": START,
}
_T5 = {
    **_COMMON, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.1,
}  # fmt: skip
_BART = {
    **_COMMON, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3,
    "max_position_embeddings": 64, "dropout": 0.1,
}  # fmt: skip
# Each ties its output layer to its embeddings; T5s do in transformers 5, whatever their configuration says.
FAMILIES = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5 gated": (
        "T5ForConditionalGeneration",
        {
            **_T5,
            "feed_forward_proj": "gated-gelu",
            "scale_decoder_outputs": False,
            "initializer_factor": 0.6,
        },
    ),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", {**_BART, "tie_word_embeddings": True}),
}

_BERT = {
    "model_type": "bert", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
_GEMMA = {
    **_COMMON, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
# Their relatives, which fewer tests go through.
RELATIVES = {
    "mt5": ("MT5ForConditionalGeneration", {**_T5, "initializer_factor": 0.6}),
    "umt5": ("UMT5ForConditionalGeneration", _T5),
    "longt5": ("LongT5ForConditionalGeneration", _T5),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {**_COMMON, "encoder": _GEMMA, "decoder": _GEMMA, "initializer_range": 0.3},
    ),
    "pegasus": ("PegasusForConditionalGeneration", _BART),
    "pegasus_x": ("PegasusXForConditionalGeneration", {**_BART, "block_size": 8}),
    "bigbird_pegasus": (
        "BigBirdPegasusForConditionalGeneration",
        {**_BART, "attention_type": "original_full"},
    ),
    "m2m_100": ("M2M100ForConditionalGeneration", _BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", _BART),
    "plbart": ("PLBartForConditionalGeneration", _BART),
    "encoder-decoder": (
        "EncoderDecoderModel",
        {
            "encoder": _BERT,
            "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
            **_COMMON,
        },
    ),
}


def make_seq2seq(family="t5", dtype=torch.float32, seed=0, **settings):
    """A model in eval mode, with weights large enough that outputs vary."""
    name, config = {**FAMILIES, **RELATIVES}[family]
    torch.manual_seed(seed)
    cls = getattr(t, name)
    model = cls(cls.config_class(**{**config, **settings}))
    if family == "marian":  # whose checkpoints add to the logits what was trained once and is then kept
        model.final_logits_bias.normal_()
    if family == "bart":
        model.generation_config.forced_bos_token_id = BOS  # as facebook/bart-large-cnn's is
    return model.to(dtype).eval()


def seq2seq_tokenizer():
    """One token per character; sources and targets end with EOS, as T5's do."""
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="$A [eos]", special_tokens=[("[eos]", EOS)])
    names = {"pad_token": "[pad]", "eos_token": "[eos]", "unk_token": "[unk]"}
    return t.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
