"""Translation: prompts to the letter, scores as sacrebleu has them, with decoders and encoder–decoders."""

import pytest
import sacrebleu
from sequence_models import make_bart, make_t5, saying

from etude import TranslationEnvironment
from etude.errors import ConfigError, DataError
from etude.runtime.loop import run_sync

ROWS = [
    {"source": "the house is old", "target": "das haus ist alt"},
    {"source": "i like tea", "target": ["ich mag tee", "tee mag ich"]},
    {"source": "no", "target": None},
]
HUB = [{"id": i, "translation": {"en": row["source"], "de": row["target"]}} for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def models(make_llama, tokenizer):
    return {"llama": make_llama(), "t5": make_t5(tokenizer), "bart": make_bart(tokenizer)}


@pytest.fixture
def make_env(models, tokenizer):
    def make(model="llama", generation=None, **settings):
        generation = generation or {"max_new_tokens": 12}
        return TranslationEnvironment(
            models[model], tokenizer, generation_kwargs=generation, **{"seed": 1, **settings}
        )

    return make


def play(env, rows=ROWS):
    return run_sync(env.run_episodes(rows))


GERMAN = {"source_language": "english", "target_language": "german"}


def test_prompts(make_env):
    assert make_env().build_prompt(ROWS[0]) == "the house is old", "as Marian and mBART read it"
    assert make_env(**GERMAN).build_prompt(ROWS[0]) == "translate english to german: the house is old"
    assert make_env().build_prompt({**ROWS[0], **GERMAN}) == "translate english to german: the house is old"
    other = {**ROWS[0], "target_language": "french"}
    assert make_env(**GERMAN).build_prompt(other) == "translate english to french: the house is old"
    env = make_env(**GERMAN, template="{source_language}: {source}\n{target_language}:", prompt="a: b\n\n")
    assert env.build_prompt(other) == "a: b\n\nenglish: the house is old\nfrench:"
    assert make_env(**GERMAN, prompt_tokens=5).build_prompt(other) == "translate english to french: the h"
    assert make_env().build_prompt({"prompt": "yes"}) == "yes"


def test_columns(make_env):
    assert make_env(source="en", target="de").build_prompt(HUB[0]) == "the house is old"
    assert make_env(source="en").build_prompt({"en": "a", "translation": {"en": "b"}}) == "a"
    with pytest.raises(
        DataError,
        match=r"text in its column 'source' or 'prompt', in the task or in its 'translation'; .*'id' ",
    ):
        make_env().build_prompt(HUB[0])
    with pytest.raises(DataError, match=r"has \{target_language\}, and a task has no column 'target_lang"):
        make_env(template="{source} > {target_language}").build_prompt(ROWS[0])
    with pytest.raises(ConfigError, match=r"needs \{source\}, and may have \{source\}, \{source_language\}"):
        make_env(template="{text}")


@pytest.mark.parametrize("model", ["llama", "t5", "bart"])
@pytest.mark.parametrize("rows", [ROWS, HUB], ids=["columns", "hub"])
def test_scores_are_sacrebleu_s(make_env, model, rows):
    columns = {} if rows is ROWS else {"source": "en", "target": "de"}
    env = make_env(model, reward_weights={"chrf": 1.0, "bleu": 0.5, "ter": 0.25}, **columns)
    first, second, third = play(env, rows)
    assert len({first.completion, second.completion, third.completion}) == 3
    for episode, references in ((first, [ROWS[0]["target"]]), (second, ROWS[1]["target"])):
        said = episode.completion.strip()
        given = {reward.name: (reward.value, reward.weight) for reward in episode.rewards}
        assert given == {
            "chrf": (pytest.approx(sacrebleu.sentence_chrf(said, references, word_order=2).score / 100), 1.0),
            "bleu": (pytest.approx(sacrebleu.sentence_bleu(said, references).score / 100), 0.5),
            "ter": (pytest.approx(max(1 - sacrebleu.sentence_ter(said, references).score / 100, 0)), 0.25),
        }
    assert [reward.value for reward in third.rewards] == [None] * 3
    assert bool(first.source_ids) == (model != "llama")
    streams = [["das haus ist alt", "ich mag tee"], [None, "tee mag ich"]]
    said = [first.completion.strip(), second.completion.strip()]
    assert env.metrics([first, second, third]) == pytest.approx(
        {
            "chrf": sacrebleu.corpus_chrf(said, streams, word_order=2).score,
            "bleu": sacrebleu.corpus_bleu(said, streams).score,
            "ter": sacrebleu.corpus_ter(said, streams).score,
        }
    )


@pytest.mark.parametrize("model", ["llama", "t5", "bart"])
def test_a_right_answer(make_env, tokenizer, model):
    env = make_env(model, saying(tokenizer, "das haus ist alt"), **GERMAN)
    queries, responses, masks, rewards, _ = env.run(ROWS[:2])
    assert rewards[0] == 1.0
    assert 0 < rewards[1] < 0.5
    assert tokenizer.decode(queries[0]) == "translate english to german: the house is old"
    starts = 0 if model == "llama" else 1
    assert tokenizer.decode(responses[0][starts:-1]) == "das haus ist alt"
    assert masks[0].tolist() == [0] * (len(responses[0]) - 1) + [1], "only the end was sampled"
    assert env.metrics(play(env, ROWS[:1])) == pytest.approx({"chrf": 100, "bleu": 100, "ter": 0})


def test_which_rewards(make_env):
    def brief(completions):
        return [-float(len(text)) for text in completions]

    def names(**settings):
        return [(reward.name, reward.weight) for reward in make_env(**settings).rewards]

    assert names() == names(rewards=[]) == [("chrf", 1.0)]
    assert names(rewards=brief) == [("brief", 1.0)]
    assert names(rewards=[brief], reward_weights={"ter": 0.5}) == [("ter", 0.5), ("brief", 1.0)]
    assert names(reward_fn=lambda segments: [0.0]) == [("<lambda>", 1.0)]
    assert names(reward_weights={}) == []
    with pytest.raises(ConfigError, match="there is no metric 'chfr'; did you mean 'chrf'"):
        make_env(reward_weights={"chfr": 1.0})
    with pytest.raises(ConfigError, match="tokenize is 'cn'"):
        make_env(reward_weights={"bleu": 1.0}, bleu_tokenize="cn")


def test_nothing_to_compare_with(make_env):
    env = make_env()
    assert env.metrics(play(env, ROWS[2:])) == {}


def test_the_language_that_a_decoder_begins_with(make_env, tokenizer):
    """mBART's way: a token of the target language is forced after the decoder's own first one."""
    german = tokenizer.convert_tokens_to_ids("<request>")
    generation = {"max_new_tokens": 4, "forced_bos_token_id": german}
    _, responses, masks, _, _ = make_env("bart", generation).run(ROWS)
    for response, mask in zip(responses, masks, strict=True):
        assert response[:2].tolist() == [tokenizer.eos_token_id, german]
        assert mask[:3].tolist() == [0, 0, 1]
    with pytest.raises(ConfigError, match="forced_bos_token_id: the model is a decoder"):
        make_env("llama", generation).run(ROWS)
