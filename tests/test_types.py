"""Episodes: masks, texts, what can't be built, and the way through JSON."""

import json

import pytest

from etude.types import (
    STOP_POLICIES,
    Episode,
    NamedReward,
    Preference,
    Rating,
    SamplingParams,
    Segment,
    StopReason,
    ToolCall,
)


def test_preferences_and_ratings_hold_episodes():
    pair = Preference(example(), Episode())
    assert (len(pair.chosen), pair.margin) == (10, None)
    assert Rating(example(), desirable=False).episode.turns == 2


def example() -> Episode:
    episode = Episode(task={"prompt": "What is 1+2?", "answer": 3}, seed=7)
    episode.append(Segment("prompt", "What is 1+2?", [1, 2, 3]))
    call = "<request><calc>1+2<call>"
    episode.append(Segment("model", call, [4, 5], logprobs=[-0.1, -0.2], policy_version=3))
    episode.append(Segment("tool", "Result=9<submit>", [6]))
    episode.append(Segment("model", "Result=3<submit>", [7, 8, 9], logprobs=[-1.0] * 3, policy_version=3))
    episode.append(Segment("environment", "", [0], target=True))
    episode.tool_calls.append(ToolCall("calc", "1+2", "Result=9<submit>", seconds=0.5))
    episode.rewards += [
        NamedReward("exact", 1.0),
        NamedReward("style", 0.5, weight=0.2),
        NamedReward("n/a", None),
    ]
    episode.stop = StopReason.SUBMITTED
    return episode


def test_masks_are_by_source_and_not_by_role():
    episode = example()
    assert episode.token_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert episode.sampled == [False] * 3 + [True] * 2 + [False] + [True] * 3 + [False]
    assert episode.target == [False] * 9 + [True]
    assert len(episode) == 10
    assert [(start, end) for start, end, _ in episode.spans()] == [(0, 3), (3, 5), (5, 6), (6, 9), (9, 10)]


def test_totals_are_sums_by_name():
    episode = example()
    episode.rewards += [NamedReward("style", -2.0, 0.2, position=4), NamedReward("n/a", None, position=7)]
    assert episode.reward_totals == {
        "exact": NamedReward("exact", 1.0),
        "style": NamedReward("style", -1.5, 0.2),
        "n/a": NamedReward("n/a", None),
    }
    assert episode.reward == pytest.approx(1.0 - 0.3)
    assert episode.rewards[1].value == 0.5, "totals are copies"


def test_replayed_model_tokens_are_not_sampled():
    assert not Segment("model", "a", [1]).sampled
    assert not Segment("model", "a", [1], logprobs=[-1.0]).sampled
    assert Segment("model", "a", [1], policy_version=0).sampled


def test_a_forced_beginning_and_what_was_sampled_after_it_are_one_turn():
    forced, sampled = Segment("model", "<think>", [1]), Segment("model", "so", [2, 3], policy_version=0)
    answer = Segment("tool", "4", [4])
    episode = Episode(
        segments=[Segment("prompt", "q", [0]), forced, sampled, answer, sampled, answer, forced]
    )
    assert episode.model_turns == [[forced, sampled], [sampled], [forced]]
    assert episode.turns == 3
    assert episode.sampled == [bool(flag) for flag in (0, 0, 1, 1, 0, 1, 1, 0, 0)]
    assert episode.last_model_text == "<think>"
    assert Episode(segments=episode.segments[:3]).last_model_text == "<think>so"
    assert Episode(segments=[sampled, sampled]).turns == 2


def test_tool_text_is_not_what_the_model_wrote():
    episode = example()
    assert "9" not in episode.completion
    assert episode.last_model_text == "Result=3<submit>"
    assert episode.prompt == "What is 1+2?"
    assert episode.turns == 2


def test_reward_is_the_weighted_sum_of_those_that_apply():
    assert example().reward == pytest.approx(1.0 + 0.2 * 0.5)


def test_through_json():
    episode = example()
    assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode
    episode.replies = ["more"]
    stored = episode.to_json()
    assert Episode.from_json(stored).replies == ["more"]
    del stored["replies"]
    assert Episode.from_json(stored).replies == [], "runs from before there were users"


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="2 tokens and 1 logprobs"):
        Segment("model", "a", [1, 2], logprobs=[0.0])
    with pytest.raises(ValueError, match="only 'model' segments are sampled"):
        Segment("tool", "a", [1], logprobs=[0.0])
    with pytest.raises(ValueError, match="policy version"):
        Segment("tool", "a", [1], policy_version=1)
    with pytest.raises(ValueError, match="expected one of prompt, model"):
        Segment("robot", "a", [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing can be appended"):
        example().append(Segment("tool", "a", [1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "0 is greedy"),
        ({"temperature": float("nan")}, "0 is greedy"),
        ({"top_p": 0.0}, "1 keeps all"),
        ({"top_k": -1}, "0 keeps all"),
    ],
)
def test_sampling_params_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_every_stop_reason_has_a_policy():
    assert set(STOP_POLICIES) == set(StopReason)
    bootstrapping = {reason for reason, policy in STOP_POLICIES.items() if policy.bootstrap}
    assert bootstrapping == {StopReason.WALL_CLOCK, StopReason.PREEMPTED}
    assert not STOP_POLICIES[StopReason.INFRASTRUCTURE].train
