"""Environments of `verifiers`, for real: its tasks, tools, rewards and runs, our model in the agent's place.

Needs the extra `verifiers`; `make test-environments` runs it in a virtual environment of its own.
"""

import importlib.machinery
import re
import sys
import types
from pathlib import Path

import pytest
from scripts import ChatScript, Script
from template_families import family_tokenizer

from etude.environments.adapters.verifiers import VerifiersEnvironment
from etude.environments.chat import ChatEnvironment
from etude.environments.orchestrator import play_episodes
from etude.environments.text import TextEnvironment
from etude.errors import DataError, EnvironmentSetupError
from etude.runtime.loop import run_sync
from etude.types import NamedReward, StopReason


def test_without_verifiers_the_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(EnvironmentSetupError, match=r"pip install 'etude\[verifiers\]'"):
        VerifiersEnvironment(3, TextEnvironment(tokenizer=tokenizer))


@pytest.fixture(scope="module")
def vf():
    return pytest.importorskip("verifiers.v1", reason="needs the extra verifiers")


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama()


@pytest.fixture
def make_inner(model, tokenizer):
    def make(turns, **settings):
        generation = {"max_new_tokens": 40, "logits_processor": [Script(tokenizer, turns)]}
        return TextEnvironment(model, tokenizer, generation_kwargs=generation, **settings)

    return make


def play(environment, rows):
    sampler = environment.inner.sampler
    return run_sync(play_episodes(environment, rows, sampler, range(7, 7 + len(rows))))


@pytest.fixture(scope="module")
def words(vf):
    """Turn words round: a question and its answer, no tools."""

    class Data(vf.TaskData):
        answer: str

    class Task(vf.Task[Data]):
        @vf.reward(weight=2.0)
        async def exact(self, trace):
            return float(trace.last_reply == self.data.answer)

        @vf.reward(weight=0.5)
        async def graded(self, task, trace):
            return {"length": min(len(trace.last_reply) / len(task.answer), 1.0), "turns": 1.0}

        @vf.metric
        async def tokens(self, trace):
            return float(trace.num_output_tokens)

    class Words(vf.Taskset[Task, vf.TasksetConfig]):
        def load(self):
            for word in ("abc", "de"):
                yield Task(Data(prompt=word, system_prompt="turn round", answer=word[::-1]), self.config.task)

    return Words(vf.TasksetConfig(id="words"))


def test_a_question_and_its_answer(words, make_inner, tokenizer):
    turns = {"turn round\n\nabc": ["cba[eos]"], "turn round\n\nde": ["d[eos]"]}
    environment = VerifiersEnvironment(words, make_inner(turns))
    rows = environment.rows()
    assert rows == [{"task": 0, "prompt": "abc"}, {"task": 1, "prompt": "de"}]
    right, wrong = play(environment, rows)
    assert (right.prompt, right.completion) == ("turn round\n\nabc", "cba")
    assert right.token_ids[-4:] == tokenizer.encode("cba[eos]")
    assert right.stop is StopReason.END_OF_SEQUENCE
    assert right.task == rows[0]
    assert right.rewards == [
        NamedReward("exact", 1.0, 2.0),
        NamedReward("length", 1.0, 0.5),
        NamedReward("turns", 1.0, 0.5),
        NamedReward("tokens", 4.0, 0.0),
    ]
    assert [(r.name, r.value) for r in wrong.rewards][:2] == [("exact", 0.0), ("length", 0.5)]
    assert wrong.reward == 0.75


def test_the_pages_snippet(words, make_inner):
    page = (Path(__file__).parents[3] / "docs/adapters.md").read_text("utf-8")
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Verifiers" in code]
    turns = {"turn round\n\nabc": ["cba[eos]"], "turn round\n\nde": ["d[eos]"]}
    names = {"taskset": words, "inner": make_inner(turns)}
    exec(snippet, names)
    assert [history.episode.reward for history in names["histories"]] == [3.0, 0.75]


def test_conversations(words, make_llama):
    tokenizer = family_tokenizer("qwen2.5")
    model = make_llama(
        vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=None, max_position_embeddings=512
    )
    script = ChatScript(tokenizer, {"abc": ["cba<|im_end|>"]}, ("<|im_start|>assistant\n",))
    generation = {"max_new_tokens": 20, "logits_processor": [script]}
    inner = ChatEnvironment(model, tokenizer, generation_kwargs=generation)
    [episode] = play(VerifiersEnvironment(words, inner), [{"task": 0}])
    assert "system\nturn round<|im_end|>" in episode.prompt
    assert "user\nabc<|im_end|>" in episode.prompt
    assert episode.reward == 3.0


def test_rows_that_are_no_tasks(words, make_inner):
    environment = VerifiersEnvironment(words, make_inner({}), limit=1)
    assert len(environment.tasks) == 1
    for row in ({"prompt": "abc"}, {"task": 1}, {"task": "0"}):
        with pytest.raises(DataError, match="expected the number of one of the 1 tasks: play rows"):
            play(environment, [row])


@pytest.fixture(scope="module")
def counting(vf):
    """Count to a goal with a tool server that has a state."""

    class Total(vf.State):
        total: int = 0

    class Data(vf.TaskData):
        goal: int

    class Counter(vf.Toolset[vf.ToolsetConfig, Total]):
        TOOL_PREFIX = "c"

        async def setup_task(self, task):
            self.goal = task.goal

        @vf.tool
        def add(self, number: int) -> str:
            """Add a number."""
            self.state.total += number
            return f"{self.goal - self.state.total} to go"

        @vf.tool(name="look")
        async def look_at_it(self) -> int:
            """Look."""
            return self.state.total

    class Task(vf.Task[Data, Total]):
        @vf.reward
        async def reached(self, trace):
            return float(trace.state.total == self.data.goal)

        @vf.metric
        async def calls(self, trace):
            asked = [c.name for m in trace.assistant_messages for c in m.tool_calls or []]
            assert len(asked) == len(trace.tool_messages)
            return float(len(asked))

        @classmethod
        def toolsets(cls, config):
            return [Counter(vf.ToolsetConfig())]

    class Goals(vf.Taskset[Task, vf.TasksetConfig]):
        INFINITE = True

        def load(self):
            goal = 0
            while True:
                goal += 1
                yield Task(Data(prompt=f"count to {goal}", goal=goal), self.config.task)

    return Goals(vf.TasksetConfig(id="goals"))


def test_tool_servers_are_the_episodes_own(counting, make_inner):
    add = "<request><c_add>{}<call>".format
    turns = {
        "count to 1": [add(1), "done[eos]"],
        "count to 2": [add(1), "<request><c_look><call>", add(1), "done[eos]"],
        "count to 3": [add(1), "<request><add>1<call>", "done[eos]"],
    }
    environment = VerifiersEnvironment(counting, make_inner(turns), limit=3)
    one, two, three = play(environment, environment.rows())
    assert [call.response for call in two.tool_calls] == ["1 to go", "1", "0 to go"]
    assert [call.error for call in three.tool_calls] == [None, "unknown_tool"]
    values = [{r.name: r.value for r in episode.rewards} for episode in (one, two, three)]
    assert values == [
        {"reached": 1.0, "calls": 1.0},
        {"reached": 1.0, "calls": 3.0},
        {"reached": 0.0, "calls": 2.0},
    ]
    with pytest.raises(EnvironmentSetupError, match="Goals never ends; pass limit="):
        VerifiersEnvironment(counting, make_inner(turns))


@pytest.fixture(scope="module")
def game(vf):
    """Guess a number: the environment's own run is the user."""

    class Data(vf.TaskData):
        secret: int

    class Task(vf.Task[Data]):
        @vf.reward
        async def brief(self, trace):
            assert [m.role for m in trace.messages][:2] == ["user", "assistant"]
            return 1.0 / trace.num_turns

    class Secrets(vf.Taskset[Task, vf.TasksetConfig]):
        def load(self):
            for secret in (3, 5, 7, 9):
                yield Task(Data(prompt="guess", secret=secret), self.config.task)

    class Config(vf.EnvConfig):
        player: vf.AgentConfig = vf.AgentConfig()

    class Game(vf.Env[Config]):
        async def setup(self, agents):
            agents.player.trainable = True

        async def run(self, task, agents):
            if task.data.secret == 9:
                raise OSError("the dice are gone")
            async with agents.player.interaction(task) as interaction:
                segment = await interaction.turn()
                while not segment.terminated and int(segment.last_reply) != task.data.secret:
                    assert interaction.trace.last_reply == segment.last_reply
                    segment = await interaction.turn("no")
            interaction.trace.record_reward("won", float(not segment.terminated), 3.0)

        async def finalize(self, task, episode):
            [trace] = episode.traces
            trace.record_metric("said", len(trace.messages))

    module = types.ModuleType("etude_test_game")
    module.Secrets, module.Game = Secrets, Game
    module.__all__ = ["Secrets", "Game"]
    module.__spec__ = importlib.machinery.ModuleSpec("etude_test_game", None)
    sys.modules["etude_test_game"] = module
    yield Game(Config(taskset=vf.TasksetConfig(id="etude_test_game")))
    del sys.modules["etude_test_game"]


def test_the_environments_own_run_is_the_user(game, make_inner):
    scripts = iter([["1[eos]", "3[eos]"], ["1[eos]", "2[eos]", "4[eos]"], ["7[eos]"]])
    rows = VerifiersEnvironment(game, make_inner({})).rows()[:3]
    won, lost, first = (
        play(VerifiersEnvironment(game, make_inner({"guess": next(scripts)}, max_turns=3)), [row])[0]
        for row in rows
    )
    assert won.text == "guess1no<response>3"
    assert won.stop is StopReason.END_OF_SEQUENCE
    assert {r.name: (r.value, r.weight) for r in won.rewards} == {
        "brief": (0.5, 1.0),
        "won": (1.0, 3.0),
        "said": (4.0, 0.0),
    }
    assert (lost.stop, lost.turns) == (StopReason.MAX_TURNS, 3)
    assert {r.name: r.value for r in lost.rewards} == {"brief": 1 / 3, "won": 0.0, "said": 6.0}
    assert {r.name: r.value for r in first.rewards} == {"brief": 1.0, "won": 1.0, "said": 2.0}


def test_what_does_not_fit_ends_the_exchange(game, make_inner):
    row = VerifiersEnvironment(game, make_inner({})).rows()[0]
    [cut] = play(VerifiersEnvironment(game, make_inner({"guess": ["1[eos]", "3[eos]"]}, max_length=9)), [row])
    assert (cut.stop, cut.text) == (StopReason.MAX_TOKENS, "guess1"), "the reply had no room"
    assert {r.name: r.value for r in cut.rewards} == {"brief": 1.0, "won": 0.0, "said": 2.0}


def test_what_does_not_fit_at_all_is_scored_as_it_stands(words, make_inner):
    environment = VerifiersEnvironment(words, make_inner({}, max_length=5))
    episode, _ = play(environment, environment.rows())
    assert (episode.stop, episode.turns) == (StopReason.MAX_TOKENS, 0)
    assert {r.name: r.value for r in episode.rewards} == {
        "exact": 0.0,
        "length": 0.0,
        "turns": 1.0,
        "tokens": 0.0,
    }


def test_what_their_code_breaks_is_data(game, make_inner):
    environment = VerifiersEnvironment(game, make_inner({"guess": ["3[eos]"]}))
    fine, lost = play(environment, [environment.rows()[i] for i in (0, 3)])
    assert fine.reward == 4.0
    assert lost.stop is StopReason.INFRASTRUCTURE
    assert lost.error == "Game raised OSError: the dice are gone"
    bad = VerifiersEnvironment(game, make_inner({"guess": ["x[eos]"]}))

    async def alone():
        return await bad.play(bad.rows()[0], bad.inner.sampler, seed=1)

    episode = run_sync(alone())
    assert episode.stop is StopReason.INFRASTRUCTURE
    assert "invalid literal for int()" in episode.error
    assert episode.completion == "x", "what was played is kept"


def make_taskset(vf, **methods):
    task = types.new_class("Odd", (vf.Task[vf.TaskData],), exec_body=lambda body: body.update(methods))

    class Odds(vf.Taskset):
        def load(self):
            yield task(vf.TaskData(prompt="go"))

    return Odds(vf.TasksetConfig(id="odds"))


def test_code_that_needs_a_runtime_runs_where_it_is_told(vf, make_inner):
    async def setup(self, trace, runtime):
        await runtime.write("note", b"hello")

    async def found(self, trace, runtime):
        result = await runtime.run(["cat", "note"], {})
        return float(result.stdout == "hello")

    taskset = make_taskset(vf, setup=setup, found=vf.reward(found))
    inner = make_inner({"go": ["so[eos]"]})
    with pytest.raises(EnvironmentSetupError, match=r"Odd\.found needs a runtime"):
        play(VerifiersEnvironment(taskset, inner), [{"task": 0}])
    [episode] = play(VerifiersEnvironment(taskset, inner, runtime=vf.SubprocessConfig()), [{"task": 0}])
    assert episode.rewards == [NamedReward("found", 1.0)]


def test_what_would_be_played_otherwise_than_meant_is_refused(vf, game, make_inner):
    inner = make_inner({"go": ["so[eos]"]})

    async def enough(self, trace: vf.Trace):
        return True

    with pytest.raises(EnvironmentSetupError, match=r"Odd\.enough stops or changes a run"):
        play(VerifiersEnvironment(make_taskset(vf, enough=vf.stop(enough)), inner), [{"task": 0}])
    with pytest.raises(EnvironmentSetupError, match="a Odd needs a container"):
        play(VerifiersEnvironment(make_taskset(vf, NEEDS_CONTAINER=True), inner), [{"task": 0}])
    with pytest.raises(EnvironmentSetupError, match="expected a Taskset or an Env"):
        VerifiersEnvironment(3, inner)

    class Two(type(game.config)):
        other: vf.AgentConfig = vf.AgentConfig()

    class Pair(vf.Env[Two]):
        async def run(self, task, agents): ...

    pair = Pair(Two(taskset=vf.TasksetConfig(id="etude_test_game")))
    with pytest.raises(EnvironmentSetupError, match="Pair has the agents player, other; only one can be"):
        VerifiersEnvironment(pair, inner)
