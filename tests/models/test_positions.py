import pytest
from encoder_decoders import make_seq2seq
from transformers import OPTConfig, OPTForCausalLM

from etude.models.positions import position_limit


def tiny_opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=20, max_position_embeddings=24, num_hidden_layers=1, **sizes))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_opt, 24),  # its table has two more
        (lambda: make_seq2seq("bart"), 64),
        (lambda: make_seq2seq("t5"), None),
    ],
    ids=["opt", "bart", "t5"],
)
def test_models_with_a_table_of_positions(build, expected):
    assert position_limit(build()) == expected


def test_decoders(make_llama, make_gpt2):
    assert position_limit(make_gpt2(n_positions=32)) == 32
    assert position_limit(make_llama()) is None
