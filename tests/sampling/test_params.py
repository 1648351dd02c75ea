"""Generation keywords."""

import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, PrefixConstrainedLogitsProcessor

from etude.errors import ConfigError
from etude.sampling.draw import Row, draw
from etude.sampling.params import sampling_params


def test_keywords_of_trl_s_scripts(tokenizer):
    given = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": 1,
        "eos_token_id": -1,
    }
    params = sampling_params({**given, "eos_token_id": -1, "max_new_tokens": 32}, tokenizer)
    assert (params.max_new_tokens, params.top_k, params.top_p, params.temperature) == (32, 0, 1.0, 1.0)
    assert params.eos_token_ids == ()


def test_defaults(tokenizer):
    assert sampling_params(None, tokenizer).eos_token_ids == (tokenizer.eos_token_id,)
    assert sampling_params(None, tokenizer).temperature == 1.0
    assert sampling_params(None, tokenizer, do_sample=False).temperature == 0.0
    assert sampling_params({"stop_strings": "x"}, tokenizer, stop=("y",)).stop == ("y", "x")
    assert sampling_params({"eos_token_id": [1, 2]}, tokenizer).eos_token_ids == (1, 2)


def test_a_repetition_penalty_pushes_what_was_there_away(tokenizer):
    params = sampling_params({"repetition_penalty": 1.5, "do_sample": False}, tokenizer)
    logits = torch.tensor([[1.0, 3.0, 2.9, 0.0]])

    def after(token):
        return Row(params, 0, 1, lambda: torch.tensor([[token]]), 0)

    assert draw(logits, [after(2)]).token_ids == [1]
    assert draw(logits, [after(1)]).token_ids == [2]
    drawn = draw(logits, [after(1)])
    penalised = torch.tensor([1.0, 2.0, 2.9, 0.0]).log_softmax(-1)[2]
    assert drawn.sampling_logprobs[0] == pytest.approx(penalised.item())
    assert drawn.logprobs[0] == pytest.approx(logits[0].log_softmax(-1)[2].item())


def test_tokens_that_are_allowed_or_forced(tokenizer):
    params = sampling_params({"allowed_token_ids": [4, 2], "forced_prefix": "ab<call>"}, tokenizer)
    assert params.allowed_token_ids == (4, 2)
    assert params.forced_prefix == tuple(tokenizer.encode("ab<call>"))
    assert len(params.forced_prefix) == 3, "an added token stays whole"
    assert sampling_params({"forced_prefix": [5, 6]}, tokenizer).forced_prefix == (5, 6)
    neutral = sampling_params({"allowed_token_ids": None, "repetition_penalty": None}, tokenizer)
    assert neutral == sampling_params(None, tokenizer)


def test_processors_come_in_the_order_of_transformers(tokenizer):
    def own(ids, scores):
        return scores

    given = {
        "logits_processor": [own],
        "prefix_allowed_tokens_fn": lambda i, ids: [1],
        "bad_words_ids": [[1]],
    }
    bad_words, constrained, last = sampling_params(given, tokenizer).processors
    assert isinstance(bad_words, NoBadWordsLogitsProcessor)
    assert isinstance(constrained, PrefixConstrainedLogitsProcessor)
    assert last is own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a finite"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [3, -1]}, "allowed_token_ids has -1"),
        ({"forced_prefix": [-2]}, "forced_prefix has -2"),
        ({"forced_prefix": "abc", "max_new_tokens": 3}, "has 3 tokens and max_new_tokens is 3"),
    ],
)
def test_values_out_of_range(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        sampling_params(given, tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"max_tokens": 3}, "did you mean"), ({"num_beams": 3}, "isn't supported"), ({"zzz": 1}, "known are")],
)
def test_what_is_refused(tokenizer, given, message):
    with pytest.raises(ConfigError, match=message):
        sampling_params(given, tokenizer)
