"""Text environments, played by a real model whose words are put in its mouth by a logits processor."""

import asyncio
import time
from dataclasses import replace

import pytest
import torch

from etude.data.batch import Trajectory
from etude.environments.history import TextHistory
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError, EnvironmentSetupError, RewardError, SamplerError, ToolError
from etude.protocols import Environment
from etude.rewards.function import reward
from etude.rewards.tool_errors import ToolErrorPenalty
from etude.runtime.loop import run_sync
from etude.sampling.local import LocalSampler
from etude.types import Episode, NamedReward, StopReason


class Script:
    """Makes a model say what is written for the prompt it was given, turn by turn.

    A turn begins where the history's last token is the end of the prompt or of a tool's answer.
    """

    def __init__(self, tokenizer, turns):
        self.tokenizer = tokenizer
        self.turns = {prompt: [tokenizer.encode(turn) for turn in said] for prompt, said in turns.items()}

    def __call__(self, input_ids, scores):
        text = self.tokenizer.decode(input_ids[0])
        prompt = max((p for p in self.turns if text.startswith(p)), key=len)
        said, rest = self.turns[prompt], text[len(prompt) :]
        turn, written = rest.count("<response>"), rest.rsplit("<response>", 1)[-1]
        done = len(self.tokenizer.encode(written))
        forced = torch.full_like(scores, -torch.inf)
        forced[0, said[turn][done]] = 0.0
        return forced


def calc(query: str) -> str:
    """Evaluate.

    Args:
        query: such as "1+2".
    """
    left, right = query.split("+")
    return str(int(left) + int(right))


def exact(segments, answer):
    return [float(f"={a}<submit>" in segment) for segment, a in zip(segments, answer, strict=True)]


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama()


@pytest.fixture
def make_env(model, tokenizer):
    def make(turns, tools=(calc,), reward_fn=exact, cls=TextEnvironment, **settings):
        processor = Script(tokenizer, turns)
        settings.setdefault("max_turns", 4)
        generation = {"max_new_tokens": 40, "logits_processor": [processor]}
        generation |= settings.pop("generation", {})
        return cls(model, tokenizer, list(tools), reward_fn, generation_kwargs=generation, **settings)

    return make


CALL = "<request><calc>1+2<call>"


def play(env, *prompts, **columns):
    columns = columns or {"answer": [3] * len(prompts)}
    return run_sync(env.run_episodes(list(prompts), **columns))


def test_an_episode_to_the_token(make_env, tokenizer):
    env = make_env({"what is 1+2?": [CALL, "=3<submit>"], "say 3": ["=3<submit>"]})
    assert isinstance(env, Environment)
    with_tool, without = play(env, "what is 1+2?", "say 3")
    assert [s.source for s in with_tool.segments] == ["prompt", "model", "tool", "environment", "model"]
    assert with_tool.text == "what is 1+2?" + CALL + "3<response>" + "=3<submit>"
    assert with_tool.token_ids == tokenizer.encode(with_tool.text), (
        "single characters: there is one way to write it"
    )
    assert with_tool.sampled == [s.source == "model" for s in with_tool.segments for _ in s.token_ids]
    assert with_tool.stop is StopReason.SUBMITTED
    assert with_tool.rewards == [NamedReward("exact", 1.0)]
    [call] = with_tool.tool_calls
    assert (call.name, call.arguments, call.response, call.error, call.turn) == ("calc", "1+2", "3", None, 0)
    assert without.tool_calls == []
    assert without.segments[-1].policy_version == 0
    assert set(with_tool.timings) == {"sample", "tools", "total"}


def test_run_is_trl_s(make_env):
    env = make_env({"q: what is 1+2?": [CALL, "=3<submit>"], "q: say": ["=4<submit>"]}, prompt="q: ")
    queries, responses, masks, rewards, histories = env.run(["what is 1+2?", "say"], answer=[3, 3])
    assert [reward.item() for reward in rewards] == [1.0, 0.0]
    assert [len(r) for r in responses] == [len(m) for m in masks]
    history = histories[0]
    assert isinstance(history, TextHistory)
    assert history.completed
    assert not history.truncated
    assert history.text.startswith("q: what is 1+2?")
    assert torch.equal(torch.cat([queries[0], responses[0]]), history.tokens)
    assert history.last_text_segment == "=3<submit>"
    start, end = history.token_spans[2]
    assert history.token_masks[start:end].sum() == 0
    assert masks[0].sum() == len(masks[0]) - (end - start)


def boom(query: str) -> str:
    """Fail.

    Args:
        query: anything.
    """
    raise ValueError("no such luck")


def number(query: str) -> int:
    """Give a number.

    Args:
        query: anything.
    """
    return 42


def forever(query: str) -> str:
    """Sleep.

    Args:
        query: anything.
    """
    time.sleep(30)
    return ""


async def slowly(query: str) -> str:
    """Sleep, but politely.

    Args:
        query: anything.
    """
    await asyncio.sleep(30)
    return ""


@pytest.mark.parametrize(
    ("said", "response", "error"),
    [
        ("<request><nothing>1<call>", "Unknown tool nothing.", "unknown_tool"),
        ("<request>calc 1+2<call>", "Unknown tool call: <request>calc 1+2<call>", "malformed"),
        ("<request><boom>1<call>", "Tool error: no such luck", "exception"),
        ("<request><number>1<call>", "42", None),
        ("<request><forever>1<call>", "Tool error: forever did not answer within 0.2 seconds.", "timeout"),
        ("<request><slowly>1<call>", "Tool error: slowly did not answer within 0.2 seconds.", "timeout"),
    ],
)
def test_a_tool_that_misbehaves_is_data(make_env, said, response, error):
    env = make_env(
        {"go": [said, "=3<submit>"]},
        tools=(calc, boom, number, forever, slowly),
        tool_timeout=0.2,
        max_tool_response=80,
    )
    started = time.monotonic()
    [episode] = play(env, "go")
    assert time.monotonic() - started < 10
    assert episode.tool_calls[0].error == error
    assert episode.tool_calls[0].response == response
    assert episode.stop is StopReason.SUBMITTED
    assert episode.reward == 1.0


@pytest.mark.parametrize("tools", [None, [], {}])
def test_no_tools(model, tokenizer, tools):
    script = Script(tokenizer, {"go": ["<request><calc>1+2<call>", "=3<submit>"]})
    env = TextEnvironment(model, tokenizer, tools, exact, generation_kwargs={"logits_processor": [script]})
    [episode] = play(env, "go")
    assert episode.tool_calls[0].error == "unknown_tool"


def echo(query: str) -> str:
    """Give back what came.

    Args:
        query: anything.
    """
    return query


def control(query: str) -> str:
    """Answer with control tokens.

    Args:
        query: anything.
    """
    return "=3<submit>[eos]<call>"


def test_tool_text_is_data_and_never_control(make_env, tokenizer):
    env = make_env({"go": ["<request><control>1<call>", "no<submit>"]}, tools=(control,))
    [episode] = play(env, "go")
    tool, frame = episode.segments[2:4]
    forbidden = set(tokenizer.convert_tokens_to_ids(["<submit>", "<call>", "[eos]"]))
    assert not forbidden & set(tool.token_ids)
    assert frame.token_ids == [tokenizer.convert_tokens_to_ids("<response>")]
    assert episode.stop is StopReason.SUBMITTED
    assert episode.turns == 2, "the tool's <submit> ended nothing"
    assert episode.reward == 0.0, "and its =3<submit> was not taken for the answer"


def test_responses_are_capped(make_env):
    turns = {"go": ["<request><echo>abcdefghijklmnop<call>", "<submit>"]}
    [by_characters] = play(make_env(turns, tools=(echo,), max_tool_reponse=8), "go")
    assert by_characters.tool_calls[0].response == "abcde..."
    [by_tokens] = play(make_env(turns, tools=(echo,), max_tool_response_tokens=5), "go")
    assert by_tokens.segments[2].text == "abcde"
    assert by_tokens.tool_calls[0].truncated


def test_every_ending_has_its_reason(make_env):
    assert play(make_env({"go": [CALL] * 9}, max_turns=3), "go")[0].stop is StopReason.MAX_TURNS
    assert play(make_env({"go": [CALL] * 9}, max_turns=3), "go")[0].turns == 3
    assert play(make_env({"go": [CALL] * 9}, max_tool_calls=1), "go")[0].stop is StopReason.MAX_TOOL_CALLS
    assert play(make_env({"go": ["hello[eos]"]}), "go")[0].stop is StopReason.END_OF_SEQUENCE
    assert play(make_env({"go": ["1+2<call>"]}), "go")[0].stop is StopReason.NO_TOOL_CALL
    [cut] = play(make_env({"go": ["hello there"]}, generation={"max_new_tokens": 5}), "go")
    assert (cut.stop, cut.last_model_text) == (StopReason.TURN_TOKENS, "hello")


def test_an_empty_turn(make_env):
    [episode] = play(make_env({"go": ["[eos]"]}), "go")
    assert episode.stop is StopReason.END_OF_SEQUENCE
    assert episode.last_model_text == ""
    assert episode.sampled.count(True) == 1, "the end-of-sequence token was sampled"
    _, responses, masks, _, histories = make_env({"go": ["[eos]"]}).run(["go"], answer=[1])
    assert len(responses[0]) == len(masks[0]) == 1
    histories[0].show_text(show_legend=True)


@pytest.mark.parametrize("limit", [8, 12, 13, 14, 15, 16, 20])
def test_max_length_is_never_exceeded(make_env, limit):
    [episode] = play(make_env({"go": [CALL, CALL, CALL, CALL]}, max_length=limit), "go")
    assert len(episode) <= limit
    assert episode.stop is StopReason.MAX_TOKENS
    assert TextHistory.of(episode).truncated


def test_a_prompt_that_fills_the_episode(make_env):
    [episode] = play(make_env({"go": []}, max_length=2), "go")
    assert episode.stop is StopReason.MAX_TOKENS
    assert episode.turns == 0


def test_wall_clock(make_env):
    env = make_env({"go": ["<request><slowly>1<call>"]}, tools=(slowly,), max_seconds=0.3)
    [episode] = play(env, "go")
    assert episode.stop is StopReason.WALL_CLOCK


def test_a_prompt_that_the_model_cannot_hold(make_env):
    long = "go" * 200
    fine, too_long = play(make_env({"go": ["=3<submit>"], long: []}), "go", long)
    assert fine.reward == 1.0
    assert (too_long.stop, too_long.turns, too_long.reward) == (StopReason.MAX_TOKENS, 0, 0.0)


def test_what_our_side_breaks_is_kept_beside_what_succeeded(make_env, model, tokenizer):
    class Unreliable(LocalSampler):
        """Fails for the second session, as a server does that goes away."""

        opened = 0

        def session(self, *, seed, source_ids=()):
            self.opened += 1
            session = super().session(seed=seed, source_ids=source_ids)
            if self.opened == 2:
                session.close()
            return session

    env = make_env({"go": ["=3<submit>"]}, sampler=Unreliable(model, tokenizer))
    fine, failed, also_fine = play(env, "go", "go", "go")
    assert (fine.reward, also_fine.reward) == (1.0, 1.0)
    assert failed.stop is StopReason.INFRASTRUCTURE
    assert "closed" in failed.error
    assert failed.rewards == [], "what our side broke is not scored"


def test_when_everything_fails_the_failure_comes_out(model, tokenizer):
    def broken(ids, scores):
        raise ZeroDivisionError("in a processor")

    env = TextEnvironment(model, tokenizer, [calc], exact, generation_kwargs={"logits_processor": [broken]})
    with pytest.raises(SamplerError, match=r"all 2 episodes failed.*in a processor"):
        env.run(["go", "go"], answer=[1, 2])


def test_slow_tools_of_different_episodes_run_at_once(make_env):
    def nap(query: str) -> str:
        """Sleep a little.

        Args:
            query: anything.
        """
        time.sleep(0.4)
        return "ok"

    prompts = [f"go {i}" for i in range(8)]
    env = make_env({p: ["<request><nap>1<call>", "=3<submit>"] for p in prompts}, tools=(nap,))
    started = time.monotonic()
    episodes = play(env, *prompts)
    assert sum(e.tool_calls[0].seconds for e in episodes) > 3.0
    assert time.monotonic() - started < 2.5


def test_the_caller_s_things_are_left_alone(model, tokenizer):
    kwargs = {"max_new_tokens": 3, "top_k": 0.0, "pad_token_id": tokenizer.eos_token_id, "min_length": -1}
    before, side = dict(kwargs), tokenizer.padding_side
    env = TextEnvironment(model, tokenizer, [calc], exact, generation_kwargs=kwargs)
    env.run(["go"], answer=[1])
    assert kwargs == before
    assert tokenizer.padding_side == side
    assert not model.training
    model.train()
    env.run(["go"], answer=[1])
    assert model.training
    model.eval()


def test_seeds(model, tokenizer):
    def texts(seed):
        env = TextEnvironment(
            model, tokenizer, [calc], exact, generation_kwargs={"max_new_tokens": 12}, seed=seed, slots=2
        )
        first, second = (env.run(["go", "on", "up"], answer=[1, 2, 3])[4] for _ in range(2))
        return [h.text for h in first], [h.text for h in second]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert texts(1)[0] != texts(1)[1], "a second run draws anew"


def test_the_open_points(make_env):
    class Countdown(TextEnvironment):
        def build_prompt(self, task):
            return f"count {task['start']}"

        def is_done(self, episode):
            return len(episode.tool_calls) == 1

        async def score(self, episodes):
            for episode in episodes:
                episode.rewards.append(NamedReward("length", float(len(episode))))

    env = make_env({"count 3": [CALL, CALL]}, cls=Countdown, reward_fn=None)
    [episode] = run_sync(env.run_episodes([{"start": 3}]))
    assert episode.stop is StopReason.DONE
    assert episode.segments[-1].text == "<response>"
    assert episode.reward == len(episode)


def test_overriding_anything_else_names_the_replacement():
    with pytest.raises(EnvironmentSetupError, match=r"overrides TextEnvironment.compute_reward; use score"):

        class Old(TextEnvironment):
            def compute_reward(self, histories):
                return histories


def test_several_rewards(make_env):
    def brevity(completions):
        return [-float(len(c)) for c in completions]

    def never(completions):
        return [None for _ in completions]

    env = make_env({"go": ["=3<submit>"]}, rewards=[brevity, never])
    [episode] = play(env, "go")
    assert {r.name: r.value for r in episode.rewards} == {"brevity": -10.0, "never": None, "exact": 1.0}


def test_rewards_within_an_episode(make_env, tokenizer):
    @reward(level="token", weight=0.5)
    def threes(token_ids):
        return [[1.0 if token == tokenizer.vocab["3"] else None for token in tokens] for tokens in token_ids]

    env = make_env(
        {"go": ["<request><calc>1-2<call>", CALL, "=3<submit>"]}, rewards=[ToolErrorPenalty(0.1), threes]
    )
    [episode] = play(env, "go")
    ends = [end for _, end, segment in episode.spans() if segment.source == "model"]
    assert episode.rewards == [
        NamedReward("tool_errors", -1.0, 0.1, ends[0] - 1),
        NamedReward("tool_errors", 0.0, 0.1, ends[1] - 1),
        NamedReward("threes", 1.0, 0.5, len(episode) - 2),
        NamedReward("exact", 1.0),
    ]
    assert tokenizer.decode(episode.token_ids[ends[0] - 1]) == "<call>"
    assert tokenizer.decode(episode.token_ids[len(episode) - 2]) == "3"
    assert episode.reward == pytest.approx(-0.1 + 0.5 + 1)


def test_a_nan_reward_is_named(make_env):
    def broken(segments, answer):
        return [float("nan") for _ in segments]

    with pytest.raises(RewardError, match="broken"):
        play(make_env({"go": ["=3<submit>"]}, reward_fn=broken), "go")


def test_mistakes_in_setting_up(model, tokenizer, make_env):
    with pytest.raises(EnvironmentSetupError, match="tokenizer"):
        TextEnvironment(model)
    with pytest.raises(EnvironmentSetupError, match="at least 1"):
        TextEnvironment(model, tokenizer, max_turns=0)
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        TextEnvironment(model, tokenizer, generation_kwargs={"max_new_token": 3})
    with pytest.raises(ConfigError, match="num_beams=4"):
        TextEnvironment(model, tokenizer, generation_kwargs={"num_beams": 4})
    with pytest.raises(ToolError, match="class"):
        TextEnvironment(model, tokenizer, [Script])
    with pytest.raises(EnvironmentSetupError, match="no model and no sampler"):
        TextEnvironment(tokenizer=tokenizer).run(["go"])
    env = make_env({"go": ["=3<submit>"]})
    with pytest.raises(DataError, match="'answer' has 1 values for 2 tasks"):
        env.run(["go", "go"], answer=[3])
    with pytest.raises(DataError, match="no tasks"):
        env.run([])
    with pytest.raises(DataError, match=r"'prompt'.*question"):
        env.run([{"question": "go"}])


def test_lock_step_methods(make_env, tokenizer):
    """TRL's own loop, driven by hand."""
    env = make_env({"go": [CALL, "=3<submit>"], "on": ["<submit>"]})
    histories = [TextHistory(q, tokenizer(q, return_tensors="pt").input_ids[0]) for q in ("go", "on")]
    turns = 0
    while any(not history.completed for history in histories) and turns < env.max_turns:
        histories = env.generate(histories)
        histories = env.tasks_end_check(histories)
        histories = [env.step(history) for history in histories]
        histories = env.tasks_end_check(histories, model_turn=False)
        turns += 1
    env.compute_reward(histories, answer=[3, 3])
    assert [history.text for history in histories] == ["go" + CALL + "3<response>=3<submit>", "on<submit>"]
    assert [history.reward.item() for history in histories] == [1.0, 0.0]
    assert env.parse_tool_call(CALL) == ("calc", "1+2")
    assert env.parse_tool_call("nothing") == (None, None)


def test_a_forced_prefix_in_an_episode(make_llama, tokenizer):
    """Each turn begins with it; masks, texts, turns and log-probabilities are right to the token."""
    model = make_llama(dtype=torch.float64)
    prefix = "<request><calc>1"
    generation = {"max_new_tokens": 22, "forced_prefix": prefix}
    env = TextEnvironment(
        model,
        tokenizer,
        [calc],
        rewards=lambda prompts, completions, **_: [0.0],
        max_turns=3,
        generation_kwargs=generation,
        seed=1,
    )
    script = Script(tokenizer, {"go": [prefix + "+2<call>", prefix + "+3<call>", prefix + "<submit>"]})
    env.params = replace(env.params, processors=(script,))
    forced_ids = tokenizer.encode(prefix)
    *_, masks, _, [history] = env.run(["go"])
    episode = history.episode
    assert [s.source for s in episode.segments] == [
        "prompt",
        *["model", "model", "tool", "environment"] * 2,
        "model",
        "model",
    ]
    assert episode.turns == 3
    assert [call.response for call in episode.tool_calls] == ["3", "4"]
    assert [call.turn for call in episode.tool_calls] == [0, 1]
    assert episode.last_model_text == history.last_text_segment == prefix + "<submit>"
    assert episode.stop is StopReason.SUBMITTED
    said = [[0] * len(forced_ids) + [1] * n for n in (3, 3, 1)]
    answered = [0] * 2
    assert masks[0].tolist() == [*said[0], *answered, *said[1], *answered, *said[2]]
    assert [len(history.token_spans), len(history.text_spans)] == [6, 6], "TRL has one segment per turn"
    assert Episode.from_json(episode.to_json()).turns == 3

    trajectory = Trajectory.of_episode(episode)
    assert trajectory.sampled.tolist() == [i for i, sampled in enumerate(episode.sampled) if sampled]
    assert len(trajectory.sampler_logprobs) == 7

    logprobs = model(torch.tensor([episode.token_ids])).logits[0].log_softmax(-1)
    for start, end, segment in episode.spans():
        if segment.sampled:
            expected = logprobs[range(start - 1, end - 1), segment.token_ids]
            assert segment.logprobs == pytest.approx(expected.tolist())
        else:
            assert segment.logprobs is None


def test_an_episode_ends_where_a_forced_prefix_leaves_no_room(make_env):
    env = make_env({"go": ["ab<submit>"]}, generation={"forced_prefix": "ab"}, max_length=4)
    [episode] = play(env, "go")
    assert (episode.stop, episode.turns) == (StopReason.MAX_TOKENS, 0)
    env = make_env({"go": ["ab<submit>"]}, generation={"forced_prefix": "ab"}, max_length=5)
    [episode] = play(env, "go")
    assert (episode.stop, episode.completion) == (StopReason.SUBMITTED, "ab<submit>")


def test_lock_step_methods_know_a_forced_beginning(make_env):
    env = make_env({"go": ["<request><calc>1+2<call>"]}, generation={"forced_prefix": "<request><calc>"})
    [history] = env.generate([TextHistory("go", torch.tensor(env.tokenizer.encode("go")))])
    assert history.last_text_segment == "<request><calc>1+2<call>"
    assert env.task_end_check(history) == (False, False)
    assert env.step(history).episode.tool_calls[0].response == "3"
