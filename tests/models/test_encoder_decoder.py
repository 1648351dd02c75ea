"""What a decoder begins with, encoding in batches, and who may decode in flat steps."""

import pytest
import torch
from tests.support.encoder_decoder_families import FAMILIES, make

from etude.errors import ModelError
from etude.models.encoder_decoder import decoder_start_ids, decodes_packed, encode
from etude.models.packing import supports_packing


@pytest.mark.parametrize("family", FAMILIES)
def test_who_decodes_packed(family):
    assert decodes_packed(make(family)) == (family not in ("m2m100", "led"))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_plain_forward_stays_as_it_was(family):
    model = make(family)
    inputs = {
        "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "decoder_input_ids": torch.tensor([[0, 9, 10], [0, 11, 12]]),
    }
    before = model(**inputs).logits
    assert decodes_packed(model)
    assert torch.equal(model(**inputs).logits, before)
    assert not supports_packing(model), "an encoder–decoder is no flat sequence"


def test_a_decoder_that_looks_elsewhere_is_refused():
    """A cross-attention that forgets which source is its sequence's shows in the test."""
    model = make("bart")

    class Wrong(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return self.inner(states.flip(1))

    attention = model.get_decoder().layers[0].encoder_attn
    attention.q_proj = Wrong(attention.q_proj)  # mixes the tokens of a step
    assert not decodes_packed(model)


def test_encoding_in_batches_changes_nothing():
    model = make("t5")
    given = [[3, 4, 5], [6], list(range(3, 40)), [7, 8], [9] * 20, [3, 4, 5]]
    for states, source in zip(encode(model, given), given, strict=True):
        alone = model.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state[0]
        torch.testing.assert_close(states, alone)


def test_the_start_is_looked_for_where_generate_looks():
    model = make("t5")
    assert decoder_start_ids(model) == (0,)
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 5
    model.generation_config.forced_bos_token_id = 7
    assert decoder_start_ids(model) == (5, 7)


def test_no_start_says_what_to_set():
    model = make("t5", decoder_start_token_id=None, bos_token_id=None)
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        decoder_start_ids(model)
