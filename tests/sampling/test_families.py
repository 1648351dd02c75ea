"""Sampling is right on every kind of decoder of transformers: it equals `generate` and a plain forward."""

import asyncio

import pytest
import torch
from decoder_families import FAMILIES, VOCAB, WIDE, make_family

from etude.errors import ModelError
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.sampling.solo import SoloBackend
from etude.types import SamplingParams


def random_queries():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 13, 4, 9, 7)]


def generate(model, ids, new_tokens):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


class NoText:
    """A tokenizer for tests that look at ids only."""

    def decode(self, ids, **_):
        return ""


def play(sampler, queries, tool_results, params):
    """Episodes of several turns, all at once; (tokens before the turn, the turn) of each."""

    async def episode(query):
        session, history, turns = sampler.session(seed=0), [], []
        for new in (query, *tool_results):
            turn = await session.sample(new, params)
            history = [*history, *new]
            turns.append((history, turn))
            history = [*history, *turn.token_ids]
        session.close()
        return turns

    async def every():
        return await asyncio.gather(*(episode(query) for query in queries))

    return run_sync(every())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_turns_equal_generate_and_a_plain_forward(family):
    """Fewer slots than sessions and prompts fed in pieces, so that states are dropped and rebuilt, too."""
    classes, configuration, way = FAMILIES[family]
    model = make_family(classes, configuration)
    queries = random_queries()
    expected = [generate(model, query, 9) for query in queries]
    assert len({token for tokens in expected for token in tokens}) > 8, "the model repeats itself"
    sampler = LocalSampler(model, NoText(), slots=2, prefill_tokens=5)
    backend = sampler._backend
    assert (backend.way if isinstance(backend, SoloBackend) else "packed") == way
    episodes = play(sampler, queries, ([5, 6, 7], [8]), SamplingParams(max_new_tokens=9, temperature=0))
    assert [turns[0][1].token_ids for turns in episodes] == expected
    history, last = episodes[1][-1]
    assert last.token_ids == generate(model, history, 9)
    for turns in episodes:
        history, last = turns[-1]
        with torch.no_grad():
            logits = model(torch.tensor([[*history, *last.token_ids]]), use_cache=False).logits[0]
        for history, turn in turns:
            states = logits[len(history) - 1 :][: len(turn.token_ids)]
            assert states.argmax(-1).tolist() == turn.token_ids
            logprobs = states.double().log_softmax(-1).amax(-1)
            # Many families compute norms, softmax or states in float32 whatever the model is in.
            torch.testing.assert_close(torch.tensor(turn.logprobs).double(), logprobs, rtol=0, atol=2e-4)


def test_a_model_that_is_no_causal_decoder_is_refused():
    with pytest.raises(ModelError, match="expected a causal decoder"):
        LocalSampler(make_family("RoFormer", {**WIDE, "embedding_size": 32}), NoText())
