"""Turns with processors, masks, penalties and forced prefixes: as `generate` or a plain forward has them."""

import asyncio

import pytest
import torch
from transformers import LogitsProcessorList

from etude.errors import SamplerError
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.sampling.params import sampling_params
from etude.types import SamplingParams


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(dtype=torch.float64)


@pytest.fixture
def sampler(model, tokenizer):
    return LocalSampler(model, tokenizer, slots=3, prefill_tokens=7)


def sample_each(sampler, queries, params, seeds=None):
    """One turn per query, all at once; exceptions are returned."""

    async def every():
        sessions = [sampler.session(seed=seed) for seed in seeds or range(len(queries))]
        turns = (s.sample(query, p) for s, query, p in zip(sessions, queries, params, strict=True))
        return await asyncio.gather(*turns, return_exceptions=True)

    return run_sync(every())


def add_what_was_there(ids, scores):
    scores[0, ids[0] % 7] += 0.5
    return scores


def three_after(batch_id, ids):
    assert batch_id == 0
    return [(int(ids[-1]) + i) % 50 for i in (1, 5, 9)]


@pytest.mark.parametrize(
    "keywords",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"prefix_allowed_tokens_fn": three_after},
        {"bad_words_ids": [[16], [31, 38], [23, 14, 54]]},
        {"logits_processor": LogitsProcessorList([add_what_was_there])},
        {"min_new_tokens": 9, "eos_token_id": list(range(30))},
        {"repetition_penalty": 1.4, "prefix_allowed_tokens_fn": three_after, "bad_words_ids": [[9]]},
    ],
    ids=lambda keywords: "+".join(keywords),
)
def test_greedy_equals_generate(model, sampler, tokenizer, keywords):
    queries = [[4, 8, 15], [16], [23, 42, 4, 8, 1, 2], [30, 31]]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **keywords}
    turns = sample_each(sampler, queries, [sampling_params(settings, tokenizer)] * 4)
    for query, turn in zip(queries, turns, strict=True):
        ids = torch.tensor([query])
        settings = {**settings, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        assert turn.token_ids == model.generate(ids, **settings)[0, len(query) :].tolist()
    free = sampling_params({"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}, tokenizer)
    plain = sample_each(sampler, queries, [free] * 4)
    assert [turn.token_ids for turn in plain] != [turn.token_ids for turn in turns], "they change nothing"


def test_allowed_tokens(sampler):
    allowed = (3, 17, 40)
    params = [SamplingParams(max_new_tokens=30, allowed_token_ids=allowed), SamplingParams(max_new_tokens=30)]
    constrained, free = sample_each(sampler, [[1, 2], [1, 2]], params, seeds=[5, 5])
    assert set(constrained.token_ids) == set(allowed)
    assert not set(free.token_ids) <= set(allowed)
    assert all(s > b for s, b in zip(constrained.sampling_logprobs, constrained.logprobs, strict=True))


def broken(ids, scores):
    if ids.shape[1] == 6:
        raise ZeroDivisionError("at six")
    return scores


class Swallow:
    def __call__(self, ids, scores):
        return scores * torch.nan


def test_a_failing_processor_fails_its_own_turn(sampler):
    queries = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11], [12]]
    free = SamplingParams(max_new_tokens=9)
    expected = sample_each(sampler, queries, [free] * 5)
    each = [
        free,
        SamplingParams(max_new_tokens=9, processors=(broken,)),
        free,
        SamplingParams(max_new_tokens=9, processors=(Swallow(),)),
        SamplingParams(max_new_tokens=9, allowed_token_ids=(1, 10_000)),
    ]
    results = sample_each(sampler, queries, each)
    for i in (0, 2):
        assert results[i].token_ids == expected[i].token_ids
    assert all(isinstance(results[i], SamplerError) for i in (1, 3, 4))
    assert "broken failed: ZeroDivisionError('at six')" in str(results[1])
    assert isinstance(results[1].__cause__, ZeroDivisionError)
    assert "after the logits processor Swallow the scores" in str(results[3])
    assert "has token 10000" in str(results[4])
    again = sample_each(sampler, queries[:1], [free])[0]
    assert again.token_ids == expected[0].token_ids


def test_a_forced_prefix_is_the_turn_s_but_not_sampled(model, sampler, tokenizer):
    """Several turns at once, with and without a prefix: as if the prefix had been in the prompt."""
    prefix = tuple(tokenizer.encode("abc<call>"))
    queries = [[4, 8, 15, 16, 23], [42], [4, 8]]
    forced = SamplingParams(max_new_tokens=14, forced_prefix=prefix)
    free = SamplingParams(max_new_tokens=10)
    turns = sample_each(sampler, queries, [forced, free, forced])
    same = sample_each(sampler, [[*queries[0], *prefix], queries[1], [*queries[2], *prefix]], [free] * 3)
    fed = sampler.steps
    for query, turn, plain in zip(queries, turns, same, strict=True):
        n = turn.forced
        assert turn.token_ids[n:] == plain.token_ids
        assert turn.text == turn.forced_text + plain.text == tokenizer.decode(turn.token_ids)
        logits = model(torch.tensor([query + turn.token_ids])).logits[0, len(query) + n - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(turn.token_ids[n:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(turn.logprobs, dtype=torch.float64), chosen.detach())
    assert [turn.forced for turn in turns] == [4, 0, 4]
    assert turns[0].forced_text == "abc<call>"
    assert [segment.sampled for segment in turns[0].segments()] == [False, True]
    assert [segment.text for segment in turns[0].segments()] == ["abc<call>", same[0].text]
    assert [segment.sampled for segment in turns[1].segments()] == [True]
    sample_each(sampler, queries[:1], [SamplingParams(max_new_tokens=5, forced_prefix=prefix)])
    assert sampler.steps - fed == 2, "nine tokens in two steps: the prefix is fed with the prompt"


def test_what_ends_a_turn_sees_its_forced_beginning(sampler, tokenizer):
    prefix = tuple(tokenizer.encode("ab"))
    after = sample_each(sampler, [[1]], [SamplingParams(max_new_tokens=6, forced_prefix=prefix)])[0]
    across = "b" + tokenizer.decode(after.token_ids[2:3])
    ends = [
        SamplingParams(max_new_tokens=6, forced_prefix=prefix, stop=(across,)),
        SamplingParams(max_new_tokens=6, forced_prefix=prefix, stop=("ab",)),
        SamplingParams(max_new_tokens=6, forced_prefix=prefix, stop=("a",)),
        SamplingParams(max_new_tokens=6, forced_prefix=prefix, eos_token_ids=prefix[1:]),
    ]
    turns = sample_each(sampler, [[1]] * 4, ends, seeds=[0] * 4)
    assert [turn.finish for turn in turns] == ["stop", "stop", "stop", "eos"]
    assert [turn.text for turn in turns] == ["a" + across, "ab", "a", "a"]
    assert [turn.forced for turn in turns] == [2, 2, 1, 2]
    assert [len(turn.logprobs) for turn in turns] == [1, 0, 0, 0]
    assert [segment.sampled for segment in turns[1].segments()] == [False]


def test_forced_tokens_take_room(model, tokenizer):
    sampler = LocalSampler(model, tokenizer, slots=1, max_length=8)
    long = SamplingParams(max_new_tokens=50, forced_prefix=(1, 2, 3))
    fits, too_long, unknown = sample_each(
        sampler,
        [[1] * 4, [1] * 5, [1]],
        [long, long, SamplingParams(forced_prefix=(1, 999))],
    )
    assert (fits.finish, len(fits.token_ids), len(fits.logprobs)) == ("length", 4, 1)
    assert "the session has 8 tokens" in str(too_long)
    assert "forced_prefix has token 999" in str(unknown)


def test_a_later_turn_may_be_forced_too(sampler, tokenizer):
    """The session's cache holds the first turn; only the rest and the prefix are fed."""
    params = SamplingParams(max_new_tokens=5, forced_prefix=(7, 8), temperature=0)

    async def two_turns():
        session = sampler.session(seed=3)
        first = await session.sample([1, 2, 3], params)
        second = await session.sample([4], params)
        return first, second

    first, second = run_sync(two_turns())
    whole = [1, 2, 3, *first.token_ids, 4, 7, 8]
    plain = sample_each(sampler, [whole], [SamplingParams(max_new_tokens=3, temperature=0)])[0]
    assert second.token_ids == [7, 8, *plain.token_ids]
