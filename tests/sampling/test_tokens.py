"""Steps of single tokens: each is told its slot and position; prompts go beside rows that decode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Textless, random_prompts, static_model

from etude.models.attention import install
from etude.sampling.feeds import Feed
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.packed import PackedBackend
from etude.sampling.tokens import LEAST, MOST, TokenBackend
from etude.types import SamplingParams


def token_backend(model, slots=4, length=128):
    install(model)
    backend = TokenBackend(PackedBackend(model))
    backend.resize(slots, length, kept=[])
    return backend


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "gemma2"])
def test_steps_of_tokens_sample_what_packed_ones_do(name):
    model = static_model(name, torch.float64)
    queries = random_prompts(9, longest=70)
    params = SamplingParams(max_new_tokens=24)
    expected = continue_all(LocalSampler(model, Textless(), slots=4), queries, params, seeds=range(9))
    sampler = LocalSampler(model, Textless(), slots=4)
    sampler._backend = token_backend(model, length=sampler._slots.length)
    turns = continue_all(sampler, queries, params, seeds=range(9))
    assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
    for turn, other in zip(turns, expected, strict=True):
        assert turn.logprobs == pytest.approx(other.logprobs, rel=1e-9)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_mix_of_feeds_gives_the_packed_logits(data):
    """Sizes on both sides of those that are captured, slots in any order."""
    model = static_model("llama", torch.float64)
    ours, theirs = token_backend(model, length=MOST + 64), token_backend(model, length=MOST + 64).packed
    past = [0] * 4
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for _ in range(3):
        slots = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        counts = [data.draw(st.sampled_from([1, 1, 2, LEAST - 1, LEAST + 1])) for _ in slots]
        feeds = [
            Feed(slot, past[slot], torch.randint(0, 61, (count,), generator=generator).tolist())
            for slot, count in zip(slots, counts, strict=True)
        ]
        logits = ours.logits(feeds)
        assert logits.shape == (len(feeds), 61)
        torch.testing.assert_close(logits, theirs.logits(feeds), rtol=1e-9, atol=1e-9)
        for feed in feeds:
            past[feed.slot] = feed.end


def test_a_step_is_launched_before_the_last_one_is_known():
    model = static_model("llama", torch.float64)
    sampler, order = LocalSampler(model, Textless(), slots=4), []
    sampler._backend = token_backend(model, length=sampler._slots.length)
    launch, land = sampler._launch, sampler._land

    def launched(*args):
        order.append("launch")
        return launch(*args)

    def landed():
        order.extend(["land"] * (sampler._flight is not None))
        land()

    sampler._launch, sampler._land = launched, landed
    plain, bound = SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=4, repetition_penalty=1.1)
    continue_all(sampler, [[1, 2]], plain, seeds=[1])
    assert order == ["launch", "launch", "land", "launch", "land", "launch", "land", "land"]
    order.clear()
    continue_all(sampler, [[1, 2]], bound, seeds=[1])
    assert order == ["launch", "land"] * 4, "the next draw depends on this token"


@torch.no_grad()
def test_large_steps_are_packed():
    model = static_model("llama", torch.float64)
    model.config.max_position_embeddings = 2 * MOST
    backend = token_backend(model, length=MOST + 8)
    backend.step.fill = lambda *_: pytest.fail("a large step was fed token by token")
    assert backend.logits([Feed(0, 0, [5] * (MOST + 1))]).shape == (1, 61)


@torch.no_grad()
def test_idle_tokens_write_nothing():
    model = static_model("llama", torch.float64)
    backend = token_backend(model)
    backend.logits([Feed(0, 0, [1, 2, 3]), Feed(3, 0, [4])])
    before = [tensor.clone() for layer in backend.step.cache.layers.values() for tensor in layer]
    backend.logits([Feed(2, 0, [7])])
    after = [tensor for layer in backend.step.cache.layers.values() for tensor in layer]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 1, 3]], new[[0, 1, 3]])
        assert not new[2, :, 0].eq(0).all()
        assert new[2, :, 1:].eq(0).all()
