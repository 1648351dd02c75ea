"""Numbers about a batch of episodes, worked by hand."""

from etude.environments.text import TextEnvironment
from etude.trainers.episode_metrics import environment_metrics, episode_metrics
from etude.types import Episode, NamedReward, StopReason


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
    metrics = episode_metrics(episodes, success_reward=1.0)
    assert metrics["rewards/exact"] == (1.0 + 0.0) / 2
    assert metrics["rewards/steps"] == (-0.75 + 2.0) / 2
    assert metrics["reward"] == ((1 - 0.375) + 1.0 + 0.0) / 3
    assert metrics["success"] == 1 / 3


def test_a_single_reward_is_not_repeated():
    metrics = episode_metrics([scored(NamedReward("steps", 1.0, position=1))], 1.0)
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
