"""Continuations: what they go on from, how long they get, how they end."""

import random

import numpy as np
import pytest
import torch
from sequence_models import make_t5, saying

from etude import GenerationEnvironment, LengthSampler
from etude.environments.single_turn import SingleTurnEnvironment
from etude.errors import ConfigError, DataError, EnvironmentSetupError
from etude.runtime.loop import run_sync
from etude.types import StopReason

TEXTS = [f"the film number {i} was rather long and {'dull' if i % 3 else 'odd'}" for i in range(12)]


def length(completions):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama()


@pytest.fixture
def make_env(model, tokenizer):
    def make(generation=None, **settings):
        settings = {"rewards": length, "seed": 3, **settings}
        return GenerationEnvironment(model, tokenizer, generation_kwargs=generation, **settings)

    return make


def play(env, tasks=TEXTS):
    return run_sync(env.run_episodes(tasks))


def test_a_prompt_is_the_first_tokens_of_a_text(make_env, tokenizer):
    assert play(make_env({"max_new_tokens": 2}), TEXTS[:1])[0].prompt == TEXTS[0]
    [episode] = play(make_env({"max_new_tokens": 2}, prompt_tokens=8), [{"text": TEXTS[0], "prompt": "no"}])
    assert episode.prompt == "the film"
    assert episode.segments[0].token_ids == tokenizer.encode(TEXTS[0])[:8]
    [episode] = play(make_env({"max_new_tokens": 2}, prompt_tokens=8, prompt="so: "), TEXTS[:1])
    assert episode.prompt == "so: the film"
    assert make_env(column="review").build_prompt({"review": "good", "text": "no"}) == "good"
    with pytest.raises(DataError, match=r"'text' or 'prompt' or 'query'; this one has 'review' \(str\)"):
        play(make_env(), [{"review": "good"}])
    with pytest.raises(DataError, match=r"its column 'review'; this one has 'prompt'"):
        play(make_env(column="review"), ["good"])


def test_a_range_of_prompts(make_env):
    env = make_env({"max_new_tokens": 2}, prompt_tokens=(2, 8))
    lengths = [len(episode.prompt) for episode in play(env)]
    assert set(lengths) <= {2, 3, 4, 5, 6, 7}
    assert len(set(lengths)) > 3
    assert [len(e.prompt) for e in play(env)] == lengths, "a task has one prompt: in every epoch, for a group"
    assert [len(e.prompt) for e in play(env, TEXTS[::-1])] == lengths[::-1], "whatever else is played"
    sampler = make_env({"max_new_tokens": 2}, prompt_tokens=LengthSampler(2, 8))
    assert [len(episode.prompt) for episode in play(sampler)] == lengths
    other = make_env({"max_new_tokens": 2}, prompt_tokens=(2, 8), seed=4)
    assert [len(episode.prompt) for episode in play(other)] != lengths
    with pytest.raises(ConfigError, match="prompt_tokens is 0"):
        make_env(prompt_tokens=0)


def test_a_range_of_answers(make_env, tokenizer):
    never = {"eos_token_id": -1, "bad_words_ids": [[tokenizer.eos_token_id]]}
    env = make_env(never, length_sampler=LengthSampler(3, 9))
    episodes = play(env)
    lengths = [sum(episode.sampled) for episode in episodes]
    assert set(lengths) <= {3, 4, 5, 6, 7, 8}
    assert len(set(lengths)) > 3
    assert {episode.stop for episode in episodes} == {StopReason.TURN_TOKENS}
    again = play(make_env(never, length_sampler=(3, 9), slots=2))
    assert [e.text for e in again] == [e.text for e in episodes], "the same seeds, other slots"
    assert [sum(e.sampled) for e in play(env)] != lengths, "a task's next episode is another"
    alone = run_sync(env.play(episodes[4].task, env.sampler, seed=episodes[4].seed))
    assert alone.text == episodes[4].text, "an episode that is resumed"


def test_no_global_state_is_read_or_changed(make_env):
    env = make_env(prompt_tokens=(2, 8), length_sampler=(3, 9))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = play(env, TEXTS[:4])
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    seeds = [episode.seed for episode in first]
    again = [run_sync(env.play(e.task, env.sampler, seed=seed)) for e, seed in zip(first, seeds, strict=True)]
    assert [e.text for e in again] == [e.text for e in first]


def test_lock_step_turns_are_as_long(make_env, tokenizer):
    from etude import TextHistory

    env = make_env({"eos_token_id": -1}, length_sampler=(3, 9))
    histories = [TextHistory("go", torch.tensor(tokenizer.encode("go"))) for _ in range(6)]
    lengths = {int(history.token_masks.sum()) for history in env.generate(histories)}
    assert lengths <= {3, 4, 5, 6, 7, 8}
    assert len(lengths) > 1


def test_an_answer_has_no_control_in_it(make_env, tokenizer):
    said = "<request><calc>1+2<call> 3<response><submit> ok"
    [episode] = play(make_env(saying(tokenizer, said)), ["go"])
    assert episode.completion == said
    assert (episode.stop, episode.turns, episode.tool_calls) == (StopReason.END_OF_SEQUENCE, 1, [])
    assert episode.reward == len(said)


def test_endings(make_env, tokenizer):
    dot = tokenizer.encode(".")
    [stopped] = play(make_env({"stop_strings": ["."], "allowed_token_ids": dot}), ["go"])
    assert (stopped.stop, stopped.completion) == (StopReason.DONE, ".")
    [cut] = play(make_env({"max_new_tokens": 5, "allowed_token_ids": dot}), ["go"])
    assert (cut.stop, cut.completion) == (StopReason.TURN_TOKENS, ".....")
    [full] = play(make_env({"max_new_tokens": 5, "allowed_token_ids": dot}, max_length=4), ["go"])
    assert (full.stop, full.completion) == (StopReason.MAX_TOKENS, "..")
    [full] = play(make_env({"allowed_token_ids": dot}, max_length=6, length_sampler=(9, 12)), ["go"])
    assert (full.stop, full.completion) == (StopReason.MAX_TOKENS, "....")


def test_lengths_that_contradict(make_env):
    with pytest.raises(EnvironmentSetupError, match="both limit a turn; give one of them"):
        make_env({"max_new_tokens": 5}, length_sampler=(3, 9))
    with pytest.raises(EnvironmentSetupError, match="begins with 2, and forced_prefix has 2 tokens"):
        make_env({"forced_prefix": "ab"}, length_sampler=(2, 9))
    with pytest.raises(ConfigError, match=r"length_sampler is 'long'; expected a length"):
        make_env(length_sampler="long")


def test_what_a_single_turn_has_no_use_for(model, tokenizer):
    for name, value in {"tools": [], "max_turns": 2, "protocol": None}.items():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            GenerationEnvironment(model, tokenizer, **{name: value})
    with pytest.raises(TypeError, match="abstract class SingleTurnEnvironment"):
        SingleTurnEnvironment(model, tokenizer)


def test_a_chat_template(make_env, tokenizer, monkeypatch):
    with pytest.raises(EnvironmentSetupError, match=r"this one has none; leave it out"):
        make_env(chat=True)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %} me: {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    [episode] = play(make_env({"max_new_tokens": 2}, chat=True, prompt="say: ", prompt_tokens=2), ["go on"])
    assert episode.prompt == "user: say: go. me: "
    assert episode.segments[0].token_ids == tokenizer.encode(episode.prompt)


def test_an_encoder_reads_the_beginning(tokenizer):
    env = GenerationEnvironment(
        make_t5(tokenizer), tokenizer, prompt_tokens=(2, 8), length_sampler=(3, 9), rewards=length, seed=3
    )
    queries, responses, masks, _, histories = env.run(TEXTS[:6])
    for text, query, response, mask, history in zip(
        TEXTS, queries, responses, masks, histories, strict=False
    ):
        assert 2 <= len(query) < 8
        assert query.tolist() == tokenizer.encode(text)[: len(query)]
        assert response[0] == tokenizer.pad_token_id
        assert mask.tolist() == [0] + [1] * (len(response) - 1)
        assert history.episode.source_ids == query.tolist()
    assert len({tuple(response.tolist()) for response in responses}) > 3
