"""Small models that score text, of several families, untied, with weights large enough that scores vary."""

import string

import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers, processors

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip

# By name: the family's prefix, its configuration, and whether its decoder computes packed sequences.
SCORERS = {
    "Llama": ("Llama", {**_SMALL, "num_key_value_heads": 2, "pad_token_id": None}, True),
    "GPT2": ("GPT2", {**_GPT, "pad_token_id": None}, True),
    "OPT": ("OPT", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24, "init_std": 0.2}, True),
    "Gemma2": ("Gemma2", {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}, True),
    "GPTNeo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        False,
    ),
    "Bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
    "Mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, False),
    "Bert": ("Bert", _SMALL, False),
    "Roberta": ("Roberta", {**_SMALL, "pad_token_id": 1, "max_position_embeddings": 66}, False),
    "DistilBert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, False),
    "DebertaV2": ("DebertaV2", _SMALL, False),
    "Bart": ("Bart", {**_SEQ2SEQ, "init_std": 0.2}, False),
}


def make(family, head, vocabulary=60, seed=0, **settings):
    """A model of a family: head "SequenceClassification", "TokenClassification", "CausalLM" or "MaskedLM"."""
    prefix, config, _ = SCORERS[family]
    labels = {"SequenceClassification": {"num_labels": 1}, "TokenClassification": {"num_labels": 2}}
    common = {"vocab_size": vocabulary, "initializer_range": 0.2, "eos_token_id": 3, **labels.get(head, {})}
    torch.manual_seed(seed)
    names = {"GPT2ForCausalLM": "GPT2LMHeadModel", "GPT2ForMaskedLM": "GPT2LMHeadModel"}
    cls = getattr(t, names.get(f"{prefix}For{head}", f"{prefix}For{head}"))
    return cls(cls.config_class(**{**common, **config, **settings})).eval()


def encoder_tokenizer():
    """One token per character, with [CLS] before and [SEP] after a text, and no end-of-sequence token."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return t.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
