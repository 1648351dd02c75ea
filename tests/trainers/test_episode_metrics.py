"""Numbers about a batch of episodes, worked by hand."""

from etude.environments.text import TextEnvironment
from etude.trainers.episode_metrics import (
    Mean,
    environment_metrics,
    episode_metrics,
    measures_by_environment,
)
from etude.types import Episode, NamedReward, StopReason


def values(*arguments, **settings):
    return {name: mean.value for name, mean in episode_metrics(*arguments, **settings).items()}


def scored(*rewards, stop=StopReason.SUBMITTED):
    return Episode(rewards=list(rewards), stop=stop)


def test_a_reward_counts_with_its_sum_over_the_episodes_to_which_it_applies():
    episodes = [
        scored(
            NamedReward("exact", 1.0),
            NamedReward("steps", -1.0, 0.5, position=3),
            NamedReward("steps", 0.25, 0.5, position=8),
        ),
        scored(NamedReward("exact", 0.0), NamedReward("steps", 2.0, 0.5, position=5)),
        scored(NamedReward("exact", None), NamedReward("steps", None, 0.5)),
        scored(NamedReward("exact", 9.0), stop=StopReason.INFRASTRUCTURE),
    ]
    metrics = values(episodes, success_reward=1.0)
    assert metrics["rewards/exact"] == (1.0 + 0.0) / 2
    assert metrics["rewards/steps"] == (-0.75 + 2.0) / 2
    assert metrics["reward"] == ((1 - 0.375) + 1.0 + 0.0) / 3
    assert metrics["success"] == 1 / 3
    means = episode_metrics(episodes, success_reward=1.0)
    assert means["rewards/exact"] == Mean(0.5, 2), "it is of those to which it applies"
    assert means["stop/infrastructure"] == Mean(1 / 4, 4)
    assert means["tool_errors"] == Mean(0.0, 0)


def test_a_single_reward_is_not_repeated():
    metrics = values([scored(NamedReward("steps", 1.0, position=1))], 1.0)
    assert not [name for name in metrics if name.startswith("rewards/")]


class Squares(TextEnvironment):
    def metrics(self, episodes):
        return {"squares": sum(each.reward**2 for each in episodes)}


def test_what_an_environment_says_of_all_episodes(tokenizer):
    episodes = [scored(NamedReward("exact", value)) for value in (1.0, 3.0)]
    lost = scored(NamedReward("exact", 9.0), stop=StopReason.INFRASTRUCTURE)
    assert environment_metrics(Squares(None, tokenizer), [*episodes, lost]) == {"squares": 10}
    assert environment_metrics(Squares(None, tokenizer), [lost]) == {}
    assert environment_metrics(TextEnvironment(None, tokenizer), episodes) == {}


def test_by_environment_beside_the_overall_ones():
    def episode(environment, *rewards, stop=StopReason.SUBMITTED):
        return Episode(task={"environment": environment}, rewards=list(rewards), stop=stop)

    episodes = [
        episode("sums", NamedReward("exact", 1.0)),
        episode("words", NamedReward("chrf", 0.25)),
        episode("words", NamedReward("chrf", 0.75), NamedReward("short", 0.5, 0.5)),
        episode("words", stop=StopReason.INFRASTRUCTURE),
    ]
    metrics = values(episodes, {"sums": 1.0, "words": 0.5}, ["sums", "words", "other"])
    assert metrics["success"] == 2 / 3
    assert metrics["rewards/chrf"] == 0.5
    assert metrics["sums/rewards/exact"] == metrics["sums/reward"] == metrics["sums/success"] == 1.0
    assert metrics["words/reward"] == (0.25 + 1.0) / 2
    assert metrics["words/rewards/chrf"] == 0.5
    assert metrics["words/success"] == 0.5
    assert metrics["words/stop/infrastructure"] == 1 / 3
    assert not [name for name in metrics if name.startswith("other/")]
    assert measures_by_environment(metrics, ["sums", "words"]) == {
        "sums": {"reward": 1.0, "success": 1.0},
        "words": {"reward": 0.625, "success": 0.5, "rewards/chrf": 0.5, "rewards/short": 0.5},
    }
    alone = values(episodes, 0.5)
    assert alone == {name: metrics[name] for name in alone}


def test_replies_of_users():
    assert "user_replies" not in episode_metrics([scored()], 1.0)
    heard = [scored(), scored(), scored(stop=StopReason.INFRASTRUCTURE)]
    heard[0].replies = ["a", "b", "c"]
    heard[2].replies = ["lost"]
    assert values(heard, 1.0)["user_replies"] == 3 / 2
