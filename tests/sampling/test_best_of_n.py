"""Best of n."""

import pytest
import torch
from encoder_decoders import FIRST, START, make_seq2seq, seq2seq_tokenizer
from transformers import GenerationConfig, LlamaForSequenceClassification

from etude.errors import ConfigError, RewardError
from etude.math.kl import best_of_n_kl
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.rewards.classifier import ClassifierReward
from etude.rewards.function import FunctionReward
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


def digits(texts):
    return [float(sum(c.isdigit() for c in text)) for text in texts]


def test_a_reward_scores_continuations_as_episodes(make, tokenizer):
    """The same order as by texts, whatever the reward's level; a negative weight turns it round."""
    queries = [[1, 2, 3], [4, 5]]

    def by_completion(prompts, completions, episodes):
        for prompt, completion, episode in zip(prompts, completions, episodes, strict=True):
            assert episode.text == prompt + completion
        return digits(completions)

    def by_token(token_ids):
        return [[1.0 if tokenizer.decode([i]).isdigit() else None for i in ids] for ids in token_ids]

    def best(score):
        return make(score, sample_size=6, n_candidates=6, seed=1).generate(queries, eos_token_id=-1)

    expected = best(digits)
    assert len(set(digits(expected[0]))) > 1
    assert best(FunctionReward(by_completion)) == expected
    assert best(FunctionReward(by_token, level="token")) == expected
    worst = best(FunctionReward(by_completion, weight=-1.0))
    assert [digits(texts) for texts in worst] == [sorted(digits(texts)) for texts in expected]


def test_a_reward_model_chooses(make, make_llama, tokenizer):
    config = make_llama().config
    config.num_labels = 1
    torch.manual_seed(5)
    reward = ClassifierReward(LlamaForSequenceClassification(config), tokenizer, text="all")
    best = make(reward, sample_size=4, n_candidates=4, seed=1).generate([1, 2, 3], eos_token_id=-1)[0]
    scores = reward.score_texts(best)
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1


def test_how_far_the_best_is_from_the_model(make):
    assert make(vowels, sample_size=8).kl_bound == best_of_n_kl(8)


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

    class Lazy:
        name, weight = "lazy", 1.0

        async def __call__(self, episodes):
            return [0.0] * 4

    with pytest.raises(RewardError, match="4 scores for 8 texts"):
        make(Lazy()).generate([[1, 2], [3]])
    with pytest.raises(ConfigError, match="n_candidates is 5"):
        make(vowels, n_candidates=5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_s_answers_without_the_query(family):
    """The query is read by its encoder; what is scored is its answer, and an episode has both."""
    tokenizer, texts, episodes_seen = seq2seq_tokenizer(), [], []
    model = make_seq2seq(family)
    queries = [torch.tensor([FIRST, FIRST + 1]), torch.tensor([FIRST + 2])]

    def score(answers):
        texts.extend(answers)
        return digits(answers)

    def by_episode(episodes):
        episodes_seen.extend(episodes)
        return [digits([episode.completion])[0] for episode in episodes]

    best = BestOfNSampler(model, tokenizer, score, lambda: 8, sample_size=6, seed=1).generate(queries)
    reward = FunctionReward(by_episode)
    again = BestOfNSampler(model, tokenizer, reward, lambda: 8, sample_size=6, seed=1).generate(queries)
    assert best == again
    for n, [chosen] in enumerate(best):
        assert digits([chosen])[0] == max(digits(texts[6 * n : 6 * n + 6]))
    assert len(set(texts)) > 6
    for n, episode in enumerate(episodes_seen):
        assert episode.source_ids == queries[n // 6].tolist()
        assert episode.segments[1].token_ids[0] == START
        assert episode.prompt == tokenizer.decode(queries[n // 6])
