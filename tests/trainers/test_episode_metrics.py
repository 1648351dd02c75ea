"""Numbers about a batch of episodes, worked by hand."""

import os
import subprocess
import sys

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


PROCESSES = """
import sys
from accelerate import Accelerator
from transformers import AutoTokenizer
from etude import Episode, StopReason, TextEnvironment
from etude.trainers.episode_metrics import environment_metrics
from etude.types import NamedReward

class Squares(TextEnvironment):
    def metrics(self, episodes):
        return {"squares": sum(each.reward for each in episodes) ** 2}

accelerator = Accelerator(cpu=True)
mine = [[1.0, 2.0], [4.0]][accelerator.process_index]
episodes = [Episode(rewards=[NamedReward("exact", value)], stop=StopReason.DONE) for value in mine]
environment = Squares(None, AutoTokenizer.from_pretrained(sys.argv[1]))
print("<", environment_metrics(environment, episodes), ">")
accelerator.end_training()
"""


def test_the_episodes_of_all_processes_are_one_corpus(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "squares.py").write_text(PROCESSES, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "squares.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("< {'squares': 49.0} >") == 2
