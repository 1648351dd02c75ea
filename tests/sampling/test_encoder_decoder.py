"""The local sampler on encoder–decoders: against `generate`, against a plain forward, and against itself."""

import asyncio
import random

import pytest
import torch
from tests.support.encoder_decoder_families import VOCAB, make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from etude.errors import CacheBudgetError, ConfigError, SamplerError
from etude.protocols import Sampler
from etude.runtime.loop import run_sync
from etude.sampling import encoder_decoder
from etude.sampling.encoder_decoder import EncoderDecoderBackend
from etude.sampling.local import LocalSampler
from etude.sampling.solo import SoloBackend
from etude.types import SamplingParams

PACKED = ("t5", "t5-gated", "umt5", "bart", "mbart", "marian", "pegasus")
LLAMA = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
PENALTY = 1.6  # else random models soon repeat one token, and a test of them can't fail


@pytest.fixture(scope="module")
def tokenizer():
    letters = [chr(ord("A") + i) for i in range(VOCAB)]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=letters[0]))
    backend.decoder = decoders.Fuse()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=letters[0], model_max_length=64)


@pytest.fixture(scope="module")
def t5():
    return make("t5-gated")


def sources(count, longest=20, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randrange(3, longest))] for _ in range(count)]


def generate(model, source, new_tokens):
    out = model.generate(
        torch.tensor([source]),
        attention_mask=torch.ones(1, len(source), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=PENALTY,
        forced_eos_token_id=None,
    )
    return out[0].tolist()


def sample_all(sampler, given, params, seeds=None):
    each = [params] * len(given) if isinstance(params, SamplingParams) else params

    async def one(i):
        session = sampler.session(seed=i if seeds is None else seeds[i], source_ids=given[i])
        result = await session.sample(sampler.decoder_start, each[i])
        session.close()
        return result

    async def every():
        return await asyncio.gather(*(one(i) for i in range(len(given))))

    return run_sync(every())


def greedy(new_tokens):
    return SamplingParams(max_new_tokens=new_tokens, temperature=0, repetition_penalty=PENALTY)


def logits_of(model, source, ids):
    return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_equals_generate(family, dtype, tokenizer):
    model = make(family, dtype)
    given = sources(9)
    lengths = [3 + 2 * i for i in range(9)]
    expected = [generate(model, *pair) for pair in zip(given, lengths, strict=True)]
    assert len({token for tokens in expected for token in tokens}) > 12, "the model repeats itself"
    sampler = LocalSampler(model, tokenizer, slots=4)
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler._backend, EncoderDecoderBackend)
    results = sample_all(sampler, given, [greedy(n) for n in lengths])
    assert [[*sampler.decoder_start, *result.token_ids] for result in results] == expected


@pytest.mark.parametrize("family", ["m2m100", "led"])
def test_a_decoder_that_cannot_be_packed_is_run_row_by_row(family, tokenizer):
    model = make(family)
    given = sources(4)
    expected = [generate(model, source, 12) for source in given]
    assert len({token for tokens in expected for token in tokens}) > 15
    sampler = LocalSampler(model, tokenizer, slots=3)
    assert isinstance(sampler._backend, SoloBackend)
    results = sample_all(sampler, given, greedy(12))
    assert [[*sampler.decoder_start, *result.token_ids] for result in results] == expected


@pytest.mark.parametrize("family", ["t5-gated", "bart"])
def test_log_probabilities_are_those_of_a_forward(family, tokenizer):
    model = make(family)
    sampler = LocalSampler(model, tokenizer, slots=3)
    given = sources(5)
    params = SamplingParams(max_new_tokens=15, temperature=0.7)
    for source, result in zip(given, sample_all(sampler, given, params), strict=True):
        start = list(sampler.decoder_start)
        scores = logits_of(model, source, start + result.token_ids[:-1])[len(start) - 1 :] / 0.7
        expected = scores.log_softmax(-1).gather(-1, torch.tensor(result.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs, dtype=expected.dtype), expected)


def test_what_is_sampled_does_not_depend_on_who_else_is_there(t5, tokenizer):
    given = sources(8)
    params = SamplingParams(max_new_tokens=20)
    together = sample_all(LocalSampler(t5, tokenizer, slots=8), given, params)
    assert len({token for result in together for token in result.token_ids}) > 40
    for i in (0, 5):
        alone = sample_all(LocalSampler(t5, tokenizer, slots=1), [given[i]], params, seeds=[i])
        assert alone[0].token_ids == together[i].token_ids


def test_a_source_is_encoded_once_for_a_group(t5, tokenizer):
    sampler = LocalSampler(t5, tokenizer, slots=3)  # some of the group come when others have left
    first, second = sources(2)
    results = sample_all(sampler, [first] * 5 + [second] * 2, SamplingParams(max_new_tokens=9))
    assert sampler._backend.sources_encoded == 2
    assert len({tuple(result.token_ids) for result in results[:5]}) == 5
    again = sample_all(LocalSampler(t5, tokenizer), [first], SamplingParams(max_new_tokens=9), seeds=[4])
    assert again[0].token_ids == results[4].token_ids


def test_sources_that_wait_are_read_ahead_and_anew_after_the_weights_changed(tokenizer, monkeypatch):
    model, read = make("t5-gated"), []

    def spy(model, given, encode=encoder_decoder.encode):
        read.append(len(given))
        return encode(model, given)

    monkeypatch.setattr(encoder_decoder, "encode", spy)
    given = sorted(sources(5), key=len)  # as they are played
    sampler = LocalSampler(model, tokenizer, slots=1)
    read.clear()

    async def one(i):
        session = sampler.session(seed=i, source_ids=given[i])
        result = await session.sample(sampler.decoder_start, greedy(8))
        session.close()
        if i == 1:
            with torch.no_grad():
                for parameter in model.encoder.parameters():
                    parameter.mul_(1.5)
        return result.token_ids

    async def every():
        return await asyncio.gather(*map(one, range(5)))

    played = run_sync(every())
    assert read == [5, 3], "all that wait, and what is left of them by the new weights"
    changed = sample_all(LocalSampler(model, tokenizer, slots=1), given, greedy(8))
    same = [result.token_ids == tokens for result, tokens in zip(changed, played, strict=True)]
    assert same[2:] == [True] * 3
    assert same[:2] != [True] * 2, "the weights make a difference"


@pytest.mark.parametrize("family", ["t5-gated", "bart"])
def test_a_session_goes_on_from_what_it_is_given(family, tokenizer):
    """A tool's answer is fed to the decoder; only what is new is computed."""
    model = make(family)
    sampler = LocalSampler(model, tokenizer, slots=4)
    given = sources(3)
    start = list(sampler.decoder_start)

    async def talk(source):
        session = sampler.session(seed=0, source_ids=source)
        first = await session.sample(start, greedy(4))
        second = await session.sample([5, 6, 7], greedy(6))
        session.close()
        return [*start, *first.token_ids, 5, 6, 7], second.token_ids

    async def all_of_them():
        return await asyncio.gather(*map(talk, given))

    for source, (before, answered) in zip(given, run_sync(all_of_them()), strict=True):
        ids = list(before)
        for token in answered:
            scores = logits_of(model, source, ids)[-1]
            seen = torch.tensor(sorted(set(ids)))
            scores[seen] = torch.where(scores[seen] > 0, scores[seen] / PENALTY, scores[seen] * PENALTY)
            assert int(scores.argmax()) == token
            ids.append(token)
    fed = sum(len(start) + 4 + 3 + 6 - 1 for _ in given)
    assert sampler.tokens_fed == fed


def test_sources_are_read_again_by_new_weights(tokenizer):
    model = make("bart")
    sampler = LocalSampler(model, tokenizer, slots=4)
    given = sources(3)

    async def across():
        session = sampler.session(seed=0, source_ids=given[0])
        first = await session.sample(sampler.decoder_start, greedy(5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        second = await session.sample([8], greedy(6))
        session.close()
        return first, second

    first, second = run_sync(across())
    assert (first.policy_version, second.policy_version) == (0, 1)
    fresh = LocalSampler(model, tokenizer)
    before = [*fresh.decoder_start, *first.token_ids, 8]

    async def anew():
        return await fresh.session(seed=0, source_ids=given[0]).sample(before, greedy(6))

    assert run_sync(anew()).token_ids == second.token_ids
    changed = sample_all(sampler, given, greedy(8))
    expected = sample_all(fresh, given, greedy(8))
    assert [r.token_ids for r in changed] == [r.token_ids for r in expected]


def test_little_memory_changes_nothing_but_time(t5, tokenizer):
    given = sources(8)
    expected = sample_all(LocalSampler(t5, tokenizer), given, greedy(20))
    plenty = LocalSampler(t5, tokenizer, max_length=24, max_source_length=24)
    least = plenty.limits.cost.of_session(24)
    sampler = LocalSampler(t5, tokenizer, max_length=24, max_source_length=24, cache_bytes=3 * least)
    results = sample_all(sampler, given, greedy(20))
    assert sampler.held_bytes <= 3 * least
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]


def test_slots_close_up_with_their_sources(t5, tokenizer):
    """Early ones leave, late ones move down, and go on from the source they had."""
    given = sources(6)
    lengths = [2, 30, 3, 30, 2, 30]
    expected = [generate(t5, *pair) for pair in zip(given, lengths, strict=True)]
    sampler = LocalSampler(t5, tokenizer, slots=6)
    results = sample_all(sampler, given, [greedy(n) for n in lengths])
    assert [[*sampler.decoder_start, *result.token_ids] for result in results] == expected


def test_the_same_decoder_tokens_behind_other_sources_are_not_shared(t5, tokenizer):
    given = sources(2)
    prefix = list(range(5, 45))
    sampler = LocalSampler(t5, tokenizer, slots=2)

    async def every():
        sessions = [sampler.session(seed=0, source_ids=source) for source in given]
        start = [*sampler.decoder_start, *prefix]
        return await asyncio.gather(*(session.sample(start, greedy(3)) for session in sessions))

    for source, result in zip(given, run_sync(every()), strict=True):
        scores = logits_of(t5, source, [*sampler.decoder_start, *prefix])[-1]
        expected = float(scores.log_softmax(-1)[result.token_ids[0]].detach())
        assert result.logprobs[0] == pytest.approx(expected)
    assert sampler.tokens_copied == 0


def test_deterministic_sampling_is_the_same_to_the_last_bit(tokenizer):
    model = make("t5-gated", torch.float32)
    given = sources(5)
    params = SamplingParams(max_new_tokens=12)
    together = sample_all(LocalSampler(model, tokenizer, deterministic=True), given, params)
    alone = sample_all(LocalSampler(model, tokenizer, deterministic=True), given[3:4], params, seeds=[3])
    assert alone[0].logprobs == together[3].logprobs


def test_what_the_decoder_begins_with_is_the_models(tokenizer):
    model = make("bart")
    model.generation_config.forced_bos_token_id = 2
    assert LocalSampler(model, tokenizer).decoder_start == (1, 2)
    [result] = sample_all(LocalSampler(model, tokenizer), sources(1), greedy(6))
    assert [1, 2, *result.token_ids] == generate(model, sources(1)[0], 7)


def test_wrong_uses_say_so(t5, tokenizer):
    sampler = LocalSampler(t5, tokenizer, max_source_length=8)
    with pytest.raises(SamplerError, match="needs source_ids"):
        sampler.session(seed=0)
    with pytest.raises(CacheBudgetError, match="to read 9 tokens, at most 8"):
        sample_all(sampler, [[3] * 9], greedy(2))
    with pytest.raises(ConfigError, match="encoder–decoder"):
        LocalSampler(t5, tokenizer, cuda_graphs=True)
    with pytest.raises(SamplerError, match="a decoder alone"):
        LocalSampler(LlamaForCausalLM(LlamaConfig(**LLAMA, num_attention_heads=2)).eval(), tokenizer).session(
            seed=0, source_ids=[1]
        )


def test_without_a_limit_of_its_own_the_tokenizers_holds(t5, tokenizer):
    sampler = LocalSampler(t5, tokenizer)
    assert (sampler.max_length, sampler.max_source_length) == (64, 64)
    assert LocalSampler(make("bart"), tokenizer).max_source_length == 96
    assert LocalSampler(t5, tokenizer, max_length=2000).max_length == 2000
