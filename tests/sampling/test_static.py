"""Static shapes: bits that don't depend on other sessions, and a decode step that can be captured."""

import asyncio
import math
from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_models import Textless, random_prompts, static_model
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from etude.errors import CacheBudgetError, ConfigError
from etude.models.attention import install
from etude.runtime.loop import run_sync
from etude.sampling.backends import choose_backend
from etude.sampling.feeds import Feed
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.packed import PackedBackend
from etude.sampling.solo import SoloBackend
from etude.sampling.static import StaticBackend, rows_are_alike
from etude.types import SamplingParams

# What sessions sample, deterministically.

EPISODES = random_prompts(6)
EPISODES[4] = EPISODES[3][:-1] + EPISODES[0]  # a shared beginning, which elsewhere would be copied
TURNS = [2, 1, 1, 3, 2, 1]
CUTS = SamplingParams(max_new_tokens=9, temperature=0.8, top_p=0.9, eos_token_ids=(3,))
PLAIN = SamplingParams(max_new_tokens=12, eos_token_ids=(3, 4))


async def one_episode(sampler, index, ticks=0):
    """Every number that the episode's turns give, as it is."""
    session, numbers = sampler.session(seed=100 + index), []
    for turn in range(TURNS[index]):
        ids = EPISODES[index] if turn == 0 else [index, turn, 7][: 1 + (index + turn) % 3]
        sampled = await session.sample(ids, PLAIN if index % 2 else CUTS)
        numbers.append((sampled.token_ids, sampled.logprobs, sampled.sampling_logprobs))
        for _ in range(ticks):
            await asyncio.sleep(0)
    session.close()
    return numbers


def deterministic_sampler(model, slots=3):
    return LocalSampler(model, Textless(), slots=slots, prefill_tokens=16, deterministic=True)


def undisturbed(model, slots=3):
    """Each episode in a sampler of its own."""
    return [run_sync(one_episode(deterministic_sampler(model, slots), i)) for i in range(len(EPISODES))]


CASES = {
    "float32": ("llama", torch.float32),
    "bfloat16": ("llama", torch.bfloat16),
    "window": ("mistral", torch.float32),
    "experts": ("mixtral", torch.float32),
    "solo": ("gptj", torch.float32),
    "softcap": ("gemma2", torch.float32),
    "dynamic": ("dynamic", torch.float64),
    "longrope": ("longrope", torch.float32),
}


@cache  # not a fixture of the module, which would run before threads are set: their number changes bits
def model_and_what_it_gives_alone(case):
    model = static_model(*CASES[case])
    return model, undisturbed(model)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # whole rollouts: too long to shrink
@given(
    order=st.permutations(range(len(EPISODES))),
    late=st.lists(st.integers(0, 25), min_size=6, max_size=6),
    ticks=st.lists(st.integers(0, 30), min_size=6, max_size=6),
)
def test_every_bit_is_the_same_whatever_runs_beside(case, order, late, ticks):
    model, expected = model_and_what_it_gives_alone(case)

    async def arrive(sampler, index):
        for _ in range(late[index]):
            await asyncio.sleep(0)
        return await one_episode(sampler, index, ticks[index])

    async def together():
        sampler = deterministic_sampler(model)
        return await asyncio.gather(*(arrive(sampler, index) for index in order))

    for index, numbers in zip(order, run_sync(together()), strict=True):
        same = numbers == expected[index]
        assert same, f"episode {index}"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_rebuilt_cache_gives_the_same_bits(name):
    """Two turns, between them every slot is taken by others."""
    model = static_model(name)

    async def play(others):
        sampler = deterministic_sampler(model, slots=2)
        session = sampler.session(seed=9)
        await session.sample(EPISODES[3], SamplingParams(max_new_tokens=20))
        for i in range(others):  # each stays open with a longer history, which is kept when one must go
            await sampler.session(seed=i).sample([i] * 60, SamplingParams(max_new_tokens=4))
        assert (session.slot is None) == (others > 0)
        fed = sampler.tokens_fed
        last = await session.sample([7, 8], SamplingParams(max_new_tokens=5))
        return last, sampler.tokens_fed - fed

    kept, fed = run_sync(play(0))
    rebuilt, fed_again = run_sync(play(5))
    assert fed_again == fed + len(EPISODES[3]) + 19
    assert (rebuilt.token_ids, rebuilt.logprobs) == (kept.token_ids, kept.logprobs)


def test_new_weights_start_the_pieces_anew():
    """After an update a session goes on as one that was evicted before the update does."""
    model = static_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    async def play(others):
        model.load_state_dict(weights)
        sampler = deterministic_sampler(model, slots=1)
        session = sampler.session(seed=9)
        await session.sample(EPISODES[3], SamplingParams(max_new_tokens=20))
        for i in range(others):
            await sampler.session(seed=i).sample([i], SamplingParams(max_new_tokens=4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        steps = sampler.steps
        last = await session.sample([7, 8], SamplingParams(max_new_tokens=9))
        length = len(EPISODES[3]) + 20 + 2
        assert sampler.steps - steps == math.ceil(length / 16) + 8, "pieces as long as can be"
        return last.token_ids, last.logprobs, last.policy_version

    assert run_sync(play(0)) == run_sync(play(1))


def test_without_the_option_bits_do_differ():
    """Else the tests above would hold for any sampler."""
    model = static_model("llama")
    together = continue_all(LocalSampler(model, Textless(), slots=6), EPISODES, PLAIN, seeds=range(6))
    alone = [
        continue_all(LocalSampler(model, Textless(), slots=1), [ids], PLAIN, seeds=[i])[0]
        for i, ids in enumerate(EPISODES)
    ]
    assert [turn.token_ids for turn in together] == [turn.token_ids for turn in alone]
    assert [turn.logprobs for turn in together] != [turn.logprobs for turn in alone]


def test_rows_that_see_each_other_are_found_out():
    llama, mixtral = static_model("llama"), static_model("mixtral")
    install(llama)
    install(mixtral)
    assert rows_are_alike(llama, 8)
    assert not rows_are_alike(mixtral, 8), "experts compute as many rows as chose them"


def test_shapes_follow_from_a_rows_own_length():
    """Which no rollout on a CPU shows: there the masked keys of a wider block happen to change no bit."""
    feeds = [Feed(0, 7, [1]), Feed(3, 100, [2]), Feed(1, 30, [3, 4]), Feed(2, 63, [5])]
    llama = static_model("llama")
    backend = choose_backend(llama, 200, deterministic=True)
    backend.resize(4, 200, kept=[])
    assert backend._arrange(feeds) == ({64: [0, 3], 128: [1]}, [2])
    assert backend.step.rows == 8
    backend.deterministic = False
    assert backend._arrange(feeds) == ({128: [0, 1, 3]}, [2])


def test_the_option_is_refused_where_it_could_not_hold():
    with pytest.raises(ConfigError, match="keep_cache"):
        LocalSampler(static_model("llama"), Textless(), deterministic=True, keep_cache=True)


@pytest.mark.parametrize(("wanted", "sessions", "slots"), [(12, 40, 12), (12, 16, 8), (3, 9, 3)])
def test_idle_rows_are_within_the_budget(wanted, sessions, slots):
    """A budget for so many sessions of 200 tokens, whose slots have room for 256, holds so many rows."""
    model = static_model("llama")
    token = LocalSampler(model, Textless()).limits.cost.per_token
    options = {"slots": wanted, "deterministic": True, "cache_bytes": sessions * 256 * token}
    sampler = LocalSampler(model, Textless(), **options)
    assert sampler.limits.slots_at(1) == sampler.limits.slots_at(200) == sampler._slots.count == slots
    queries = [(ids * 9)[:190] for ids in EPISODES] * 3
    continue_all(sampler, queries, SamplingParams(max_new_tokens=4), seeds=range(18))
    assert sampler._backend.step.rows == math.ceil(slots / 8) * 8
    assert sampler.held_bytes <= sessions * 256 * token
    with pytest.raises(CacheBudgetError, match="at least 9 slots of 256 tokens"):
        LocalSampler(model, Textless(), **{**options, "cache_bytes": 9 * 256 * token - 1})


# The step that CUDA graphs capture.


def static_backend(model, slots=4, capture=None):
    install(model)
    backend = StaticBackend(PackedBackend(model), 256, capture=capture and (lambda: capture))
    backend.resize(slots, 64, kept=[])
    return backend


def traced(step):
    """What a capture does, on any device: the operations of one call, over the very tensors it used."""
    return make_fx(lambda: step())()


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        *((name, None) for name in ("llama", "qwen3", "mistral", "gpt2", "gemma2")),
        ("mistral", traced),
        ("gemma2", traced),
    ],
)
def test_the_static_step_samples_what_the_packed_one_does(name, capture):
    model = static_model(name, torch.float64)
    queries = random_prompts(9, longest=70)
    params = SamplingParams(max_new_tokens=24)
    expected = continue_all(LocalSampler(model, Textless(), slots=4), queries, params, seeds=range(9))
    sampler = LocalSampler(model, Textless(), slots=4)
    sampler._backend = static_backend(model, capture=capture)
    sampler._backend.resize(4, sampler._slots.length, kept=[])
    turns = continue_all(sampler, queries, params, seeds=range(9))
    assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
    for turn, other in zip(turns, expected, strict=True):
        assert turn.logprobs == pytest.approx(other.logprobs, rel=1e-9)
    if capture:
        assert sampler._backend.replays.possible
        assert len(sampler._backend.replays._replays) > 1


@torch.no_grad()
def test_sinks_are_seen_by_static_rows():
    model = static_model("gpt_oss")
    for layer in model.model.layers:
        layer.self_attn.sinks.copy_(torch.tensor([1.0, -1.0, 2.0, 0.5]))
    ids = [*EPISODES[0], 7, 9, 11, 13]
    expected = model(torch.tensor([ids])).logits[0]
    backend, fed = static_backend(model), len(ids) - 4
    backend.logits([Feed(2, 0, ids[:fed])])
    for position in range(fed, len(ids)):
        logits = backend.logits([Feed(2, position, [ids[position]])])[0]
        torch.testing.assert_close(logits, expected[position], rtol=1e-3, atol=1e-3)


class Recorder(TorchDispatchMode):
    """Operations, with the shapes of their tensors and every plain argument."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def plain(value):
            return tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)

        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.calls.append((str(function), *map(plain, flat)))
        return function(*args, **(kwargs or {}))


WAITS_FOR_THE_DEVICE = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal.")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "gemma2"])
def test_steps_of_a_width_differ_in_nothing_but_values(name):
    model = static_model(name)
    backend = static_backend(model)
    backend.logits([Feed(0, 0, EPISODES[0]), Feed(3, 0, EPISODES[1])])
    records = []
    for rows in ([(0, 20, 3), (3, 9, 4)], [(1, 0, 5)], [(0, 21, 5), (1, 1, 9), (2, 0, 8), (3, 60, 2)]):
        backend.step.fill(rows)
        with Recorder() as recorder:
            backend.step(64)
        records.append(recorder.calls)
    assert records[0] == records[1] == records[2]
    assert len(records[0]) > 30
    assert not [call for call in records[0] if any(op in call[0] for op in WAITS_FOR_THE_DEVICE)]


@torch.no_grad()
def test_replays_follow_the_weights():
    """Updates in place are seen by a capture; tensors that moved make it be taken anew."""
    model, captures = static_model("llama", torch.float64), []

    def counted(step):
        captures.append(step)
        return traced(step)

    backend, eager = static_backend(model, capture=counted), static_backend(model)

    def logits(*feeds):
        ours, expected = backend.logits(feeds), eager.logits(feeds)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        return ours

    logits(Feed(0, 0, EPISODES[0][:5]), Feed(2, 0, EPISODES[1][:5]))
    before = logits(Feed(0, 5, [1]), Feed(2, 5, [2]))
    logits(Feed(0, 6, [1]))
    assert len(captures) == 1
    model.lm_head.weight.mul_(-0.5)
    backend.weights_changed()
    after = logits(Feed(0, 5, [1]), Feed(2, 5, [2]))
    assert len(captures) == 1
    torch.testing.assert_close(after, -0.5 * before)
    model.lm_head.weight.data = model.lm_head.weight * 3.0
    backend.weights_changed()  # as the sampler says, who watches them
    torch.testing.assert_close(logits(Feed(0, 5, [1]), Feed(2, 5, [2])), -1.5 * before)
    assert len(captures) == 2
    for grown in (backend, eager):
        grown.resize(4, 128, kept=[0, 1, 2, 3])
    logits(Feed(0, 6, list(range(61))))
    logits(Feed(0, 67, [1]), Feed(2, 6, [2]))
    assert len(captures) == 3
    with torch.autocast("cpu", torch.bfloat16):
        backend.logits([Feed(0, 68, [1])])
    assert len(captures) == 4, "another precision is another capture"


@torch.no_grad()
def test_a_model_that_cannot_be_captured_decodes_eagerly():
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = static_model("llama", torch.float64)
    backend = static_backend(model, capture=refuse)
    with pytest.warns(UserWarning, match="Llama.* can't be captured"):
        first = backend.logits([Feed(0, 0, [5])])
    torch.testing.assert_close(first[0], model(torch.tensor([[5]])).logits[0, 0])
    torch.testing.assert_close(
        backend.logits([Feed(0, 1, [6])])[0], model(torch.tensor([[5, 6]])).logits[0, 1]
    )


def test_who_decodes_how():
    llama = static_model("llama")
    assert isinstance(choose_backend(llama, 96), PackedBackend)
    assert isinstance(choose_backend(llama, 96, deterministic=True), StaticBackend)
    assert isinstance(choose_backend(static_model("gptj"), 96, deterministic=True), SoloBackend)
    with pytest.raises(ConfigError, match="one CUDA device"):
        LocalSampler(llama, Textless(), cuda_graphs=True)
