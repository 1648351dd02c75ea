"""Best of n in an environment."""

import pytest

from etude.environments.best_of_n import BestOfN
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError
from etude.math.kl import best_of_n_kl


def echo(query: str) -> str:
    """Say it again.

    Args:
        query: anything.
    """
    return query


def likes_digits(completions, bonus):
    digits = [sum(c.isdigit() for c in text) for text in completions]
    return [float(n + b) for n, b in zip(digits, bonus, strict=True)]


@pytest.fixture
def environment(make_llama, tokenizer):
    def make(**settings):
        settings = {"rewards": likes_digits, **settings}
        generation = {"max_new_tokens": 8, "eos_token_id": -1}
        return TextEnvironment(
            make_llama(), tokenizer, tools=[echo], seed=3, generation_kwargs=generation, **settings
        )

    return make


def test_the_best_of_each_task(environment):
    everything = BestOfN(environment(), n=6, n_candidates=6).run(["1+1", "a"], bonus=[0.0, 10.0])
    best = BestOfN(environment(), n=6, n_candidates=2).run(["1+1", "a"], bonus=[0.0, 10.0])
    for task, (found, played) in enumerate(zip(best, everything, strict=True)):
        rewards = [episode.reward for episode in played]
        assert rewards == sorted(rewards, reverse=True)
        assert rewards[0] > rewards[-1]
        assert [e.completion for e in found] == [e.completion for e in played[:2]]
        assert all(episode.task["bonus"] == 10.0 * task for episode in played)
        assert len({episode.seed for episode in played}) == 6


def test_it_draws_anew_each_time_and_says_how_far_it_is(environment):
    sampler = BestOfN(environment(), n=3)
    first, second = (sampler.run(["1+1"], bonus=0.0)[0][0] for _ in range(2))
    assert first.completion != second.completion
    assert sampler.kl_bound == best_of_n_kl(3)


def test_an_environment_can_score_by_itself(make_llama, tokenizer):
    from etude.types import NamedReward

    class Longest(TextEnvironment):
        async def score(self, episodes):
            for episode in episodes:
                episode.rewards.append(NamedReward("length", float(len(episode.completion))))

    environment = Longest(make_llama(), tokenizer, generation_kwargs={"max_new_tokens": 8}, seed=0)
    [found] = BestOfN(environment, n=4, n_candidates=4).run(["1+1"])
    assert [len(e.completion) for e in found] == sorted((len(e.completion) for e in found), reverse=True)


def test_bad_settings(environment):
    with pytest.raises(ConfigError, match="n_candidates is 5 and n 4"):
        BestOfN(environment(), n=4, n_candidates=5)
    with pytest.raises(ConfigError, match="no rewards"):
        BestOfN(environment(rewards=None))
