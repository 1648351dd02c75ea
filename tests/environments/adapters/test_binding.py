"""Tools, users and endings of single episodes, in conversations under a real template and in texts."""

import json

import pytest
from scripts import ChatScript
from template_families import family_tokenizer

from etude.environments.adapters.binding import Binder
from etude.environments.adapters.duck import DuckEnvironment
from etude.environments.adapters.gymnasium import GymnasiumEnvironment
from etude.environments.chat import ChatEnvironment
from etude.environments.orchestrator import play_episodes
from etude.environments.text import TextEnvironment
from etude.errors import EnvironmentSetupError, TemplateError
from etude.runtime.loop import run_sync
from etude.tools.function import tools_by_name
from etude.types import NamedReward, StopReason

ASK = "<|im_start|>assistant\n"


class Counter:
    def reset(self, goal, **row):
        self.total, self.goal = 0, goal
        return f" to {goal}"

    def add(self, number: int) -> int:
        """Add a number.

        Args:
            number: what to add.
        """
        self.total += number
        return self.total

    def get_reward(self):
        return float(self.total == self.goal)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def model(make_llama):
    vocabulary = len(family_tokenizer("qwen2.5"))
    return make_llama(
        vocab_size=vocabulary, eos_token_id=None, pad_token_id=None, max_position_embeddings=1024
    )


@pytest.fixture
def make_chat(model):
    def make(turns, family="qwen2.5", **settings):
        tokenizer = family_tokenizer(family)
        generation = {"max_new_tokens": 60, "logits_processor": [ChatScript(tokenizer, turns, (ASK,))]}
        return ChatEnvironment(model, tokenizer, generation_kwargs=generation, **settings)

    return make


def play(environment, tasks):
    return run_sync(play_episodes(environment, tasks, environment.sampler, range(len(tasks))))


def test_a_template_shows_the_tools_of_an_episodes_object(make_chat):
    turns = {
        "to 3": [call("add", number=1) + call("add", number=2) + "<|im_end|>", "3<|im_end|>"],
        "to 5": ["5<|im_end|>"],
    }
    inner = make_chat(turns)
    environment = DuckEnvironment(Counter, inner)
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "count"}]
    tasks = [{"prompt": said, "goal": 3}, {"prompt": "count", "goal": 5}, {"prompt": said, "goal": 3}]
    won, lost, _ = play(environment, tasks)
    assert '"name": "add"' in won.prompt
    assert "Add a number." in won.prompt
    assert "count to 3<|im_end|>" in won.prompt
    assert [c.response for c in won.tool_calls] == ["1", "3"]
    assert won.rewards == [NamedReward("Counter", 1.0)]
    assert won.stop is lost.stop is StopReason.END_OF_SEQUENCE
    whole = inner.tokenizer.decode(won.token_ids)
    assert whole.endswith(f"<tool_response>\n3\n</tool_response><|im_end|>\n{ASK}3<|im_end|>")
    assert won.token_ids == inner.tokenizer.encode(whole, add_special_tokens=False)
    assert won.task == tasks[0]
    assert '"name": "add"' not in inner.prompt_text({"prompt": "count"}), "the inner environment has none"
    assert len(environment._binder._known) == 1, "a protocol is made once for all episodes"


def test_rewards_see_the_conversation_as_it_was_played(make_chat):
    seen = []

    def look(prompts, completions, environments):
        seen.append((prompts[0][-1]["content"], completions[0][-1]["content"], environments[0].total))
        return [0.0]

    inner = make_chat({"to 3": ["3<|im_end|>"]}, rewards=look)
    play(DuckEnvironment(Counter, inner), [{"prompt": [{"role": "user", "content": "count"}], "goal": 3}])
    assert seen == [("count to 3", "3", 0)]


def test_observations_are_users(make_chat):
    pytest.importorskip("gymnasium")
    turns = {"at 0": ["down<|im_end|>", "jump<|im_end|>", "right<|im_end|>"]}
    inner = make_chat(turns, max_turns=9)
    actions = ["left", "down", "right", "up"]
    environment = GymnasiumEnvironment("FrozenLake-v1", inner, actions=actions, is_slippery=False)
    [episode] = play(environment, [{"prompt": "at "}])
    assert episode.replies == ["4", "'jump' is no action; expected left, down, right, up"]
    whole = inner.tokenizer.decode(episode.token_ids)
    assert f"down<|im_end|>\n<|im_start|>user\n4<|im_end|>\n{ASK}jump" in whole
    assert episode.stop is StopReason.DONE


def test_what_a_template_cannot_show_is_said_before_anything_is_played(make_chat):
    tools = tools_by_name([Counter().add])
    binder = Binder(make_chat({}), "duck")
    bound = binder.bind(tools, None, lambda episode: False)
    assert list(bound.tools) == ["add"]
    assert bound.params.eos_token_ids == binder.inner.params.eos_token_ids
    assert binder.bind(tools, None, lambda episode: False).protocol is bound.protocol

    async def user(episode):
        return None

    assert binder.bind(tools, user, lambda episode: False).protocol is not bound.protocol
    silent = family_tokenizer("qwen2.5")
    template = silent.chat_template
    try:
        silent.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}a:"
        )
        with pytest.raises(TemplateError):
            Binder(ChatEnvironment(tokenizer=silent), "duck").bind(tools, None, lambda episode: False)
    finally:
        silent.chat_template = template


def test_both_endings_count(tokenizer):
    class Short(TextEnvironment):
        def is_done(self, episode):
            return episode == "inner"

    bound = Binder(Short(tokenizer=tokenizer), "duck").bind({}, None, lambda episode: episode == "own")
    assert [bound.is_done(who) for who in ("own", "inner", "nobody")] == [True, True, False]
    assert not Short(tokenizer=tokenizer).is_done("own")


def test_a_second_user_is_refused(tokenizer):
    async def user(episode):
        return None

    binder = Binder(TextEnvironment(tokenizer=tokenizer, user=["a"]), "duck")
    assert binder.bind({}, None, lambda episode: False).user is binder.inner.user
    with pytest.raises(EnvironmentSetupError, match="duck answers the model's turns"):
        binder.bind({}, user, lambda episode: False)
