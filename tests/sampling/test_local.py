"""The local sampler against `generate` and against a plain forward, on random models."""

import asyncio

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from etude.errors import CacheBudgetError, SamplerError
from etude.models import cached_attention
from etude.protocols import Sampler
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.sampling.packed import PackedBackend
from etude.sampling.solo import SoloBackend
from etude.types import SamplingParams

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
}
GPT = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=5)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)),
}


def make_model(family: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype).eval()


@pytest.fixture(scope="module")
def tokenizer():
    letters = [chr(ord("A") + i) for i in range(VOCAB)]
    tok = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=letters[0]))
    tok.decoder = decoders.Fuse()
    tok.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token=letters[0])


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def prompts(n: int, longest: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generate(model, ids, new_tokens):
    """The greedy continuation that `transformers` gives."""
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)  # else token 0, which is as good as any, would be taken for padding
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


async def sample_all(sampler, token_lists, params, seeds=None):
    sessions = [sampler.session(seed=i if seeds is None else seeds[i]) for i in range(len(token_lists))]
    results = await asyncio.gather(
        *(s.sample(ids, params) for s, ids in zip(sessions, token_lists, strict=True))
    )
    for session in sessions:
        session.close()
    return results


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_equals_generate(family, dtype, tokenizer):
    model = make_model(family, dtype)
    queries = prompts(9)
    expected = [generate(model, ids, 14) for ids in queries]  # before the sampler touches the model
    assert len({token for tokens in expected for token in tokens}) > 10, (
        "the model repeats itself: a test that can't fail"
    )
    sampler = LocalSampler(model, tokenizer, slots=4, prefill_tokens=7)
    assert isinstance(sampler, Sampler)
    results = run_sync(sample_all(sampler, queries, SamplingParams(max_new_tokens=14, temperature=0)))
    assert [r.token_ids for r in results] == expected
    assert generate(model, queries[0], 14) == expected[0], "generate still works on the sampler's model"


def test_backends_are_chosen_by_what_the_model_can_do(tokenizer):
    assert isinstance(LocalSampler(make_model("llama"), tokenizer)._backend, PackedBackend)
    assert isinstance(LocalSampler(make_model("gptj"), tokenizer)._backend, SoloBackend)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward(llama, tokenizer, temperature):
    queries = prompts(5)
    sampler = LocalSampler(llama, tokenizer, slots=3)
    params = SamplingParams(max_new_tokens=10, temperature=temperature)
    for ids, result in zip(queries, run_sync(sample_all(sampler, queries, params)), strict=True):
        full = torch.tensor([ids + result.token_ids])
        with torch.no_grad():
            logits = llama(full).logits[0, len(ids) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(-1, full[0, len(ids) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs, dtype=torch.float64), expected)
        assert result.sampling_logprobs == result.logprobs


def test_turns_continue_from_the_cache(llama, tokenizer):
    """Two turns with tool tokens between them equal one fresh pass over the whole history."""
    sampler = LocalSampler(llama, tokenizer, slots=2)
    params = SamplingParams(max_new_tokens=6, temperature=0)

    async def play():
        session = sampler.session(seed=0)
        first = await session.sample([1, 2, 3], params)
        fed = sampler.tokens_fed
        second = await session.sample([9, 8], params)
        return first.token_ids, second.token_ids, sampler.tokens_fed - fed

    first, second, fed = run_sync(play())
    history = [1, 2, 3, *first, 9, 8]
    assert second == generate(llama, history, 6)
    assert fed == 3 + 5, "the last sampled token, two new ones, and five of the turn: the rest was kept"


def test_shared_beginnings_are_computed_and_read_once(llama, tokenizer, monkeypatch):
    read_once = [0]

    def spy(q, keys, values, group, scaling, attend=cached_attention._attend_after_prefix):
        read_once.append(len(group.members))
        return attend(q, keys, values, group, scaling)

    monkeypatch.setattr(cached_attention, "_attend_after_prefix", spy)
    preamble = prompts(1)[0] + list(range(40))
    queries = [[*preamble, 7, 8], [*preamble, 7, 8], [*preamble, 9], [*preamble, 3, 4, 5], [1, 2]]
    params = SamplingParams(max_new_tokens=6)
    sampler = LocalSampler(llama, tokenizer, slots=8)
    together = run_sync(sample_all(sampler, queries, params))
    assert max(read_once) >= 3, "rows of the family were decoded over one reading of what they share"
    fed, copied = sampler.tokens_fed, sampler.tokens_copied
    assert copied == 3 * len(preamble)
    assert fed == sum(map(len, queries)) - copied + 5 * 5
    alone = LocalSampler(llama, tokenizer, slots=1)
    for i, (query, result) in enumerate(zip(queries, together, strict=True)):
        [expected] = run_sync(sample_all(alone, [query], params, seeds=[i]))
        assert result.token_ids == expected.token_ids
        assert result.logprobs == pytest.approx(expected.logprobs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_optimizer_step_is_noticed(tokenizer, dtype):
    """A session that stays open over an update goes on with the new weights, and none of the old cache."""
    model = make_model("llama", dtype)
    sampler = LocalSampler(model, tokenizer, slots=1)
    params = SamplingParams(max_new_tokens=6, temperature=0)

    async def play():
        session = sampler.session(seed=0)
        first = await session.sample([1, 2, 3], params)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.7)
        second = await session.sample([9], params)
        return first, second

    first, second = run_sync(play())
    assert (first.policy_version, second.policy_version) == (0, 1)
    assert second.token_ids == generate(model, [1, 2, 3, *first.token_ids, 9], 6)


def test_linear_layers_are_prepacked_where_they_can_be(tokenizer):
    assert LocalSampler(make_model("llama"), tokenizer)._linears is None, "oneDNN has no float64"
    model = make_model("llama", torch.float32)
    sampler = LocalSampler(model, tokenizer)
    assert sampler._linears is not None
    assert LocalSampler(model, tokenizer, prepack=False)._linears is None
    [packed] = run_sync(sample_all(sampler, [[1, 2, 3]], SamplingParams(max_new_tokens=5)))
    plain = LocalSampler(model, tokenizer, prepack=False)
    [expected] = run_sync(sample_all(plain, [[1, 2, 3]], SamplingParams(max_new_tokens=5)))
    assert packed.token_ids == expected.token_ids
    assert packed.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_sessions_close_up_when_slots_become_free(llama, tokenizer):
    """What is left of a draining batch lies in the lowest slots, and goes on there as if nothing were."""
    sampler = LocalSampler(llama, tokenizer, slots=4)
    lengths = [3, 5, 4, 20]

    async def play():
        sessions = [sampler.session(seed=i) for i in range(4)]
        slots = []

        async def one(session, length):
            result = await session.sample([5, 6], SamplingParams(max_new_tokens=length))
            slots.append(session.slot)
            session.close()
            return result

        return await asyncio.gather(*map(one, sessions, lengths)), slots

    results, slots = run_sync(play())
    assert slots == [0, 2, 1, 0], "the longest moved from slot 3 to slot 0 when that became free"
    for seed, (result, length) in enumerate(zip(results, lengths, strict=True)):
        alone = LocalSampler(llama, tokenizer, slots=1)
        [expected] = run_sync(
            sample_all(alone, [[5, 6]], SamplingParams(max_new_tokens=length), seeds=[seed])
        )
        assert result.token_ids == expected.token_ids


def test_those_that_wait_go_by_length_and_latecomers_after_them(llama, tokenizer):
    """Rows of a step are padded to the longest of them. Nobody is overtaken by who comes while he waits."""
    sampler = LocalSampler(llama, tokenizer, slots=1)
    ended = []

    async def one(length):
        session = sampler.session(seed=length)
        await session.sample([1] * length, SamplingParams(max_new_tokens=2))
        ended.append(length)
        session.close()
        if length == 3:
            await asyncio.gather(one(2), one(1))

    async def play():
        await asyncio.gather(*map(one, [9, 3, 6, 12]))

    run_sync(play())
    assert ended == [3, 6, 9, 12, 1, 2]


def test_more_sessions_than_slots_all_waiting_for_tools(llama, tokenizer):
    """Idle sessions hold every slot: one is evicted and rebuilt, nobody waits for ever."""
    sampler = LocalSampler(llama, tokenizer, slots=2)
    params = SamplingParams(max_new_tokens=4)

    async def play():
        sessions = [sampler.session(seed=i) for i in range(5)]
        first = [await s.sample([i + 1], params) for i, s in enumerate(sessions)]
        second = [await s.sample([7], params) for s in sessions]
        return [(a.token_ids, b.token_ids) for a, b in zip(first, second, strict=True)]

    roomy = LocalSampler(llama, tokenizer, slots=5)
    expected = []
    for i in range(5):

        async def alone(i=i):
            session = roomy.session(seed=i)
            a = await session.sample([i + 1], params)
            return a.token_ids, (await session.sample([7], params)).token_ids

        expected.append(run_sync(alone()))
    assert run_sync(play()) == expected


def test_a_slow_tool_gives_its_slot_up_while_others_run(llama, tokenizer):
    sampler = LocalSampler(llama, tokenizer, slots=2)
    ended = []

    async def episode(name, tokens):
        session = sampler.session(seed=ord(name))
        await session.sample([ord(name) % VOCAB], SamplingParams(max_new_tokens=tokens))
        ended.append(name)
        return session

    async def play():
        waiting_for_its_tool = await episode("a", 2)
        await asyncio.gather(episode("b", 60), episode("c", 3))
        assert waiting_for_its_tool.slot is None
        return await waiting_for_its_tool.sample([5], SamplingParams(max_new_tokens=4))

    again = run_sync(play())
    assert ended == ["a", "c", "b"], "c didn't wait for b's sixty tokens"
    alone = LocalSampler(llama, tokenizer, slots=1)

    async def undisturbed():
        session = alone.session(seed=ord("a"))
        await session.sample([ord("a") % VOCAB], SamplingParams(max_new_tokens=2))
        return await session.sample([5], SamplingParams(max_new_tokens=4))

    assert again.token_ids == run_sync(undisturbed()).token_ids


def test_stop_strings_eos_and_length(llama, tokenizer):
    sampler = LocalSampler(llama, tokenizer, slots=4)
    query = prompts(1)[0]
    free = run_sync(sample_all(sampler, [query], SamplingParams(max_new_tokens=20)))[0]
    assert free.finish == "length"
    assert len(free.token_ids) == 20
    stop = free.text[4:6]
    stopped = run_sync(sample_all(sampler, [query], SamplingParams(max_new_tokens=20, stop=(stop,))))[0]
    assert stopped.finish == "stop"
    assert stopped.text == free.text[: free.text.index(stop) + 2]
    eos = free.token_ids[7]
    first = free.token_ids.index(eos)
    ended = run_sync(sample_all(sampler, [query], SamplingParams(max_new_tokens=20, eos_token_ids=(eos,))))[0]
    assert ended.finish == "eos"
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.text == free.text[:first]
    later = SamplingParams(max_new_tokens=20, eos_token_ids=(eos,), min_new_tokens=first + 2)
    assert len(run_sync(sample_all(sampler, [query], later))[0].token_ids) >= first + 2


def test_bad_requests_say_what_to_do(llama, tokenizer):
    sampler = LocalSampler(llama, tokenizer, slots=1, max_length=8)
    with pytest.raises(CacheBudgetError, match="shorten the prompt"):
        run_sync(sample_all(sampler, [[1] * 8], SamplingParams()))
    with pytest.raises(SamplerError, match="at least one token"):
        run_sync(sample_all(sampler, [[]], SamplingParams()))
    with pytest.raises(CacheBudgetError, match="at least 1"):
        LocalSampler(llama, tokenizer, slots=0)
    short = run_sync(sample_all(sampler, [[1] * 5], SamplingParams(max_new_tokens=50)))[0]
    assert short.finish == "length"
    assert len(short.token_ids) == 3


def test_a_failing_step_reaches_every_turn(llama, tokenizer):
    def broken(module, inputs):
        raise ZeroDivisionError("in the forward")

    async def outcomes():
        sessions = [sampler.session(seed=i) for i in range(3)]
        turns = (session.sample([i + 1], SamplingParams()) for i, session in enumerate(sessions))
        return await asyncio.gather(*turns, return_exceptions=True)

    sampler = LocalSampler(llama, tokenizer, slots=2)
    hook = llama.lm_head.register_forward_pre_hook(broken)
    try:
        errors = run_sync(outcomes())
    finally:
        hook.remove()
    assert [type(error) for error in errors] == [SamplerError] * 3
    assert all("in the forward" in str(error) for error in errors)
    assert run_sync(sample_all(sampler, [[1]], SamplingParams(max_new_tokens=2)))[0].token_ids


def test_a_cancelled_turn_leaves(llama, tokenizer):
    sampler = LocalSampler(llama, tokenizer, slots=1)

    async def play():
        slow = asyncio.create_task(sampler.session(seed=0).sample([1, 2], SamplingParams(max_new_tokens=80)))
        for _ in range(5):
            await asyncio.sleep(0)
        slow.cancel()
        return await sampler.session(seed=1).sample([3], SamplingParams(max_new_tokens=2))

    assert len(run_sync(play()).token_ids) == 2


def test_a_session_closed_in_mid_turn_fails_its_turn_only(llama, tokenizer):
    sampler = LocalSampler(llama, tokenizer, slots=2)
    params = SamplingParams(max_new_tokens=30)

    async def play():
        closed = sampler.session(seed=0)
        turns = [asyncio.create_task(s.sample([1, 2], params)) for s in (closed, sampler.session(seed=1))]
        for _ in range(5):
            await asyncio.sleep(0)
        closed.close()
        with pytest.raises(SamplerError, match="closed while it sampled"):
            await turns[0]
        return await turns[1]

    assert len(run_sync(play()).token_ids) == 30


def test_run_sync_inside_a_running_loop(llama, tokenizer):
    sampler = LocalSampler(llama, tokenizer)

    async def notebook_cell():
        return run_sync(sample_all(sampler, [[1]], SamplingParams(max_new_tokens=3)))

    assert len(asyncio.run(notebook_cell())[0].token_ids) == 3
