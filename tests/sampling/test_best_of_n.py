"""Best of n."""

import pytest
import torch
from transformers import GenerationConfig

from etude.errors import ConfigError, RewardError
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.sampling.best_of_n import BestOfNSampler


@pytest.fixture
def make(make_llama, tokenizer):
    def build(score, **settings):
        model = AutoModelForCausalLMWithValueHead(make_llama())
        return BestOfNSampler(model, tokenizer, score, lambda: 8, **settings)

    return build


def vowels(texts):
    return [float(sum(c in "aeiou" for c in text)) for text in texts]


def test_the_best_are_returned_best_first(make, tokenizer):
    seen = []

    def score(texts):
        seen.append(texts)
        return vowels(texts)

    best = make(score, sample_size=6, n_candidates=2, seed=1).generate(
        [torch.tensor([1, 2, 3]), torch.tensor([4, 5])], eos_token_id=-1
    )
    assert [len(texts) for texts in seen] == [6, 6]
    assert len(set(seen[0])) > 1
    for texts, chosen in zip(seen, best, strict=True):
        assert vowels(chosen) == sorted(vowels(texts), reverse=True)[:2]
    assert best[0][0].startswith(tokenizer.decode([1, 2, 3]))


def test_forms_of_queries_seeds_and_settings(make):
    sampler = make(vowels, seed=3)
    one = sampler.generate([1, 2, 3], eos_token_id=-1)
    assert one == make(vowels, seed=3).generate(torch.tensor([1, 2, 3]), eos_token_id=-1)
    assert one == make(vowels, seed=3).generate([[1, 2, 3]], eos_token_id=-1)
    assert one != sampler.generate([1, 2, 3], eos_token_id=-1), "a second call draws anew"
    greedy = make(vowels, generation_config=GenerationConfig(do_sample=False, eos_token_id=-1))
    assert greedy.generate([1, 2, 3]) == greedy.generate([1, 2, 3])


def test_bad_scores_and_settings(make):
    with pytest.raises(RewardError, match="for 4 texts"):
        make(lambda texts: [1.0]).generate([1, 2])
    with pytest.raises(RewardError, match="finite"):
        make(lambda texts: [float("nan")] * 4).generate([1, 2])
    with pytest.raises(ConfigError, match="n_candidates is 5"):
        make(vowels, n_candidates=5)
