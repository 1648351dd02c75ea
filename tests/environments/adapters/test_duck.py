"""TRL's duck type, played by a real model whose words are put in its mouth."""

import asyncio
import math
import re
import threading
import time

import pytest
from scripts import Script

from etude import BestOfN, Selection, evaluate, sample_dataset
from etude.environments.adapters.duck import DuckEnvironment, duck_environments
from etude.environments.orchestrator import play_episodes
from etude.environments.text import TextEnvironment
from etude.errors import DataError, EnvironmentSetupError, RewardError, SamplerError
from etude.protocols import Environment
from etude.runtime.loop import run_sync
from etude.types import NamedReward, StopReason

ADD = "<request><add>{}<call>"


class Counter:
    """Adds up to what the task asks for."""

    made: list = []  # noqa: RUF012  each test has its own subclass

    def __init__(self):
        type(self).made.append(self)
        self.closed = False
        self._secret = 1

    def reset(self, goal=3, **row):
        self.total, self.goal, self.row = 0, goal, row
        return f" to {goal}"

    def add(self, number: int) -> int:
        """Add a number.

        Args:
            number: what to add.
        """
        self.total += number
        return self.total

    async def look(self) -> str:
        """Look."""
        await asyncio.sleep(0)
        return f"at {self.total}"

    def _hidden(self) -> None: ...

    @property
    def costly(self):
        raise AssertionError("nobody asked for it")

    def get_reward(self) -> float:
        return float(self.total == self.goal)

    def close(self):
        self.closed = True


@pytest.fixture
def counter():
    return type("Counter", (Counter,), {"made": []})


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama()


@pytest.fixture
def make_inner(model, tokenizer):
    def make(turns, **settings):
        generation = {"max_new_tokens": 40, "logits_processor": [Script(tokenizer, turns)]}
        return TextEnvironment(model, tokenizer, generation_kwargs=generation, **settings)

    return make


def play(environment, tasks):
    sampler = environment.inner.sampler
    return run_sync(play_episodes(environment, tasks, sampler, range(7, 7 + len(tasks))))


def test_an_object_plays_each_episode(make_inner, counter, tokenizer):
    turns = {
        "count to 3": [ADD.format(1), ADD.format(2), "3<submit>"],
        "count to 5": ["<request><look><call>", ADD.format(4), "5<submit>"],
    }
    environment = DuckEnvironment(counter, make_inner(turns))
    assert isinstance(environment, Environment)
    tasks = [{"prompt": "count", "x": 1}, {"prompt": "count", "goal": 5, "environment": "duck"}]
    won, lost = play(environment, tasks)
    assert won.text == "count to 3" + ADD.format(1) + "1<response>" + ADD.format(2) + "3<response>3<submit>"
    assert [(s.source, s.text) for s in won.segments[:1]] == [("prompt", "count to 3")]
    assert won.token_ids == tokenizer.encode(won.text)
    assert won.sampled == [s.source == "model" for s in won.segments for _ in s.token_ids]
    assert won.rewards == [NamedReward("Counter", 1.0)]
    assert won.stop is StopReason.SUBMITTED
    assert [call.response for call in lost.tool_calls] == ["at 0", "4"]
    assert lost.rewards == [NamedReward("Counter", 0.0)]
    assert [won.task, lost.task] == tasks, "the prompt's addition is no change of the task"
    first, second = sorted(counter.made, key=lambda duck: duck.goal)
    assert first.row == {"prompt": "count", "x": 1}
    assert second.row == {"prompt": "count"}, "who plays is not for the player to read"
    assert first.closed
    assert second.closed


def test_only_public_methods_are_tools(make_inner, counter):
    for name in ("_hidden", "reset", "get_reward", "close", "costly"):
        turns = {"count to 3": [f"<request><{name}><call>", "<submit>"]}
        [episode] = play(DuckEnvironment(counter, make_inner(turns)), [{"prompt": "count"}])
        assert [call.error for call in episode.tool_calls] == ["unknown_tool"], name


def test_tools_stand_beside_the_inner_environments(make_inner, counter):
    def double(number: int) -> int:
        """Double.

        Args:
            number: what to double.
        """
        return 2 * number

    turns = {"count to 3": ["<request><double>4<call>", ADD.format(3), "<submit>"]}
    inner = make_inner(turns, tools=[double])
    [episode] = play(DuckEnvironment(counter, inner), [{"prompt": "count"}])
    assert [call.response for call in episode.tool_calls] == ["8", "3"]
    assert list(inner.tools) == ["double"]
    inner.tools["add"] = inner.tools["double"]
    with pytest.raises(EnvironmentSetupError, match="the inner environment both have a tool 'add'"):
        play(DuckEnvironment(counter, inner), [{"prompt": "count"}])


def test_rewards_may_look_at_the_objects(make_inner, counter):
    def total(environments, goal):
        assert all(duck.closed for duck in environments)
        return [duck.total / wanted for duck, wanted in zip(environments, goal, strict=True)]

    turns = {f"count to {goal}": [ADD.format(2), "<submit>"] for goal in (4, 8)}
    environment = DuckEnvironment(counter, make_inner(turns, rewards=total), name="exact", weight=0.5)
    tasks = [{"prompt": "count", "goal": 4}, {"prompt": "count", "goal": 8}]
    episodes = play(environment, tasks)
    assert [episode.rewards for episode in episodes] == [
        [NamedReward("exact", 0.0, 0.5), NamedReward("total", 0.5)],
        [NamedReward("exact", 0.0, 0.5), NamedReward("total", 0.25)],
    ]
    assert [episode.task for episode in episodes] == tasks
    assert not environment._played, "what is scored is let go"


def test_messages_and_missing_prompts(make_inner, counter):
    from etude.environments.adapters.instance import extend_prompt

    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "count"}]
    assert extend_prompt({"prompt": said}, " to 3") == {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "count to 3"}]
    }
    assert said[1]["content"] == "count"
    assert extend_prompt({"query": "a"}, "b") == {"query": "ab"}
    assert extend_prompt({"query": "a"}, None) == {"query": "a"}
    with pytest.raises(DataError, match="expected text, or messages that end in a text"):
        extend_prompt({"prompt": []}, "b")
    [episode] = play(DuckEnvironment(counter, make_inner({" to 3": ["<submit>"]})), [{"goal": 3}])
    assert episode.prompt == " to 3"


class Silent:
    def reset(self, **row):
        pass


def test_an_object_needs_no_more_than_reset(make_inner):
    inner = make_inner({"count": ["<submit>"]}, rewards=lambda completions: [2.0] * len(completions))
    [episode] = play(DuckEnvironment(Silent, inner), [{"prompt": "count"}])
    assert (episode.prompt, episode.reward) == ("count", 2.0)


@pytest.mark.parametrize("broken", ["__init__", "reset", "get_reward", "hang", "text"])
def test_what_an_object_breaks_is_data(make_inner, counter, broken):
    def fail(self, *args, **row):
        raise ZeroDivisionError(broken)

    def hang(self, **row):
        time.sleep(0.5)

    methods = {"hang": {"reset": hang}, "text": {"reset": lambda self, **row: 3}}
    bad = type("Bad", (counter,), methods.get(broken, {broken: fail}))
    says = {
        "hang": r"reset: hang did not answer|hang did not answer within 0\.1 seconds",
        "text": "reset returned 3; expected text or None",
    }
    turns = iter([bad, counter])

    def factory():
        return next(turns)()

    inner = make_inner({"count": ["<submit>"], "count to 3": ["<submit>"]})
    environment = DuckEnvironment(factory, inner, timeout=0.1, max_instances=1)
    lost, fine = play(environment, [{"prompt": "count"}, {"prompt": "count"}])
    assert lost.stop is StopReason.INFRASTRUCTURE
    assert lost.task == {"prompt": "count"}
    assert lost.prompt.startswith("count"), "what hasn't begun has a prompt all the same"
    assert lost.token_ids
    assert not lost.rewards
    assert re.search(says.get(broken, f"raised ZeroDivisionError: {broken}"), lost.error), lost.error
    assert fine.stop is StopReason.SUBMITTED
    assert all(duck.closed for duck in counter.made if hasattr(duck, "closed"))
    with pytest.raises(SamplerError, match=r"all 1 episodes failed; the first: \w+"):
        play(DuckEnvironment(bad, inner, timeout=0.1), [{"prompt": "count"}])


def test_what_fails_to_close_has_played_all_the_same(make_inner, counter, caplog):
    def fail(self):
        raise OSError("stuck")

    bad = type("Bad", (counter,), {"close": fail})
    [episode] = play(DuckEnvironment(bad, make_inner({"count to 3": ["<submit>"]})), [{"prompt": "count"}])
    assert (episode.stop, episode.error) == (StopReason.SUBMITTED, None)
    assert "Bad: fail raised OSError: stuck" in caplog.text


def test_a_reward_that_is_no_number_is_an_error(make_inner, counter):
    bad = type("Bad", (counter,), {"get_reward": lambda self: math.nan})
    environment = DuckEnvironment(bad, make_inner({"count to 3": ["<submit>"]}))
    with pytest.raises(RewardError, match="reward 'Bad' returned nan for episode 0, prompt 'count to 3'"):
        play(environment, [{"prompt": "count"}])
    nothing = type("Counter", (counter,), {"get_reward": lambda self: None})
    environment = DuckEnvironment(nothing, make_inner({"count to 3": ["<submit>"]}))
    [episode] = play(environment, [{"prompt": "count"}])
    assert episode.rewards == [NamedReward("Counter", None)]


def test_objects_are_no_more_than_allowed_and_close_when_playing_is_cancelled(make_inner, counter):
    open_ones, most = [], []
    lock = threading.Lock()

    class Bounded(counter):
        def reset(self, **row):
            super().reset()
            with lock:
                open_ones.append(self)
                most.append(len(open_ones))
            time.sleep(0.01)

        def close(self):
            with lock:
                open_ones.remove(self)

    inner = make_inner({"count": ["<submit>"]})
    environment = DuckEnvironment(Bounded, inner, max_instances=2)
    play(environment, [{"prompt": "count"}] * 7)
    assert max(most) == 2
    assert not open_ones

    class Slow(Bounded):
        async def add(self, number: int) -> int:
            """Add.

            Args:
                number: what to add.
            """
            await asyncio.sleep(9)
            return number

    async def cancelled():
        inner = make_inner({"count": [ADD.format(1)]})
        playing = DuckEnvironment(Slow, inner).play({"prompt": "count"}, inner.sampler, seed=1)
        task = asyncio.ensure_future(playing)
        while not open_ones:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_sync(cancelled())
    assert not open_ones


def test_a_time_limit_interrupts_and_the_object_still_scores(make_inner, counter):
    class Slow(counter):
        async def add(self, number: int) -> int:
            """Add.

            Args:
                number: what to add.
            """
            await asyncio.sleep(9)
            return number

    inner = make_inner({"count to 3": [ADD.format(1)]}, max_seconds=0.3)
    [episode] = play(DuckEnvironment(Slow, inner), [{"prompt": "count"}])
    assert episode.stop is StopReason.WALL_CLOCK
    assert episode.reward == 0.0
    assert episode.rewards


def test_everything_that_plays_takes_one(make_inner, counter, tmp_path):
    turns = {f"count to {goal}": [ADD.format(3), "<submit>"] for goal in (3, 5)}
    environment = DuckEnvironment(counter, make_inner(turns))
    tasks = [{"prompt": "count", "goal": 3}, {"prompt": "count", "goal": 5}]
    queries, responses, masks, rewards, histories = environment.run(tasks)
    assert [float(reward) for reward in rewards] == [1.0, 0.0]
    assert [history.text.split("<")[0] for history in histories] == ["count to 3", "count to 5"]
    assert len(queries[0]) + len(responses[0]) == len(histories[0].tokens)
    assert masks[0].sum() == len(responses[0]) - 2, "all but what the tool said and its frame"

    best = BestOfN(environment, n=2).run(tasks)
    assert [len(group) for group in best] == [1, 1]
    measured = evaluate(environment, tasks, samples=2).measures["clean"]
    assert measured["success"].value == 0.5
    for resume in (False, True):
        summary = sample_dataset(
            environment, tasks, tmp_path, Selection(format="segments"), num_samples=2, resume=resume
        )
        assert (summary.episodes, summary.rows) == (4, 2)

    class Other(Silent):
        def quack(self) -> str:
            """Quack."""
            return "quack"

    turns["go"] = ["<request><quack><call>", "<request><add>1<call>", "<submit>"]
    mixed = duck_environments({"counter": counter, "other": Other}, make_inner(turns), max_instances=1)
    rows = [{**tasks[0], "environment": "counter"}, {"prompt": "go", "environment": "other"}]
    counted, quacked = (history.episode for history in mixed.run(rows)[-1])
    assert counted.reward == 1.0
    assert [call.error for call in quacked.tool_calls] == [None, "unknown_tool"]
    assert not quacked.rewards
    with pytest.raises(DataError, match="expected 'counter' or 'other'"):
        mixed.run([{"prompt": "go", "environment": "nobody"}])


def test_what_is_no_environment_is_said_at_once(make_inner):
    inner = make_inner({"count": ["<submit>"]})
    with pytest.raises(EnvironmentSetupError, match="has no method reset"):
        play(DuckEnvironment(dict, inner), [{"prompt": "count"}])
    with pytest.raises(EnvironmentSetupError, match="expected a class or function that makes an environment"):
        DuckEnvironment(3, inner)
    with pytest.raises(EnvironmentSetupError, match="inner is a Counter; expected the TextEnvironment"):
        DuckEnvironment(Counter, Counter())
