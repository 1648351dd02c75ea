"""Cuts of mixed rows against `transformers`' own processors and warpers, row by row, in its order."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from etude.errors import SamplerError
from etude.sampling import cuts
from etude.sampling.cuts import Row, edit, forbidden_tokens, warp
from etude.types import SamplingParams

VOCABULARY = 40


def bias(ids, scores):
    """A processor that depends on all that came before, and writes into what it is given."""
    scores[0, ids[0, -1]] += ids.shape[1] % 3 - 0.5
    return scores


PARAMS = st.builds(
    SamplingParams,
    min_new_tokens=st.integers(0, 3),
    eos_token_ids=st.sampled_from([(), (2,), (0, 5, 999)]),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.3]),
    top_k=st.sampled_from([0, 1, 3, 7, VOCABULARY, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    allowed_token_ids=st.one_of(
        st.none(), st.sets(st.integers(0, VOCABULARY - 1), min_size=9).map(lambda ids: tuple(sorted(ids)))
    ),
    processors=st.sampled_from([(), (bias,), (bias, bias)]),
)
PARAMS_AND_GENERATED = st.lists(st.tuples(PARAMS, st.integers(0, 4)), min_size=1, max_size=6)


def expected(logits_1V, ids_1N, params, generated):
    """What `GenerationMixin._get_logits_processor` would put together."""
    steps = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    if params.eos_token_ids:
        prompt = ids_1N.shape[1] - generated
        steps.append(
            MinNewTokensLengthLogitsProcessor(prompt, params.min_new_tokens, list(params.eos_token_ids))
        )
    if params.allowed_token_ids is not None:
        rest = sorted(set(range(VOCABULARY)) - set(params.allowed_token_ids))
        steps.append(SuppressTokensLogitsProcessor(rest))
    steps.extend(params.processors)
    if params.temperature:
        steps.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            steps.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            steps.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            steps.append(MinPLogitsWarper(params.min_p))
    scores = logits_1V.clone()
    for step in steps:
        scores = step(ids_1N, scores)
    return scores


def cut(logits, rows):
    edited = logits.clone()
    assert not edit(edited, rows)
    return warp(edited / edited.new_tensor([row.params.temperature or 1.0 for row in rows])[:, None], rows)


def assert_same_cut(scores, want):
    """Equal, but for the choice among equally likely tokens at the border of top-p: any will do."""
    torch.testing.assert_close(scores.sort().values, want.sort().values)
    if scores.isfinite().any():
        least = scores[scores.isfinite()].min() + 1e-3
        torch.testing.assert_close(scores.clamp(min=least), want.clamp(min=least))


def make_rows(settings, seed, vocabulary=VOCABULARY):
    """Rows with random histories, some of whose tokens the head doesn't score."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, (params, generated) in enumerate(settings):
        ids = torch.randint(0, vocabulary + 2, (1, 5 + 3 * i), generator=generator)
        ids[0, -1] %= vocabulary
        rows.append(Row(params, i, ids.shape[1], lambda ids=ids: ids, generated))
    return rows


@given(
    PARAMS_AND_GENERATED,
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_mixed_rows_equal_transformers(settings, seed, dtype, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(settings), VOCABULARY, dtype=dtype, generator=generator) * 2
    if ties:
        logits = logits.round()
    rows = make_rows(settings, seed)
    given_logits = logits.clone()
    result = cut(logits, rows)
    assert torch.equal(logits, given_logits)
    for i, (params, generated) in enumerate(settings):
        want = expected(logits[i : i + 1], rows[i].history(), params, generated)[0]
        assert_same_cut(result[i], want)
        assert torch.equal(result[i], cut(logits[i : i + 1], [rows[i]])[0]), "rows don't see each other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("candidates", [(4, 200), (64, 1500), (3000,)])
def test_a_nucleus_within_the_candidates_and_beyond(dtype, top_p, candidates, monkeypatch):
    """Sharp rows end within the candidates, flat ones don't; with ties across their border, too."""
    monkeypatch.setattr(cuts, "_CANDIDATES", candidates)
    generator = torch.Generator().manual_seed(len(candidates))
    noise = torch.randn(6, 2000, dtype=dtype, generator=generator)
    logits = noise * torch.tensor([12.0, 4.0, 1.0, 0.1, 8.0, 2.0], dtype=dtype)[:, None]
    logits[4:] = logits[4:].round()
    top_k = [0, 0, 0, 0, 0, 30]
    rows = make_rows([(SamplingParams(top_p=top_p, top_k=k), 0) for k in top_k], 0)
    result = cut(logits, rows)
    sizes = []
    for i, row in enumerate(rows):
        want = expected(logits[i : i + 1], row.history(), row.params, 0)[0]
        assert_same_cut(result[i], want)
        sizes.append(int(want.isfinite().sum()))
    assert sizes[0] < 64 < sizes[3], "a test that takes only one way"


def test_masks_are_made_once():
    forbidden_tokens.cache_clear()
    rows = [
        Row(SamplingParams(allowed_token_ids=(1, 2)), i, 1, lambda: torch.zeros(1, 1), 0) for i in range(3)
    ]
    rows.append(dataclasses.replace(rows[0], params=SamplingParams(allowed_token_ids=(7,))))
    for _ in range(3):
        scores = torch.zeros(4, 9)
        assert not edit(scores, rows)
        assert [row.isfinite().nonzero()[:, 0].tolist() for row in scores] == [[1, 2]] * 3 + [[7]]
    info = forbidden_tokens.cache_info()
    assert (info.misses, info.hits) == (2, 2), "once per distinct tuple, looked up once per row"


def test_an_allowed_token_beyond_the_vocabulary_fails_its_row():
    rows = make_rows([(SamplingParams(allowed_token_ids=(1, 99)), 0), (SamplingParams(), 0)], 0)
    failures = edit(torch.zeros(2, VOCABULARY), rows)
    assert list(failures) == [0]
    assert isinstance(failures[0], SamplerError)
    assert "has token 99; the model's vocabulary ends at 39" in str(failures[0])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, scores: scores[0], r"<lambda> gave \[40\]; expected scores \[1, 40\]"),
        (lambda ids, scores: scores[:, :-1], r"gave \[1, 39\]"),
        (lambda ids, scores: None, "gave NoneType"),
        (
            PrefixConstrainedLogitsProcessor(lambda batch_id, ids: [], 1),
            "ConstrainedLogitsProcessor failed: Val",
        ),
    ],
)
def test_a_processor_that_breaks_its_contract_fails_its_row(processor, message):
    rows = make_rows([(SamplingParams(), 0), (SamplingParams(processors=(processor,)), 0)], 0)
    failures = edit(torch.zeros(2, VOCABULARY), rows)
    assert list(failures) == [1]
    with pytest.raises(SamplerError, match=message):
        raise failures[1]
