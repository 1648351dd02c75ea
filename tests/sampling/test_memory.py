"""Bytes of the cache: known before the first turn, and kept to whatever comes."""

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from etude.environments.text import TextEnvironment
from etude.errors import CacheBudgetError, ConfigError
from etude.models.slot_cache import SlotCache
from etude.runtime.loop import run_sync
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.memory import FIRST_LENGTH, CacheCost, CacheLimits, format_size, parse_size
from etude.trainers.ppo_config import PPOConfig
from etude.types import SamplingParams

VOCAB = 53
LENGTH = 1024
COMMON = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
WIDE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}
GPT = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "initializer_range": 0.3}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "conv_kernel": 4}
# name -> (model, bytes of keys and values per token, in float32)
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**WIDE)), 2 * 2 * 2 * 8 * 4),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT)), 2 * 2 * 32 * 4),
    "gptj": (lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)), 2 * 2 * 32 * 4),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**COMMON, **STATE)), 0),
}


class Mute:
    """A tokenizer for tests that look at ids only."""

    def decode(self, ids, **_):
        return ""


def build(name="llama", dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).eval()


def queries_of(lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("1.5 kib", 1536),
        ("2GB", 2 * 10**9),
        ("3 MB", 3_000_000),
    ],
)
def test_sizes_are_read(text, amount):
    assert parse_size(text) == amount


@pytest.mark.parametrize("text", ["", "GiB", "2 apples", 0, -3, True, "-1GiB", "1e9x"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ConfigError, match="expected bytes or a text"):
        parse_size(text)


def test_sizes_are_written():
    written = [format_size(n) for n in (17, 6 * 1024, 192 << 20, 3 << 29, 5000 << 30)]
    assert written == ["17 B", "6.0 KiB", "192 MiB", "1.5 GiB", "5,000 GiB"]


@given(
    slots=st.integers(1, 40),
    max_length=st.integers(1, 5000),
    cost=st.builds(CacheCost, st.integers(1, 1000), st.integers(0, 100), st.integers(0, 5000)),
    extra=st.floats(0, 60),
    needs=st.lists(st.integers(1, 5000), max_size=30),
)
def test_slots_grow_within_the_budget(slots, max_length, cost, extra, needs):
    budget = round(cost.of_session(max_length) * (1 + extra))
    limits = CacheLimits(slots, max_length, cost, budget)
    count, length = limits.grown(min(FIRST_LENGTH, max_length))
    growths = 0
    for needed in needs:
        if length < needed <= max_length:
            before = count, length
            count, length = limits.grown(needed, length)
            growths += 1
            assert needed <= length <= max_length
            assert count <= before[0]
        assert 1 <= count <= slots
        assert count * cost.of_session(length) <= budget
    assert growths <= 5 + slots, "it doubles, or loses a slot"


def test_a_budget_below_one_session_says_what_it_needs():
    with pytest.raises(
        CacheBudgetError, match=r"1,000 tokens needs .* \(110,000 bytes\).*999 tokens or less"
    ):
        CacheLimits(4, 1000, CacheCost(100, 10), budget=109_999)


# ---- measured ----


@pytest.mark.parametrize("name", MODELS)
def test_what_a_token_takes_is_known_before_the_first_turn(name):
    sampler = LocalSampler(build(name, torch.float32), Mute(), slots=3)
    assert sampler.limits.cost.token == MODELS[name][1]
    assert sampler.held_bytes == 0
    held = []

    async def play():
        session = sampler.session(seed=0)
        await session.sample(queries_of([9])[0], SamplingParams(max_new_tokens=4))
        held.append(sampler.held_bytes)

    run_sync(play())
    solo = name in ("gptj", "mamba")
    cells = 9 + 4 - 1 if solo else 3 * FIRST_LENGTH  # the last token is not fed yet
    cost = sampler.limits.cost
    assert held == [cells * cost.token + cost.session]
    states = 2 * 64 * (8 + 4) * 4  # per layer and channel (twice the width) its state and last inputs
    assert cost.session == (states if name == "mamba" else 0)


def test_the_precision_is_that_of_the_run():
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    sampler = LocalSampler(build("gpt2", torch.float32), Mute(), autocast=autocast)
    assert sampler.limits.cost.token == MODELS["gpt2"][1] // 2


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside took at once."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, self.now)
        return out

    @property
    def now(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize(("slots", "length"), [(6, 20), (2, 40), (6, 7)])
def test_a_cache_that_is_resized_keeps_what_is_held_and_needs_one_tensor_more(slots, length):
    with LiveBytes() as live:
        cache = SlotCache(slots=6, length=10)
        for layer in range(5):
            key = torch.randn(3, 60, 4)
            cells = torch.arange(60)
            cache.write(layer, key, -key, cells // 10, cells % 10)
            del key, cells
        before = [[tensor.tolist() for tensor in layer] for layer in cache.layers.values()]
        old, live.most = cache.nbytes, live.now
        cache.resize(slots, length, kept=[1, 4])
    assert cache.nbytes == old * slots * length // 60
    assert live.most <= max(old, cache.nbytes) + max(old, cache.nbytes) // 10
    both = min(10, length)
    for layer, was in zip(cache.layers.values(), before, strict=True):
        for tensor, values in zip(layer, was, strict=True):
            expected = torch.tensor(values)[[1, 4], :, :both]
            assert torch.equal(tensor[:2, :, :both], expected)
            assert not tensor[2:].any()
            assert not tensor[:, :, both:].any()


# ---- the sampler ----


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_short_budget_gives_the_same_tokens(name):
    """A long sequence takes slots from sessions in mid-turn; they go on later, and nothing is different."""
    model = build(name)
    queries = queries_of([250, 3, 5, 240, 8, 300, 2])
    params = [SamplingParams(max_new_tokens=n) for n in (30, 40, 40, 30, 40, 30, 10)]
    roomy = LocalSampler(model, Mute(), slots=7, max_length=512)
    expected = continue_all(roomy, queries, params, seeds=range(7))
    budget = 2 * roomy.limits.cost.of_session(512)
    tight = LocalSampler(model, Mute(), slots=7, max_length=512, cache_bytes=budget)
    assert tight._slots.count == 4, "at the first length"
    counts, held = set(), []

    async def all_at_once():
        async def one(seed):
            session = tight.session(seed=seed)
            turn = await session.sample(queries[seed], params[seed])
            counts.add(tight._slots.count)
            held.append(tight.held_bytes)
            session.close()
            return turn

        return await asyncio.gather(*map(one, range(7)))

    actual = run_sync(all_at_once())
    assert [turn.token_ids for turn in actual] == [turn.token_ids for turn in expected]
    assert len({token for turn in expected for token in turn.token_ids}) > 10
    assert min(counts) <= 3
    assert 0 < max(held) <= budget
    assert tight.tokens_fed > roomy.tokens_fed, "somebody had to start again"
    continue_all(tight, queries[1:3], params[0], seeds=[1, 2])
    assert tight._slots.count == 4, "short sessions have all slots again"


def test_what_idles_goes_before_what_runs():
    model = build()
    cost = LocalSampler(model, Mute()).limits.cost
    sampler = LocalSampler(model, Mute(), slots=3, max_length=600, cache_bytes=2 * cost.of_session(600))
    few = SamplingParams(max_new_tokens=2)

    async def play():
        idle, short = sampler.session(seed=0), sampler.session(seed=1)
        await idle.sample(queries_of([200])[0], few)
        long = sampler.session(seed=2)
        running = asyncio.create_task(short.sample([1], SamplingParams(max_new_tokens=60)))
        await asyncio.sleep(0)
        await long.sample(queries_of([500])[0], few)
        assert idle.slot is None
        assert short.slot is not None
        return await running, await idle.sample([3], few)

    running, idle = run_sync(play())
    alone = LocalSampler(model, Mute(), slots=1)
    [expected] = continue_all(alone, [[1]], SamplingParams(max_new_tokens=60), seeds=[1])
    assert running.token_ids == expected.token_ids
    assert len(idle.token_ids) == 2


def test_a_budget_that_holds_no_session_is_refused_at_once():
    model = build("llama", torch.float32)
    with pytest.raises(
        CacheBudgetError, match=r"one session of 1,024 tokens needs 320 KiB .*raise cache_bytes"
    ):
        LocalSampler(model, Mute(), cache_bytes="200KiB")
    sampler = LocalSampler(model, Mute(), cache_bytes="200KiB", max_length=600)
    assert sampler.limits.slots_at(600) == 1


def test_the_sizes_are_said():
    model = build("llama", torch.float32)
    assert LocalSampler(model, Mute(), slots=16).describe() == (
        "sampler: 16 slots × up to 1,024 tokens, 256 B per token: at most 5.0 MiB of keys and values, "
        "and 67 KiB of prepacked weights"
    )
    assert LocalSampler(model, Mute(), slots=16, cache_bytes="1MiB", prepack=False).describe() == (
        "sampler: 16 slots × up to 1,024 tokens, 256 B per token: at most 1.0 MiB of keys and values, "
        "which hold 3 sessions of full length at once"
    )


def test_by_default_the_budget_is_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr("etude.sampling.local.free_memory", lambda device: 2_000_000)
    model = build("llama", torch.float32)
    assert LocalSampler(model, Mute()).limits.budget == 1_000_000
    monkeypatch.setattr("etude.sampling.local.free_memory", lambda device: 1)
    assert LocalSampler(model, Mute()).limits.slots_at(LENGTH) == 1, "never less than one session"


def test_the_budget_can_be_set_where_samplers_are_made():
    class Silent(Mute):
        eos_token_id = None

    model = build("llama", torch.float32)
    environment = TextEnvironment(model, Silent(), max_length=100, slots=5, cache_bytes="1MiB")
    limits = environment.sampler.limits
    assert (limits.slots, limits.max_length, limits.budget) == (5, 100, 1 << 20)
    assert PPOConfig(cache_bytes="1MiB").cache_bytes == "1MiB"
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        PPOConfig(cache_bytes="lots")
