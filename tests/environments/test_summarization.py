"""Summaries: prompts to the letter, scores as rouge-score has them, penalties by hand."""

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sequence_models import make_t5, saying

from etude import SummarizationEnvironment
from etude.environments.summarization import WEIGHTS
from etude.errors import ConfigError, DataError
from etude.runtime.loop import run_sync

ROWS = [
    {
        "document": "the old cat sat on the mat and the dog slept all day",
        "summary": "a cat sat and a dog slept",
    },
    {"document": "it rained and it rained until the river rose", "summary": None},
]


@pytest.fixture(scope="module")
def models(make_llama, tokenizer):
    return {"llama": make_llama(), "t5": make_t5(tokenizer)}


@pytest.fixture
def make_env(models, tokenizer):
    def make(model="llama", generation=None, **settings):
        generation = generation or {"max_new_tokens": 24}
        return SummarizationEnvironment(
            models[model], tokenizer, generation_kwargs=generation, **{"seed": 1, **settings}
        )

    return make


def play(env, rows=ROWS):
    return run_sync(env.run_episodes(rows))


def test_prompts(make_env):
    document = ROWS[0]["document"]
    assert make_env().build_prompt(ROWS[0]) == f"summarize: {document}"
    assert make_env(template="tldr").build_prompt(ROWS[0]) == f"{document}\n\nTL;DR:"
    assert make_env(template="tldr", prompt_tokens=11).build_prompt(ROWS[0]) == "the old cat\n\nTL;DR:"
    assert make_env(template="say {document} briefly", prompt="x ").build_prompt(ROWS[0]) == (
        f"x say {document} briefly"
    )
    assert make_env(document="article").build_prompt({"article": "a"}) == "summarize: a"
    assert make_env().build_prompt({"prompt": "a"}) == "summarize: a"
    with pytest.raises(DataError, match=r"column 'article' or 'prompt'; this one has 'document' \(str\)"):
        make_env(document="article").build_prompt(ROWS[0])
    with pytest.raises(ConfigError, match=r"the template 'TLDR' needs \{document\}"):
        make_env(template="TLDR")


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_scores_by_default(make_env, tokenizer, model):
    said = "the old cat sat on a sofa"
    env = make_env(model, saying(tokenizer, said))
    first, second = play(env)
    assert first.completion == second.completion == said
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(ROWS[0]["summary"], said)
    given = {reward.name: reward.value for reward in first.rewards}
    assert {reward.name: reward.weight for reward in first.rewards} == WEIGHTS
    assert given == pytest.approx(
        {
            **{kind: score.fmeasure for kind, score in scores.items()},
            "length_penalty": 0.0,  # seven words, as the reference has
            "copy_penalty": -2 / 4,  # two of four sequences of four words
        }
    )
    assert given["rouge1"] > 0.3
    assert {reward.name: reward.value for reward in second.rewards} == {
        **dict.fromkeys(WEIGHTS, None),
        "copy_penalty": 0.0,
    }
    assert env.metrics([first, second]) == pytest.approx(
        {kind: 100 * score.fmeasure for kind, score in scores.items()}
    )
    assert env.metrics([second]) == {}


def test_settings_of_rewards(make_env, tokenizer):
    def scores(**settings):
        said = "the old cat sat"
        [episode] = play(make_env(generation=saying(tokenizer, said), **settings), ROWS[:1])
        return {reward.name: (reward.value, reward.weight) for reward in episode.rewards}

    assert scores(reward_weights={"length_penalty": 0.5}) == {"length_penalty": (-3 / 7, 0.5)}
    assert scores(reward_weights={"length_penalty": 1}, words=5) == {"length_penalty": (-1 / 5, 1.0)}
    assert scores(reward_weights={"length_penalty": 1}, tokens=(2, 4)) == {"length_penalty": (-1 / 2, 1.0)}
    assert scores(reward_weights={"copy_penalty": 1}, copied=2) == {"copy_penalty": (-(1 - 2 / 6), 1.0)}
    assert list(scores(reward_weights={"rouge": 2})) == ["rouge"]
    with pytest.raises(ConfigError, match="give one of them"):
        make_env(words=3, tokens=4)


def test_documents_and_summaries_of_other_names(make_env, tokenizer):
    row = {"article": "the old cat sat on the mat", "highlights": ["no", "the old cat sat"]}
    env = make_env(
        generation=saying(tokenizer, "the old cat sat"), document="article", summary="highlights", copied=3
    )
    [episode] = play(env, [row])
    assert {reward.name: reward.value for reward in episode.rewards} == pytest.approx(
        {"rouge1": 1, "rouge2": 1, "rougeL": 1, "length_penalty": 0, "copy_penalty": 0}
    )


def test_answers_of_a_model_differ_and_are_scored(make_env):
    for model in ("llama", "t5"):
        env = make_env(model)
        *_, rewards, histories = env.run(ROWS * 2)
        assert len({history.episode.completion for history in histories}) == 4
        assert all(-0.4 <= reward <= 1 for reward in rewards)
