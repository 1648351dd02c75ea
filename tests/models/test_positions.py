import pytest
from encoder_decoders import make_seq2seq
from scoring_models import make
from transformers import OPTConfig, OPTForCausalLM

from etude.models.positions import length_limit, position_limit


def tiny_opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=20, max_position_embeddings=24, num_hidden_layers=1, **sizes))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_opt, 24),  # its table has two more
        (lambda: make_seq2seq("bart"), 64),
        (lambda: make_seq2seq("t5"), None),
        (lambda: make("Roberta", "SequenceClassification"), 64),  # of 66, two are for padding
    ],
    ids=["opt", "bart", "t5", "roberta"],
)
def test_models_with_a_table_of_positions(build, expected):
    assert position_limit(build()) == expected


def test_decoders(make_llama, make_gpt2):
    assert position_limit(make_gpt2(n_positions=32)) == 32
    assert position_limit(make_llama()) is None


def test_limits(tokenizer, monkeypatch):
    llama = make("Llama", "SequenceClassification", max_position_embeddings=40).config
    assert length_limit(tokenizer, llama, None) == 40
    assert length_limit(tokenizer, llama, 7) == 7
    assert length_limit(tokenizer, llama, 700) == 40
    roberta = make("Roberta", "SequenceClassification").config
    assert length_limit(tokenizer, roberta, None) == 64, "its positions begin behind the padding token's"
    monkeypatch.setattr(tokenizer, "model_max_length", 30)
    assert length_limit(tokenizer, llama, None) == 30
