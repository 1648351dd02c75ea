"""Rows made of episodes: which are kept, what they hold, and that they can be learnt from."""

import pytest

from etude.data.formats import to_episode
from etude.data.selection import Selection, best_first
from etude.errors import ConfigError, DataError
from etude.types import Episode, NamedReward, Segment, StopReason


@pytest.fixture
def played(tokenizer):
    def make(answer, reward, *, tool=None, stop=StopReason.END_OF_SEQUENCE, brevity=0.0):
        said = tokenizer.encode(answer)
        segments = [Segment("prompt", "1+1", tokenizer.encode("1+1"))]
        if tool is not None:
            segments += [
                Segment("model", "<request>", tokenizer.encode("<request>"), policy_version=0),
                Segment("tool", tool, tokenizer.encode(tool)),
            ]
        end = [tokenizer.eos_token_id] if stop is StopReason.END_OF_SEQUENCE else []
        segments.append(Segment("model", answer, [*said, *end], policy_version=0))
        rewards = [NamedReward("exact", reward), NamedReward("brevity", brevity, weight=0.5)]
        return Episode({"prompt": "1+1"}, segments, rewards, stop)

    return make


def completions(rows):
    return [row["completion"] for row in rows]


def test_the_best_so_many_are_kept(played):
    group = [played("1", 0.0), played("2", 1.0), played("3", 0.5), played("2.0", 1.0)]
    assert [e.completion for e in best_first(group)] == ["2", "2.0", "3", "1"]

    def kept(**settings):
        return completions(Selection("prompt-completion", **settings).rows(7, group))

    assert kept() == ["2"]
    assert kept(keep=3) == ["2", "2.0", "3"]
    assert kept(keep=None) == ["2", "2.0", "3", "1"]
    assert kept(keep=None, min_reward=0.5) == ["2", "2.0", "3"]
    assert kept(min_reward=1.5) == []


def test_what_failed_on_our_side_is_never_kept(played):
    broken = played("2", 9.0, stop=StopReason.INFRASTRUCTURE)
    for format, least in (("segments", None), ("preference", None), ("unpaired-preference", 0.0)):
        assert Selection(format, min_reward=least).rows(0, [broken]) == []


def test_a_row_says_what_it_is(played):
    [row] = Selection("prompt-completion").rows(7, [played("2", 1.0, brevity=-1.0)])
    assert row == {
        "prompt": "1+1",
        "completion": "2",
        "task": 7,
        "reward": 0.5,
        "rewards": {"exact": 1.0, "brevity": -1.0},
        "stop": "end_of_sequence",
    }


def test_segments_are_learnt_as_they_were_sampled(played, tokenizer):
    episode = played("=2<submit>", 1.0, tool="2")
    [row] = Selection().rows(0, [episode])
    learnt = to_episode(row, tokenizer, append_eos=False)
    assert learnt.token_ids == episode.token_ids
    assert learnt.target == episode.sampled
    assert len(set(learnt.target)) == 2


def test_pairs_are_the_best_and_the_worst(played):
    group = [played("3", 0.5), played("2", 1.0, brevity=-1.0), played("1", -1.0)]
    [row] = Selection("preference").rows(3, group)
    assert row == {
        "prompt": "1+1",
        "chosen": "3",
        "rejected": "1",
        "margin": 1.5,
        "task": 3,
        "chosen_rewards": {"exact": 0.5, "brevity": 0.0},
        "rejected_rewards": {"exact": -1.0, "brevity": 0.0},
    }
    assert Selection("preference", min_margin=1.4).rows(3, group) == [row]
    assert Selection("preference", min_margin=1.5).rows(3, group) == []
    assert Selection("preference", min_reward=0.6).rows(3, group) == []


def test_equal_episodes_make_no_pair(played):
    assert Selection("preference").rows(0, [played("2", 1.0), played("3", 1.0)]) == []


def test_each_episode_is_rated(played):
    group = [played("1", 0.0), played("2", 1.0), played("3", 0.5)]
    rows = Selection("unpaired-preference", min_reward=0.5).rows(0, group)
    assert {row["completion"]: row["label"] for row in rows} == {"1": False, "2": True, "3": True}


@pytest.mark.parametrize("format", ["prompt-completion", "preference", "unpaired-preference"])
def test_plain_text_has_no_place_for_tools(played, format):
    group = [played("2", 1.0, tool="2"), played("1", 0.0)]
    with pytest.raises(DataError, match=r"text of its tool.*'1\+1'.*Use the format segments"):
        Selection(format, min_reward=0.0).rows(0, group)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "pairs"}, "format is 'pairs'; expected one of segments"),
        ({"keep": 0}, "keep is 0"),
        ({"format": "preference", "keep": 2}, "keep does nothing for preference"),
        ({"format": "unpaired-preference", "keep": 2, "min_reward": 0.0}, "keep does nothing for unpaired"),
        ({"format": "unpaired-preference"}, "set min_reward"),
        ({"format": "preference", "min_margin": -0.1}, "min_margin is -0.1"),
        ({"min_margin": 0.1}, "min_margin does nothing for segments"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        Selection(**settings)
