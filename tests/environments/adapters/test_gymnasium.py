"""Gymnasium's own toy texts and grids, played by a real model whose words are put in its mouth."""

import pytest
from scripts import Script

gymnasium = pytest.importorskip("gymnasium")

from etude.environments.adapters.gymnasium import GymnasiumEnvironment  # noqa: E402
from etude.environments.adapters.stepping import INVALID  # noqa: E402
from etude.environments.orchestrator import play_episodes  # noqa: E402
from etude.environments.text import TextEnvironment  # noqa: E402
from etude.errors import ConfigError, EnvironmentSetupError  # noqa: E402
from etude.protocols import Environment  # noqa: E402
from etude.runtime.loop import run_sync  # noqa: E402
from etude.types import NamedReward, StopReason  # noqa: E402

LAKE = {"actions": ["left", "down", "right", "up"], "is_slippery": False}


class Lines(Script):
    """A script for prompts of one length, whatever they say."""

    def __init__(self, tokenizer, length, turns):
        super().__init__(tokenizer, {"": turns})
        self.length, self.said = length, self.turns[()]

    def __call__(self, input_ids, scores):
        self.turns = {tuple(input_ids[0, : self.length].tolist()): self.said}
        return super().__call__(input_ids, scores)


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama()


@pytest.fixture
def make_inner(model, tokenizer):
    def make(turns, length=None, **settings):
        script = Script(tokenizer, turns) if length is None else Lines(tokenizer, length, turns)
        generation = {"max_new_tokens": 12, "logits_processor": [script], "stop_strings": "."}
        return TextEnvironment(
            model, tokenizer, **{"max_turns": 20, "generation_kwargs": generation, **settings}
        )

    return make


def play(environment, tasks):
    sampler = environment.inner.sampler
    return run_sync(play_episodes(environment, tasks, sampler, range(7, 7 + len(tasks))))


def moves(*words):
    return [f"{word}." for word in words]


def lake(inner, **settings):
    environment = GymnasiumEnvironment("FrozenLake-v1", inner, **{**LAKE, **settings})
    environment.parse = lambda text: environment.actions[text.strip(" .")]
    return environment


def test_frozen_lake_to_its_end(make_inner, tokenizer):
    turns = {"at 0": moves("down", "down", "right", "down", "right", "right")}
    environment = lake(make_inner(turns))
    assert isinstance(environment, Environment)
    [episode] = play(environment, [{"prompt": "at "}])
    seen = ["4", "8", "9", "13", "14"]
    *words, last = turns["at 0"]
    answered = "".join(f"{word}{s}<response>" for word, s in zip(words, seen, strict=True))
    assert episode.text == f"at 0{answered}{last}"
    assert episode.token_ids == tokenizer.encode(episode.text)
    assert episode.sampled == [s.source == "model" for s in episode.segments for _ in s.token_ids]
    assert episode.stop is StopReason.DONE
    ends = [end - 1 for _, end, segment in episode.spans() if segment.source == "model"]
    values = [0.0] * 5 + [1.0]
    assert episode.rewards == [
        *(NamedReward("FrozenLake-v1", v, 1.0, at) for v, at in zip(values, ends, strict=True)),
        NamedReward(INVALID, 0.0, 0.0),
    ]


def test_holes_and_limits_end_it(make_inner):
    [hole] = play(lake(make_inner({"0": moves("down", "right")})), [{}])
    assert (hole.stop, hole.reward, hole.turns) == (StopReason.DONE, 0.0, 2)
    back_and_forth = moves("down", "up", "down", "up")
    [cut] = play(lake(make_inner({"0": back_and_forth}), max_episode_steps=3), [{}])
    assert (cut.stop, cut.turns) == (StopReason.MAX_TURNS, 3), "their limit on steps is one on turns"
    [ours] = play(lake(make_inner({"0": back_and_forth}, max_turns=2)), [{}])
    assert (ours.stop, ours.turns) == (StopReason.MAX_TURNS, 2)
    assert len(ours.rewards) == 3, "two steps and the count"


def test_the_last_turn_that_the_limit_allows_is_an_action(make_inner):
    path = moves("down", "down", "right", "down", "right", "right")
    [episode] = play(lake(make_inner({"0": path}, max_turns=6)), [{}])
    assert (episode.stop, episode.reward) == (StopReason.DONE, 1.0)
    [episode] = play(lake(make_inner({"0": path}, max_turns=5)), [{}])
    assert (episode.stop, episode.reward) == (StopReason.MAX_TURNS, 0.0)


def test_what_is_no_action_is_said_and_not_stepped(make_inner):
    inner = make_inner({"0": ["jump[eos]", "9[eos]", "1[eos]", "2[eos]"]}, max_turns=4)
    environment = GymnasiumEnvironment("FrozenLake-v1", inner, is_slippery=False, invalid_reward=-0.5)
    [episode] = play(environment, [{}])
    wrong = "?{}? is no action? expected a number from 0 to 3"  # what this vocabulary can't spell is escaped
    assert episode.replies == [wrong.format("jump"), wrong.format(9), "4"]
    assert [r.value for r in episode.rewards] == [-0.5, -0.5, 0.0, 0.0, 2.0]
    assert episode.reward == -1.0, "the count weighs nothing"
    assert episode.stop is StopReason.DONE, "right of 4 is a hole"


def test_seeds_are_the_episodes_own_or_the_tasks(make_inner):
    class Die(gymnasium.Env):
        action_space = gymnasium.spaces.Text(8)
        observation_space = gymnasium.spaces.Text(8)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.options = options
            return f"{self.np_random.integers(10**6):06}", {}

        def step(self, action):
            return f"said {action}", 2.5, False, action == "b", {}

    said = []

    def die():
        said.append(Die())
        return said[-1]

    environment = GymnasiumEnvironment(die, make_inner(["a[eos]", " b[eos]"], 6), weight=2.0)
    first, second, third, fourth = play(environment, [{"x": 1}, {"x": 1}, {"seed": 3}, {"seed": 3}])
    assert first.prompt != second.prompt
    assert third.prompt == fourth.prompt
    assert sorted(len(made.options) for made in said) == [1, 1, 1, 1]
    assert {"x": 1} in [made.options for made in said]
    again = play(environment, [{"x": 1}])[0]
    assert again.prompt == first.prompt
    assert first.text == f"{first.prompt}asaid a<response> b"
    assert first.stop is StopReason.MAX_TURNS
    assert first.reward == 10.0
    assert first.rewards[0].name == "die"


def test_observations_by_a_function_or_by_what_they_render(make_inner):
    def cards(observation):
        mine, dealers, ace = observation
        return f"{mine:02} {dealers:02} {'y' if ace else 'n'}"

    inner = make_inner(["hold[eos]"], 7)
    environment = GymnasiumEnvironment("Blackjack-v1", inner, actions={"hold": 0, "more": 1}, render=cards)
    [episode] = play(environment, [{"seed": 3}])
    assert len(episode.prompt.split()) == 3
    assert episode.stop is StopReason.DONE
    assert episode.reward in (-1.0, 0.0, 1.0)

    inner = make_inner(["1[eos]"], len("\n[S]FFF\nFHFH\nFFFH\nHFFG\n"), max_turns=1)
    environment = GymnasiumEnvironment("FrozenLake-v1", inner, render_mode="ansi")
    [episode] = play(environment, [{"seed": 1}])
    assert episode.prompt == "\n[S]FFF\nFHFH\nFFFH\nHFFG\n", "a colour says where one is; brackets do, too"


def test_a_world_that_breaks_is_data(make_inner):
    class Broken(gymnasium.Env):
        action_space = gymnasium.spaces.Discrete(2)
        render_mode = None
        closed = 0

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            if action == 1:
                raise OSError("no ice")
            return 0, 1.0, True, False, {}

        def close(self):
            Broken.closed += 1

    inner = make_inner({"a0": ["0[eos]"], "b0": ["1[eos]"]})
    fine, lost = play(GymnasiumEnvironment(Broken, inner), [{"prompt": "a"}, {"prompt": "b"}])
    assert (fine.stop, fine.reward) == (StopReason.DONE, 1.0)
    assert (lost.stop, lost.error) == (StopReason.INFRASTRUCTURE, "Broken: step raised OSError: no ice")
    assert Broken.closed == 2


def test_what_contradicts_itself_is_said_at_once(make_inner):
    inner = make_inner({})
    with pytest.raises(ConfigError, match="parse and actions both say what an action is"):
        GymnasiumEnvironment("FrozenLake-v1", inner, parse=int, actions=["a"])
    with pytest.raises(ConfigError, match="options are for an id"):
        GymnasiumEnvironment(dict, inner, is_slippery=False)
    with pytest.raises(ConfigError, match="timeout is 0; expected seconds > 0"):
        GymnasiumEnvironment("FrozenLake-v1", inner, timeout=0)
    with pytest.raises(ConfigError, match="max_instances is 0; expected at least 1"):
        GymnasiumEnvironment("FrozenLake-v1", inner, max_instances=0)
    with pytest.raises(EnvironmentSetupError, match="has a user= as well"):
        play(lake(make_inner({"0": moves("down")}, user=["a"])), [{}])


def test_without_gymnasium_the_extra_is_named(make_inner, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(EnvironmentSetupError, match=r"pip install 'etude\[gymnasium\]'"):
        GymnasiumEnvironment("FrozenLake-v1", make_inner({}))
