"""The draw: distributions, streams, and cuts against `transformers`' own warpers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from etude.sampling.draw import Row, draw, draw_each, mix, uniform
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


@given(
    st.integers(0, 10_000),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.sampled_from([0.6, 1.0, 1.3]),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_cuts_equal_the_warpers_of_transformers(seed, top_k, top_p, temperature, min_p):
    logits = torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    drawn = draw(logits, [row(params, seed)])
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    token = drawn.token_ids[0]
    assert drawn.sampling_logprobs[0] == pytest.approx(scores.log_softmax(-1)[0, token].item())
    assert drawn.logprobs[0] == pytest.approx((logits / temperature).log_softmax(-1)[0, token].item())


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


def test_rows_drawn_each_by_itself():
    """What `draw` gives to the last digits, and to the last bit what it gives each row alone."""
    logits = torch.randn(5, 61, generator=torch.Generator().manual_seed(0))
    kinds = [SamplingParams(), SamplingParams(top_p=0.7), SamplingParams(temperature=0), SamplingParams()]
    rows = [
        row(params, seed=i) for i, params in enumerate([*kinds, SamplingParams(temperature=0.6, top_k=9)])
    ]
    together, each = draw(logits, rows), draw_each(logits, rows)
    assert each.token_ids == together.token_ids
    assert each.logprobs == pytest.approx(together.logprobs)
    assert each.sampling_logprobs == pytest.approx(together.sampling_logprobs)
    alone = draw(logits[3:4].clone(), rows[3:4])
    assert (alone.token_ids[0], alone.logprobs[0]) == (each.token_ids[3], each.logprobs[3])
