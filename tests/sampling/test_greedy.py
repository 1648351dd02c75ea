"""A sampler that is greedy whatever it is asked for."""

from etude.protocols import Sampler
from etude.runtime.loop import run_sync
from etude.sampling.greedy import GreedySampler
from etude.sampling.local import LocalSampler
from etude.types import SamplingParams


def test_it_is_the_other_sampler_at_temperature_0(make_llama, tokenizer):
    inner = LocalSampler(make_llama(), tokenizer, max_length=64)
    greedy = GreedySampler(inner)
    assert isinstance(greedy, Sampler)
    assert (greedy.policy_version, greedy.max_length, greedy.decoder_start) == (0, 64, ())

    async def two_turns(sampler, seed, temperature):
        session = sampler.session(seed=seed)
        params = SamplingParams(max_new_tokens=12, temperature=temperature)
        turns = [await session.sample(ids, params) for ids in ([3, 4, 5], [6])]
        session.close()
        return [turn.token_ids for turn in turns]

    wanted = run_sync(two_turns(inner, 0, 0.0))
    assert run_sync(two_turns(greedy, 1, 1.5)) == wanted
    assert run_sync(two_turns(inner, 1, 1.5)) != wanted
    assert len(set(wanted[0])) > 3
