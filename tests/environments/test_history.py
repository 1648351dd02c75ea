"""`TextHistory` as TRL's users know it."""

import pytest
import torch

from etude.environments.history import TextHistory


def test_segments_spans_and_masks(tokenizer, capsys):
    def tokens(text):
        return tokenizer(text, return_tensors="pt").input_ids[0]

    history = TextHistory("hello ", tokens("hello "))
    history.append_segment("there", tokens("there"), system=False)
    history.append_segment("fine", tokens("fine"))
    history.complete(truncated=True)
    assert history.text == "hello therefine"
    assert history.text_spans == [(0, 6), (6, 11), (11, 15)]
    assert history.token_spans == [(0, 6), (6, 11), (11, 15)]
    assert history.system_spans == [True, False, True]
    assert history.token_masks.tolist() == [0] * 6 + [1] * 5 + [0] * 4
    assert history.last_text_segment == "fine"
    assert (history.completed, history.truncated) == (True, True)
    query, response, mask = history.split_query_response_tokens()
    assert torch.equal(query, tokens("hello "))
    assert torch.equal(response, tokens("therefine"))
    assert mask.tolist() == [1] * 5 + [0] * 4
    history.reward = torch.tensor(1.0)
    history.show_text(show_legend=True)
    history.show_tokens(tokenizer, show_legend=True)
    assert "there" in capsys.readouterr().out


def test_empty_segments_are_refused():
    with pytest.raises(ValueError, match="needs text and tokens"):
        TextHistory("", torch.tensor([], dtype=torch.long))
    history = TextHistory("a", torch.tensor([1]))
    history.complete()
    with pytest.raises(ValueError, match="ended"):
        history.append_segment("b", torch.tensor([2]))
