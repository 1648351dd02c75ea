"""OpenEnv, for real: a server on the loopback, its own client, a model whose words are put in its mouth.

Needs the extra `openenv`; `make test-environments` runs it in a virtual environment of its own.
"""

import contextlib
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from scripts import Script

from etude.environments.adapters.openenv import OpenEnvEnvironment
from etude.environments.orchestrator import play_episodes
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, EnvironmentSetupError
from etude.runtime.loop import run_sync
from etude.types import NamedReward, StopReason


def test_without_openenv_the_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "openenv", None)
    with pytest.raises(EnvironmentSetupError, match=r"pip install 'etude\[openenv\]'"):
        OpenEnvEnvironment("http://localhost:1", TextEnvironment(tokenizer=tokenizer))


def test_settings_that_contradict_each_other(tokenizer):
    with pytest.raises(ConfigError, match="leave parse and invalid_reward out"):
        OpenEnvEnvironment(dict, TextEnvironment(tokenizer=tokenizer), tools=True, parse="a")


@contextlib.contextmanager
def served(app):
    """Serve on a free port of the loopback; its address."""
    import uvicorn

    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def core():
    return pytest.importorskip("openenv.core", reason="needs the extra openenv")


@pytest.fixture(scope="module")
def guessing(core):
    """Guess a number; the address of its server."""
    from openenv.core.env_server.types import Action, Observation, State

    class Guess(Action):
        number: int

    class Hint(Observation):
        message: str

    class Game(core.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, secret=3):
            self.secret, self.seed = secret, seed
            return Hint(message=f" of {secret}")

        def step(self, action, timeout_s=None):
            if action.number == 9:
                raise RuntimeError("out of order")
            right = action.number == self.secret
            return Hint(message="yes" if right else "no", done=right, reward=1.0 if right else -0.25)

        @property
        def state(self):
            return State()

    with served(core.create_fastapi_app(Game, Guess, Hint, max_concurrent_envs=2)) as address:
        yield address


@pytest.fixture(scope="module")
def counting(core):
    """Count to a goal with tools; the address of its server."""
    from fastmcp import FastMCP
    from openenv.core.env_server.mcp_types import CallToolAction
    from openenv.core.env_server.types import Action, Observation, State

    class Counter(core.MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self):
            tools = FastMCP("counter")

            @tools.tool
            def add(number: int) -> int:
                """Add a number."""
                self.total += number
                return self.total

            @tools.tool
            def look() -> dict:
                """Look."""
                return {"total": self.total}

            super().__init__(tools)

        def reset(self, seed=None, episode_id=None, goal=3):
            self.total, self.goal = 0, goal
            return Observation(metadata={"message": f" to {goal}"})

        async def step_async(self, action, timeout_s=None):
            observation = await super().step_async(action, timeout_s=timeout_s)
            if isinstance(action, CallToolAction):
                observation.done = self.total >= self.goal
                observation.reward = float(self.total == self.goal)
            return observation

        def _step_impl(self, action, timeout_s=None):
            return Observation()

        @property
        def state(self):
            return State()

    with served(core.create_fastapi_app(Counter, Action, Observation, max_concurrent_envs=4)) as address:
        yield address


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


def test_turns_are_actions_and_observations_answers(guessing, make_inner, tokenizer):
    turns = {"guess of 3": ["1[eos]", "3[eos]"], "guess of 5": ["x[eos]", "5[eos]"]}
    environment = OpenEnvEnvironment(
        guessing, make_inner(turns), parse="number", max_instances=2, name="game", weight=2.0
    )
    tasks = [{"prompt": "guess"}, {"prompt": "guess", "secret": 5, "unknown": "column"}] * 3
    right, refused, *more = play(environment, tasks)
    assert right.text == "guess of 31no<response>3"
    assert right.token_ids == tokenizer.encode("guess of 31[eos]no<response>3[eos]")
    assert right.stop is StopReason.DONE
    ends = [end - 1 for _, end, segment in right.spans() if segment.source == "model"]
    assert right.rewards == [
        NamedReward("game", -0.25, 2.0, ends[0]),
        NamedReward("game", 1.0, 2.0, ends[1]),
        NamedReward("invalid_actions", 0.0, 0.0),
    ]
    assert refused.replies == ["That is no action of this environment."]
    assert [reward.value for reward in refused.rewards] == [0.0, 1.0, 1.0]
    assert refused.stop is StopReason.DONE
    assert [episode.text for episode in more] == [right.text, refused.text] * 2, "two sessions at a time"


def test_actions_as_json_and_observations_by_a_function(guessing, make_inner):
    turns = {"go": ["3[eos]", "4[eos]"]}
    inner = make_inner(turns, max_turns=2)
    environment = OpenEnvEnvironment(
        guessing,
        inner,
        parse=lambda text: {"number": int(text)},
        render=lambda fields: "go" if "of" in fields["message"] else ". ".join(sorted(fields, reverse=True)),
    )
    [episode] = play(environment, [{"secret": 4}])
    assert episode.replies == ["metadata. message"]
    assert episode.reward == 0.75
    from etude.environments.adapters.openenv import _json

    assert _json('```json\n{"number": 3}\n```') == {"number": 3} == _json(' {"number": 3}')
    with pytest.raises(ValueError, match="'3' is no action; expected a JSON object"):
        _json("3")


def test_servers_that_fail_and_servers_that_are_not_there(guessing, make_inner):
    inner = make_inner({"guess of 3": ["9[eos]"], "guess of 5": ["5[eos]"]})
    environment = OpenEnvEnvironment(guessing, inner, parse="number")
    lost, fine = play(environment, [{"prompt": "guess"}, {"prompt": "guess", "secret": 5}])
    assert lost.stop is StopReason.INFRASTRUCTURE
    assert "out of order" in lost.error
    assert fine.reward == 1.0
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        nobody = OpenEnvEnvironment(f"http://127.0.0.1:{door.getsockname()[1]}", inner, parse="number")

    async def alone():
        return await nobody.play({"prompt": "guess"}, inner.sampler, seed=1)

    episode = run_sync(alone())
    assert episode.stop is StopReason.INFRASTRUCTURE
    assert episode.error.startswith("openenv: reset raised ConnectionError")


@pytest.mark.parametrize("client", ["GenericEnvClient", "MCPToolClient"])
def test_a_servers_tools_are_the_models(counting, core, make_inner, client):
    turns = {
        "count": [
            "<request><look><call>",
            "<request><nix>1<call>",
            "<request><add>x<call>",
            "<request><add>1<call>",
            "<request><add>2<call>",
        ]
    }
    environment = OpenEnvEnvironment(
        lambda: getattr(core, client)(base_url=counting), make_inner(turns, max_turns=9), tools=True
    )
    [episode] = play(environment, [{"prompt": "count"}])
    assert [(call.name, call.error) for call in episode.tool_calls] == [
        ("look", None),
        ("nix", "unknown_tool"),
        ("add", "invalid_arguments"),
        ("add", None),
        ("add", None),
    ]
    assert [call.response for call in episode.tool_calls if call.error is None] == ['{"total": 0}', "1", "3"]
    assert episode.stop is StopReason.DONE
    ends = [end - 1 for _, end, segment in episode.spans() if segment.source == "model"]
    assert episode.rewards == [
        NamedReward("openenv", value, 1.0, ends[turn]) for turn, value in ((0, 0.0), (3, 0.0), (4, 1.0))
    ]


def test_a_servers_tools_and_nobody_who_calls_them(counting, make_inner):
    render = dict.fromkeys(["render"], lambda fields: fields["metadata"]["message"])
    environment = OpenEnvEnvironment(counting, make_inner({"count to 4": ["<submit>"]}), tools=True, **render)
    [episode] = play(environment, [{"prompt": "count", "goal": 4}])
    assert episode.rewards == [NamedReward("openenv", None)]
    assert episode.stop is StopReason.SUBMITTED


def test_the_pages_snippet(guessing, model, tokenizer):
    page = (Path(__file__).parents[3] / "docs/adapters.md").read_text("utf-8")
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "OpenEnv" in code]
    names = {"address": guessing, "inner": TextEnvironment(model, tokenizer)}
    exec(snippet, names)
    [history] = names["histories"]
    assert history.text.startswith("guess of 3")


def test_a_server_without_tools_is_said(guessing, make_inner):
    with pytest.raises(EnvironmentSetupError, match="openenv has no tools; leave tools= out"):
        play(OpenEnvEnvironment(guessing, make_inner({}), tools=True), [{"prompt": "guess"}])
