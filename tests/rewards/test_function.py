import asyncio
import functools
import math
import threading

import pytest
import torch

from etude.errors import ConfigError, RewardError
from etude.protocols import Reward
from etude.rewards.function import FunctionReward, SegmentReward, as_reward, reward
from etude.types import Episode, Segment, ToolCall


def played(prompt, *segments, **columns):
    """An episode from (source, text) pairs."""
    made = [Segment("prompt", prompt, [])] + [Segment(source, text, []) for source, text in segments]
    return Episode(task={"prompt": prompt, **columns}, segments=made)


EPISODES = [
    played(
        "1+1=", ("model", "<request>"), ("tool", "Result=3<submit>"), ("model", "Result=2<submit>"), answer=2
    ),
    played("2+2=", ("model", "Result=5<submit>"), answer=4, level="hard"),
    played("3+3=", ("model", "<request>"), ("tool", "Result=6<submit>")),
]


def score(reward, episodes=EPISODES):
    return asyncio.run(reward(episodes))


def recorder():
    """A reward with **kwargs, and the arguments that it got."""
    seen = {}

    def reward(**arguments):
        seen.update(arguments)
        return [0.0] * len(EPISODES)

    return reward, seen


def test_prompts_completions_and_columns():
    reward, seen = recorder()
    assert score(FunctionReward(reward)) == [0.0, 0.0, 0.0]
    assert seen == {
        "prompts": ["1+1=", "2+2=", "3+3="],
        "completions": ["<request>Result=2<submit>", "Result=5<submit>", "<request>"],  # no tool text
        "answer": [2, 4, None],
        "level": [None, "hard", None],
    }


def test_messages_come_as_messages():
    """As many as the model has turns; what tools and users say is not among them."""
    asked = [{"role": "user", "content": "1+1?"}]
    segments = [
        Segment("prompt", "<user>1+1?<model>", []),
        Segment("model", "<tool_call>", []),
        Segment("model", "1+1", [], policy_version=0),  # after what was forced
        Segment("tool", "2", []),
        Segment("model", "It is 2.", []),
    ]
    calls = [ToolCall("add", {"a": 1}, "2"), ToolCall(None, "?", "Unknown", "malformed")]
    episodes = [
        Episode(task={"prompt": asked}, segments=segments, tool_calls=calls),
        Episode(task={"messages": asked}, segments=segments[:1]),
        EPISODES[1],
    ]
    seen = {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * 3

    score(FunctionReward(reward), episodes)
    function = {"name": "add", "arguments": {"a": 1}}
    assert seen["prompts"] == [asked, asked, "2+2="]
    assert seen["completions"] == [
        [
            {
                "role": "assistant",
                "content": "<tool_call>1+1",
                "tool_calls": [{"type": "function", "function": function}],
            },
            {"role": "assistant", "content": "It is 2."},
        ],
        [],
        "Result=5<submit>",
    ]


def test_only_what_is_declared_is_passed():
    def exact(completions, answer, bonus=0.5):
        return [float(f"Result={a}<" in c) + bonus for c, a in zip(completions, answer, strict=True)]

    assert score(FunctionReward(exact)) == [1.5, 0.5, 0.5]


def test_episodes_on_request():
    assert score(FunctionReward(lambda episodes: [e.turns for e in episodes])) == [2.0, 1.0, 1.0]


def test_async_functions_and_objects():
    async def later(completions):
        await asyncio.sleep(0)
        return torch.tensor([1.0, 2.0, 3.0])

    class Length:
        async def __call__(self, prompts):
            return [len(prompt) for prompt in prompts]

    assert score(FunctionReward(later)) == [1.0, 2.0, 3.0]
    assert score(FunctionReward(Length())) == [4.0, 4.0, 4.0]
    assert score(FunctionReward(lambda completions: later(completions), "wrapped")) == [1.0, 2.0, 3.0]


def test_sync_functions_leave_the_loop_free():
    gate = threading.Event()

    def waits(completions):
        assert gate.wait(5)
        return [1.0] * len(completions)

    async def main():
        task = asyncio.create_task(FunctionReward(waits)(EPISODES))
        await asyncio.sleep(0.05)
        gate.set()
        return await task

    assert asyncio.run(main()) == [1.0, 1.0, 1.0]


def test_names_and_weight():
    def exact(completions): ...

    class Judge:
        def __call__(self, completions): ...

    assert FunctionReward(exact).name == "exact"
    assert FunctionReward(functools.partial(exact)).name == "exact"
    assert FunctionReward(Judge()).name == "Judge"
    assert FunctionReward(exact, name="other", weight=2).name == "other"
    assert FunctionReward(exact, weight=2).weight == 2.0
    assert isinstance(FunctionReward(exact), Reward)
    assert isinstance(SegmentReward(exact), Reward)


def test_a_parameter_that_nothing_fills():
    def exact(completions, answers):
        return [1.0] * len(completions)

    message = "reward function 'exact' needs 'answers', .* found 'answer', 'level', 'prompts', 'completions'"
    with pytest.raises(RewardError, match=message):
        score(FunctionReward(exact))


def test_parameters_that_cannot_be_passed_by_name():
    with pytest.raises(RewardError, match="takes 'completions' by position only"):
        FunctionReward(lambda completions, /: [])
    with pytest.raises(RewardError, match="can't be read"):
        FunctionReward(max)


def test_bad_scores_name_the_function_and_the_episode():
    def broken(completions):
        return [1.0, math.nan, 0.0]

    with pytest.raises(RewardError, match=r"reward 'broken' returned nan for episode 1, prompt '2\+2='"):
        score(FunctionReward(broken))


@pytest.mark.parametrize("exception", [KeyError("gold"), StopIteration()])
def test_an_exception_says_where_it_came_from(exception):
    def broken(completions):
        raise exception

    with pytest.raises((KeyError, RuntimeError)) as caught:
        score(FunctionReward(broken))
    assert caught.value.__notes__ == ["raised by reward function 'broken'"]
    assert exception in (caught.value, caught.value.__cause__)


def test_no_episodes_no_call():
    assert score(FunctionReward(lambda completions: 1 / 0), []) == []
    assert score(SegmentReward(lambda segments: 1 / 0), []) == []


def exact_match(responses, answers=None):
    return [torch.tensor(float(f"Result={a}<" in r)) for r, a in zip(responses, answers, strict=True)]


def test_segment_reward_takes_last_segments_and_columns():
    # The third episode ended on a tool's text, which would have been right.
    assert score(SegmentReward(exact_match, answers=[2, 4, 6])) == [1.0, 0.0, 0.0]


def test_segment_reward_finds_declared_columns_in_the_tasks():
    def reward(segments, answer, scale=1.0):
        return [scale if str(a) in s else 0.0 for s, a in zip(segments, answer, strict=True)]

    assert score(SegmentReward(reward, scale=3.0)) == [3.0, 0.0, 0.0]
    assert score(SegmentReward(reward, answer=[0, 5, 0])) == [0.0, 1.0, 0.0]  # given columns come first
    with pytest.raises(RewardError, match=r"'reward' needs 'answer', .* found none"):
        score(SegmentReward(reward), [played("no columns", ("model", "x"))])


def test_segment_reward_passes_everything_to_open_functions():
    def reward(segments, **columns):
        seen.update(columns)
        return [0.0] * len(segments)

    seen = {}
    assert score(SegmentReward(reward, 0.5, anything=[1, 2, 3])) == [0.0, 0.0, 0.0]
    assert seen == {"answer": [2, 4, None], "level": [None, "hard", None], "anything": [1, 2, 3]}


def test_segment_reward_refuses_columns_that_nobody_takes():
    with pytest.raises(RewardError, match="'exact_match' has no parameter for 'answer'; it takes 'answers'"):
        SegmentReward(exact_match, answer=[2, 4, 6])


def test_as_reward():
    reward = FunctionReward(exact_match)
    assert as_reward(reward) is reward
    assert as_reward(exact_match).name == "exact_match"


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (FunctionReward, r"is a class; expected an object of it, FunctionReward\(...\)"),
        ("exact", "reward is 'exact'; expected a function"),
        (torch.nn.Linear(2, 2), r"is a model, Linear; .* ClassifierReward\(model, tokenizer\)"),
    ],
)
def test_what_is_not_a_reward(obj, message):
    with pytest.raises(RewardError, match=message):
        as_reward(obj)


def two_turns():
    return Episode(
        task={"prompt": "1+1=", "turns": "a column"},
        segments=[
            Segment("prompt", "1+1=", [0, 1]),
            Segment("model", "<think>", [2]),
            Segment("model", "so<request>", [3, 4], policy_version=0),
            Segment("tool", "2", [5]),
            Segment("model", "=2", [6], policy_version=0),
        ],
    )


def test_turns_and_tokens_on_request():
    @reward(level="turn", weight=0.5)
    def lengths(turns, completions):
        seen.update(turns=turns, completions=completions)
        return [[len(text) for text in texts] for texts in turns]

    @reward(level="token", name="even")
    def parity(token_ids):
        return [[1 - token % 2 for token in tokens] for tokens in token_ids]

    seen = {}
    assert score(lengths, [two_turns()]) == [[18.0, 2.0]]
    assert seen == {"turns": [["<think>so<request>", "=2"]], "completions": ["<think>so<request>=2"]}
    assert score(parity, [two_turns()]) == [[0.0, 1.0, 1.0]]
    assert (lengths.name, lengths.weight, lengths.level) == ("lengths", 0.5, "turn")
    assert (parity.name, parity.weight, parity.level) == ("even", 1.0, "token")
    assert isinstance(lengths, FunctionReward)
    assert as_reward(lengths) is lengths
    assert lengths.function([["abc"]], [""]) == [[3]]


def test_an_episode_s_reward_sees_a_column_named_turns():
    assert score(FunctionReward(lambda turns: [len(turns[0])]), [two_turns()]) == [8.0]


def test_levels_that_do_not_exist():
    with pytest.raises(ConfigError, match="level of reward 'r' is 'step'; expected episode, turn or token"):
        FunctionReward(exact_match, "r", level="step")


def test_a_level_s_scores_are_checked():
    @reward(level="turn")
    def broken(completions):
        return [[1.0] for _ in completions]

    with pytest.raises(
        RewardError, match=r"'broken' returned 1 scores for the 2 turns of episode 0, prompt '1"
    ):
        score(broken, [two_turns()])


def test_columns_are_checked_before_anything_is_played():
    def exact(completions, answers, prompts, episodes=(), weight=1.0):
        return [0.0 for _ in completions]

    FunctionReward(exact).check_columns(["prompt", "answers"])
    with pytest.raises(RewardError, match=r"'exact' needs 'answers', which no column provides; found"):
        FunctionReward(exact).check_columns(["prompt", "answer"])
    FunctionReward(exact, columns={"answers": "answer"}).check_columns(["prompt", "answer"])
    FunctionReward(exact, columns={"answers": len}).check_columns(["prompt"])

    def within(completions, turns):
        return [[0.0] for _ in completions]

    FunctionReward(within, level="turn").check_columns([])
    with pytest.raises(RewardError, match="needs 'turns'"):
        FunctionReward(within).check_columns([])

    def last(segments, answers):
        return [0.0 for _ in segments]

    SegmentReward(last, answers=["4"]).check_columns(["prompt"])
    with pytest.raises(RewardError, match="'last' needs 'answers'"):
        SegmentReward(last).check_columns(["prompt"])


def test_a_reward_is_no_segment_reward():
    with pytest.raises(RewardError, match=r"reward_fn is the reward 'exact_match'; pass it among rewards=\["):
        SegmentReward(FunctionReward(exact_match))
