"""Whatever happens around a session, it gets the tokens that plain generation gives it, one by one.

Episodes are drawn from a pool of scripts, whose right tokens are found once by plain forwards of the whole
history. Hypothesis then draws everything that must not matter: who plays beside whom, when each comes, how
many slots and bytes there are, who is cancelled, and when caches are thrown away.
"""

import asyncio
import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
)

from etude.runtime.loop import run_sync
from etude.sampling.draw import Row, draw, uniform
from etude.sampling.local import LocalSampler
from etude.sampling.solo import SoloBackend
from etude.sampling.tokens import TokenBackend
from etude.types import SamplingParams

VOCAB = 61
MAX_LENGTH = 64
SMALL = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.3,
}
GPT = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH, "initializer_range": 0.3}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=5)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)),
}
TURNS = 3


def letters_tokenizer():
    letters = [chr(ord("A") + i) for i in range(VOCAB)]
    tok = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=letters[0]))
    tok.decoder = decoders.Fuse()
    tok.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token=letters[0])


TOKENIZER = letters_tokenizer()
TEXT = "".join(chr(ord("A") + i) for i in range(VOCAB))


@dataclass(frozen=True)
class Script:
    """An episode: what is fed before each of its turns, and how each is sampled."""

    seed: int
    fed: tuple[tuple[int, ...], ...]
    params: SamplingParams


def make_scripts():
    generator = torch.Generator().manual_seed(11)

    def tokens(count):
        return tuple(torch.randint(0, VOCAB, (count,), generator=generator).tolist())

    preamble = tokens(20)
    ways = (
        SamplingParams(max_new_tokens=6, eos_token_ids=(3, 4, 9, 17)),
        SamplingParams(max_new_tokens=7, stop=tuple(TEXT[20:26])),
        SamplingParams(max_new_tokens=6, temperature=0),
        SamplingParams(max_new_tokens=5, temperature=1.3, stop=("Z", TEXT[40]), eos_token_ids=(5,)),
    )
    for i in range(8):
        beginning = preamble if i in (1, 4, 5, 6) else preamble[: 3 * i % 7]
        fed = (beginning + tokens(1 + i % 5), tokens(1 + i % 3), tokens(2))
        yield Script(100 + i, fed, ways[i % 4])


SCRIPTS = list(make_scripts())


@functools.cache
def setting(family, dtype):
    """A model, its weights in each round, and each script's turns: with the first weights, and with each
    round's."""
    torch.manual_seed(0)
    model = MAKE[family]().to(dtype).eval()
    weights = [[p.detach() * factor for p in model.parameters()] for factor in (1.0, -0.8, 1.2)]
    still = [one_by_one(model, script, weights[:1] * TURNS) for script in SCRIPTS]
    moving = [one_by_one(model, script, weights) for script in SCRIPTS]
    load(model, weights[0])
    seen = {token for turns in still + moving for turn in turns for token in turn}
    assert len(seen) > 20, "the model repeats itself: a test that can't fail"
    return model, weights, still, moving


@torch.no_grad()
def load(model, weights):
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def plain_logits(model, history):
    return model(torch.tensor([history]), use_cache=False).logits[:, -1]


def one_by_one(model, script, weights):
    history, turns = [], []
    for fed, now in zip(script.fed, weights, strict=True):
        load(model, now)
        history += fed
        turn = []
        while not ended(turn, script.params):
            row = Row(script.params, script.seed, len(history), lambda: None, len(turn))
            [token] = draw(plain_logits(model, history), [row]).token_ids
            history.append(token)
            turn.append(token)
        turns.append(turn)
    return turns


def ended(turn, params):
    text = "".join(TEXT[token] for token in turn)
    return (
        len(turn) == params.max_new_tokens
        or bool(turn and turn[-1] in params.eos_token_ids)
        or any(stop in text for stop in params.stop)
    )


def nearly_drawn(model, script, history, token, within=1e-5):
    """Whether rounding by `within` can make `token` the next one."""
    logits = plain_logits(model, history)[0].double()
    if script.params.temperature == 0:
        return bool(logits.max() - logits[token] <= within * max(1.0, float(logits.abs().max())))
    cdf = (logits / script.params.temperature).softmax(-1).cumsum(0)
    before = float(cdf[token - 1]) if token else 0.0
    return before - within <= uniform(script.seed, len(history)) <= float(cdf[token]) + within


def check(model, weights, script, actual, expected):
    """Turns equal those expected, in float32 up to a first token that rounding decides."""
    history = []
    for r, (fed, got, right) in enumerate(zip(script.fed, actual, expected, strict=False)):
        history += fed
        if got != right:
            assert model.dtype == torch.float32, f"turn {r} of {script}"
            at = next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), None)
            assert at is not None, "the same tokens, but ended elsewhere"
            load(model, weights[r])
            assert nearly_drawn(model, script, history + right[:at], got[at])
            load(model, weights[0])
            return
        history += right


async def ticks(count):
    for _ in range(count):
        await asyncio.sleep(0)


@dataclass(frozen=True)
class Happening:
    """All that must not matter."""

    scripts: tuple[int, ...]
    slots: int
    prefill: int
    sessions: float | None  # of full length that the byte budget holds
    delays: tuple[int, ...]
    cancelled: tuple[int | None, ...]  # the tick at which each is
    refreshed: tuple[int, ...]
    rounds: bool  # everybody waits for everybody after each turn, and then the weights change


@st.composite
def happenings(draw_):
    scripts = draw_(st.lists(st.integers(0, len(SCRIPTS) - 1), min_size=2, max_size=7))

    def each(values):
        return tuple(draw_(st.lists(values, min_size=len(scripts), max_size=len(scripts))))

    return Happening(
        tuple(scripts),
        slots=draw_(st.integers(1, 5)),
        prefill=draw_(st.integers(1, 30)),
        sessions=draw_(st.sampled_from([None, 1.0, 1.2, 1.7, 2.5])),
        delays=each(st.integers(0, 6)),
        cancelled=each(st.none() | st.none() | st.integers(0, 50)),
        refreshed=tuple(draw_(st.lists(st.integers(0, 40), max_size=3))),
        rounds=draw_(st.booleans()),
    )


@pytest.fixture(autouse=True, scope="module")
def _slots_start_short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "etude.sampling.memory.CacheLimits.__init__.__defaults__", (0, 8)
        )  # so that they grow in so short episodes
        yield


async def play(sampler, model, weights, happening):
    """The turns that each episode came to."""
    outs = [[] for _ in happening.scripts]
    sessions = [sampler.session(seed=SCRIPTS[s].seed) for s in happening.scripts]

    async def turn(i, r):
        await ticks(happening.delays[i])
        script = SCRIPTS[happening.scripts[i]]
        sampled = await sessions[i].sample(script.fed[r], script.params)
        outs[i].append(sampled.token_ids)

    async def turns(i, some):
        for r in some:
            await turn(i, r)

    async def quietly(i, some):
        task = asyncio.create_task(turns(i, some))
        if happening.cancelled[i] is not None:
            await ticks(happening.cancelled[i])
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    async def refresh(at):
        await ticks(at)
        sampler.weights_changed()

    async def watch(limit=4000):
        for _ in range(limit):
            assert sampler.held_bytes <= sampler.limits.budget
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    active = list(range(len(sessions)))
    for r, some in enumerate([[0], [1], [2]] if happening.rounds else [[0, 1, 2]]):
        load(model, weights[r])
        results = await asyncio.gather(
            *(quietly(i, some) for i in active), *(refresh(at) for at in happening.refreshed)
        )
        active = [i for i, result in zip(active, results, strict=False) if result is None]
        for result in results:
            assert result is None or isinstance(result, asyncio.CancelledError), result
    watcher.cancel()
    [failure] = await asyncio.gather(watcher, return_exceptions=True)
    assert failure is None or isinstance(failure, asyncio.CancelledError), failure
    for session in sessions:
        session.close()
    return outs


def changed_backend(backend, way):
    """The same cache, as a GPU has it: token by token, each step launched before the last is known."""
    if way == "tokens":
        return TokenBackend(backend)
    backend.runs_ahead = way == "ahead"
    return backend


# The families share the draws out: each is one way of computing, and the schedule is the same for all.
@pytest.mark.parametrize(
    ("family", "dtype", "way"),
    [
        *((family, dtype, "as it is") for family in MAKE for dtype in (torch.float64, torch.float32)),
        *((family, torch.float64, "ahead") for family in ("llama", "gpt2")),
        *((family, torch.float64, "tokens") for family in ("llama", "mistral")),
    ],
)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(happening=happenings())
def test_any_interleaving_gives_the_tokens_of_one_by_one(family, dtype, way, happening):
    model, weights, still, moving = setting(family, dtype)
    load(model, weights[0])
    budget = None
    if happening.sessions is not None:
        cost = probe_cost(family, dtype)
        budget = int(happening.sessions * cost.of_session(MAX_LENGTH))
    sampler = LocalSampler(
        model, TOKENIZER, slots=happening.slots, prefill_tokens=happening.prefill, cache_bytes=budget
    )
    assert isinstance(sampler._backend, SoloBackend) is (family == "gptj")
    sampler._backend = changed_backend(sampler._backend, way)
    outs = run_sync(play(sampler, model, weights, happening))
    load(model, weights[0])
    for index, out, cancelled in zip(happening.scripts, outs, happening.cancelled, strict=True):
        assert cancelled is not None or len(out) == TURNS
        expected = (moving if happening.rounds else still)[index]
        check(model, weights if happening.rounds else weights[:1] * TURNS, SCRIPTS[index], out, expected)
    assert sampler._slots.free == sampler._slots.count, "every slot came back"
    assert not sampler._schedule.running
    assert not sampler._schedule.waiting


@functools.cache
def probe_cost(family, dtype):
    return LocalSampler(setting(family, dtype)[0], TOKENIZER).limits.cost


def test_a_wrong_token_is_not_taken_for_rounding():
    model, _, still, _ = setting("llama", torch.float32)
    for script, [turn, *_] in zip(SCRIPTS, still, strict=True):
        history = list(script.fed[0])
        likely = [t for t in range(VOCAB) if nearly_drawn(model, script, history, t)]
        assert likely == turn[:1]
