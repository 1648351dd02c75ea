"""Several environments as one."""

import pytest
import torch

from etude.environments.best_of_n import BestOfN
from etude.environments.mixed import MixedEnvironment
from etude.environments.rejection import sample_dataset
from etude.environments.text import TextEnvironment
from etude.environments.traits import metrics_of
from etude.errors import ConfigError, DataError, EnvironmentSetupError, RewardError
from etude.evaluation.evaluate import evaluate
from etude.protocols import Environment
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.tools.calculator import calculator
from etude.types import Episode, NamedReward, Segment, StopReason


def digits(completions, **_):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def vowels(completions, bonus, **_):
    counts = [sum(c in "aeiou" for c in text) for text in completions]
    return [float(n + (b or 0)) for n, b in zip(counts, bonus, strict=True)]


class Echo:
    """Somebody else's environment: two methods and nothing else. It keeps no rows."""

    async def play(self, task, sampler, *, seed):
        session = sampler.session(seed=seed)
        ids = [int(c) for c in task["start"]]
        params = TextEnvironment(None, self.tokens, generation_kwargs={"max_new_tokens": 4}).params
        sampled = await session.sample(ids, params)
        session.close()
        segments = [Segment("prompt", task["start"], ids), *sampled.segments()]
        return Episode(segments=segments, stop=StopReason.TURN_TOKENS, seed=seed)

    async def score(self, episodes):
        for episode in episodes:
            episode.rewards.append(NamedReward("length", float(len(episode.completion))))


TASKS = [
    {"environment": "words", "prompt": "say one:", "bonus": 0.5},
    {"environment": "echo", "start": "123"},
    {"environment": "sums", "prompt": "1+1", "bonus": None},
    {"environment": "words", "prompt": "say two:", "bonus": 10.0},
]


@pytest.fixture
def parts(make_llama, tokenizer):
    model, echo = make_llama(), Echo()
    echo.tokens = tokenizer
    settings = {"seed": 3, "generation_kwargs": {"max_new_tokens": 8, "eos_token_id": -1}}
    sums = TextEnvironment(model, tokenizer, tools=[calculator], rewards=digits, max_length=60, **settings)
    words = TextEnvironment(model, tokenizer, rewards=vowels, prompt="please ", max_length=90, **settings)
    return {"sums": sums, "words": words, "echo": echo}


@pytest.fixture
def mixed(parts):
    return MixedEnvironment(parts, seed=1)


def test_each_environment_plays_and_scores_its_own(mixed, parts):
    assert isinstance(mixed, Environment)
    episodes = run_sync(mixed.run_episodes(TASKS))
    assert [e.environment for e in episodes] == ["words", "echo", "sums", "words"]
    assert [[r.name for r in e.rewards] for e in episodes] == [["vowels"], ["length"], ["digits"], ["vowels"]]
    assert [e.prompt for e in episodes] == ["please say one:", "123", "1+1", "please say two:"]
    assert episodes[3].reward >= 10
    assert episodes[0].task == TASKS[0]
    alone = run_sync(parts["words"].play(TASKS[3], mixed.sampler, seed=episodes[3].seed))
    assert alone.token_ids == episodes[3].token_ids


def test_what_a_run_wants_of_it(mixed, parts, tokenizer):
    assert mixed.tokenizer is tokenizer
    assert mixed.max_length is None, "one of them goes as far as the model"
    both = MixedEnvironment({name: parts[name] for name in ("sums", "words")})
    assert both.max_length == 90
    assert both.sampler.max_length == 90
    assert both.sampler is both.sampler
    assert both.model is parts["sums"].model
    queries, responses, masks, rewards, histories = both.run([TASKS[0], TASKS[2]])
    assert [len(q) for q in queries] == [len("please say one:"), len("1+1")]
    assert [int(mask.sum()) for mask in masks] == [sum(h.episode.sampled) for h in histories]
    assert torch.stack(rewards).tolist() == [h.episode.reward for h in histories]
    assert [len(r) for r in responses] == [len(m) for m in masks]


def test_tasks_that_name_no_environment(parts):
    mixed = MixedEnvironment(parts, default="words")
    [episode] = run_sync(mixed.run_episodes([{"prompt": "say:", "bonus": 1.0}]))
    assert episode.environment == "words"
    assert episode.rewards[0].name == "vowels"
    with pytest.raises(DataError, match="'environment' that says who plays it: 'sums' or 'words' or 'echo'"):
        MixedEnvironment(parts).run(["say:"])
    with pytest.raises(DataError, match="environment is 'sum'; expected 'sums' or"):
        mixed.run([{"prompt": "say:", "environment": "sum"}])


def test_failures_stay_data(parts, monkeypatch):
    class Broken(Echo):
        async def play(self, task, sampler, *, seed):
            return Episode(task=task, stop=StopReason.INFRASTRUCTURE, error="no wire", seed=seed)

        async def score(self, episodes):
            raise AssertionError("there is nothing to score")

    mixed = MixedEnvironment({**parts, "echo": Broken()})
    episodes = run_sync(mixed.run_episodes(TASKS))
    assert [e.error for e in episodes] == [None, "no wire", None, None]
    assert [len(e.rewards) for e in episodes] == [1, 0, 1, 1]

    def nan(completions, **_):
        return [float("nan")] * len(completions)

    words = TextEnvironment(parts["words"].model, mixed.tokenizer, rewards=nan)
    with pytest.raises(RewardError, match="nan"):
        MixedEnvironment({**parts, "words": words}).run(TASKS)


def test_what_cannot_be_mixed(parts, make_llama, tokenizer):
    other = TextEnvironment(make_llama(1), tokenizer, rewards=digits)
    with pytest.raises(EnvironmentSetupError, match="different models"):
        MixedEnvironment({**parts, "other": other}).run(TASKS)
    sampler = LocalSampler(make_llama(1), tokenizer)
    assert MixedEnvironment({**parts, "other": other}, sampler=sampler).sampler is sampler
    with pytest.raises(EnvironmentSetupError, match="pass sampler="):
        MixedEnvironment({"echo": parts["echo"]}).sampler  # noqa: B018
    with pytest.raises(EnvironmentSetupError, match="no environments"):
        MixedEnvironment({})
    for name in ("", "a/b", "stop"):
        with pytest.raises(EnvironmentSetupError, match="metrics are called after it"):
            MixedEnvironment({name: parts["sums"]})
    with pytest.raises(EnvironmentSetupError, match="'both' is mixed itself"):
        MixedEnvironment({"both": MixedEnvironment(parts)})
    with pytest.raises(ConfigError, match=r"environment is a Llama.*play\(task"):
        MixedEnvironment({"model": parts["sums"].model})
    with pytest.raises(EnvironmentSetupError, match="default is 'x'"):
        MixedEnvironment(parts, default="x")
    different = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[eos]")
    different.add_tokens(["<more>"])
    other = TextEnvironment(None, different, rewards=digits)
    with pytest.raises(EnvironmentSetupError, match="'other' has another tokenizer than 'sums'"):
        MixedEnvironment({**parts, "other": other})


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"sums": 1}, "weights are of sums; expected one for each of sums, words, echo"),
        ({"sums": 1, "words": -1, "echo": 1}, "weight of 'words' is -1"),
        ({"sums": 1, "words": float("nan"), "echo": 1}, "weight of 'words' is nan"),
        ({"sums": 0, "words": 0, "echo": 0}, "all weights are 0"),
    ],
)
def test_weights_that_are_none(parts, weights, match):
    with pytest.raises(EnvironmentSetupError, match=match):
        MixedEnvironment(parts, weights)


class Counting(TextEnvironment):
    def metrics(self, episodes):
        return {"played": float(len(episodes))}


def test_what_environments_say_of_all_their_episodes(parts, tokenizer):
    mixed = MixedEnvironment(parts)
    assert metrics_of(mixed) is None
    assert metrics_of(parts["words"]) is None
    assert metrics_of(parts["echo"]) is None
    counting = MixedEnvironment({**parts, "words": Counting(parts["words"].model, tokenizer, rewards=vowels)})
    episodes = run_sync(counting.run_episodes(TASKS))
    assert metrics_of(counting)(episodes) == {"words/played": 2.0}
    measures = evaluate(counting, TASKS).measures["clean"]
    assert measures["words/played"].value == 2.0
    assert measures["echo/reward"].value > 0
    assert "echo/success" in measures


def test_best_of_n_of_any_environment(mixed, parts, tokenizer):
    best = BestOfN(mixed, n=4).run(TASKS)
    assert [episode.environment for [episode] in best] == ["words", "echo", "sums", "words"]
    sampler = LocalSampler(parts["sums"].model, tokenizer)
    [found] = BestOfN(parts["echo"], n=4, n_candidates=4, sampler=sampler).run([TASKS[1]])
    assert [e.reward for e in found] == sorted((e.reward for e in found), reverse=True)
    assert len({e.seed for e in found}) == 4
    with pytest.raises(ConfigError, match="a Echo has no sampler of its own; pass sampler="):
        BestOfN(parts["echo"], n=4).run([TASKS[1]])


def test_rejection_sampling_of_any_environment(mixed, tmp_path):
    summary = sample_dataset(mixed, TASKS, tmp_path, num_samples=2, seed=5)
    assert (summary.tasks, summary.episodes) == (4, 8)
    again = sample_dataset(mixed, TASKS, tmp_path, num_samples=3, seed=5, resume=True)
    assert again.episodes == 12
    for place, change in ((0, {"prompt": "say it:"}), (1, {"start": "321"})):
        other = [{**task, **change} if i == place else task for i, task in enumerate(TASKS)]
        with pytest.raises(DataError, match=f"task {place}"):
            sample_dataset(mixed, other, tmp_path, num_samples=3, seed=5, resume=True)


def test_evaluation_of_any_environment(mixed, parts, tokenizer):
    found = evaluate(mixed, TASKS, greedy=True, tool_noise=["characters"])
    again = evaluate(mixed, TASKS, greedy=True, seed=9)
    said = [[e.completion for task in x.episodes["clean"] for e in task] for x in (found, again)]
    assert said[0] == said[1], "greedy, whatever the seed"
    sampled = evaluate(mixed, TASKS, samples=2)
    assert [e.completion for task in sampled.episodes["clean"] for e in task[:1]] != said[0]
    assert parts["sums"].tools["calculator"] is not None
    with pytest.raises(ConfigError, match="pass sampler="):
        evaluate(parts["echo"], TASKS[1:2])
    with pytest.raises(ConfigError, match="rewards would make an environment"):
        evaluate(mixed, TASKS, rewards=digits)
    sampler = LocalSampler(parts["sums"].model, tokenizer)
    assert evaluate(parts["echo"], TASKS[1:2], sampler=sampler).measures["clean"]["reward"].value > 0
