"""The draw: distributions, streams, rows in one batch, and rows from which nothing can be drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.sampling.draw import Row, begin_draw_each, draw, mix, uniform, uniforms
from etude.types import SamplingParams


def row(params, seed=0, position=0, generated=0):
    return Row(params, seed, position, lambda: torch.zeros(1, position, dtype=torch.long), generated)


def test_streams_are_functions_of_seed_and_position():
    assert uniform(1, 2) == uniform(1, 2)
    values = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(values) == 900
    assert abs(sum(values) / 900 - 0.5) < 0.03
    assert mix(1, 2) != mix(2, 1)


def test_frequencies_follow_the_distribution():
    """20,000 draws of a four-token distribution: each count within 4 standard deviations."""
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    n = 20_000
    rows = [row(SamplingParams(), seed=i // 200, position=i % 200) for i in range(n)]
    tokens = torch.tensor(draw(probs.log().expand(n, 4), rows).token_ids)
    for token, p in enumerate(probs.tolist()):
        assert abs((tokens == token).sum().item() - n * p) < 4 * math.sqrt(n * p * (1 - p))


@given(st.integers(0, 2**63), st.integers(0, 300), st.sampled_from([0.5, 1.0, 1.7]))
def test_a_token_without_mass_is_never_drawn(seed, position, temperature):
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]])
    token = draw(logits, [row(SamplingParams(temperature=temperature), seed, position)]).token_ids[0]
    assert token in (1, 3)


def test_rows_with_different_parameters_share_a_batch():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(min_new_tokens=1, eos_token_ids=(int(logits[3].argmax()),), temperature=0),
        SamplingParams(processors=(lambda ids, scores: scores.index_fill(1, torch.tensor([5]), 1e9),)),
        SamplingParams(temperature=0.3),
    ]
    together = draw(logits, [row(p, seed=i) for i, p in enumerate(params)])
    alone = [draw(logits[i : i + 1], [row(p, seed=i)]) for i, p in enumerate(params)]
    assert together.token_ids == [a.token_ids[0] for a in alone]
    best = logits.argmax(-1).tolist()
    assert together.token_ids[1] == best[1]
    assert together.token_ids[2] == best[2]
    assert together.token_ids[3] != best[3]
    assert together.token_ids[4] == 5
    assert together.sampling_logprobs[2] == 0.0


@given(st.lists(st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**40)), min_size=1, max_size=9))
def test_streams_of_many_rows_are_those_of_each(streams):
    rows = [Row(SamplingParams(), seed, position, None, 0) for seed, position in streams]
    assert uniforms(rows).tolist() == [uniform(seed, position) for seed, position in streams]


def test_rows_drawn_each_by_itself():
    """What `draw` gives to the last digits, and to the last bit what it gives each row alone."""
    logits = torch.randn(6, 61, generator=torch.Generator().manual_seed(0))
    logits[4, 7] = torch.nan
    kinds = [SamplingParams(), SamplingParams(top_p=0.7), SamplingParams(temperature=0), SamplingParams()]
    kinds += [SamplingParams(), SamplingParams(temperature=0.6, top_k=9)]
    rows = [row(params, seed=i) for i, params in enumerate(kinds)]
    together, each = draw(logits, rows), begin_draw_each(logits, rows).known()
    assert [*each.failures] == [*together.failures] == [4]
    assert str(each.failures[4]) == str(together.failures[4])
    for i in (0, 1, 2, 3, 5):
        assert each.token_ids[i] == together.token_ids[i]
        assert each.logprobs[i] == pytest.approx(together.logprobs[i])
        assert each.sampling_logprobs[i] == pytest.approx(together.sampling_logprobs[i])
    alone = draw(logits[3:4].clone(), rows[3:4])
    assert (alone.token_ids[0], alone.logprobs[0]) == (each.token_ids[3], each.logprobs[3])


def test_rows_without_a_distribution_fail_alone():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    logits[1, 4] = torch.nan
    logits[2] = -torch.inf
    logits[3, 7] = torch.inf
    empty = SamplingParams(processors=(lambda ids, scores: scores - torch.inf,))
    ended = SamplingParams(allowed_token_ids=(3,), eos_token_ids=(3,), min_new_tokens=1, temperature=0)
    params = [
        SamplingParams(),
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(),
        empty,
        ended,
    ]
    drawn = draw(logits, [row(p, seed=i) for i, p in enumerate(params)])
    assert sorted(drawn.failures) == [1, 2, 3, 4, 5]
    assert all("model's logits" in str(drawn.failures[i]) for i in (1, 2, 3))
    assert "after the logits processor <lambda> the scores" in str(drawn.failures[4])
    assert "after allowed_token_ids, min_new_tokens the scores" in str(drawn.failures[5])
    alone = draw(logits[:1], [row(params[0])])
    assert (drawn.token_ids[0], drawn.logprobs[0]) == (alone.token_ids[0], alone.logprobs[0])
